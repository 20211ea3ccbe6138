"""block_sparse_linear against torch's dense Linear: `make bench`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastprune as fp
from fastprune import _library
from harness import THREADS, measure, threads

SHAPES = ((1024, 1024), (3072, 768), (768, 3072))
SAMPLES = (1, 64, 256, 2048)
BLOCKSIZES = ((8, 8), (16, 16), (32, 32))
SPARSITIES = (0.5, 0.75, 0.9)

cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or _library.cuda_kernels_unavailable_reason() is not None,
    reason="needs a GPU and the CUDA kernels",
)


def make_layer(
    out_features: int, in_features: int, blocksize: tuple[int, int], sparsity: float, device: str
) -> fp.BlockSparseLinear:
    torch.manual_seed(0)
    grid = (-(-out_features // blocksize[0]), -(-in_features // blocksize[1]))
    order = torch.rand(grid).flatten().argsort()
    mask = torch.ones(grid, dtype=torch.bool)
    mask.view(-1)[order[: round(sparsity * len(order))]] = False
    linear = torch.nn.Linear(in_features, out_features)
    return fp.BlockSparseLinear.from_dense(linear, blocksize, mask).to(device)


@pytest.mark.parametrize(
    ("device", "thread_count"),
    [*(("cpu", count) for count in THREADS), pytest.param("cuda", 1, marks=cuda)],
)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@torch.no_grad()
def bench_forward(
    benchmark,
    shape: tuple[int, int],
    samples: int,
    blocksize: tuple[int, int],
    sparsity: float,
    device: str,
    thread_count: int,
) -> None:
    layer = make_layer(*shape, blocksize, sparsity, device)
    weight, bias = layer.weight.clone(), layer.bias
    input = torch.randn(samples, shape[1], device=device)
    with threads(thread_count):
        measure(
            benchmark,
            lambda: layer(input),
            lambda: F.linear(input, weight, bias),
            check=lambda ours, dense: torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-3),
            group=f"linear {shape[0]}x{shape[1]}, N = {samples}, {device}, {thread_count} threads",
            flops=2.0 * samples * layer.packed_values.numel(),
            device=torch.device(device),
            blocksize=f"{blocksize[0]}x{blocksize[1]}",
            sparsity=sparsity,
            density=layer.density,
        )
