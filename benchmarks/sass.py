"""Reads the machine code of CUDA kernels: their loops, and what one turn of the hot one asks for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# Bytes that a warp moves, by the width in an instruction's name; without one it is 32 bits a lane.
WARP_BYTES = {"U8": 32, "S8": 32, "U16": 64, "S16": 64, "64": 256, "128": 512}
PRODUCTS = ("HMMA", "HGMMA", "LDSM")
WARPS_OF_A_GROUP = 4  # HGMMA is one instruction of four warps


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: ``opcode`` with its modifiers, ``operands`` as nvdisasm prints them."""

    address: int
    opcode: str
    operands: str

    @property
    def parts(self) -> list[str]:
        """The opcode's name and its modifiers."""
        return self.opcode.split(".")

    @property
    def warp_bytes(self) -> int:
        """Bytes that a warp loads or stores; every lane is taken to be active."""
        if self.operands.startswith("RZ,"):  # a load that never runs, put before some copies
            return 0
        if self.parts[0] == "LDSM":  # LDSM.16.M88.4: that many 8 x 8 matrices of 16 bits
            return 128 * int(self.parts[-1]) if self.parts[-1] in ("2", "4") else 128
        return next((WARP_BYTES[part] for part in self.parts[1:] if part in WARP_BYTES), 128)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one warp: of a matrix instruction, or of 32 lanes."""
        name = self.parts[0]
        if name == "HMMA":  # HMMA.16816.F32.BF16, HMMA.1688.F32.TF32
            return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}[self.parts[1]]
        if name == "HGMMA":  # HGMMA.64x128x16.F32.BF16
            m, n, k = map(int, self.parts[1].split("x"))
            return m * n * k // WARPS_OF_A_GROUP
        return 32 if name == "FFMA" else 0

    @property
    def operand_bytes(self) -> int:
        """Bytes of shared memory that a matrix instruction reads by itself, for one of its warps."""
        if self.parts[0] != "HGMMA":
            return 0
        m, n, k = map(int, self.parts[1].split("x"))
        # The left factor may come from registers, which then stand before the descriptor.
        left = 0 if re.match(r"R\d+, R\d+, gdesc", self.operands) else m * k
        return 2 * (left + n * k) // WARPS_OF_A_GROUP


@dataclass(frozen=True)
class Loop:
    """Instructions from a branch's target to the branch, both included."""

    begin: int
    end: int

    def holds(self, other: Loop) -> bool:
        """Tell whether another loop lies within this one."""
        return self != other and self.begin <= other.begin and other.end <= self.end


@dataclass(frozen=True)
class Counts:
    """What one warp asks for in one turn of a loop.

    ``product_instructions`` multiply, or load the factors from shared memory, ``product_shared_bytes`` of
    them: a kernel that skips a block skips these. ``skippable_instructions`` are others that a branch within
    the loop may jump over.
    ``pending`` is how many groups of asynchronous copies may be under way at the wait, 0 where loads are
    waited for at once; ``opcodes`` counts instructions by name.
    """

    multiply_adds: int
    kind: str
    instructions: int
    shared_bytes: int
    global_bytes: int
    barriers: int
    pending: int
    product_instructions: int
    product_shared_bytes: int
    opcodes: Counter[str]
    skippable_instructions: int = 0


