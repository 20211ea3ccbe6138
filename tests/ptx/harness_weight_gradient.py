"""Runs the PTX of block_sparse_linear_weight_gradient.cu as its launcher does."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from . import harness
from .mutants import entry_of

OP = "block_sparse_linear_weight_gradient"
BF16 = np.dtype(np.uint16)  # bfloat16 as its bits
DTYPES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", BF16: "bfloat16"}


def op_of(kernel: str) -> str:
    """Return what a kernel's name begins with: the op, which its source is named after."""
    end = "weight_gradient"
    return kernel[: kernel.index(end) + len(end)]


@functools.cache
def _ptx_of_kernel(kernel: str, arch: str) -> str:
    return entry_of(harness.ptx_of(op_of(kernel), arch), kernel)


def to_float(array: np.ndarray) -> np.ndarray:
    """Return float64 values of an array whose uint16 are bits of bfloat16."""
    if array.dtype == BF16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def operand(matrix: np.ndarray, name: str, offset: int) -> tuple[tuple, bool]:
    """Return a MatrixView of exactly the memory spanned, and whether its rows are aligned to 16 bytes."""
    bits = matrix.view(f"u{matrix.itemsize}")  # a pattern of ones is NaN in each type
    rows, cols = matrix.shape
    stride = matrix.strides[0] // matrix.itemsize if rows > 1 else cols
    memory = np.full((rows - 1) * stride + cols if rows else 0, np.iinfo(bits.dtype).max, bits.dtype)
    view = np.lib.stride_tricks.as_strided(
        memory, matrix.shape, (stride * bits.itemsize, bits.itemsize), writeable=True
    )
    view[...] = bits
    pointer = harness._ptxsim().In(memory, name, misalign=offset * bits.itemsize) if memory.size else None
    ends = offset | cols | (stride if rows > 1 else 0)
    aligned = ends * bits.itemsize % 16 == 0
    return (pointer, np.int64(rows), np.int64(cols), np.int64(stride)), aligned


def empty_gradient(kept: int, blocksize: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Return a gradient that is NaN everywhere."""
    rows, cols = blocksize
    return np.full((kept, cols, rows), np.nan if dtype != BF16 else 0xFFFF, dtype)


def run_plan(
    plan: dict,
    views: tuple,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    grad_values: np.ndarray,
    added: tuple = (),
    *,
    arch: str = "compute_80",
    order: str = "forward",
    seed: int = 0,
    ptx_transform: Callable[[str], str] | None = None,
    transformed: str = "product",
    max_instructions: int = 10**8,
) -> list[str]:
    """Run the kernels of a plan, fill ``grad_values``, and return the findings.

    ``views`` are the MatrixViews of input and grad_output; ``added`` is what the product's arguments have
    beside those of the linear layer. ``ptx_transform`` changes the kernel of the product, or that of the
    "sum" of its slices.
    """
    if plan["product"]["grid"][0] == 0:
        return []
    ptxsim = harness._ptxsim()
    partial_sums = np.full((plan["slices"], *grad_values.shape), np.nan, np.float32)
    result = ptxsim.Out(grad_values, "grad_values")
    several = plan["slices"] > 1
    cols, rows = grad_values.shape[1:]

    def arguments(result: object, partial: object) -> tuple:
        # BlockSparseLinearWeightGradientCudaArgs of its header, member by member.
        return (
            *views,
            harness._pointer(crow_indices, "crow_indices"),
            harness._pointer(col_indices, "col_indices"),
            *(np.int64(crow_indices.size - 1), np.int64(rows), np.int64(cols), result),
            *(np.int64(plan["samples_per_slice"]), np.int64(plan["slices"]), np.int64(grad_values.size)),
            partial,
        )

    def launch(step: str, args: tuple) -> list[str]:
        kernel = plan[step]["kernel"]
        ptx = _ptx_of_kernel(kernel, arch)
        changed = ptx_transform(ptx) if ptx_transform and step == transformed else ptx
        return harness._launch(
            op_of(kernel), plan[step], args, arch, order, seed, lambda _: changed, max_instructions
        )

    product = arguments(
        None if several else result, ptxsim.Out(partial_sums, "partial_sums") if several else None
    )
    findings = launch("product", (*product, *added))
    if several:
        findings += launch("sum", arguments(result, ptxsim.In(partial_sums, "partial_sums")))
    return findings


def block_sparse_linear_weight_gradient(
    grad_output: np.ndarray,
    input: np.ndarray,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    blocksize: tuple[int, int],
    *,
    allow_tf32: bool = False,
    offset: int = 0,
    **options: object,
) -> tuple[np.ndarray, list[str], dict]:
    """Return the gradient, the findings, and the plan; what was left out is NaN.

    ``offset`` counts the elements by which both operands begin after a multiple of 16 bytes; ``options`` are
    those of ``run_plan``.
    """
    from fastprune import _C

    grad_values = empty_gradient(len(col_indices), blocksize, grad_output.dtype)
    grad_view, grad_aligned = operand(grad_output, "grad_output", offset)
    input_view, input_aligned = operand(input, "input", offset)
    plan = _C.plan_block_sparse_linear_weight_gradient_cuda(
        samples=len(input),
        in_features=input.shape[1],
        out_features=grad_output.shape[1],
        rows=blocksize[0],
        cols=blocksize[1],
        kept=len(col_indices),
        dtype=DTYPES[grad_output.dtype],
        allow_tf32=allow_tf32,
        aligned=grad_aligned and input_aligned,
    )
    views = (*input_view, *grad_view)
    findings = run_plan(plan, views, crow_indices, col_indices, grad_values, **options)
    return grad_values, findings, plan
