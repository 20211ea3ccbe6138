"""sparsify_: swaps masked layers for block-sparse ones where that is measured to be faster."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._fake_checks import HALF_DTYPES
from ..batches import model_device
from ..granularity import Block, check_blocksize, is_scorable
from ..layers import check_model, has_forward_hooks, is_plain
from ..masks import piece_mask_of, remove_masks_
from ..timing import WORTHWHILE
from .base import BlockSparseLayer
from .block_sizes import block_sizes_for
from .choice import LayerChoice, layer_seconds
from .conv import BlockSparseConv2d, cuts_groups
from .examples import example_batches, record_inputs
from .fold import Folding, fold_batch_norms, identity_for
from .formats import Form, fastest_form, format_of, use_format_
from .linear import BlockSparseLinear, check_weight_dtype
from .own_forward import has_own_forward, only_pads
from .swapping import copy_of, swap_modules


@torch.inference_mode(False)
@torch.no_grad()
def sparsify_(
    model: nn.Module,
    *,
    example_inputs: Any,
    blocksize: tuple[int, int] | str = "auto",
    policy: str = "measured",
    fold_batch_norm: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Swap masked Linear and Conv2d layers for block-sparse ones in place, and return the model.

    With ``policy="measured"`` each layer is timed dense and sparse, interleaved, on the inputs it gets
    from ``example_inputs``, and the faster is kept; then the whole model is timed, and the conversion is
    taken back if it made the model slower. Convolutions, dense and sparse, are timed in both memory formats;
    where a layer gained, the model is left in the faster one, also where that is the dense model. Layers
    that stay dense lose their masks and keep plain zeros. :func:`explain` prints what was decided and why.

    Example:
        >>> fp.sparsify_(model, example_inputs=torch.randn(256, 64))
        >>> print(fp.explain(model))

    Args:
        model: a model with masks (see :func:`apply_masks_`).
        example_inputs: a tensor, a tuple (positional inputs), a dict (keyword inputs), or a list of these
            for several batch sizes; the choice is made for their total time.
        blocksize: ``(rows, cols)``; blocks of which a mask left nothing are skipped. "auto" for the size that
            suits each layer's mask: 16x16, 8x8, 8x1, 4x1 or, for single weights, 1x1, on CUDA 64x64, 32x32 or
            16x16; where two come close both are measured.
        policy: "measured", or "always" to convert every masked layer that can be.
        fold_batch_norm: for inference: batch norms that are alone behind a Linear or Conv2d, on the way that
            the first of ``example_inputs`` takes through the model, become a part of it, with the statistics
            of eval mode, and ``nn.Identity``; so do modules that compute ReLU, ReLU6, SiLU or GELU behind a
            layer that is swapped. The model must be one that torch.fx or torch.export can trace.
        weight_dtype: torch.bfloat16 or torch.float16: Linear layers of float32 that are swapped store their
            kept weights in it, and compute in float32 as before (see :meth:`BlockSparseLinear.from_dense`).
            Layers that stay dense keep their dtype.

    Raises:
        TypeError: ``model`` is no module or ``example_inputs`` of no known kind.
        ValueError: ``blocksize``, ``policy``, ``fold_batch_norm`` or ``weight_dtype`` is out of range. The
            model is left as it was.

    """
    check_model(model)
    if blocksize != "auto":
        check_blocksize(blocksize)  # type: ignore[arg-type]
    if policy not in ("measured", "always"):
        raise ValueError(f"`policy` must be 'measured' or 'always', got {policy!r}")
    if not isinstance(fold_batch_norm, bool):
        raise ValueError(f"`fold_batch_norm` must be True or False, got {fold_batch_norm!r}")
    check_weight_dtype(weight_dtype)
    device = model_device(model)
    batches = example_batches(example_inputs, device)
    masks = {
        name: mask
        for name, module in model.named_modules()
        if is_scorable(module) and (mask := piece_mask_of(module)) is not None
    }
    if not masks:
        converted = any(isinstance(module, BlockSparseLayer) for module in model.modules())
        hint = "the model is converted already" if converted else "call apply_masks_ first"
        warnings.warn(f"fastprune: sparsify_ found no masked layer; {hint}", stacklevel=3)

    originals = dict(model.named_modules())
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    folding = Folding({}, {}, lambda: None)
    # Nothing changes for good before all is measured: an input that the model refuses leaves it untouched.
    try:
        if fold_batch_norm:
            folding = fold_batch_norms(model, batches)
        layers = {name: model.get_submodule(name) for name in masks}
        inputs = record_inputs(model, layers, batches)
        choices: dict[str, LayerChoice] = {}
        replacements: dict[str, BlockSparseLayer] = {}
        for name in layers:
            sparse, choices[name] = _best(
                model, name, masks[name], blocksize, inputs[name], policy, device, weight_dtype
            )
            if sparse is not None:
                replacements[name] = sparse
        swapped = {**replacements, **_fuse(model, folding, replacements)}
        form = Form(bool(replacements), format_of(model))
        if replacements and policy == "measured":
            form = fastest_form(model, swapped, batches, device)
        swap_modules(model, swapped if form.sparse else {})
    except BaseException:
        folding.revert()
        raise
    finally:
        for flagged, training in flags:
            flagged.training = training

    if not form.sparse:
        for name in replacements:
            choices[name].choice = "dense"
            choices[name].reason = "the whole model is slower with sparse layers"
    for name, module in model.named_modules():
        if name in originals and module is not originals[name]:
            module.train(originals[name].training)
    for name, note in folding.notes.items():
        model.get_submodule(name)._fastprune_note = note  # type: ignore[assignment]
    remove_masks_(model)
    if form.memory_format != format_of(model):
        use_format_(model, form.memory_format)
    for name, choice in choices.items():
        model.get_submodule(name)._fastprune_choice = choice  # type: ignore[assignment]
    return model


