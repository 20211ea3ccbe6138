"""Measures every CUDA kernel against cuBLAS and torch's Triton kernels, with cold caches and results checked.

Usage: python benchmarks/gpu_benchmark.py [--output FOLDER] [--seconds 180] [--check-only] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastprune as fp
from gpu_cases import Case, make_problem, plan, small_plan
from gpu_report import Result, markdown, plot

REPEATS = 15


class ColdTimer:
    """Times functions on a GPU from caches that hold something else, in turn, by CUDA events.

    Before each call a buffer larger than the second-level cache is written, and the GPU is kept busy until
    the host has queued the call: what lies between the two events is the GPU's work alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(max(256 << 20, 4 * cache), dtype=torch.uint8, device=device)

    def seconds(self, functions: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
        """Return the seconds of each call of each function, all called in turn in every repeat."""
        if self.device.type != "cuda":
            return {name: [self._host_seconds(f) for _ in range(repeats)] for name, f in functions.items()}
        queueing = {name: self._host_seconds(function) for name, function in functions.items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.buffer.zero_()
                # Twice what the host needs, at 2 GHz.
                torch.cuda._sleep(int(4e9 * min(queueing[name], 10e-3)))
                begin.record()
                function()
                end.record()
                events[name].append((begin, end))
            torch.cuda.synchronize()
        return {name: [b.elapsed_time(e) * 1e-3 for b, e in pairs] for name, pairs in events.items()}

    def _host_seconds(self, function: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        function()
        elapsed = time.perf_counter() - start
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return elapsed


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return ‖result - expected‖ / ‖expected‖, NaN where anything is NaN."""
    if result.shape != expected.shape:
        raise ValueError(f"`result` must have shape {list(expected.shape)}, got {list(result.shape)}")
    difference = (result.to(expected.device).double() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-300))


def result_where_nan_was(function: Callable[[], Tensor], like: Tensor, device: torch.device) -> Tensor:
    """Return a function's result; what it leaves unwritten is likely to be NaN."""
    if device.type == "cuda":
        # The allocator hands the freed memory to the next tensor of this size.
        for dtype in (torch.float32, torch.float16):
            torch.full(like.shape, torch.nan, dtype=dtype, device=device)
    return function()


def run_case(case: Case, device: torch.device, timer: ColdTimer | None, repeats: int) -> Result:
    """Check a case and, with a timer, measure it; what cannot run, or is wrong, stands under "failures"."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
    result: Result = {**asdict(case), "failures": {}, "seconds": {}}
    try:
        problem = make_problem(case, device, baselines=timer is not None)
        # Without a timer the sanitizers run: they would only be held up by the reference's kernels.
        expected = problem.expected(device if timer is not None else torch.device("cpu"))
    except Exception as failure:  # memory, or an earlier kernel that broke the process
        result["failures"]["fastprune"] = described(failure)
        return result
    result |= {**problem.info, "flops": problem.flops}
    right = {}
    for name, function in problem.functions.items():
        try:
            output = result_where_nan_was(function, expected, device)
            error = 0.0 if name == problem.unchecked else relative_error(output, expected)
        except Exception as failure:  # a missing kernel, a refused dtype, a compiler error in Triton
            result["failures"][name] = described(failure)
            continue
        if name == "fastprune":
            result["error"] = error
        if error <= problem.tolerance:
            right[name] = function
        else:
            result["failures"][name] = f"wrong: relative error {error:.3g}, allowed {problem.tolerance:g}"
    if timer is not None:
        times = timer.seconds(right, repeats)
        result["seconds"] = {name: statistics.median(values) for name, values in times.items()}
        result["spread"] = {
            name: (max(values) - min(values)) / statistics.median(values) for name, values in times.items()
        }
    return result


def described(failure: Exception) -> str:
    """Return an exception in one line; those of a missing kernel or dtype begin with "no kernel"."""
    text = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
    missing = isinstance(failure, NotImplementedError) or "must have dtype" in text
    return f"no kernel: {text}" if missing else text


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    facts: dict[str, Any] = {"torch": torch.__version__, "fastprune": fp.build_info()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return facts


def main(arguments: list[str]) -> int:
    """Run the benchmark; the exit status is 1 where a result of ours was wrong, or nothing could run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_results"))
    parser.add_argument("--seconds", type=float, default=180.0, help="no case is begun later than this")
    parser.add_argument(
        "--check-only", action="store_true", help="small ragged shapes, checked and not timed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="small shapes on the CPU; its times mean nothing"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run tries the steps without one")
    start = time.perf_counter()
    device = torch.device("cpu" if options.dry_run else "cuda")
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support")
    timer = None if options.check_only else ColdTimer(device)
    cases = small_plan() if options.check_only or options.dry_run else plan()
    report = {"dry_run": options.dry_run, **machine(device), "results": [], "left_out": []}
    results = report["results"]
    saved = start
    for case in cases:
        if time.perf_counter() - start > options.seconds:
            report["left_out"].append(asdict(case))
            continue
        results.append(run_case(case, device, timer, repeats=1 if options.dry_run else REPEATS))
        failures = {n: f for n, f in results[-1]["failures"].items() if not f.startswith("no kernel")}
        if failures:
            print(case, failures, flush=True)
        # A run that is killed keeps what it had.
        if timer is not None and time.perf_counter() - saved > 10:
            saved = time.perf_counter()
            save(report, options.output)

    ours = [result["failures"].get("fastprune", "") for result in results]
    missing = sum(failure.startswith("no kernel") for failure in ours)
    right = ours.count("")
    wrong = len(ours) - right - missing
    print(
        f"{right} cases right, {wrong} wrong, {missing} without a kernel, "
        f"{len(report['left_out'])} left out for lack of time"
    )
    if timer is not None:
        save(report, options.output)
        print(markdown(report))
        if not options.dry_run:
            print(plot(report, options.output / "benchmark.png"))
    return 1 if wrong or not right else 0


def save(report: dict[str, Any], folder: Path) -> None:
    """Write the results and their tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "benchmark.md").write_text(markdown(report) + "\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
