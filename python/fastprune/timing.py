"""Interleaved timing: the only way ratios are measured on machines that other work disturbs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# Fewer values make no median that a single disturbance leaves alone.
_FEWEST_REPEATS = 5
# What takes more than this share of another's time does not count as faster: the noise of an interleaved
# median of 15 on a shared machine.
WORTHWHILE = 0.97


def interleaved_medians(
    functions: Sequence[Callable[[], object]],
    *,
    repeats: int = 9,
    warmup: int = 2,
    device: torch.device | None = None,
    minimum_seconds: float = 0.0,
    maximum_seconds: float = float("inf"),
) -> list[float]:
    """Return the median seconds of each function, all called in turn in every repeat.

    The first one's is the median of its repeats; another's is that times the median of the ratios within
    one repeat. So ratios hold on a machine that changes its speed between two repeats.

    Functions of microseconds are called in a loop until a repeat lasts ``minimum_seconds``, so that the
    clock's grain does not count. After ``maximum_seconds`` no more repeats are made than it takes for five.
    On a CUDA device each repeat ends with a synchronisation.

    Example:
        >>> dense_s, sparse_s = interleaved_medians([lambda: dense(x), lambda: sparse(x)])

    """

    def synchronize() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls = []
    for function in functions:
        for _ in range(warmup):
            function()
        synchronize()
        # What is not repeated within a repeat need not be measured before it.
        once = seconds(function, 1) if minimum_seconds else 1.0
        calls.append(max(1, int(minimum_seconds / max(once, 1e-7))))
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= _FEWEST_REPEATS and time.perf_counter() - start > maximum_seconds:
            break
        for index, function in enumerate(functions):
            times[index].append(seconds(function, calls[index]))
    first = statistics.median(times[0])
    if min(times[0]) <= 0.0:  # below the clock's grain
        return [statistics.median(values) for values in times]
    ratios = [[other / own for own, other in zip(times[0], values, strict=True)] for values in times]
    return [first * statistics.median(values) for values in ratios]
