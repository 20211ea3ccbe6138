"""shrink: cuts what is masked whole out of a copy of a model, which then gives what the masked one gives."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batches import Batch, model_device
from ..granularity import Layer, ParameterTensor
from ..layers import check_model, has_forward_hooks
from ..masks import Masks, apply_masks_, piece_mask_of, remove_masks_, set_piece_mask
from ..modules import BlockSparseLayer, swap_modules
from ..modules.examples import example_batches
from .cutting import cut_
from .dependencies import ChannelGroup, channel_groups, import_torch_pruning, sides_of
from .heads import Attention, attentions, features_of
from .plan import MaskedLayers, Part, constant_tensors, joined, parts_of, why_kept
from .skipping import outermost, stand_ins
from .verification import Verification, calls_of


@torch.inference_mode(False)
def shrink(
    model: nn.Module,
    masks: Masks | Iterable[Masks] | None,
    example_inputs: Any,
) -> nn.Module:
    """Return a copy of a model without what masks take away: smaller dense layers, not zeros.

    Units go with their bias and batch norm and with what the layers behind them did with them, through sums,
    concatenations, flattening, depthwise and grouped convolutions; heads with their queries, keys and values;
    layers that are masked whole give their input, or zeros where the shapes differ. In eval mode the shrunk
    model gives what the masked one gives, up to rounding: a unit that only some of its layers mask, that a
    layer norm counts, or that leaves a constant which no bias can take over, stays, masked to zero, and a
    warning says why. The masks of what stays go along.

    Example:
        >>> scores = fp.score(model, loader, granularity=fp.Unit(coupled=True), exclude="head")
        >>> small = fp.shrink(model, scores.select(sparsity=0.5, round_to=8), x)

    Args:
        model: dense or masked; it is not changed.
        masks: of any granularity, or several of different layers; they go into the place of those that the
            model has. None for the latter alone.
        example_inputs: as for :func:`sparsify_`. The shrunk model is compared with the masked one on two
            samples of each, and on random values in their place, in float64.

    Raises:
        ImportError: Torch-Pruning is not installed; ``pip install 'fastprune[structured]'``.
        TypeError: an argument is of the wrong kind.
        ValueError: the masks are of another model, a layer that is masked whole cannot be replaced, or
            Torch-Pruning cannot trace the model.

    Source: what hangs together is found by the dependency graph of Fang et al. 2023, "DepGraph: Towards Any
    Structural Pruning".

    """
    import_torch_pruning()
    check_model(model)
    batches = example_batches(example_inputs, model_device(model))
    if any(isinstance(module, BlockSparseLayer) for module in model.modules()):
        raise ValueError("`model` has block-sparse layers: shrink first, then call sparsify_")
    masked = copy.deepcopy(model)
    skipped = _apply(masked, masks)
    carried = _take_masks_off(masked)
    carried = {key: mask for key, mask in carried.items() if not _lies_in(key[0], skipped)}
    shrunk = _without(masked, skipped, batches)
    heads = attentions(shrunk)
    groups = _touched_groups(shrunk, batches[0], heads, MaskedLayers.of(shrunk, carried))
    readers = dict.fromkeys(name for group in groups for name, _ in group.sides("in"))
    verification = Verification(masked, skipped, batches, readers)
    parts, reasons = _parts(shrunk, carried, groups, heads, verification.constants)
    chosen = _verified(shrunk, carried, parts, verification)
    for part in parts:
        if part not in chosen:
            reasons.update(dict.fromkeys(part.layers, "cutting it would change the outputs"))
    small, left = _cut(shrunk, carried, joined(chosen))
    _warn(small, left, reasons)
    for (name, parameter), mask in left.items():
        if not bool(mask.all()):
            set_piece_mask(small.get_submodule(name), parameter, mask)
    return small


def _apply(model: nn.Module, masks: Masks | Iterable[Masks] | None) -> list[str]:
    """Put masks on a model; return the names of the layers that are masked whole."""
    skipped: dict[str, bool] = {}
    given = [] if masks is None else [masks] if isinstance(masks, Masks) else list(masks)
    for each in given:
        if isinstance(each, Masks) and _is_of_layers(each):
            known = {name for name, _ in model.named_modules()}
            unknown = sorted(name for name in each if name not in known)
            if unknown:
                raise ValueError(f"`masks` are of another model: it has no layer '{unknown[0]}'")
            skipped.update({name: True for name, keep in each.items() if not bool(keep)})
        else:
            apply_masks_(model, each)
    return outermost(skipped)


def _is_of_layers(masks: Masks) -> bool:
    return isinstance(masks.granularity, Layer) and not isinstance(masks.granularity, ParameterTensor)


def _lies_in(name: str, owners: Iterable[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _take_masks_off(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Leave plain parameters with plain zeros, and return the masks by layer and parameter."""
    masks = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for parameter in module.parametrizations:
            mask = piece_mask_of(module, parameter)
            if mask is None or len(module.parametrizations[parameter]) != 1:
                raise ValueError(
                    f"layer '{name}' has a parametrization of '{parameter}' that is no fastprune mask; "
                    "remove it before shrinking"
                )
            masks[name, parameter] = mask.clone()
    remove_masks_(model)
    return masks


def _without(masked: nn.Module, skipped: list[str], batches: list[Batch]) -> nn.Module:
    """Return a copy of a model in which layers that are masked whole made room for what is left of them."""
    shrunk = copy.deepcopy(masked)
    if skipped:
        stands = stand_ins(copy.deepcopy(masked).eval(), skipped, batches)
        for name, module in stands.items():
            module.train(shrunk.get_submodule(name).training)
        swap_modules(shrunk, stands)
    return shrunk


