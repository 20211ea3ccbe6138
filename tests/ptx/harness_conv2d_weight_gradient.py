"""Runs the PTX of block_sparse_conv2d_weight_gradient.cu as its launcher does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .harness_weight_gradient import DTYPES, empty_gradient, operand, run_plan

OP = "block_sparse_conv2d_weight_gradient"


@dataclass(frozen=True)
class Geometry:
    """What a convolution is besides its weight; padding is top, bottom, left, right."""

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the outputs of images of a size."""
        top, bottom, left, right = self.padding
        padded = (height + top + bottom, width + left + right)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        rows, columns = ((p - r) // s + 1 for p, r, s in zip(padded, reach, self.stride, strict=True))
        return rows, columns


def plan_of(
    input_size: tuple[int, int, int, int],
    out_channels: int,
    geometry: Geometry,
    blocksize: tuple[int, int],
    kept: int,
    dtype: str,
    *,
    allow_tf32: bool = False,
    aligned: bool = True,
) -> dict:
    """Return the launch plan for images of a size: images, channels, height, width."""
    from fastprune import _C

    return _C.plan_block_sparse_conv2d_weight_gradient_cuda(
        input_size=input_size,
        out_channels=out_channels,
        output_size=geometry.output_size(*input_size[2:]),
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        rows=blocksize[0],
        cols=blocksize[1],
        kept=kept,
        dtype=dtype,
        allow_tf32=allow_tf32,
        aligned=aligned,
    )


def block_sparse_conv2d_weight_gradient(
    grad_output: np.ndarray,
    input: np.ndarray,
    crow_indices: np.ndarray,
    col_indices: np.ndarray,
    blocksize: tuple[int, int],
    geometry: Geometry,
    *,
    allow_tf32: bool = False,
    offset: int = 0,
    **options: object,
) -> tuple[np.ndarray, list[str], dict]:
    """Return the gradient, the findings, and the plan; what was left out is NaN.

    Both tensors lie channels-last, ``[images, height, width, channels]``. ``offset`` counts the elements by
    which both begin after a multiple of 16 bytes; ``options`` are those of ``run_plan``.
    """
    images, height, width, in_channels = input.shape
    out_channels = grad_output.shape[3]
    groups, cols = geometry.groups, blocksize[1]
    grad_values = empty_gradient(len(col_indices), blocksize, grad_output.dtype)
    grad_view, _ = operand(grad_output.reshape(-1, out_channels), "grad_output", offset)
    pixels, _ = operand(input.reshape(-1, in_channels), "input", offset)
    plan = plan_of(
        (images, in_channels, height, width),
        out_channels,
        geometry,
        blocksize,
        len(col_indices),
        DTYPES[grad_output.dtype],
        allow_tf32=allow_tf32,
        aligned=offset * input.itemsize % 16 == 0,
    )
    # What BlockSparseConv2dWeightGradientCudaArgs adds, filled up to 8 bytes.
    added: tuple = ()
    if not plan["pointwise"]:
        channel_blocks = -(-(in_channels // groups) // cols)
        added = (
            *(np.uint32(value % 2**32) for value in plan["positions"]),
            *(np.int32(channel_blocks), np.int32(out_channels // groups)),
            *(np.uint32(in_channels * input.itemsize), np.uint32(0)),
        )
    input_view = (pixels[0], grad_view[1], np.int64(in_channels // groups), np.int64(in_channels))
    views = (*input_view, *grad_view)
    findings = run_plan(plan, views, crow_indices, col_indices, grad_values, added, **options)
    return grad_values, findings, plan
