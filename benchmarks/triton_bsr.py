"""Compiles PyTorch's own block-sparse Triton kernel for an architecture, without a GPU.

PyTorch hides the kernel where it sees no GPU; told that Triton is there, it imports. Its host code then runs
on CPU tensors with a stand-in for the kernel, which notes the arguments: block shapes, strides and meta
parameters are those that PyTorch itself chooses for the device named. Needs the triton package.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# What PyTorch asks for the name of: it has tuned parameters for the first alone.
DEVICE_NAMES = {"80": "NVIDIA A100-SXM4-80GB", "90": "NVIDIA H100 80GB HBM3"}
POINTERS = {torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Compiled:
    """The kernel for one problem: where its machine code lies, and how it is launched."""

    cubin: Path
    grid: tuple[int, ...]
    tile_rows: int
    tile_samples: int
    step_columns: int
    warps: int
    stages: int
    registers: int
    shared_bytes: int


class _Recorder:
    """Stands in for the kernel and keeps what it would be launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **meta: Any) -> None:
            self.grid, self.arguments, self.meta = tuple(grid), arguments, meta

        return launch


def _triton_ops() -> ModuleType:
    """Import torch's Triton kernels also where there is no GPU."""
    # It asks this once, when it is imported.
    triton_state = importlib.import_module("torch.utils._triton")
    before = triton_state.has_triton
    triton_state.has_triton = lambda: True
    try:
        return importlib.import_module("torch.sparse._triton_ops")
    finally:
        triton_state.has_triton = before


def compile_bsr_kernel(
    architecture: str, samples: int, blocksize: int, out_features: int, in_features: int, folder: Path
) -> Compiled:
    """Compile ``_bsr_strided_addmm_kernel`` as ``bsr_dense_addmm`` launches it for bfloat16, without a bias.

    Raises:
        ModuleNotFoundError: there is no triton package.
        AttributeError: this torch has no such kernel.

    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = _triton_ops()
    kernel, name_of = module._bsr_strided_addmm_kernel, module._get_device_name
    recorder = _Recorder()
    module._bsr_strided_addmm_kernel, module._get_device_name = recorder, lambda: DEVICE_NAMES[architecture]
    try:
        rows, cols = out_features // blocksize, in_features // blocksize
        crow = torch.arange(0, rows * cols + 1, cols, dtype=torch.int32)
        col = torch.arange(cols, dtype=torch.int32).repeat(rows)
        values = torch.empty(rows * cols, blocksize, blocksize, dtype=torch.bfloat16)
        weight = torch.sparse_bsr_tensor(crow, col, values, (out_features, in_features))
        input = torch.empty(samples, in_features, dtype=torch.bfloat16)
        output = torch.empty(out_features, samples, dtype=torch.bfloat16)
        module.bsr_dense_addmm(output, weight, input.T, beta=0, alpha=1, out=output)
    finally:
        module._bsr_strided_addmm_kernel, module._get_device_name = kernel, name_of

    meta = dict(recorder.meta)
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    values_of = {**dict(zip(kernel.arg_names, recorder.arguments, strict=False)), **meta}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    # As Triton's launcher specialises: 1 is a constant, and what divides by 16 is known to.
    for index, parameter in enumerate(kernel.params):
        value = values_of[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(architecture), 32), options=options)
    cubin = folder / f"triton_bsr_{blocksize}_{samples}.sm_{architecture}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump -res-usage is not understood: {usage}")
    return Compiled(
        cubin=cubin,
        grid=recorder.grid,
        tile_rows=meta["BLOCKSIZE_ROW"],
        tile_samples=meta["BLOCKSIZE_COL"],
        step_columns=meta["BLOCKSIZE_INNER"],
        warps=options["num_warps"],
        stages=options["num_stages"],
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
    )
