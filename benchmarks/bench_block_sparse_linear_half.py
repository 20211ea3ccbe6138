"""Weights of 16 bits, which few samples are bound by reading, against those of 32 and dense layers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import fastprune as fp
from harness import THREADS, measure, threads
from layers import assert_close, make_layer, name_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.lru_cache(maxsize=1)
def _rounded(shape: tuple[int, int], blocksize: tuple[int, int], dtype: torch.dtype) -> fp.BlockSparseLinear:
    """Return a layer with float32 activations, its weights rounded to 16 bits; 75 % sparse."""
    layer = make_layer(*shape, blocksize, 0.75)
    return fp.BlockSparseLinear.from_dense(layer.to_dense(), blocksize, weight_dtype=dtype)


def _baseline(name: str, layer: fp.BlockSparseLinear, input: torch.Tensor):
    if name == "sparse float32":
        wide = copy.deepcopy(layer).float()
        return lambda: wide(input)
    dense = layer.to_dense()
    if name == "dense float32":
        return lambda: dense(input)
    dense, half_input = dense.bfloat16(), input.bfloat16()
    return lambda: dense(half_input)


def _assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Fail where results differ by more than a bfloat16 baseline rounds."""
    if theirs.dtype == torch.float32:
        assert_close(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("baseline", ["sparse float32", "dense float32", "dense bfloat16"])
@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [(16, 16), (32, 32)], ids=name_of)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 1024)], ids=name_of)
@torch.no_grad()
def bench_half_weights(
    benchmark,
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    dtype: str,
    samples: int,
    baseline: str,
    thread_count: int,
) -> None:
    layer, input = _rounded(shape, blocksize, DTYPES[dtype]), torch.randn(samples, shape[1])
    with threads(thread_count):
        measure(
            benchmark,
            lambda: layer(input),
            _baseline(baseline, layer, input),
            check=_assert_near,
            group=f"{dtype} weights {name_of(shape)}, N = {samples}, {baseline}, {thread_count} threads",
            flops=2.0 * samples * layer.packed_values.numel(),
            kind=f"{dtype}, N = {samples}: {baseline}",
            blocksize=name_of(blocksize),
            sparsity=0.75,
            density=layer.density,
        )