def leave_dense_(model: nn.Module, reason: str) -> nn.Module:
    """Take all masks off in place and leave plain zeros, with the reason for :func:`explain`."""
    for module in model.modules():
        mask = piece_mask_of(module)
        if mask is not None and is_scorable(module):
            choice = LayerChoice(
                (mask.shape[0], mask[0].numel()), float(mask.float().mean()), "dense", reason
            )
            module._fastprune_choice = choice  # type: ignore[assignment]
    return remove_masks_(model)


def why_dense(
    model: nn.Module,
    name: str,
    module: nn.Module,
    inputs: list[Tensor],
    blocksize: tuple[int, int],
    policy: str,
) -> str | None:
    """Why a masked layer cannot be swapped at all, or None."""
    linear = isinstance(module, nn.Linear)
    if not name:
        return f"it is the model itself; use BlockSparse{'Linear' if linear else 'Conv2d'}.from_dense"
    reason = _why_linear_dense(model, name, module) if linear else _why_conv_dense(module, inputs, blocksize)
    if reason is not None:
        return reason
    weight = module.weight
    half = (linear or weight.is_cuda) and weight.dtype in HALF_DTYPES
    if weight.dtype not in (torch.float32, torch.float64) and not half:
        return f"no kernel for {weight.dtype}"
    if not inputs and policy == "measured":
        return "the example inputs never reach it"
    return None


def _why_linear_dense(model: nn.Module, name: str, module: nn.Module) -> str | None:
    if parametrize.type_before_parametrizations(module) is not nn.Linear:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "torch's attention never calls the layer; after fp.unpack_attention_ it is called"
        kind = parametrize.type_before_parametrizations(module).__name__
        return f"{kind} may have a forward of its own"
    return None if is_plain(module) else "it has hooks or a forward of its own"


def _why_conv_dense(module: nn.Module, inputs: list[Tensor], blocksize: tuple[int, int]) -> str | None:
    assert isinstance(module, nn.Conv2d)
    if has_forward_hooks(module) or "forward" in vars(module):
        return "it has hooks or a forward of its own"
    if 1 < module.groups == module.in_channels:
        return "depthwise convolutions have one input channel in a group, and nothing to skip in blocks"
    if cuts_groups(module.out_channels, module.groups, blocksize[0]):
        outputs = module.out_channels // module.groups
        return f"a block has {blocksize[0]} rows, which do not divide the {outputs} outputs of a group"
    if has_own_forward(module):
        kind = parametrize.type_before_parametrizations(module).__name__
        if not inputs:
            return f"{kind} has a forward of its own, which the example inputs never reach"
        if not only_pads(module, inputs):
            return f"{kind} has a forward of its own that does more than change the input"
    return None


