"""The fixed cost of a call: layers of one block, where checks, dispatch and autograd are all there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from harness import THREADS, measure, threads
from layers import assert_close

LAYERS = {
    "Linear": (lambda: nn.Linear(16, 16), fp.BlockSparseLinear.from_dense, (1, 16)),
    "Conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), fp.BlockSparseConv2d.from_dense, (1, 16, 4, 4)),
}


def inference(layer: nn.Module, input: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(input)


def training_forward(layer: nn.Module, input: Tensor) -> Tensor:
    return layer(input)


def training_step(layer: nn.Module, input: Tensor) -> Tensor:
    output = layer(input)
    output.sum().backward()
    return output


CALLS = {inference: "inference", training_forward: "forward", training_step: "forward, backward"}


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("name", LAYERS)
def bench_call_overhead(
    benchmark, name: str, call: Callable[[nn.Module, Tensor], Tensor], thread_count: int
) -> None:
    """A block-sparse layer with its one block kept, against its dense form."""
    torch.manual_seed(0)
    make, convert, shape = LAYERS[name]
    dense = make()
    sparse, input = convert(dense), torch.randn(shape, requires_grad=True)
    what = CALLS[call]
    with threads(thread_count):
        measure(
            benchmark,
            lambda: call(sparse, input),
            lambda: call(dense, input),
            check=assert_close,
            group=f"fixed cost of a call: {what}, {thread_count} threads",
            kind=f"a call: {name}, {what}",
            blocksize="16x16",
            sparsity=0.0,
        )