def find_nvdisasm() -> str | None:
    """Return nvdisasm of the PATH, of CUDA or of the triton wheel, or None."""
    folders = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    folders.append("/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))


def disassemble(cubin: Path) -> str:
    """Return nvdisasm's listing of a cubin.

    Raises:
        FileNotFoundError: there is no nvdisasm.

    """
    tool = find_nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm is needed: it comes with CUDA, and in the triton wheel")
    return subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


def parse(listing: str) -> dict[str, tuple[list[Instruction], dict[str, int]]]:
    """Return each kernel's instructions, and where its labels point."""
    kernels: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    code: list[Instruction] | None = None
    for line in listing.splitlines():
        if match := re.match(r"\.text\.([\w$]+):", line):
            code, labels, waiting = [], {}, []
            kernels[match[1]] = (code, labels)
        elif line.lstrip().startswith(".section"):
            code = None
        elif code is None:
            continue
        elif match := re.match(r"(\.L[\w$.]*):", line):
            waiting.append(match[1])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            code.append(Instruction(address, match[2], match[3].strip()))
    return kernels


def loops(code: Iterable[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Return the loops, one for each target of backward branches."""
    ends: dict[int, int] = {}
    for instruction in code:
        match = re.search(r"\.L[\w$.]*", instruction.operands)
        if instruction.parts[0] == "BRA" and match and match[0] in labels:
            target = labels[match[0]]
            # A branch to itself is the end of the code, not a loop.
            if target < instruction.address:
                ends[target] = max(ends.get(target, 0), instruction.address)
    return [Loop(begin, end) for begin, end in sorted(ends.items())]


def skippable(code: list[Instruction], labels: dict[str, int]) -> int:
    """Return how many instructions, but for products, lie between a branch and its target further on."""
    jumps = []
    for instruction in code:
        match = re.search(r"\.L[\w$.]*", instruction.operands)
        if instruction.parts[0] == "BRA" and match and match[0] in labels:
            jumps.append((instruction.address, labels[match[0]]))
    return sum(
        i.parts[0] not in PRODUCTS and any(begin < i.address < end for begin, end in jumps) for i in code
    )


def count(code: Iterable[Instruction]) -> Counts:
    """Return what one turn of these instructions asks for."""
    code = list(code)
    matrix = [i for i in code if i.parts[0] in ("HMMA", "HGMMA")]
    arithmetic = matrix or [i for i in code if i.parts[0] == "FFMA"]
    shared = sum(i.warp_bytes for i in code if i.parts[0] in ("LDS", "LDSM", "STS", "STSM", "LDGSTS"))
    waits = [
        int(m[1], 0)
        for i in code
        if (m := re.match(r"SB0, (0x[0-9a-f]+)", i.operands)) and i.parts[0] == "DEPBAR"
    ]
    # Beside matrix products plain loads of shared memory are bookkeeping.
    products = PRODUCTS if matrix else ("FFMA", "LDS")
    product = [i for i in code if i.parts[0] in products]
    return Counts(
        multiply_adds=sum(i.multiply_adds for i in arithmetic),
        kind=".".join(arithmetic[0].parts) if arithmetic else "none",
        instructions=len(code),
        shared_bytes=shared + sum(i.operand_bytes for i in matrix),
        global_bytes=sum(i.warp_bytes for i in code if i.parts[0] in ("LDG", "LDGSTS")),
        barriers=sum(i.parts[0] == "BAR" for i in code),
        pending=max(waits, default=0),
        product_instructions=len(product),
        product_shared_bytes=sum(
            i.operand_bytes + (i.warp_bytes if i.parts[0] in ("LDS", "LDSM") else 0) for i in product
        ),
        opcodes=Counter(i.parts[0] for i in code),
    )


@dataclass(frozen=True)
class HotLoop:
    """The loop that multiplies, and the step around it that loads.

    ``inner`` is one turn of the loop that itself holds most multiply-adds; ``step`` is one turn of the
    smallest loop around it that also loads from global memory, without ``inner``; all zero where that is the
    same loop.
    """

    inner: Counts
    step: Counts

    @property
    def pending(self) -> int:
        """Groups of copies under way at the wait."""
        return max(self.inner.pending, self.step.pending)


def hot_loop(code: list[Instruction], labels: dict[str, int]) -> HotLoop:
    """Return the hot loop of a kernel.

    Raises:
        ValueError: no loop multiplies.

    """
    found = loops(code, labels)

    def within(loop: Loop) -> list[Instruction]:
        return [i for i in code if loop.begin <= i.address <= loop.end]

    def itself(loop: Loop) -> list[Instruction]:
        nested = [other for other in found if loop.holds(other)]
        return [i for i in within(loop) if not any(n.begin <= i.address <= n.end for n in nested)]

    # Matrix products first: a kernel may keep another loop for what they cannot do.
    inner = max(
        found,
        key=lambda loop: ("MMA" in count(itself(loop)).kind, count(itself(loop)).multiply_adds),
        default=None,
    )
    if inner is None or count(itself(inner)).multiply_adds == 0:
        raise ValueError(f"`code` must have a loop that multiplies, got {len(found)} loops without")
    around = [
        inner,
        *sorted((loop for loop in found if loop.holds(inner)), key=lambda loop: loop.end - loop.begin),
    ]
    step = next((loop for loop in around if count(within(loop)).global_bytes), inner)
    rest = [i for i in within(step) if not inner.begin <= i.address <= inner.end]
    counts = replace(
        count(within(inner)), skippable_instructions=skippable(within(inner), labels) if step is inner else 0
    )
    return HotLoop(counts, count(rest))
