"""Measures one function against a baseline: checked first, timed by pytest-benchmark, ratio interleaved."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastprune as fp
from fastprune.timing import interleaved_medians

THREADS = (1, 2)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with a number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def faster(candidates: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return the fastest of some functions."""
    seconds = interleaved_medians(candidates, repeats=5, warmup=1, minimum_seconds=5e-3)
    return candidates[seconds.index(min(seconds))]


def measure_once(
    benchmark: Any,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    check: Callable[[Any, Any], None],
    group: str,
    **extra: Any,
) -> None:
    """Time two functions that take many seconds: each runs once, is checked, and ours once more.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: the function under test.
        baseline: what it is compared with.
        check: called with both results; raises if ours is wrong.
        group: the table's section.
        extra: more columns.

    """
    seconds, results = [], []
    for function in (ours, baseline):
        start = time.perf_counter()
        results.append(function())
        seconds.append(time.perf_counter() - start)
    check(*results)
    benchmark.group = group
    benchmark.extra_info.update(
        extra,
        speedup=seconds[1] / seconds[0],
        our_seconds=seconds[0],
        baseline_seconds=seconds[1],
        threads=torch.get_num_threads(),
        cpu_isa=fp.cpu_isa(),
        torch=torch.__version__,
        machine=platform.processor() or platform.machine(),
    )
    benchmark.pedantic(ours, rounds=1)


def measure(
    benchmark: Any,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    check: Callable[[Any, Any], None],
    group: str,
    flops: float | None = None,
    device: torch.device | None = None,
    **extra: Any,
) -> float:
    """Time ``ours`` and return how many times faster than ``baseline`` it is.

    The speed-up is the median ratio of one interleaved run; pytest-benchmark's own time of ``ours``
    stands beside it.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: the function under test.
        baseline: what it is compared with.
        check: called with both results before any timing; raises if ours is wrong.
        group: the table's section.
        flops: multiplications and additions of one call of ours, for a rate.
        device: a CUDA device to synchronise, or None.
        extra: more columns; ``density`` adds the sparse efficiency.
    """
    check(ours(), baseline())
    start = time.perf_counter()
    baseline()
    slow = time.perf_counter() - start > 0.1
    # Each turn lasts long enough that the first call, which finds the caches full of the other function's
    # data and code (0.1 ms on a virtual machine, whatever the function), hardly counts.
    baseline_seconds, our_seconds = interleaved_medians(
        [baseline, ours],
        repeats=5 if slow else 11,
        warmup=0 if slow else 2,
        device=device,
        minimum_seconds=10e-3,
    )
    benchmark.group = group
    speedup = baseline_seconds / our_seconds
    benchmark.extra_info.update(
        extra,
        speedup=speedup,
        our_seconds=our_seconds,
        baseline_seconds=baseline_seconds,
        threads=torch.get_num_threads(),
        cpu_isa=fp.cpu_isa(),
        torch=torch.__version__,
        machine=platform.processor() or platform.machine(),
    )
    if flops is not None:
        benchmark.extra_info["gflops"] = flops / our_seconds / 1e9
    if "density" in extra:
        benchmark.extra_info["sparse_efficiency"] = speedup * extra["density"]

    def timed() -> None:
        ours()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
    return speedup


def onnxruntime_session(graph: Any, thread_count: int) -> Any:
    """Return a session of ONNX Runtime for a graph of onnx, or skip the benchmark where it is missing."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count
    # Its threads would go on spinning, on the cores that torch's then need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
