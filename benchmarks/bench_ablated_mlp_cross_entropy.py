"""Loss deltas of all blocks of a hidden layer, in plain forwards of the same data: `make bench`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastprune import ops, reference
from harness import THREADS, measure, threads

IN_FEATURES, HIDDEN_FEATURES, CLASSES, SAMPLES, BLOCK = 784, 512, 10, 10_000, 16
CHECKED = slice(0, None, 97)  # pieces; the reference holds all their logits


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def bench_against_one_forward(benchmark, activation: str, thread_count: int) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(IN_FEATURES, HIDDEN_FEATURES), nn.Linear(HIDDEN_FEATURES, CLASSES)
    function = reference.ACTIVATIONS[activation]
    inputs, targets = torch.randn(SAMPLES, IN_FEATURES), torch.randint(0, CLASSES, (SAMPLES,))
    blocks = [
        (row, row + BLOCK, col, col + BLOCK)
        for row in range(0, HIDDEN_FEATURES, BLOCK)
        for col in range(0, IN_FEATURES, BLOCK)
    ]
    pieces = torch.tensor(blocks, dtype=torch.int32)

    def forward() -> Tensor:
        return last(function(first(inputs)))

    with torch.no_grad(), threads(thread_count):
        before, logits = first(inputs), forward()
        layers = (inputs, before, first.weight, last.weight)

        def check(deltas: Tensor, _: Tensor) -> None:
            some = slice(0, 500)
            head = (logits[some], inputs[some], before[some], first.weight, last.weight, targets[some])
            ours = ops.ablated_mlp_cross_entropy(*head, pieces[CHECKED], activation)
            wanted = reference.ablated_mlp_cross_entropy(*head, pieces[CHECKED], activation)
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
            assert deltas.shape == (len(blocks),)

        speedup = measure(
            benchmark,
            lambda: ops.ablated_mlp_cross_entropy(logits, *layers, targets, pieces, activation),
            forward,
            check=check,
            group=f"{len(blocks)} blocks, {activation}, N = {SAMPLES}: forwards, {thread_count} threads",
        )
        benchmark.extra_info["forwards"] = 1.0 / speedup
