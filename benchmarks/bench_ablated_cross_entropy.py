"""Loss deltas of all hidden units against the loop of masked forwards: `make bench`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from harness import THREADS, measure, threads

IN_FEATURES, HIDDEN_FEATURES, CLASSES, SAMPLES = 64, 1024, 10, 1000


@torch.no_grad()
def masked_forwards(model: nn.Sequential, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss deltas of the hidden units as a user would write them: one forward a unit."""
    first = model[0]
    loss = F.cross_entropy(model(inputs), targets).item()
    deltas = []
    for unit in range(first.out_features):
        weight, bias = first.weight[unit].clone(), first.bias[unit].clone()
        first.weight[unit], first.bias[unit] = 0, 0
        deltas.append(F.cross_entropy(model(inputs), targets).item() - loss)
        first.weight[unit], first.bias[unit] = weight, bias
    return torch.tensor(deltas, dtype=torch.float64)


@pytest.mark.parametrize("thread_count", THREADS)
def bench_score_units(benchmark, thread_count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(IN_FEATURES, HIDDEN_FEATURES), nn.ReLU(), nn.Linear(HIDDEN_FEATURES, CLASSES)
    )
    inputs, targets = torch.randn(SAMPLES, IN_FEATURES), torch.randint(0, CLASSES, (SAMPLES,))

    def ours() -> Tensor:
        return fp.score(model, [(inputs, targets)], granularity=fp.Unit(), include="0", progress=False)["0"]

    def check(deltas: Tensor, _: Tensor) -> None:
        double = nn.Sequential(*(layer for layer in model)).double()
        wanted = masked_forwards(double, inputs.double(), targets)
        loss = F.cross_entropy(double(inputs.double()), targets).item()
        model.float()
        assert bool(((deltas - wanted).abs() <= 1e-4 * wanted.abs() + 1e-6 * loss).all())

    with threads(thread_count):
        measure(
            benchmark,
            ours,
            lambda: masked_forwards(model, inputs, targets),
            check=check,
            group=f"loss deltas of {HIDDEN_FEATURES} units, N = {SAMPLES}, {thread_count} threads",
        )
