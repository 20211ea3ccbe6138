"""Outputs under many masked pieces against what torch offers for them: `make bench`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprune import ops
from harness import THREADS, measure, threads
from layers import assert_close

SAMPLES, FEATURES = 512, 768
# Heads of 32 columns, input units, and blocks of 16 x 16: rows, columns and how many of them.
PIECES = {"heads": (FEATURES, 32, 24), "input units": (FEATURES, 1, 64), "blocks": (16, 16, 64)}


def make_pieces(rows: int, cols: int, count: int) -> Tensor:
    """Return the first of the pieces that cover the weight, row-major."""
    corners = [(r, c) for r in range(0, FEATURES, rows) for c in range(0, FEATURES, cols)]
    return torch.tensor([(r, r + rows, c, c + cols) for r, c in corners[:count]], dtype=torch.int32)


def batched(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    """Gather all slices and multiply them in one batch."""
    bounds = pieces.tolist()
    inputs = torch.stack([input[:, c:d] for _, _, c, d in bounds])
    weights = torch.stack([weight[a:b, c:d].T for a, b, c, d in bounds])
    if bounds[0][1] - bounds[0][0] == weight.shape[0]:
        return torch.baddbmm(output.expand(len(bounds), -1, -1), inputs, weights, alpha=-1)
    slices = torch.baddbmm(torch.stack([output[:, a:b] for a, b, _, _ in bounds]), inputs, weights, alpha=-1)
    masked = output.expand(len(bounds), -1, -1).clone()
    for target, (a, b, _, _), piece in zip(masked, bounds, slices, strict=True):
        target[:, a:b] = piece
    return masked


def loop(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    """Copy the output and subtract one product, piece by piece."""
    masked = output.expand(len(pieces), -1, -1).clone()
    for target, (a, b, c, d) in zip(masked, pieces.tolist(), strict=True):
        target[:, a:b].addmm_(input[:, c:d], weight[a:b, c:d].T, alpha=-1)
    return masked


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("baseline", [batched, loop], ids=["baddbmm", "addmm_ loop"])
@pytest.mark.parametrize("kind", PIECES)
def bench_ablate_linear(benchmark, kind: str, baseline, thread_count: int) -> None:
    torch.manual_seed(0)
    input, weight = torch.randn(SAMPLES, FEATURES), torch.randn(FEATURES, FEATURES)
    output = input @ weight.T
    rows, cols, count = PIECES[kind]
    arguments = (output, input, weight, make_pieces(rows, cols, count))
    with threads(thread_count):
        measure(
            benchmark,
            lambda: ops.ablate_linear(*arguments),
            lambda: baseline(*arguments),
            check=assert_close,
            group=f"ablate_linear: {kind} against {baseline.__name__}, {thread_count} threads",
            flops=2.0 * count * SAMPLES * rows * cols,
        )
