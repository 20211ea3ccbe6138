"""The layers and the grid that the benchmarks of block_sparse_linear share."""

from __future__ import annotations

import torch

import fastprune as fp

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024))
SAMPLES = (64, 128, 512, 2048)
BLOCKSIZES = ((16, 16), (32, 32), (8, 8), (8, 1))
SPARSITIES = (0.5, 0.75, 0.9)


def name_of(sizes: tuple[int, int]) -> str:
    """Return 16x16 for (16, 16)."""
    return f"{sizes[0]}x{sizes[1]}"


def make_layer(
    out_features: int,
    in_features: int,
    blocksize: tuple[int, int],
    sparsity: float,
    skewed: bool = False,
    device: str = "cpu",
) -> fp.BlockSparseLinear:
    """Return a layer with blocks kept at random, or, skewed, in as few block rows as hold them."""
    torch.manual_seed(0)
    grid = (-(-out_features // blocksize[0]), -(-in_features // blocksize[1]))
    order = torch.rand(grid).flatten().argsort()
    if skewed:
        order = torch.arange(len(order)).flip(0)
    mask = torch.ones(grid, dtype=torch.bool)
    mask.view(-1)[order[: round(sparsity * len(order))]] = False
    linear = torch.nn.Linear(in_features, out_features)
    return fp.BlockSparseLinear.from_dense(linear, blocksize, mask).to(device)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Fail where a result is not the baseline's."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
