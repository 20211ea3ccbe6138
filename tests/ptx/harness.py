"""Runs the kernels' real PTX on the CPU, in the simulator ptxsim: one function for each op.

The simulator is the directory that FASTPRUNE_PTXSIM names, else ``../shared/ptxsim`` beside the
checkout. Kernels are launched as their launchers do: the geometry comes from ``fastprune._C``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from . import budgets, records

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "csrc" / "kernels" / "cuda"
ACTIVATIONS = {"none": 0, "relu": 1}  # of csrc/kernels/types.h
# Blocks interleaved and warps pre-empted at random, so that an order that happens to hold in the
# plain schedules is broken too.
RANDOM_SCHEDULE = {"resident": 3, "quantum": 9}


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
    """Return the PTX of an op's kernels as nvcc makes it."""
    return _ptxsim().compile(str(KERNELS / f"{op}.cu"), arch=arch, flags=["-std=c++17"], nvcc=_nvcc()).ptx


@functools.lru_cache(maxsize=8)
def _module(ptx: str) -> object:
    return _ptxsim().Module(ptx)


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
    findings = [*result.errors, *result.warnings]
    if result.fatal:
        findings.append(f"[fatal] {result.fatal}")
    findings += [f"[unwritten-output] {n} bytes of {name}" for name, n in result.unwritten.items() if n]
    findings += budgets.launch_findings(plan["kernel"], plan["shared_bytes"])
    records.launch(plan, arguments, arch, findings)
    return findings


def _pointer(array: np.ndarray | None, name: str) -> object:
    """Return a read-only argument; an empty tensor is a null pointer, as torch's is."""
    return None if array is None or array.size == 0 else _ptxsim().In(np.ascontiguousarray(array), name)


def _rows_in_memory(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Return exactly the memory that a matrix spans, NaN between its rows, and the row stride."""
    rows, cols = matrix.shape
    stride = matrix.strides[0] // matrix.itemsize if rows > 1 else cols
    memory = np.full((rows - 1) * stride + cols if rows else 0, np.nan, matrix.dtype)
    view = np.lib.stride_tricks.as_strided(
        memory, matrix.shape, (stride * matrix.itemsize, matrix.itemsize), writeable=True
    )
    view[...] = matrix
    return memory, stride


def block_sparse_linear(
    input: np.ndarray,
    packed_values: np.ndarray,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    bias: np.ndarray | None,
    out_features: int,
    activation: str,
    *,
    arch: str = "compute_80",
    order: str = "forward",
    seed: int = 0,
    ptx_transform: Callable[[str], str] | None = None,
    max_instructions: int = 10**8,
) -> tuple[np.ndarray, list[str]]:
    """Return the output of the float32 forward kernel, and the findings; what it left out is NaN."""
    from fastprune import _C

    samples, in_features = input.shape
    _, cols, rows = packed_values.shape
    output = np.full((samples, out_features), np.nan, np.float32)
    plan = _C.plan_block_sparse_linear_cuda(
        samples=samples, in_features=in_features, out_features=out_features, rows=rows, cols=cols
    )
    if plan["grid"][0] == 0:
        return output, []
    memory, row_stride = _rows_in_memory(input)
    # BlockSparseLinearArgs<float> of csrc/kernels/block_sparse_linear.h, member by member.
    arguments = (
        *(_pointer(memory, "input"), np.int64(samples), np.int64(in_features), np.int64(row_stride)),
        _pointer(packed_values, "packed_values"),
        _pointer(crow_indices, "crow_indices"),
        _pointer(col_indices, "col_indices"),
        *(np.int64(crow_indices.size - 1), np.int64(rows), np.int64(cols)),
        _pointer(bias, "bias"),
        *(_ptxsim().Out(output, "output"), np.int64(samples), np.int64(out_features), np.int64(out_features)),
        *(np.int32(ACTIVATIONS[activation]), bytes(4)),
    )
    findings = _launch(
        "block_sparse_linear", plan, arguments, arch, order, seed, ptx_transform, max_instructions
    )
    return output, findings
