"""sparsify_ never makes a model slower, and the converted model holds little more than its weights."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import fastprune as fp
from convolution_layers import KINDS, Layer, make_dense
from harness import THREADS, faster, measure, threads
from layers import SAMPLES, SHAPES, assert_close, name_of


def masked_model(shape: tuple[int, int], sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(16, 16), progress=False)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity))


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@torch.no_grad()
def bench_sparsified(
    benchmark, shape: tuple[int, int], samples: int, sparsity: float, thread_count: int
) -> None:
    """A model after sparsify_ against the same model with its masks taken off, dense."""
    model, input = masked_model(shape, sparsity), torch.randn(samples, shape[1])
    dense = fp.remove_masks_(copy.deepcopy(model)).eval()
    with threads(thread_count):
        converted = fp.sparsify_(model, example_inputs=input).eval()
        measure(
            benchmark,
            lambda: converted(input),
            lambda: dense(input),
            check=assert_close,
            group=f"sparsify_ {name_of(shape)}, N = {samples}, {thread_count} threads",
            kind="model after sparsify_",
            blocksize="16x16" if isinstance(converted[0], fp.BlockSparseLinear) else "dense",
            sparsity=sparsity,
        )


def masked_convolution(layer: Layer, sparsity: float) -> nn.Module:
    model = nn.Sequential(make_dense(layer))
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(16, 16), progress=False)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity))


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("layer", KINDS, ids=str)
@torch.no_grad()
def bench_sparsified_convolution(
    benchmark, layer: Layer, images: int, sparsity: float, thread_count: int
) -> None:
    """A convolution after sparsify_ against itself with its masks taken off, in the faster memory format."""
    model = masked_convolution(layer, sparsity)
    input = torch.randn(images, layer.in_channels, layer.size, layer.size)
    dense = fp.remove_masks_(copy.deepcopy(model)).eval()
    with threads(thread_count):
        converted = fp.sparsify_(model, example_inputs=input).eval()
        sides = [dense, copy.deepcopy(dense).to(memory_format=torch.channels_last)]
        theirs = faster([lambda side=side: side(input) for side in sides])
        measure(
            benchmark,
            lambda: converted(input),
            theirs,
            check=assert_close,
            group=f"sparsify_ {layer}, N = {images}, {thread_count} threads",
            kind="convolution after sparsify_",
            blocksize="16x16" if isinstance(converted[0], fp.BlockSparseConv2d) else "dense",
            sparsity=sparsity,
        )


def live_bytes() -> int:
    """Bytes of all storages that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@torch.no_grad()
def bench_memory(benchmark, sparsity: float) -> None:
    """Bytes that a converted inference model of 768-3072-768 holds, against its kept weights and indices."""
    before = live_bytes()
    model = nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768)).eval()
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(16, 16), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))
    del scores
    fp.sparsify_(model, example_inputs=torch.randn(64, 768), policy="always")
    model(torch.randn(64, 768))
    held = live_bytes() - before
    needed = sum(
        tensor.numel() * tensor.element_size()
        for layer in (model[0], model[2])
        for tensor in (layer.packed_values, layer.crow_indices, layer.col_indices)
    )
    benchmark.group = "memory of a converted 768-3072-768"
    benchmark.extra_info.update(
        kind="memory", blocksize="16x16", sparsity=sparsity, bytes=held, bytes_ratio=held / needed
    )
    benchmark.pedantic(lambda: None, rounds=1)
