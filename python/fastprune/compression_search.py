"""The search of compress for the largest sparsity that is accurate enough."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator

from .compression_result import CompressionResult
from .compression_run import CompressionRun


def search(
    run_to: Callable[[float], CompressionRun], *, largest: float, tolerance: float
) -> CompressionResult:
    """Run to one sparsity after the other, as :func:`probes` asks for, and return the largest that holds.

    A run holds when all of its rounds are accurate enough. Finished runs are read from their directories:
    a search that was killed goes on where it was.
    """
    result: CompressionResult | None = None
    plan = probes(largest=largest, tolerance=tolerance)
    sparsity = next(plan)
    while True:
        run = run_to(sparsity)
        found = run.result()
        if result is None:
            result = dataclasses.replace(
                found, model=copy.deepcopy(run.model), history=[], scores=None, masks=None
            )
        holds = len(run.counted()) == run.rounds
        accuracy = run.checkpoints.history[-1]["accuracy"]
        tried = [*result.probes, {"sparsity": sparsity, "accuracy": accuracy, "holds": holds}]
        result = dataclasses.replace(found if holds else result, probes=tried)
        try:
            sparsity = plan.send(holds)
        except StopIteration:
            return result


def probes(*, largest: float, tolerance: float) -> Generator[float, bool, None]:
    """Yield the sparsities to try; each is answered by whether it holds.

    First up, halving what is left (0.5, 0.75, 0.875, ...), until a sparsity does not hold, so that the
    search ends where the accuracy first falls rather than at some place beyond; then by bisection between the
    last that held and the first that did not, until they are no further apart than the tolerance. Every
    sparsity that was tried below the answer holds.

    Example:
        >>> plan = probes(largest=0.99, tolerance=0.1)
        >>> next(plan), plan.send(True), plan.send(False)
        (0.5, 0.75, 0.625)

    Args:
        largest: that is tried.
        tolerance: how far apart, in absolute sparsity, the last two may be.

    """
    low, high = 0.0, None
    while high is None or high - low > tolerance:
        middle = (low + (1.0 if high is None else high)) / 2
        if high is None and largest - middle < tolerance:
            middle = largest
        if (yield round(middle, 4)):
            low = middle
            if middle >= largest:
                return
        else:
            high = middle
