"""What sparsify_ measures and decides for each layer, and how explain prints it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from .._library import cpu_isa
from ..layers import check_model
from ..timing import interleaved_medians
from .linear import BlockSparseLinear


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


def _situation(sparse: BlockSparseLinear, inputs: Sequence[Tensor]) -> Hashable:
    """Everything that the times of a layer depend on."""
    pattern = hashlib.blake2b(digest_size=16)
    for indices in (sparse.crow_indices, sparse.col_indices):
        pattern.update(indices.cpu().numpy().tobytes())
    device = sparse.packed_values.device
    return (
        (sparse.out_features, sparse.in_features, sparse.blocksize, pattern.digest()),
        (sparse.packed_values.dtype, sparse.bias is None, str(device)),
        tuple((tuple(x.shape), x.stride()) for x in inputs),
        (torch.get_num_threads(), cpu_isa()) if device.type == "cpu" else torch.cuda.get_device_name(device),
    )


def layer_seconds(
    dense: nn.Linear, sparse: BlockSparseLinear, inputs: Sequence[Tensor], device: torch.device
) -> tuple[float, float]:
    """Return the seconds of a layer for all inputs, dense and sparse: interleaved medians of 15.

    Layers of the same shape and pattern of blocks, on the same inputs, are measured once.
    """
    situation = _situation(sparse, inputs)
    if situation not in _measured:
        dense_seconds, sparse_seconds = interleaved_medians(
            [lambda: [dense(x) for x in inputs], lambda: [sparse(x) for x in inputs]],
            repeats=15,
            device=device,
            minimum_seconds=1e-3,
        )
        _measured[situation] = (dense_seconds, sparse_seconds)
    return _measured[situation]


def explain(model: nn.Module) -> str:
    """Return one line per pruned layer: shape, density, dense and sparse time, choice and why.

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
        choice = getattr(module, "_fastprune_choice", None)
        if choice is None and isinstance(module, BlockSparseLinear):
            choice = LayerChoice(
                (module.out_features, module.in_features), module.density, "sparse", "not measured here"
            )
        if choice is None:
            continue
        ratio = "-"
        if choice.dense_seconds and choice.sparse_seconds:
            ratio = f"{choice.dense_seconds / choice.sparse_seconds:.2f}x"
        shape = f"{choice.shape[0]}x{choice.shape[1]}"
        lines.append(
            f"{name:<32} {shape:>14} {choice.density:>8.3f} {microseconds(choice.dense_seconds):>10} "
            f"{microseconds(choice.sparse_seconds):>10} {ratio:>7}  {choice.choice}: {choice.reason}"
        )
    return "\n".join(lines) if len(lines) > 1 else "no pruned layers"
