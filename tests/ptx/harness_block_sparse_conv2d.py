"""block_sparse_conv2d, its input gradient and the lists of the latter, in the simulator.

Images are channels-last arrays ``[images, height, width, channels]``; array types stand for dtypes as in
:mod:`harness_block_sparse_linear`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import harness

PLAIN = ("block_sparse_conv2d_f32", "block_sparse_conv2d_f16", "block_sparse_conv2d_bf16")


def source_of(kernel: str) -> str:
    """Return the stem of the source file that a kernel is in."""
    if kernel in PLAIN:
        return "block_sparse_conv2d"
    return next(f"block_sparse_conv2d_{type}" for type in ("tf32", "bf16", "f16") if f"_{type}_" in kernel)


@dataclass(frozen=True)
class Convolution:
    """What a call is besides its tensors: sizes, geometry, and what chooses the kernel."""

    images: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    rows: int
    cols: int
    arithmetic: str
    multiprocessors: int = 1
    misalign_input: int = 0
    misalign_weight: int = 0

    def output_size(self) -> tuple[int, int]:
        """Return height and width of the output."""
        padded = (
            self.height + self.padding[0] + self.padding[1],
            self.width + self.padding[2] + self.padding[3],
        )
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        sizes = zip(padded, reach, self.stride, strict=True)
        return tuple((size - reach) // step + 1 for size, reach, step in sizes)  # type: ignore[return-value]

    def call(self, kept: int) -> object:
        """Return the call as the launch plans take it."""
        from fastprune import _C

        return _C.Conv2dCall(
            images=self.images,
            in_channels=self.in_channels,
            height=self.height,
            width=self.width,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            rows=self.rows,
            cols=self.cols,
            kept=kept,
            arithmetic=self.arithmetic,
            aligned=self.misalign_weight % 16 == 0,
            aligned_input=self.misalign_input % 16 == 0,
            multiprocessors=self.multiprocessors,
        )

    def plans(self, kept: int, input_gradient: bool) -> list[dict]:
        """Return the launch plans: one, or that of each phase of the input."""
        from fastprune import _C

        call = self.call(kept)
        if not input_gradient:
            return [_C.plan_block_sparse_conv2d_cuda(call)]
        phases = itertools.product(
            range(min(self.stride[0], self.height)), range(min(self.stride[1], self.width))
        )
        return [_C.plan_block_sparse_conv2d_input_gradient_cuda(call, *phase) for phase in phases]


def _integers(geometry: bytes) -> list[np.int32]:
    return list(np.frombuffer(geometry, np.int32))


def _product(
    convolution: Convolution,
    plans: list[dict],
    input: np.ndarray,
    packed_values: np.ndarray,
    lists: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    bias: np.ndarray | None,
    output_shape: tuple[int, ...],
    activation: str,
    *,
    arch: str = "compute_80",
    **options,
) -> tuple[np.ndarray, list[str]]:
    input_gradient = lists[2] is not None
    _, cols, rows = packed_values.shape
    offsets, sources, blocks = lists
    output = np.full(output_shape, harness.nan_of(input.dtype), input.dtype)
    options = {"order": "forward", "seed": 0, "ptx_transform": None, "max_instructions": 10**8, **options}
    ptxsim = harness._ptxsim()
    # One of several launches leaves outputs to the others.
    target = ptxsim.Out(output, "output") if len(plans) == 1 else ptxsim.InOut(output, "output")
    sizes = (cols, rows, rows, 1) if input_gradient else (rows, cols, 1, rows)
    findings = []
    for plan in plans:
        if plan["grid"][0] == 0:
            continue
        # ConvolutionProductArgs of csrc/kernels/cuda/block_sparse_conv2d_geometry.h, member by member.
        arguments = (
            *_integers(plan["input_geometry"]),
            harness._pointer(input, "input", convolution.misalign_input),
            harness._pointer(packed_values, "packed_values", convolution.misalign_weight),
            harness._pointer(offsets, "offsets"),
            harness._pointer(sources, "sources"),
            harness._pointer(blocks, "blocks"),
            *(np.int64(size) for size in (plan["lists"], *sizes)),
            harness._pointer(bias, "bias"),
            *_integers(plan["output_geometry"]),
            target,
            *(np.int32(harness.ACTIVATIONS[activation]), bytes(4)),
        )
        findings += harness._launch(source_of(plan["kernel"]), plan, arguments, arch, **options)
    return output, findings


def block_sparse_conv2d(
    convolution: Convolution,
    input: np.ndarray,
    packed_values: np.ndarray,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    bias: np.ndarray | None,
    activation: str,
    **options,
) -> tuple[np.ndarray, list[str]]:
    """Return the output of the forward, and the findings; what it left out is NaN.

    Options are those of ``harness._launch``.
    """
    shape = (convolution.images, *convolution.output_size(), convolution.out_channels)
    plans = convolution.plans(len(packed_values), False)
    lists = (crow_indices, col_indices, None)
    return _product(convolution, plans, input, packed_values, lists, bias, shape, activation, **options)


def block_sparse_conv2d_input_gradient(
    convolution: Convolution,
    grad_output: np.ndarray,
    packed_values: np.ndarray,
    lists: tuple[np.ndarray, np.ndarray, np.ndarray],
    **options,
) -> tuple[np.ndarray, list[str]]:
    """Return the input gradient, and the findings; ``lists`` is what :func:`structure` returns."""
    shape = (convolution.images, convolution.height, convolution.width, convolution.in_channels)
    plans = convolution.plans(len(packed_values), True)
    return _product(convolution, plans, grad_output, packed_values, lists, None, shape, "none", **options)


def structure(
    convolution: Convolution,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    *,
    arch: str = "compute_80",
    **options,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[str]]:
    """Return offsets, sources and blocks of the lists of the input gradient, and the findings."""
    from fastprune import _C

    channel_blocks = -(-(convolution.in_channels // convolution.groups) // convolution.cols)
    lists = convolution.groups * channel_blocks
    plan = _C.plan_block_sparse_conv2d_structure_cuda(
        kernel_size=convolution.kernel_size,
        stride=convolution.stride,
        dilation=convolution.dilation,
        lists=lists,
    )
    kept = col_indices.size
    taps = convolution.kernel_size[0] * convolution.kernel_size[1]
    results = tuple(np.full(size, -1, np.int32) for size in (lists * taps + 1, kept, kept))
    outputs = (
        harness._ptxsim().Out(array, name) if array.size else None
        for array, name in zip(results, ("offsets", "sources", "blocks"), strict=True)
    )
    arguments = (
        harness._pointer(crow_indices, "crow_indices"),
        harness._pointer(col_indices, "col_indices"),
        *outputs,
        *_integers(plan["row_classes"]),
        *_integers(plan["column_classes"]),
        *(np.int32(size) for size in ((crow_indices.size - 1) // convolution.groups, channel_blocks)),
        *(np.int32(convolution.groups), bytes(4)),
    )
    options = {"order": "forward", "seed": 0, "ptx_transform": None, "max_instructions": 10**8, **options}
    findings = harness._launch("block_sparse_conv2d_structure", plan, arguments, arch, **options)
    return results, findings