def _touched_groups(
    model: nn.Module, batch: Batch, heads: list[Attention], masked: MaskedLayers
) -> list[ChannelGroup]:
    """Return the groups of channels of which something is masked."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    groups = channel_groups(twin, batch, kept_layers(twin, heads, batch))
    return [group for group in groups if _touches(group, masked)]


def _parts(
    model: nn.Module,
    masks: Mapping[tuple[str, str], Tensor],
    groups: list[ChannelGroup],
    heads: list[Attention],
    constants: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[list[Part], dict[str, str]]:
    """Return what can be cut, and for layers that keep masked units, why."""
    masked = MaskedLayers.of(model, masks)
    layers = {name: module for name, module in model.named_modules() if sides_of(module)}
    kept = [(group, why_kept(group, masked, constants, layers)) for group in groups]
    parts, staying = parts_of([group for group, reason in kept if reason is None], masked, constants, layers)
    kept += [
        (group, "one unit of a layer stays, and as many in each group of a convolution") for group in staying
    ]
    reasons: dict[str, str] = {}
    for group, reason in kept:
        for name, indices in group.sides("out") if reason is not None else ():
            if any(masked.row(name, index) for index in indices):
                reasons.setdefault(name, reason)  # type: ignore[arg-type]
    return [*parts, *(part for each in heads if (part := _head_part(model, each, masked)))], reasons


def _touches(group: ChannelGroup, masked: MaskedLayers) -> bool:
    return any(masked.row(name, index) for name, indices in group.sides("out") for index in indices) or any(
        masked.column(name, index) for name, indices in group.sides("in") for index in indices
    )


def kept_layers(model: nn.Module, heads: list[Attention], batch: Batch) -> dict[str, str]:
    """Layers whose channels stay, and why."""
    kept: dict[str, str] = {}
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    calls = calls_of(model, batch)
    for name, module in model.named_modules(remove_duplicate=False):
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            kept[name] = "its parameters are tied to those of another layer"
        elif has_forward_hooks(module):
            kept[name] = "it has forward hooks"
        elif calls.get(name, 1) != 1:
            kept[name] = f"it is called {calls[name]} times"
    for attention in heads:
        for name in attention.projections:
            kept[name] = "only whole heads of an attention can go"
    return kept


def _head_part(model: nn.Module, attention: Attention, masked: MaskedLayers) -> Part | None:
    """The heads of an attention that go: all but one at most."""
    output: Any = model.get_submodule(attention.output)
    values: Any = model.get_submodule(attention.projections[2])
    nothing = torch.zeros(output.in_features, dtype=torch.bool)
    silent = masked.rows.get(attention.projections[2], nothing)
    if values.bias is not None:
        silent = silent & (values.bias.detach().cpu() == 0)
    dead = attention.dead_heads(masked.columns.get(attention.output, nothing), silent)
    if bool(dead.all()):
        dead[0] = False
    if not bool(dead.any()):
        return None
    features = features_of(dead, output.in_features)
    part = Part(attributes={attention.owner: attention.without(int(dead.sum()))})
    for name in attention.projections:
        part.removed[name, "out"] = list(features)
    part.removed[attention.output, "in"] = list(features)
    return part


def _cut(
    model: nn.Module, masks: Mapping[tuple[str, str], Tensor], part: Part
) -> tuple[nn.Module, dict[tuple[str, str], Tensor]]:
    """Return a copy of a model, and of its masks, without a part."""
    small, left = copy.deepcopy(model), dict(masks)
    _cut_in_place(small, left, part)
    return small, left


def _cut_in_place(model: nn.Module, masks: dict[tuple[str, str], Tensor], part: Part) -> None:
    cut_(model, part.removed, masks, constant_tensors(part), part.attributes)


def _verified(
    model: nn.Module,
    masks: Mapping[tuple[str, str], Tensor],
    parts: list[Part],
    verification: Verification,
) -> list[Part]:
    """Return the parts that can be cut without a change of the outputs: all, or those that prove to be.

    Raises:
        ValueError: the model differs from the masked one although nothing is cut.

    """

    def problem(chosen: list[Part]) -> str | None:
        # Cut in float64 too: the rounding of a bias that takes over a constant would hide what is looked for.
        twin = verification.prepared(model)
        _cut_in_place(twin, dict(masks), joined(chosen))
        return verification.difference(twin)

    if problem(parts) is None:
        return parts
    nothing = problem([])
    if nothing is not None:
        raise ValueError(f"`model` cannot be shrunk: without a layer that is masked whole {nothing}")
    return _good(parts, [], problem)


def _good(parts: list[Part], chosen: list[Part], problem: Any) -> list[Part]:
    """Return ``chosen`` and those of the parts that can go as well, by halving."""
    if not parts:
        return chosen
    if problem([*chosen, *parts]) is None:
        return [*chosen, *parts]
    if len(parts) == 1:
        return chosen
    middle = len(parts) // 2
    return _good(parts[middle:], _good(parts[:middle], chosen, problem), problem)


def _warn(model: nn.Module, masks: Mapping[tuple[str, str], Tensor], reasons: Mapping[str, str]) -> None:
    """Say which layers keep masked units, and why."""
    notes = []
    for name, rows in MaskedLayers.of(model, masks).rows.items():
        if name in reasons and bool(rows.any()):
            notes.append(f"{int(rows.sum())} of '{name}' ({reasons[name]})")
    if notes:
        shown = "; ".join(notes[:8]) + (f"; and of {len(notes) - 8} more layers" if len(notes) > 8 else "")
        warnings.warn(f"fastprune: masked units stay: {shown}", stacklevel=4)
