"""Runs the kernels' real PTX on the CPU, in the simulator ptxsim: one function for each op.

The simulator is the directory that FASTPRUNE_PTXSIM names, else ``../shared/ptxsim`` beside the
checkout. Kernels are launched as their launchers do: the geometry comes from ``fastprune._C``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from . import budgets, records

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "csrc" / "kernels" / "cuda"
# Of csrc/kernels/types.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "relu6": 5}
# Blocks interleaved and warps pre-empted at random, so that an order that happens to hold in the
# plain schedules is broken too.
RANDOM_SCHEDULE = {"resident": 3, "quantum": 9}
# All combinations of edges and all mutants, some minutes (`make cuda-check`); else a sample of them.
FULL_SWEEP = os.environ.get("FASTPRUNE_PTX_SWEEP") == "full"
# Orders of blocks and warps, with the seed of random ones.
SCHEDULES = [("forward", 0), ("random", 1)]
if FULL_SWEEP:
    SCHEDULES += [("reverse", 0), ("random", 2)]


def _nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _simulator_file() -> Path:
    folder = os.environ.get("FASTPRUNE_PTXSIM") or REPOSITORY.parent / "shared" / "ptxsim"
    return Path(folder) / "ptxsim.py"


def unavailable_reason() -> str | None:
    """Return what is missing to run PTX here, or None."""
    if not _simulator_file().is_file():
        return f"no PTX simulator: {_simulator_file()} does not exist, and FASTPRUNE_PTXSIM names no other"
    if _nvcc() is None:
        return "nvcc, which makes the PTX, was not found"
    if shutil.which("g++") is None:
        return "g++, which compiles the PTX simulator, was not found"
    return None


@functools.cache
def _ptxsim() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxsim", _simulator_file())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def ptx_of(op: str, arch: str = "compute_80") -> str:
    """Return the PTX of an op's kernels as nvcc makes it, or has made it in FASTPRUNE_PTX_FOLDER."""
    if folder := os.environ.get("FASTPRUNE_PTX_FOLDER"):
        made = Path(folder) / f"{op}.{arch.replace('compute', 'sm')}.ptx"
        if made.is_file():
            return made.read_text()
    return _ptxsim().compile(str(KERNELS / f"{op}.cu"), arch=arch, flags=["-std=c++17"], nvcc=_nvcc()).ptx


@functools.lru_cache(maxsize=8)
def _module(ptx: str) -> object:
    return _ptxsim().Module(ptx)


_last_stats: dict[str, int] = {}
_instructions: list[int] = []


def last_stats() -> dict[str, int]:
    """Return what the simulator counted in the latest launch: instructions, accesses, bank conflicts."""
    return dict(_last_stats)


@contextlib.contextmanager
def instructions() -> Iterator[list[int]]:
    """Collect how many instructions the warps of each launch execute."""
    _instructions.clear()
    yield _instructions


def _launch(
    op: str,
    plan: dict,
    arguments: tuple,
    arch: str,
    order: str,
    seed: int,
    ptx_transform: Callable[[str], str] | None,
    max_instructions: int,
) -> list[str]:
    """Run one kernel, whose only parameter is a struct, and return the simulator's findings."""
    ptx = ptx_of(op, arch)
    module = _module(ptx_transform(ptx) if ptx_transform else ptx)
    result = module.launch(
        plan["kernel"],
        grid=plan["grid"],
        block=plan["block"],
        args=[arguments],
        shared=plan["shared_bytes"],
        order=order,
        seed=seed,
        max_instr=max_instructions,
        **(RANDOM_SCHEDULE if order == "random" else {}),
    )
    _last_stats.clear()
    _last_stats.update(result.stats)
    _instructions.append(result.stats["warp_instr"])
    findings = [*result.errors, *result.warnings]
    if result.fatal:
        findings.append(f"[fatal] {result.fatal}")
    findings += [f"[unwritten-output] {n} bytes of {name}" for name, n in result.unwritten.items() if n]
    findings += budgets.launch_findings(plan["kernel"], plan["shared_bytes"])
    records.launch(plan, arguments, arch, findings)
    return findings


def _pointer(array: np.ndarray | None, name: str, misalign: int = 0) -> object:
    """Return a read-only argument, `misalign` bytes past an aligned address; an empty tensor is null."""
    if array is None or array.size == 0:
        return None
    return _ptxsim().In(np.ascontiguousarray(array), name, misalign=misalign)


def nan_of(dtype: np.dtype) -> float | int:
    """Return a NaN of a type; uint16 holds bfloat16."""
    return 0x7FC0 if dtype == np.uint16 else np.nan


def _rows_in_memory(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Return exactly the memory that a matrix spans, NaN between its rows, and the row stride."""
    rows, cols = matrix.shape
    stride = matrix.strides[0] // matrix.itemsize if rows > 1 else cols
    memory = np.full((rows - 1) * stride + cols if rows else 0, nan_of(matrix.dtype), matrix.dtype)
    view = np.lib.stride_tricks.as_strided(
        memory, matrix.shape, (stride * matrix.itemsize, matrix.itemsize), writeable=True
    )
    view[...] = matrix
    return memory, stride
