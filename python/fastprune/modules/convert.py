"""sparsify_: swaps masked layers for block-sparse ones where that is measured to be faster."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batches import Batch, model_device
from ..granularity import check_blocksize, is_scorable
from ..layers import check_model, is_plain
from ..masks import piece_mask_of, remove_masks_
from ..timing import interleaved_medians
from .choice import LayerChoice, layer_seconds
from .linear import BlockSparseLinear

# A converted model may be this much slower before the conversion is taken back: the noise of an
# interleaved median of 15 on a shared machine.
TOLERATED_SLOWDOWN = 1.03
# A layer is converted where that takes less than this share of the dense time: the same noise again.
WORTHWHILE = 0.97


def _example_batches(example_inputs: Any, device: torch.device) -> list[Batch]:
    inputs = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    batches = []
    for entry in inputs:
        if isinstance(entry, Tensor):
            batch = Batch((entry,), {}, None, 0)
        elif isinstance(entry, tuple):
            batch = Batch(entry, {}, None, 0)
        elif isinstance(entry, dict):
            batch = Batch((), entry, None, 0)
        else:
            raise TypeError(
                "`example_inputs` must be a tensor, a tuple, a dict or a list of these, "
                f"got {type(entry).__name__}"
            )
        batches.append(batch.to(device).fresh())
    if not batches:
        raise ValueError("`example_inputs` must hold at least one input, got an empty list")
    return batches


def _record_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]
) -> dict[str, list[Tensor]]:
    """The inputs that each layer sees, by running the model."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: inputs[name].append((*args, *kwargs.values())[0].detach())

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True) for name, module in layers.items()
    ]
    try:
        for batch in batches:
            batch.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _why_dense(model: nn.Module, name: str, module: nn.Linear) -> str | None:
    """Why a masked Linear cannot be swapped at all, or None."""
    if not name:
        return "it is the model itself; use BlockSparseLinear.from_dense"
    if parametrize.type_before_parametrizations(module) is not nn.Linear:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "torch's attention reads the weight and never calls the layer"
        kind = parametrize.type_before_parametrizations(module).__name__
        return f"{kind} may have a forward of its own"
    if not is_plain(module):
        return "it has hooks or a forward of its own"
    half = module.weight.is_cuda and module.weight.dtype in (torch.float16, torch.bfloat16)
    if module.weight.dtype not in (torch.float32, torch.float64) and not half:
        return f"no kernel for {module.weight.dtype}"
    return None


