"""Kernels broken on purpose: one barrier, wait, bound or guard of the PTX at a time."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import harness, records

OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


@dataclass(frozen=True)
class Mutant:
    """A kernel's PTX with one instruction changed; a harness may call it to transform its own PTX.

    ``kind`` is "no barrier", "no wait" (for an asynchronous copy), "bound + 1" (a comparison that takes in
    one index more or less), "no guard" (a branch, memory access or sum that depends on no predicate any more)
    or "tile - 1" (a size cut to one below the tile's); ``where`` is the line of source that it comes from.
    ``probe`` is PTX that executes "{}" where a thread is about to do other than in the unbroken kernel, for
    the line at ``index`` of the kernel's PTX.
    """

    kind: str
    where: str
    ptx: str
    kernel: str
    index: int = 0
    probe: str = "{}"

    def __call__(self, ptx: str) -> str:
        return self.ptx


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

    def mutate(kind: str, index: int, line: str, probe: str = "{}") -> None:
        ptx = "\n".join([*lines[:index], line, *lines[index + 1 :]])
        found.append(Mutant(kind, where, ptx, kernel, index, probe))

    for index, line in enumerate(lines):
        if match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            if match[1] in files:
                where = files[match[1]][int(match[2]) - 1].strip()
        elif "bar.sync" in line:
            mutate("no barrier", index, "")
        elif re.search(r"cp\.async\.wait_(group|all)", line):
            mutate("no wait", index, "")
        elif match := re.match(r"\s*setp\.(lt|le|gt|ge)\.([su]\d+)\s+%p\d+, ([^,]+), ([^,]+);", line):
            changed = line.replace(f"setp.{match[1]}", f"setp.{OFF_BY_ONE[match[1]]}")
            equal = f"setp.eq.{match[2]} %probe, {match[3]}, {match[4]};"
            mutate("bound + 1", index, changed, f"{equal} @%probe {{}}")
        elif match := re.match(r"\s*(@!?%p\d+)\s+bra", line):
            mutate("no guard", index, "", f"{match[1]} {{}}")
        elif match := re.match(r"\s*@(!?)(%p\d+)\s+((?:ld|st|cp|add|sub)\..*)", line):
            mutate("no guard", index, match[3], f"@{'' if match[1] else '!'}{match[2]} {{}}")
        elif match := re.match(r"\s*min\.(s\d+)\s+%\w+, ([^,]+), (\d+);", line):
            # One more is no mutant: no thread has an index past its tile.
            size = int(match[3]) - 1
            changed = line.replace(f", {match[3]};", f", {size};")
            above = f"setp.gt.{match[1]} %probe, {match[2]}, {size};"
            mutate("tile - 1", index, changed, f"{above} @%probe {{}}")
    return found


Run = Callable[..., list[str]]
"""Runs a kernel with the options ``ptx_transform`` and ``max_instructions`` and returns what was wrong."""


class _Measured:
    """A run of the unbroken kernel: which mutants would have changed anything, and how long it took."""

    def __init__(self, run: Run, mutants: Sequence[Mutant], probed: Callable[[str], str]) -> None:
        with records.broken_kernel(), harness.instructions() as counts:
            findings = run(ptx_transform=probed, max_instructions=10**8)
        # The simulator tells where a register is read that was never written, once for each register.
        found = [(re.search(r"register %reached(\d+) ", finding), finding) for finding in findings]
        self.run = run
        self.faults = [finding for probe, finding in found if probe is None]
        self.changed = {mutants[int(probe[1])].index for probe, _ in found if probe}
        self.noticed = 0
        self.instructions = max(counts, default=0)

    def cost(self) -> float:
        """Return about how much is simulated for each mutant noticed; a launch alone costs something."""
        return (self.instructions + 5000) / (self.noticed + 1)

    def notices(self, mutant: Mutant) -> bool:
        # A mutant that never ends need not be watched for longer.
        most = 4 * self.instructions + 10_000
        found = bool(self.run(ptx_transform=mutant, max_instructions=most))
        self.noticed += found
        return found


def _probed(ptx: str, mutants: Sequence[Mutant]) -> str:
    """Return a kernel's PTX that reads an unwritten register where a mutant would change anything."""
    if not mutants:
        return ptx
    lines = entry_of(ptx, mutants[0].kernel).split("\n")
    for number, mutant in enumerate(mutants):
        probe = mutant.probe.format(f"mov.b32 %unused, %reached{number};")
        lines[mutant.index] = f"{probe}\n{lines[mutant.index]}"
    body = lines.index("{")
    lines[body] += f"\n.reg .b32 %unused, %reached<{len(mutants)}>;\n.reg .pred %probe;"
    return "\n".join(lines)


class Runs:
    """The runs that are to notice a kernel's mutants.

    A mutant goes through those runs alone in which the unbroken kernel meets what it changes: the cheapest
    and those that noticed most before first, then those that no mutant has needed yet. ``faults`` is what
    was wrong with the unbroken kernel so far.
    """

    def __init__(self, mutants: Sequence[Mutant], runs: Iterable[Run]) -> None:
        self._mutants = mutants
        self._probed = functools.cache(lambda ptx: _probed(ptx, mutants))
        self._measured: list[_Measured] = []
        self._waiting = list(runs)[::-1]
        self.faults: list[str] = []

    def __call__(self, mutant: Mutant) -> bool:
        """Return whether any run notices a mutant."""
        meeting = [run for run in self._measured if mutant.index in run.changed]
        if any(run.notices(mutant) for run in sorted(meeting, key=_Measured.cost)):
            return True
        while self._waiting:
            run = _Measured(self._waiting.pop(), self._mutants, self._probed)
            self._measured.append(run)
            self.faults += run.faults
            if mutant.index in run.changed and run.notices(mutant):
                return True
        return False


def sample_of(mutants: Sequence[Mutant], every: int, equivalent: Iterable[tuple[str, str]]) -> list[Mutant]:
    """Return one in ``every`` mutants, but none that may compute the same, which take all runs."""
    known = set(equivalent)
    return [mutant for mutant in mutants[::every] if (mutant.kind, mutant.where) not in known]


def unnoticed(
    mutants: Iterable[Mutant],
    notices: Callable[[Mutant], bool],
    equivalent: Iterable[tuple[str, str]] = (),
) -> list[tuple[str, str]]:
    """Return (kind, where) of the mutants that nothing noticed.

    Args:
        mutants: what to run.
        notices: runs the kernel with a mutant as its ``ptx_transform``, and tells whether anything was wrong.
        equivalent: (kind, where) of mutants that compute the same; each stands for one.

    """
    missed, same = [], Counter(list(equivalent))
    for mutant in mutants:
        change = (mutant.kind, mutant.where)
        with records.broken_kernel():
            noticed = notices(mutant)
        if noticed:
            records.mutant(mutant.kernel, "noticed")
        elif same[change] > 0:
            same[change] -= 1
            records.mutant(mutant.kernel, "equivalent")
        else:
            records.mutant(mutant.kernel, "unnoticed")
            missed.append(change)
    return missed
