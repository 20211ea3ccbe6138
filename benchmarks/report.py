"""Prints a pytest-benchmark JSON file as tables, with a summary, and draws the speed-ups.

Usage: python benchmarks/report.py benchmark.json [--summary-only] [--plots FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

Info = dict[str, Any]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def geometric_mean(values: list[float]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def table(benchmarks: list[Info]) -> str:
    """Return one section per group, one line per benchmark."""
    groups: dict[str, list[Info]] = defaultdict(list)
    for entry in benchmarks:
        if "our_seconds" in entry["extra_info"]:
            groups[entry["group"] or entry["name"]].append(entry["extra_info"])
    lines = []
    for group, entries in groups.items():
        lines += [
            "",
            group,
            f"  {'block':>7} {'sparsity':>8} {'ours us':>11} {'baseline us':>12} "
            f"{'GFLOP/s':>8} {'speed-up':>9} {'efficiency':>10}",
        ]
        for info in entries:
            lines.append(
                f"  {info.get('blocksize', '-'):>7} {_number(info.get('sparsity'), '{:.0%}'):>8} "
                f"{info['our_seconds'] * 1e6:>11.1f} {info['baseline_seconds'] * 1e6:>12.1f} "
                f"{_number(info.get('gflops'), '{:.1f}'):>8} {info['speedup']:>8.2f}x "
                f"{_number(info.get('sparse_efficiency'), '{:.2f}'):>10}"
            )
    return "\n".join(lines)


def summary(benchmarks: list[Info]) -> str:
    """Return geometric means and worst cases, one line per kind, threads, block size and sparsity."""
    cases: dict[tuple, list[Info]] = defaultdict(list)
    for entry in benchmarks:
        info = entry["extra_info"]
        if "kind" in info:
            key = (info["kind"], info.get("threads", "-"), info["blocksize"], info["sparsity"])
            cases[key].append({**info, "group": entry["group"]})
    lines = [
        "",
        f"{'geometric mean (worst)':<34} {'threads':>7} {'block':>7} {'sparsity':>8} {'cases':>5} "
        f"{'speed-up':>16} {'efficiency':>16}",
    ]
    for (kind, threads, blocksize, sparsity), infos in cases.items():
        start = f"{kind:<34} {threads!s:>7} {blocksize:>7} {sparsity:>8.0%} {len(infos):>5}"
        if kind == "memory":
            ratio = max(info["bytes_ratio"] for info in infos)
            lines.append(f"{start}  {ratio:.3f}x the bytes of kept weights and indices")
            continue
        columns = []
        for column in ("speedup", "sparse_efficiency"):
            values = [info[column] for info in infos if column in info]
            text = f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "-"
            columns.append(f"{text:>16}")
        lines.append(f"{start} {' '.join(columns)}")
    return "\n".join(lines)


def plot(benchmarks: list[Info], folder: Path) -> list[Path]:
    """Draw the forward's speed-up over the sparsity, one picture per thread count, one line per block size.

    A point is the geometric mean over shapes and samples. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    points: dict[int, dict[str, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for entry in benchmarks:
        info = entry["extra_info"]
        if info.get("kind") == "forward":
            points[info["threads"]][info["blocksize"]][info["sparsity"]].append(info["speedup"])
    paths = []
    for threads, lines in points.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for blocksize, values in lines.items():
            sparsities = sorted(values)
            means = [geometric_mean(values[sparsity]) for sparsity in sparsities]
            axes.plot(sparsities, means, marker="o", label=blocksize)
        grid = sorted({sparsity for values in lines.values() for sparsity in values})
        axes.plot(grid, [1 / (1 - sparsity) for sparsity in grid], "k--", label="1 / density")
        axes.axhline(1.0, color="gray", linestyle=":", label="dense")
        axes.set(
            xlabel="sparsity",
            ylabel="speed-up over dense",
            yscale="log",
            title=f"block_sparse_linear, {threads} thread{'s' if threads > 1 else ''}",
        )
        ticks = (1, 2, 4, 10)
        axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
        axes.legend()
        paths.append(folder / f"forward_{threads}_threads.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def main() -> None:
    """Read the file named on the command line and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--summary-only", action="store_true", help="leave out the single benchmarks")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the speed-ups into this folder")
    arguments = parser.parse_args()
    benchmarks = json.loads(arguments.file.read_text())["benchmarks"]
    if not benchmarks:
        raise SystemExit("the file holds no benchmark")
    info = next(entry["extra_info"] for entry in benchmarks if "torch" in entry["extra_info"])
    print(f"torch {info['torch']}, {info['cpu_isa']}, {info['machine']}; medians of one interleaved run")
    if not arguments.summary_only:
        print(table(benchmarks))
    print(summary(benchmarks))
    if arguments.plots is not None:
        for path in plot(benchmarks, arguments.plots):
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