def _plain_linear(module: nn.Linear) -> nn.Linear:
    """A Linear without parametrizations, as it would run if the layer stayed dense."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
    linear.bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear


@torch.inference_mode(False)
@torch.no_grad()
def sparsify_(
    model: nn.Module,
    *,
    example_inputs: Any,
    blocksize: tuple[int, int] = (16, 16),
    policy: str = "measured",
) -> nn.Module:
    """Swap masked Linear layers for :class:`BlockSparseLinear` in place, and return the model.

    With ``policy="measured"`` each layer is timed dense and sparse, interleaved, on the inputs it gets
    from ``example_inputs``, and the faster is kept; then the whole model is timed, and the conversion is
    taken back if it made the model slower. Layers that stay dense lose their masks and keep plain zeros.
    Masked convolutions stay dense for now. :func:`explain` prints what was decided and why.

    Example:
        >>> fp.sparsify_(model, example_inputs=torch.randn(256, 64))
        >>> print(fp.explain(model))

    Args:
        model: a model with masks (see :func:`apply_masks_`).
        example_inputs: a tensor, a tuple (positional inputs), a dict (keyword inputs), or a list of these
            for several batch sizes; the choice is made for their total time.
        blocksize: ``(rows, cols)``; blocks of which a mask left nothing are skipped.
        policy: "measured", or "always" to convert every masked Linear.

    Raises:
        TypeError: ``model`` is no module or ``example_inputs`` of no known kind.
        ValueError: ``blocksize`` or ``policy`` is out of range. The model is left as it was.

    """
    check_model(model)
    check_blocksize(blocksize)
    if policy not in ("measured", "always"):
        raise ValueError(f"`policy` must be 'measured' or 'always', got {policy!r}")
    device = model_device(model)
    batches = _example_batches(example_inputs, device)
    masked = {
        name: module
        for name, module in model.named_modules()
        if is_scorable(module) and piece_mask_of(module) is not None
    }
    linears = {name: module for name, module in masked.items() if isinstance(module, nn.Linear)}
    if not masked:
        converted = any(isinstance(module, BlockSparseLinear) for module in model.modules())
        hint = "the model is converted already" if converted else "call apply_masks_ first"
        warnings.warn(f"fastprune: sparsify_ found no masked layer; {hint}", stacklevel=3)

    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Nothing changes before all is measured: an input that the model refuses leaves it untouched.
        inputs = _record_inputs(model, linears, batches)
        replacements: dict[str, BlockSparseLinear] = {}
        choices = {
            name: LayerChoice(
                (module.weight.shape[0], module.weight[0].numel()),
                float(piece_mask_of(module).float().mean()),  # type: ignore[union-attr]
                "dense",
                "no block-sparse convolution yet",
            )
            for name, module in masked.items()
        }
        for name, module in linears.items():
            sparse, choices[name] = _convert(model, name, module, blocksize, policy, inputs[name], device)
            if sparse is not None:
                replacements[name] = sparse
        if replacements and policy == "measured" and _is_slower(model, replacements, batches, device):
            for name in replacements:
                choices[name].choice = "dense"
                choices[name].reason = "the whole model is slower with sparse layers"
            replacements = {}
    finally:
        for flagged, training in flags:
            flagged.training = training

    for name, replacement in replacements.items():
        replacement.train(linears[name].training)
    swap_modules(model, replacements)
    remove_masks_(model)
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


def _convert(
    model: nn.Module,
    name: str,
    module: nn.Linear,
    blocksize: tuple[int, int],
    policy: str,
    inputs: list[Tensor],
    device: torch.device,
) -> tuple[BlockSparseLinear | None, LayerChoice]:
    """The block-sparse module for one layer if it is to be swapped, and the choice."""
    mask = piece_mask_of(module)
    assert mask is not None
    kept = BlockSparseLinear.from_dense(
        module, blocksize, _blocks_with_any(mask, blocksize)
    )  # a kept block that happens to be zero stays trainable
    choice = LayerChoice((module.out_features, module.in_features), kept.density, "dense", "")
    reason = _why_dense(model, name, module)
    if reason is None and not inputs and policy == "measured":
        reason = "the example inputs never reach it"
    if reason is not None:
        choice.reason = reason
        return None, choice
    if policy == "measured":
        dense = _plain_linear(module)
        choice.dense_seconds, choice.sparse_seconds = layer_seconds(dense, kept, inputs, device)
        if choice.sparse_seconds > choice.dense_seconds * WORTHWHILE:
            faster = choice.sparse_seconds < choice.dense_seconds
            choice.reason = "sparse gains less than noise" if faster else "dense is faster"
            return None, choice
    choice.choice = "sparse"
    choice.reason = "measured faster" if policy == "measured" else "policy='always'"
    return kept, choice


def _blocks_with_any(mask: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Bool ``[block_rows, block_cols]``: where an elementwise mask keeps anything of a block."""
    rows, cols = blocksize
    padding = (0, -mask.shape[1] % cols, 0, -mask.shape[0] % rows)
    padded = torch.nn.functional.pad(mask, padding)
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols).any(3).any(1)


def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules at every place where the ones of these names are used; return the way back.

    torch's encoder is kept from its fast path where one of its Linears makes room for another module.
    """
    undo: list[Callable[[], None]] = []

    def assign(owner: nn.Module, attribute: str, value: object) -> None:
        undo.append(functools.partial(setattr, owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    new = {id(model.get_submodule(name)): module for name, module in replacements.items()}
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and id(child) in new:
                undo.append(functools.partial(parent._modules.__setitem__, child_name, child))
                parent._modules[child_name] = new[id(child)]
    sparse = {id(module) for module in replacements.values() if not isinstance(module, nn.Linear)}
    for parent in model.modules():
        if not sparse.isdisjoint(id(module) for module in parent.modules()):
            if isinstance(parent, nn.TransformerEncoderLayer):
                # torch's fast path reads linear1.weight and would never call the swapped module.
                assign(parent, "activation_relu_or_gelu", 0)
            elif isinstance(parent, nn.TransformerEncoder):
                # For that path the encoder packs padded inputs as nested tensors, which need it.
                assign(parent, "use_nested_tensor", False)

    def revert() -> None:
        for step in undo:
            step()

    return revert


def _is_slower(
    model: nn.Module,
    replacements: dict[str, BlockSparseLinear],
    batches: list[Batch],
    device: torch.device,
) -> bool:
    """Whether the whole model is slower with the replacements than with plain dense layers."""
    dense = {name: _plain_linear(model.get_submodule(name)) for name in replacements}  # type: ignore[arg-type]
    candidates: tuple[Mapping[str, nn.Module], ...] = (dense, replacements)
    times: list[list[float]] = [[], []]
    for _ in range(15):
        for index, modules in enumerate(candidates):
            revert = swap_modules(model, modules)
            try:
                times[index] += interleaved_medians(
                    [lambda: [batch.call(model) for batch in batches]], repeats=1, warmup=1, device=device
                )
            finally:
                revert()
    dense_seconds, sparse_seconds = (statistics.median(values) for values in times)
    return sparse_seconds > dense_seconds * TOLERATED_SLOWDOWN
