"""What the simulator's runs have covered, collected while the tests run, for `make cuda-check`'s report."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Report = dict[str, dict[str, Any]]

_shapes: dict[tuple[str, str], set[tuple]] = defaultdict(set)
_launches: dict[tuple[str, str], int] = defaultdict(int)
_findings: dict[tuple[str, str], int] = defaultdict(int)
_mutants: dict[str, dict[str, int]] = defaultdict(lambda: {"made": 0, "noticed": 0, "equivalent": 0})


_broken = False


@contextlib.contextmanager
def broken_kernel() -> Iterator[None]:
    """Leave launches out of the counts: their kernel is broken on purpose."""
    global _broken
    before, _broken = _broken, True
    try:
        yield
    finally:
        _broken = before


def launch(plan: dict, arguments: tuple, arch: str, findings: list[str]) -> None:
    """Count one launch; a shape is its grid and its integer arguments."""
    if _broken:
        return
    key = (plan["kernel"], arch)
    sizes = tuple(int(value) for value in arguments if isinstance(value, np.integer))
    _shapes[key].add((plan["grid"], plan["block"], plan["shared_bytes"], sizes))
    _launches[key] += 1
    _findings[key] += len(findings)


def mutant(kernel: str, outcome: str) -> None:
    """Count one mutant of a kernel: "noticed", "equivalent", or "unnoticed"."""
    counts = _mutants[kernel]
    counts["made"] += 1
    if outcome in counts:
        counts[outcome] += 1


def report() -> Report:
    """Return all counts: launches by kernel and architecture, mutants by kernel."""
    launches = {
        f"{kernel} {arch}": {
            "shapes": len(_shapes[kernel, arch]),
            "launches": count,
            "findings": _findings[kernel, arch],
        }
        for (kernel, arch), count in sorted(_launches.items())
    }
    return {"simulated": launches, "mutants": {name: dict(_mutants[name]) for name in sorted(_mutants)}}


def merged(reports: Iterable[Report]) -> Report:
    """Return the sums of several processes' counts; shapes are taken to differ between files of tests."""
    total: Report = {"simulated": {}, "mutants": {}}
    for part in reports:
        for section, rows in total.items():
            for name, counts in part[section].items():
                row = rows.setdefault(name, dict.fromkeys(counts, 0))
                for what, count in counts.items():
                    row[what] += count
    return total
