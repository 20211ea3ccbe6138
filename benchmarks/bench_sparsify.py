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

BLOCKS = fp.Block(16, 16)


def masked(layer: nn.Module, sparsity: float, granularity: fp.Granularity) -> nn.Module:
    """Return a model of one layer, the smallest pieces of its weight masked."""
    model = nn.Sequential(layer)
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, progress=False)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity))


def masked_model(shape: tuple[int, int], sparsity: float, granularity: fp.Granularity = BLOCKS) -> nn.Module:
    torch.manual_seed(0)
    return masked(nn.Linear(shape[1], shape[0]), sparsity, granularity)


def blocks_of(layer: nn.Module) -> str:
    """Return the block size that sparsify_ has chosen, or that it left a layer dense."""
    kinds = (fp.BlockSparseLinear, fp.BlockSparseConv2d)
    return name_of(layer.blocksize) if isinstance(layer, kinds) else "dense"


def measure_linear(
    benchmark, kind: str, model: nn.Module, input: torch.Tensor, sparsity: float, thread_count: int
) -> None:
    """Measure a masked Linear after sparsify_ against itself with its masks taken off."""
    dense = fp.remove_masks_(copy.deepcopy(model)).eval()
    with threads(thread_count):
        converted = fp.sparsify_(model, example_inputs=input).eval()
        layer = dense[0]
        shape = name_of((layer.out_features, layer.in_features))
        measure(
            benchmark,
            lambda: converted(input),
            lambda: dense(input),
            check=assert_close,
            group=f"{kind}, {shape}, N = {len(input)}, {thread_count} threads",
            kind=kind,
            blocksize=blocks_of(converted[0]),
            sparsity=sparsity,
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@torch.no_grad()
def bench_sparsified(
    benchmark, shape: tuple[int, int], samples: int, sparsity: float, thread_count: int
) -> None:
    model, input = masked_model(shape, sparsity), torch.randn(samples, shape[1])
    measure_linear(benchmark, "model after sparsify_", model, input, sparsity, thread_count)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("granularity", [fp.Element(), fp.Block(4, 1), BLOCKS], ids=str)
@pytest.mark.parametrize("samples", [1, 4, 16, 128])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072)], ids=name_of)
@torch.no_grad()
def bench_sparsified_pieces(
    benchmark,
    shape: tuple[int, int],
    samples: int,
    granularity: fp.Granularity,
    sparsity: float,
    thread_count: int,
) -> None:
    """Few samples, single weights and blocks of one column."""
    model, input = masked_model(shape, sparsity, granularity), torch.randn(samples, shape[1])
    kind = f"sparsify_, N = {samples}, {granularity}"
    measure_linear(benchmark, kind, model, input, sparsity, thread_count)


def measure_convolution(
    benchmark, kind: str, layer: Layer, images: int, model: nn.Module, sparsity: float, thread_count: int
) -> None:
    """Measure a masked convolution after sparsify_ against itself unmasked, in the faster memory format."""
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
            group=f"{kind}, {layer}, N = {images}, {thread_count} threads",
            kind=kind,
            blocksize=blocks_of(converted[0]),
            sparsity=sparsity,
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("layer", KINDS, ids=str)
@torch.no_grad()
def bench_sparsified_convolution(
    benchmark, layer: Layer, images: int, sparsity: float, thread_count: int
) -> None:
    model = masked(make_dense(layer), sparsity, BLOCKS)
    kind = "convolution after sparsify_"
    measure_convolution(benchmark, kind, layer, images, model, sparsity, thread_count)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("layer", KINDS, ids=str)
@torch.no_grad()
def bench_sparsified_weights_of_a_convolution(
    benchmark, layer: Layer, sparsity: float, thread_count: int
) -> None:
    """Single weights masked anywhere; one image."""
    model = masked(make_dense(layer), sparsity, fp.Element())
    kind = f"{KINDS[layer]}, single weights"
    measure_convolution(benchmark, kind, layer, 1, model, sparsity, thread_count)


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
