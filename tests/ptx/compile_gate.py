"""Compiles every CUDA kernel and judges what ptxas says: spills, local memory, registers, shared memory."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from . import harness
from .budgets import budget_of


@dataclass(frozen=True)
class Multiprocessor:
    """What thread blocks share.

    Source: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"; registers are
    given to warps in units of 256, and each thread block costs 1 KiB of shared memory of its own
    (cuda_occupancy.h).
    """

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65_536

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Return how many thread blocks run at a time; 0 where not even one fits."""
        warps = -(-threads // 32)
        registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256
        # Each of the four schedulers has a quarter of the registers.
        resident_warps = min(self.warps, self.registers // 4 // registers_per_warp * 4)
        shared = -(-(shared_bytes + 1024) // 128) * 128
        return min(self.blocks, resident_warps // warps, self.shared_bytes // shared)


KIB = 1024
MULTIPROCESSORS = {
    "80": Multiprocessor(warps=64, blocks=32, shared_bytes=164 * KIB),
    "86": Multiprocessor(warps=48, blocks=16, shared_bytes=100 * KIB),
    "89": Multiprocessor(warps=48, blocks=24, shared_bytes=100 * KIB),
    "90": Multiprocessor(warps=64, blocks=32, shared_bytes=228 * KIB),
    "100": Multiprocessor(warps=64, blocks=32, shared_bytes=228 * KIB),
    "120": Multiprocessor(warps=48, blocks=24, shared_bytes=100 * KIB),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, as ``ptxas -v`` describes it.

    ``local_bytes`` is its stack frame: arrays that did not fit registers, or are indexed at run time.
    ``threads`` is the launch bound, None where the source states none.
    """

    name: str
    architecture: str
    registers: int
    static_shared_bytes: int
    local_bytes: int
    spill_bytes: int
    threads: int | None

    def faults(self) -> list[str]:
        """Return why this kernel must not pass."""
        found = []
        budget = budget_of(self.name)
        spills = budget.spill_bytes if budget else 0
        if self.spill_bytes > spills:
            found.append(f"spills {self.spill_bytes} bytes of registers, its budget is {spills}")
        if self.local_bytes > spills:
            found.append(f"keeps {self.local_bytes} bytes in local memory, its budget is {spills}")
        if self.threads is None:
            found.append("has no __launch_bounds__")
        if budget is None:
            return [*found, "has no entry in tests/ptx/budgets.py"]
        for what in ("registers", "static_shared_bytes"):
            used, allowed = getattr(self, what), getattr(budget, what)
            if used > allowed:
                found.append(f"uses {used} {what}, its budget is {allowed}")
        if self.resident_blocks() == 0:
            found.append("does not fit on a multiprocessor")
        return found

    def dynamic_shared_bytes(self) -> int:
        """Return the most that a launch adds to the shared memory that the kernel declares."""
        budget = budget_of(self.name)
        return budget.dynamic_shared_bytes if budget else 0

    def resident_blocks(self) -> int:
        """Return how many thread blocks of the largest launch share a multiprocessor."""
        return MULTIPROCESSORS[self.architecture].resident_blocks(
            self.threads or 1024, self.registers, self.static_shared_bytes + self.dynamic_shared_bytes()
        )


def parse(log: str, ptx: str, architecture: str) -> list[Kernel]:
    """Return the kernels that a log of ``ptxas -v`` tells of; launch bounds come from the PTX.

    Raises:
        ValueError: a device function was not inlined, or the log is not understood.

    """
    # `.maxntid 128, 1, 1`, and from sm_100 on `.maxntid 128`.
    bounds = {
        name: math.prod(map(int, sizes.split(",")))
        for name, sizes in re.findall(
            r"\.entry\s+([\w$]+)\([^)]*\)[^{]*\.maxntid\s+(\d+(?:\s*,\s*\d+)*)", ptx
        )
    }
    entries = re.findall(r"Compiling entry function '([^']+)'", log)
    frames = {
        name: (int(frame), int(stores) + int(loads))
        for name, frame, stores, loads in re.findall(
            r"Function properties for (\S+)\s+(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            log,
        )
    }
    used = re.findall(r"Used (\d+) registers([^\n]*)", log)
    if not entries or len(used) != len(entries) or not set(entries) <= set(frames):
        raise ValueError(f"`log` must be the output of ptxas -v for at least one kernel, got:\n{log}")
    if apart := sorted(set(frames) - set(entries)):
        raise ValueError(f"device functions must be inlined, these are not: {', '.join(apart)}")
    kernels = []
    for name, (registers, rest) in zip(entries, used, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                name=name,
                architecture=architecture,
                registers=int(registers),
                static_shared_bytes=int(shared[1]) if shared else 0,
                local_bytes=frames[name][0],
                spill_bytes=frames[name][1],
                threads=bounds.get(name),
            )
        )
    return kernels


def compile_kernels(source: Path, architecture: str, output: Path) -> list[Kernel]:
    """Compile a ``.cu`` for an architecture ("80"), leave cubin and PTX in a folder, and return its kernels.

    Raises:
        ValueError: it does not compile, or what ptxas says is not understood.

    """
    with tempfile.TemporaryDirectory() as kept:
        command = [str(harness._nvcc()), "-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"]
        command += [f"-arch=sm_{architecture}"]
        command += ["-Xcompiler=-Wall,-Wextra", "-cubin", "--keep", "--keep-dir", kept]
        command += ["-o", str(output / f"{source.stem}.sm_{architecture}.cubin"), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        log = result.stdout + result.stderr
        if result.returncode != 0:
            raise ValueError(f"{source.name} does not compile for sm_{architecture}:\n{log}")
        ptx = (Path(kept) / f"{source.stem}.ptx").read_text()
        (output / f"{source.stem}.sm_{architecture}.ptx").write_text(ptx)
        return parse(log, ptx, architecture)


def compile_all(
    sources: Iterable[Path], architectures: Iterable[str], output: Path, jobs: int
) -> tuple[list[Kernel], list[str]]:
    """Compile all sources for all architectures; return the kernels, and what is wrong with them."""
    output.mkdir(parents=True, exist_ok=True)
    pairs = [(source, architecture) for source in sources for architecture in architectures]

    def attempt(pair: tuple[Path, str]) -> tuple[list[Kernel], list[str]]:
        try:
            return compile_kernels(*pair, output), []
        except ValueError as error:
            return [], [f"{pair[0].name} sm_{pair[1]}: {error}"]

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(attempt, pairs))
    kernels = [kernel for compiled, _ in results for kernel in compiled]
    faults = [fault for _, errors in results for fault in errors]
    faults += [f"{k.name} sm_{k.architecture} {fault}" for k in kernels for fault in k.faults()]
    return kernels, faults


def table(kernels: Iterable[Kernel]) -> str:
    """Return one line for each kernel and architecture."""
    lines = [
        f"{'kernel':<52} {'sm':>4} {'threads':>7} {'registers':>9} {'static':>7} {'dynamic':>8} "
        f"{'spills':>6} {'local':>5} {'resident':>8}"
    ]
    for kernel in sorted(kernels, key=lambda k: (k.name, int(k.architecture))):
        lines.append(
            f"{kernel.name:<52} {kernel.architecture:>4} {kernel.threads or '-':>7} {kernel.registers:>9} "
            f"{kernel.static_shared_bytes:>7} {kernel.dynamic_shared_bytes():>8} {kernel.spill_bytes:>6} "
            f"{kernel.local_bytes:>5} {kernel.resident_blocks():>8}"
        )
    return "\n".join(lines)


def as_record(kernel: Kernel) -> dict[str, object]:
    """Return a kernel as the report holds it."""
    return {
        **asdict(kernel),
        "dynamic_shared_bytes": kernel.dynamic_shared_bytes(),
        "resident_blocks": kernel.resident_blocks(),
    }
