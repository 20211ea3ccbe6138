"""Which blocks a mask is best cut into."""

from __future__ import annotations

import torch
from torch import Tensor

from ..granularity import Block

# The rate of a kernel at blocks of a size over the rate of large ones: with AVX2 and many samples
# (docs/kernels.md, "block_sparse_linear, CPU"; benchmarks/bench_block_sparse_linear.py).
_CPU_RATES = {(16, 16): 1.0, (8, 8): 0.95, (8, 1): 0.9, (4, 1): 0.7, (1, 1): 0.45}
# The same on an H200, in bfloat16, at 75 and 90 % (docs/gpu.md; benchmarks/gpu_benchmark.py).
_CUDA_RATES = {(64, 64): 1.0, (32, 32): 0.67, (16, 16): 0.41}

# Sizes that are expected to take no more than this of the best one's time are worth a measurement.
_CLOSE = 1.3
_MOST_MEASURED = 2


def block_sizes_for(mask: Tensor) -> list[tuple[int, int]]:
    """Return the block sizes that a mask may be fastest in, the most promising first.

    A block runs if a mask left anything of it: large blocks run at a higher rate, small ones skip more.

    Args:
        mask: bool, in the shape of a weight; True for weights that are kept.

    """
    rates = _CUDA_RATES if mask.is_cuda else _CPU_RATES
    expected = {size: _density(mask, size) / rate for size, rate in rates.items()}
    order = sorted(expected, key=expected.__getitem__)  # stable: of equal ones the larger
    return [size for size in order if expected[size] <= _CLOSE * expected[order[0]]][:_MOST_MEASURED]


def _density(mask: Tensor, size: tuple[int, int]) -> float:
    kept = Block(*size).sum_pieces(mask.to(torch.float32)) > 0
    return float(kept.float().mean()) if kept.numel() else 1.0