def _best(
    model: nn.Module,
    name: str,
    mask: Tensor,
    blocksize: tuple[int, int] | str,
    inputs: list[Tensor],
    policy: str,
    device: torch.device,
    weight_dtype: torch.dtype | None,
) -> tuple[BlockSparseLayer | None, LayerChoice]:
    """The block-sparse module for one layer, in the blocks that suit it, or None, and the choice."""
    module = model.get_submodule(name)
    sizes = block_sizes_for(mask) if isinstance(blocksize, str) else [blocksize]
    best: tuple[BlockSparseLayer | None, LayerChoice] | None = None
    for size in sizes if policy == "measured" else sizes[:1]:
        reason = why_dense(model, name, module, inputs, size, policy)
        found = _convert(module, mask, size, reason, inputs, policy, device, weight_dtype)
        if best is None or _seconds(found[1]) < _seconds(best[1]):
            best = found
    assert best is not None
    return best


def _seconds(choice: LayerChoice) -> float:
    """Sparse seconds over dense ones, which were measured beside them; infinite where nothing was."""
    if choice.dense_seconds is None or choice.sparse_seconds is None:
        return float("inf")
    return choice.sparse_seconds / choice.dense_seconds


def _convert(
    module: nn.Module,
    mask: Tensor,
    blocksize: tuple[int, int],
    reason: str | None,
    inputs: list[Tensor],
    policy: str,
    device: torch.device,
    weight_dtype: torch.dtype | None,
) -> tuple[BlockSparseLayer | None, LayerChoice]:
    """The block-sparse module for one layer if it is to be swapped, and the choice.

    Args:
        module: the layer.
        mask: on its weight.
        blocksize: of the block-sparse module.
        reason: why the layer cannot be swapped, or None.
        inputs: of the layer.
        policy: of ``sparsify_``.
        device: of the model.
        weight_dtype: of ``sparsify_``.

    """
    # A kept block that happens to be zero stays trainable.
    keep = Block(*blocksize).sum_pieces(mask.long()) > 0
    density = float(keep.float().mean()) if keep.numel() else 1.0
    choice = LayerChoice((mask.shape[0], mask[0].numel()), density, "dense", "")
    if reason is not None:
        choice.reason = reason
        return None, choice
    sparse: BlockSparseLayer
    if isinstance(module, nn.Linear):
        own_dtype = weight_dtype if module.weight.dtype == torch.float32 else None
        sparse = BlockSparseLinear.from_dense(module, blocksize, keep, weight_dtype=own_dtype)
    else:
        sparse = BlockSparseConv2d.from_dense(module, blocksize, keep)  # type: ignore[arg-type]
    if policy == "measured":
        seconds = layer_seconds(copy_of(module), sparse, inputs, device)
        choice.dense_seconds, choice.sparse_seconds = seconds
        if choice.sparse_seconds > choice.dense_seconds * WORTHWHILE:
            faster = choice.sparse_seconds < choice.dense_seconds
            choice.reason = "sparse gains less than noise" if faster else "dense is faster"
            return None, choice
    choice.choice = "sparse"
    choice.reason = "measured faster" if policy == "measured" else "policy='always'"
    return sparse, choice


def _fuse(
    model: nn.Module, folding: Folding, replacements: dict[str, BlockSparseLayer]
) -> dict[str, nn.Module]:
    """Give layers that are swapped the activation behind them; return what goes into its place."""
    identities: dict[str, nn.Module] = {}
    for name, layer in replacements.items():
        if name in folding.activations:
            activation, layer.activation = folding.activations[name]
            identities[activation] = identity_for(model.get_submodule(activation), name)
    return identities
