"""What sparsify_ measures and decides for each layer, and how explain prints it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._dispatch import runs_dense
from .._library import cpu_isa
from ..layers import check_model
from ..timing import interleaved_medians
from .base import BlockSparseLayer
from .conv import BlockSparseConv2d
from .formats import FORMATS, format_of, in_format
from .swapping import copy_of

# Layers that take milliseconds are measured less often than 15 times: a network has many of them.
_SECONDS = 0.5


@dataclasses.dataclass
class LayerChoice:
    """What `sparsify_` decided for one layer, and why; times are seconds for all example inputs."""

    shape: tuple[int, int]
    density: float
    choice: str
    reason: str
    dense_seconds: float | None = None
    sparse_seconds: float | None = None


_measured: dict[Hashable, tuple[float, float]] = {}


def clear_layer_seconds() -> None:
    """Forget all measured times, such as those of a moment when the machine was busy."""
    _measured.clear()


def _situation(sparse: BlockSparseLayer, inputs: Sequence[Tensor]) -> Hashable:
    """Everything that the times of a layer depend on."""
    pattern = hashlib.blake2b(digest_size=16)
    for indices in (sparse.crow_indices, sparse.col_indices):
        pattern.update(indices.cpu().numpy().tobytes())
    device = sparse.packed_values.device
    return (
        (repr(sparse), pattern.digest()),
        (sparse.packed_values.dtype, str(device)),
        tuple((tuple(x.shape), x.stride(), x.dtype) for x in inputs),
        (torch.get_num_threads(), cpu_isa()) if device.type == "cpu" else torch.cuda.get_device_name(device),
    )


def layer_seconds(
    dense: nn.Module, sparse: BlockSparseLayer, inputs: Sequence[Tensor], device: torch.device
) -> tuple[float, float]:
    """Return the seconds of a layer for all inputs, dense and sparse: interleaved medians of up to 15.

    Convolutions of images in batches are measured in both memory formats, in the same run, and each side
    counts with its better one. Layers of the same shape and pattern of blocks, on the same inputs, are
    measured once.
    """
    situation = _situation(sparse, inputs)
    if situation not in _measured:
        images = isinstance(sparse, BlockSparseConv2d) and all(x.dim() == 4 for x in inputs)
        functions = []
        for memory_format in FORMATS if images else (None,):
            functions += _calls(dense, sparse, inputs, memory_format)
        seconds = interleaved_medians(
            functions, repeats=15, device=device, minimum_seconds=1e-3, maximum_seconds=_SECONDS
        )
        _measured[situation] = (min(seconds[0::2]), min(seconds[1::2]))
    return _measured[situation]


def _calls(
    dense: nn.Module,
    sparse: BlockSparseLayer,
    inputs: Sequence[Tensor],
    memory_format: torch.memory_format | None,
) -> list[Callable[[], object]]:
    """Calls of a dense and a sparse layer, with inputs and weight in a memory format."""
    if memory_format is not None:
        dense = copy_of(dense, weight=in_format(dense.weight, memory_format))
        inputs = [in_format(x, memory_format) for x in inputs]
    return [lambda: [dense(x) for x in inputs], lambda: [sparse(x) for x in inputs]]


def layer_choices(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what :func:`sparsify_` decided for each pruned layer, as plain values; empty where nothing was.

    Example:
        >>> layer_choices(model)["encoder.0"]["choice"]
        'sparse'

    """
    choices = {name: getattr(module, "_fastprune_choice", None) for name, module in model.named_modules()}
    return {
        name: {**dataclasses.asdict(choice), "shape": list(choice.shape)}
        for name, choice in choices.items()
        if choice is not None
    }


def explain(model: nn.Module) -> str:
    """Return one line per pruned layer: shape, density, dense and sparse time, choice and why.

    Batch norms that :func:`sparsify_` was asked to fold, and activations that it fused, have a line too.

    Example:
        >>> print(fp.explain(model))

    """
    header = (
        f"{'layer':<32} {'shape':>14} {'density':>8} {'dense us':>10} {'sparse us':>10} {'gain':>7}  choice"
    )
    lines = [header]

    def microseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e6:.1f}"

    for name, module in check_model(model).named_modules():
        note = getattr(module, "_fastprune_note", None)
        if note is not None:
            lines.append(f"{name:<32} {'-':>14} {'-':>8} {'-':>10} {'-':>10} {'-':>7}  {note}")
        choice = getattr(module, "_fastprune_choice", None)
        if choice is None and isinstance(module, BlockSparseLayer):
            choice = LayerChoice(
                (module.weight_shape[0], module.weight_shape[1:].numel()),
                module.density,
                "sparse",
                "not measured here",
            )
        if choice is None:
            continue
        reason = choice.reason
        if isinstance(module, BlockSparseLayer):
            reason += ", blocks of {}x{}".format(*module.blocksize)
        if isinstance(module, BlockSparseLayer) and runs_dense(module.packed_values):
            reason += ", through its dense weight on CUDA"
        ratio = "-"
        if choice.dense_seconds and choice.sparse_seconds:
            ratio = f"{choice.dense_seconds / choice.sparse_seconds:.2f}x"
        shape = f"{choice.shape[0]}x{choice.shape[1]}"
        lines.append(
            f"{name:<32} {shape:>14} {choice.density:>8.3f} {microseconds(choice.dense_seconds):>10} "
            f"{microseconds(choice.sparse_seconds):>10} {ratio:>7}  {choice.choice}: {reason}"
        )
    if len(lines) == 1:
        return "no pruned layers"
    if format_of(model) == torch.channels_last:
        lines.append("convolutions run channels-last")
    return "\n".join(lines)
