"""block_sparse_linear, its input gradient and the transposed structure, in the simulator.

float32 arrays stand for float32 or, with ``allow_tf32``, tf32; float16 for float16; uint16 for bfloat16.
"""

from __future__ import annotations

import numpy as np

from . import harness

# The source that an arithmetic's tensor-core kernels are in, by array type.
_SOURCES = {np.dtype(np.float32): "tf32", np.dtype(np.float16): "f16", np.dtype(np.uint16): "bf16"}
_ARITHMETICS = {"tf32": "tf32", "f16": "float16", "bf16": "bfloat16"}


def arithmetic_of(dtype: np.dtype, allow_tf32: bool) -> str:
    """Return the name that the launch plan knows an array type by."""
    if dtype == np.float32 and not allow_tf32:
        return "float32"
    return _ARITHMETICS[_SOURCES[np.dtype(dtype)]]


def source_of(kernel: str) -> str:
    """Return the stem of the source file that a kernel is in."""
    if kernel in ("block_sparse_linear_f32", "block_sparse_linear_f16", "block_sparse_linear_bf16"):
        return "block_sparse_linear"
    return next(f"block_sparse_linear_{type}" for type in _SOURCES.values() if f"_{type}_" in kernel)


def plan_of(
    input: np.ndarray,
    packed_values: np.ndarray,
    output_features: int,
    allow_tf32: bool,
    input_gradient: bool,
    multiprocessors: int,
    misalign_input: int = 0,
    misalign_weight: int = 0,
) -> dict:
    """Return the launch plan of the forward, or of the input gradient."""
    from fastprune import _C

    samples, features = input.shape
    kept, cols, rows = packed_values.shape
    row_stride = harness._rows_in_memory(input)[1] if samples > 1 else 0
    in_features, out_features = (output_features, features) if input_gradient else (features, output_features)
    return _C.plan_block_sparse_linear_cuda(
        samples=samples,
        in_features=in_features,
        out_features=out_features,
        rows=rows,
        cols=cols,
        kept=kept,
        arithmetic=arithmetic_of(input.dtype, allow_tf32),
        input_gradient=input_gradient,
        aligned=misalign_weight % 16 == 0,
        aligned_input=(misalign_input | (row_stride | features) * input.itemsize) % 16 == 0,
        multiprocessors=multiprocessors,
    )


def _block_product(
    input: np.ndarray,
    packed_values: np.ndarray,
    lists: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    bias: np.ndarray | None,
    output_features: int,
    activation: str,
    input_gradient: bool,
    *,
    allow_tf32: bool = False,
    multiprocessors: int = 1,
    misalign_input: int = 0,
    misalign_weight: int = 0,
    arch: str = "compute_80",
    **options,
) -> tuple[np.ndarray, list[str]]:
    samples, features = input.shape
    _, cols, rows = packed_values.shape
    offsets, sources, blocks = lists
    output = np.full((samples, output_features), harness.nan_of(input.dtype), input.dtype)
    plan = plan_of(
        input,
        packed_values,
        output_features,
        allow_tf32,
        input_gradient,
        multiprocessors,
        misalign_input,
        misalign_weight,
    )
    if plan["grid"][0] == 0:
        return output, []
    memory, row_stride = harness._rows_in_memory(input)
    outputs, steps = (cols, rows) if input_gradient else (rows, cols)
    strides = (rows, 1) if input_gradient else (1, rows)
    # BlockProductArgs of csrc/kernels/block_product.h, member by member.
    arguments = (
        harness._pointer(memory, "input", misalign_input),
        *(np.int64(samples), np.int64(features), np.int64(row_stride)),
        harness._pointer(packed_values, "packed_values", misalign_weight),
        harness._pointer(offsets, "offsets"),
        harness._pointer(sources, "sources"),
        harness._pointer(blocks, "blocks"),
        *(np.int64(size) for size in (offsets.size - 1, outputs, steps, *strides)),
        harness._pointer(bias, "bias"),
        harness._ptxsim().Out(output, "output"),
        *(np.int64(samples), np.int64(output_features), np.int64(output_features)),
        *(np.int32(harness.ACTIVATIONS[activation]), bytes(4)),
    )
    options = {"order": "forward", "seed": 0, "ptx_transform": None, "max_instructions": 10**8, **options}
    findings = harness._launch(source_of(plan["kernel"]), plan, arguments, arch, **options)
    return output, findings


def block_sparse_linear(
    input: np.ndarray,
    packed_values: np.ndarray,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    bias: np.ndarray | None,
    out_features: int,
    activation: str,
    **options,
) -> tuple[np.ndarray, list[str]]:
    """Return the output of the forward, and the findings; what it left out is NaN.

    Options are ``allow_tf32``, ``multiprocessors`` (1: large tiles from 129 samples on), ``misalign_input``
    and ``misalign_weight`` (bytes), and those of ``harness._launch``.
    """
    lists = (crow_indices, col_indices, None)
    return _block_product(input, packed_values, lists, bias, out_features, activation, False, **options)


def transposed_structure(
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    block_cols: int,
    *,
    arch: str = "compute_80",
    **options,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[str]]:
    """Return offsets, sources and blocks of the block columns, and the findings."""
    from fastprune import _C

    plan = _C.plan_transposed_structure_cuda(block_cols=block_cols)
    kept = col_indices.size
    results = tuple(np.full(size, -1, np.int32) for size in (block_cols + 1, kept, kept))
    names = ("offsets", "sources", "blocks")
    outputs = (
        harness._ptxsim().Out(array, name) if array.size else None
        for array, name in zip(results, names, strict=True)
    )
    arguments = (
        harness._pointer(crow_indices, "crow_indices"),
        harness._pointer(col_indices, "col_indices"),
        np.int64(crow_indices.size - 1),
        *outputs,
    )
    options = {"order": "forward", "seed": 0, "ptx_transform": None, "max_instructions": 10**8, **options}
    findings = harness._launch("transposed_structure", plan, arguments, arch, **options)
    return results, findings


def block_sparse_linear_input_gradient(
    grad_output: np.ndarray,
    packed_values: np.ndarray,
    lists: tuple[np.ndarray, np.ndarray, np.ndarray],
    in_features: int,
    **options,
) -> tuple[np.ndarray, list[str]]:
    """Return the input gradient, and the findings; ``lists`` is the transposed structure."""
    return _block_product(grad_output, packed_values, lists, None, in_features, "none", True, **options)
