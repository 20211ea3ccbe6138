"""Prints a pytest-benchmark JSON file as a table of times, rates and interleaved speed-ups.

Usage: python benchmarks/report.py benchmark.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def table(benchmarks: list[dict[str, Any]]) -> str:
    """Return one section per group, one line per benchmark."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in benchmarks:
        groups[entry["group"] or entry["name"]].append(entry["extra_info"])

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

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
                f"  {info.get('blocksize', '-'):>7} {number(info.get('sparsity'), '{:.0%}'):>8} "
                f"{info['our_seconds'] * 1e6:>11.1f} {info['baseline_seconds'] * 1e6:>12.1f} "
                f"{number(info.get('gflops'), '{:.1f}'):>8} {info['speedup']:>8.2f}x "
                f"{number(info.get('sparse_efficiency'), '{:.2f}'):>10}"
            )
    return "\n".join(lines)


def main() -> None:
    """Read the file named on the command line and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    benchmarks = json.loads(parser.parse_args().file.read_text())["benchmarks"]
    if not benchmarks:
        raise SystemExit("the file holds no benchmark")
    info = benchmarks[0]["extra_info"]
    print(f"torch {info['torch']}, {info['cpu_isa']}, {info['machine']}; medians of one interleaved run")
    print(table(benchmarks))


if __name__ == "__main__":
    main()
