"""Kernels broken on purpose: one barrier, wait, bound or guard of the PTX at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import harness, records

OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


@dataclass(frozen=True)
class Mutant:
    """A kernel's PTX with one instruction changed.

    ``kind`` is "no barrier", "no wait" (for an asynchronous copy), "bound + 1" (a comparison that takes in
    one index more or less), "no guard" (a branch or memory access that no longer depends on its predicate)
    or "tile - 1" (a size cut to one below the tile's); ``where`` is the line of source that it comes from.
    """

    kind: str
    where: str
    ptx: str
    kernel: str


def entry_of(ptx: str, kernel: str) -> str:
    """Return the PTX with the other kernels left out, so that it is parsed in a fraction of the time."""
    kept, skipping, found = [], False, False
    for line in ptx.split("\n"):
        if match := re.match(r"\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)", line):
            skipping = match[1] != kernel
            found |= not skipping
        if not skipping:
            kept.append(line)
        if line.startswith("}"):
            skipping = False
    if not found:
        raise ValueError(f"`kernel` must be an entry of the PTX, got {kernel!r}")
    return "\n".join(kept)


def mutants_of(op: str, kernel: str, arch: str = "compute_80") -> list[Mutant]:
    """Return all mutants of one kernel of ``csrc/kernels/cuda/<op>.cu``."""
    lines = entry_of(harness.ptx_of(op, arch), kernel).split("\n")
    files = {}
    for line in lines:
        if match := re.match(r'\s*\.file\s+(\d+)\s+"([^"]+)"', line):
            path = Path(match[2])
            # Lines of CUDA's own headers keep the line that called them.
            if harness.KERNELS in path.resolve().parents:
                files[match[1]] = path.read_text().split("\n")
    where, found = "", []

    def mutate(kind: str, index: int, line: str) -> None:
        found.append(Mutant(kind, where, "\n".join([*lines[:index], line, *lines[index + 1 :]]), kernel))

    for index, line in enumerate(lines):
        if match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            if match[1] in files:
                where = files[match[1]][int(match[2]) - 1].strip()
        elif "bar.sync" in line:
            mutate("no barrier", index, "")
        elif re.search(r"cp\.async\.wait_(group|all)", line):
            mutate("no wait", index, "")
        elif match := re.search(r"setp\.(lt|le|gt|ge)\.[su]\d", line):
            mutate("bound + 1", index, line.replace(f"setp.{match[1]}", f"setp.{OFF_BY_ONE[match[1]]}"))
        elif re.match(r"\s*@!?%p\d+\s+bra", line):
            mutate("no guard", index, "")
        elif match := re.match(r"\s*@!?%p\d+\s+((?:ld|st|cp)\..*)", line):
            mutate("no guard", index, match[1])
        elif match := re.search(r"min\.s\d+.*, (\d+);", line):
            # One more is no mutant: no thread has an index past its tile.
            mutate("tile - 1", index, line.replace(f", {match[1]};", f", {int(match[1]) - 1};"))
    return found


def unnoticed(
    mutants: Iterable[Mutant],
    notices: Callable[[Callable[[str], str]], bool],
    equivalent: Iterable[tuple[str, str]] = (),
) -> list[tuple[str, str]]:
    """Return (kind, where) of the mutants that nothing noticed.

    Args:
        mutants: what to run.
        notices: runs the kernel with the given ``ptx_transform``, and tells whether anything was wrong.
        equivalent: (kind, where) of mutants that compute the same; each stands for one.

    """
    missed, same = [], Counter(list(equivalent))
    for mutant in mutants:
        change = (mutant.kind, mutant.where)
        with records.broken_kernel():
            noticed = notices(lambda _, ptx=mutant.ptx: ptx)
        if noticed:
            records.mutant(mutant.kernel, "noticed")
        elif same[change] > 0:
            same[change] -= 1
            records.mutant(mutant.kernel, "equivalent")
        else:
            records.mutant(mutant.kernel, "unnoticed")
            missed.append(change)
    return missed
