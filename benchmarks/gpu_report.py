"""The results of gpu_benchmark.py as markdown tables and as pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def _microseconds(result: Result, name: str) -> str:
    seconds = result["seconds"].get(name)
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def speedup(result: Result, baseline: str) -> float | None:
    """Return how many times faster ours is than a baseline, or None where one of them did not run."""
    ours, theirs = (result["seconds"].get(name) for name in ("fastprune", baseline))
    return None if ours is None or theirs is None else theirs / ours


def _ratio(result: Result, baseline: str) -> str:
    ratio = speedup(result, baseline)
    return "-" if ratio is None else f"{ratio:.2f}"


def markdown(report: dict[str, Any]) -> str:
    """Return one table for each op and dtype, and what did not run."""
    lines = []
    if report["dry_run"]:
        lines += ["A dry run on the CPU: the times mean nothing.", ""]
    lines.append(
        f"{report.get('gpu', 'CPU')}, torch {report['torch']}. Microseconds, medians from cold caches."
    )
    results = report["results"]
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in results):
        chosen = [r for r in results if (r["op"], r["dtype"]) == (op, dtype)]
        baselines = [
            n for n in ("dense", "torch BSR", "masked forwards") if any(n in r["seconds"] for r in chosen)
        ]
        lines += ["", f"## {op}, {dtype}", ""]
        columns = ["out x in", "block", "sparsity", "samples", "fastprune", *baselines]
        columns += [f"against {name}" for name in baselines] + ["TFLOP/s kept"]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for r in sorted(
            chosen, key=lambda r: (r["out_features"], r["blocksize"], r["sparsity"], r["samples"])
        ):
            ours = r["seconds"].get("fastprune")
            cells = [
                f"{r['out_features']}x{r['in_features']}",
                r["blocksize"],
                f"{r['sparsity']:.0%}",
                r["samples"],
            ]
            cells += [_microseconds(r, name) for name in ("fastprune", *baselines)]
            cells += [_ratio(r, name) for name in baselines]
            cells.append("-" if ours is None else f"{r['flops'] / ours / 1e12:.1f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    failures = {
        f"{r['op']}, {r['dtype']}: {name}: {text}" for r in results for name, text in r["failures"].items()
    }
    if failures:
        lines += ["", "Did not run, or was wrong:", "", *(f"- {failure}" for failure in sorted(failures))]
    if report["left_out"]:
        lines += ["", f"Left out for lack of time: {len(report['left_out'])} cases."]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> str:
    """Draw the forward's speed-up over dense; return the path, or why there is no picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed"
    forward = [r for r in report["results"] if (r["op"], r["dtype"]) == ("forward", "bfloat16")]
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = (("sparsity", "samples", 4096), ("samples", "sparsity", 0.9))
    for axes, (x, fixed, value) in zip(figure.subplots(1, 2), panels, strict=True):
        chosen = sorted((r for r in forward if r[fixed] == value), key=lambda r: r[x])
        for blocksize in sorted({r["blocksize"] for r in chosen}):
            points = [(r[x], speedup(r, "dense")) for r in chosen if r["blocksize"] == blocksize]
            known = [(at, ratio) for at, ratio in points if ratio is not None and math.isfinite(ratio)]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", label=f"{blocksize}x{blocksize}")
        axes.axhline(1.0, color="gray", linestyle=":", label="dense")
        axes.set(
            xlabel=x, ylabel="speed-up over dense", title=f"bfloat16 forward, {fixed} = {value}", yscale="log"
        )
        if x == "samples":
            axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(path, dpi=150)
    return str(path)
