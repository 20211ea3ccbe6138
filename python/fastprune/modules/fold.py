"""Folding batch norms into the layers in front of them, and finding activations that a layer can take over.

In eval mode a batch norm multiplies each channel and adds to it, which the layer's weight and bias can do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from ..batches import Batch
from ..granularity import is_scorable
from ..graph import TracedModel
from ..layers import has_forward_hooks, is_plain
from ..masks import piece_mask_of
from ..node_ops import computes_activation, fused_activation
from ..tracing import Traces
from .base import is_trainable
from .examples import record_inputs
from .own_forward import has_own_forward, only_pads
from .swapping import copy_of, swap_modules

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# A model with folded norms gives the same up to the rounding of its sums; this share of its largest output.
_TOLERANCE = 1e-4


@dataclasses.dataclass
class Folding:
    """What folding changed of a model, whose layers and norms it has replaced.

    Attributes:
        notes: why batch norms are still there, by name.
        activations: of layers, by name: the module of the activation that is their outputs' only user, and
            the name under which the kernels know it.
        revert: puts everything back.

    """

    notes: dict[str, str]
    activations: dict[str, tuple[str, str]]
    revert: Callable[[], None]


def fold_batch_norms(model: nn.Module, batches: list[Batch]) -> Folding:
    """Replace layers of a model by copies that do the work of the batch norm behind them, in eval mode.

    A batch norm is folded if it is the only consumer of a layer's output, on the way that the first of the
    batches takes through the model. The outputs for all batches are compared, and all is taken back if they
    differ.
    """
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    layers = {name: module for name, module in model.named_modules() if is_scorable(module)}
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    traces = Traces(model, layers.values())
    traced = traces.of(batches[0])
    if traced is None:
        notes = dict.fromkeys(norms, f"not folded: {traces.problem}")
        return Folding(notes, {}, lambda: None)
    notes = dict.fromkeys(norms, "not folded: no Linear or Conv2d alone is in front of it")
    pairs: dict[str, str] = {}
    for name, layer in layers.items():
        node = traced.single_call(layer)
        norm_node = None if node is None else traced.batch_norm_of(node)
        if norm_node is not None:
            pairs[name] = names[id(traced.module_of(norm_node))]
    reasons = _why_not(model, pairs, batches)
    notes.update({pairs[name]: f"not folded: {reason}" for name, reason in reasons.items()})
    pairs = {name: norm for name, norm in pairs.items() if name not in reasons}
    copies = {name: _folded(layers[name], model.get_submodule(norm)) for name, norm in pairs.items()}
    expected = [batch.fresh().call(model) for batch in batches]
    identities = {norm: identity_for(model.get_submodule(norm), name) for name, norm in pairs.items()}
    revert = swap_modules(model, {**copies, **identities})
    try:
        differs = not all(
            _agree(batch.fresh().call(model), y) for batch, y in zip(batches, expected, strict=True)
        )
    except BaseException:
        revert()
        raise
    if differs:
        revert()
        notes.update(dict.fromkeys(pairs.values(), "not folded: the model would give something else"))
        pairs, revert = {}, lambda: None
    for norm in pairs.values():
        del notes[norm]
    activations = _activations(traced, layers, pairs, names)
    return Folding(notes, activations, revert)


def _why_not(model: nn.Module, pairs: Mapping[str, str], batches: list[Batch]) -> dict[str, str]:
    """Why layers cannot take in their batch norm, by the layer's name."""
    layers = {name: model.get_submodule(name) for name in pairs}
    inputs = record_inputs(model, layers, batches[:1])
    reasons = {}
    for name, layer in layers.items():
        reason = _why_layer_cannot(layer, inputs[name]) or _why_norm_cannot(model.get_submodule(pairs[name]))
        if reason is not None:
            reasons[name] = reason
    return reasons


def _why_layer_cannot(layer: nn.Module, inputs: list[Tensor]) -> str | None:
    if isinstance(layer, nn.Conv2d):
        plain = not has_forward_hooks(layer) and (not has_own_forward(layer) or only_pads(layer, inputs))
    else:
        plain = is_plain(layer)
    if not plain:
        return "the layer in front of it has hooks or a forward of its own"
    for parameter in ("weight", "bias"):
        if parametrize.is_parametrized(layer, parameter) and piece_mask_of(layer, parameter) is None:
            return f"the {parameter} of the layer in front of it has a parametrization"
    dims = 2 if isinstance(layer, nn.Linear) else 4
    if any(input.dim() != dims for input in inputs):
        return "its channels are not the outputs of the layer in front of it"
    return None


def _why_norm_cannot(norm: nn.Module) -> str | None:
    if type(norm).forward is not nn.BatchNorm2d.forward or "forward" in vars(norm) or has_forward_hooks(norm):
        return "it has hooks or a forward of its own"
    if norm.running_mean is None:
        return "it has no running statistics"
    return None


def _folded(layer: Any, norm: Any) -> nn.Module:
    """Return a copy of a layer that does the work of the batch norm behind it too."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    before = -mean if layer.bias is None else layer.bias.double() - mean
    bias = before * scale if norm.bias is None else before * scale + norm.bias.double()
    weight = layer.weight
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    folded = copy_of(layer, weight=scaled.to(weight.dtype), bias=bias.to(weight.dtype))
    for name in ("weight", "bias"):
        part = "weight" if getattr(layer, name) is None else name
        getattr(folded, name).requires_grad_(is_trainable(layer, part))
    return folded


def identity_for(module: nn.Module, layer: str) -> nn.Identity:
    """Return what goes into the place of a module whose work a layer does, marked for explain and save."""
    identity = nn.Identity()
    kind = parametrize.type_before_parametrizations(module).__name__
    identity._fastprune_folded_into = layer  # type: ignore[assignment]
    identity._fastprune_note = f"{kind} folded into {layer}"  # type: ignore[assignment]
    identity._fastprune_inplace = getattr(module, "inplace", False)  # type: ignore[assignment]
    return identity


def _agree(output: Any, expected: Any) -> bool:
    """Whether two outputs of a model are the same but for rounding."""
    pairs = list(zip(tree_leaves(output), tree_leaves(expected), strict=True))
    return all(
        bool((x - y).abs().max() <= _TOLERANCE * y.abs().max())
        for x, y in pairs
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel()
    )


def _activations(
    traced: TracedModel, layers: Mapping[str, nn.Module], pairs: Mapping[str, str], names: Mapping[int, str]
) -> dict[str, tuple[str, str]]:
    """The activations that are modules of their own, used once and behind a layer or its folded norm."""
    found = {}
    for name, layer in layers.items():
        node: fx.Node | None = traced.single_call(layer)
        if node is not None and name in pairs:
            node = traced.batch_norm_of(node)
        node = None if node is None else traced.only_consumer(node)
        module = None if node is None else traced.sole_module(node)
        activation = None if node is None else fused_activation(traced, node)
        if module is None or activation in (None, "none"):
            continue
        if computes_activation(module, str(activation)):
            found[name] = (names[id(module)], str(activation))
    return found
