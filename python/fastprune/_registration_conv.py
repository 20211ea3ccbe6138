"""What torch must know of the ops of block_sparse_conv2d: shapes, gradients, autocast and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._fake_checks import check, check_activation, check_floating, check_like
from ._registration import (
    CLIPPING,
    _check_blocks,
    _check_indices,
    activation_gradient,
    autograd_function,
    clipped_gradient,
)

_ops = torch.ops.fastprune


def _output_size(op: str, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Return height and width of the output of an image of ``size``, padded top, bottom, left, right."""
    result = []
    for d in range(2):
        padded = size[d] + padding[2 * d] + padding[2 * d + 1]
        reach = dilation[d] * (kernel[d] - 1) + 1
        check(
            size[d] >= 1 and padded >= reach,
            f"{op}: `input` must have a {('height', 'width')[d]} that with its padding holds the kernel's "
            f"{reach} pixels, got {size[d]}",
        )
        result.append((padded - reach) // stride[d] + 1)
    return result


def _check_channels(op: str, in_channels: int, out_channels: int, groups: int, rows: int) -> None:
    check(groups >= 1, f"{op}: `groups` must be >= 1, got {groups}")
    check(
        in_channels % groups == 0 and out_channels % groups == 0,
        f"{op}: `groups` must divide the channels, {in_channels} and {out_channels}, got {groups}",
    )
    check(
        groups == 1 or out_channels // groups % rows == 0,
        f"{op}: `groups` must have a multiple of the block's {rows} rows in output channels, "
        f"got {out_channels // groups}",
    )


def _check_geometry(op: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> None:
    for name, counts, size, least in (
        ("kernel_size", kernel_size, 2, 1),
        ("stride", stride, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
    ):
        check(len(counts) == size, f"{op}: `{name}` must have {size} integers, got {len(counts)}")
        check(min(counts) >= least, f"{op}: `{name}` must be >= {least}, got {list(counts)}")


def _check_images(op: str, name: str, images: Tensor) -> None:
    check_floating(op, name, images)
    check(images.dim() == 4, f"{op}: `{name}` must have 4 dimensions, got shape {list(images.shape)}")


def _is_channels_last(images: Tensor) -> bool:
    """Tell whether torch counts images as channels-last: by the order of the strides, in doubt not."""
    least = 0
    if images.stride(1) == 0:
        return False
    for d in (1, 3, 2, 0):
        if images.shape[d] == 0 or images.stride(d) < least or (d == 0 and least == images.stride(1)):
            return False
        least = images.stride(d) * max(images.shape[d], 1)
    return True


def _empty_images(like: Tensor, size: Any) -> Tensor:
    """Return a tensor in the memory format of another, on CUDA in the kernels'."""
    channels_last = like.is_cuda or _is_channels_last(like)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _forward_fake(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    allow_tf32: bool = False,
) -> Tensor:
    op = "block_sparse_conv2d"
    check_activation(op, activation)
    _check_geometry(op, kernel_size, stride, padding, dilation)
    _check_images(op, "input", input)
    _check_blocks(op, packed_values)
    check_like(op, input, packed_values=packed_values, bias=bias)
    rows = packed_values.shape[2]
    _check_channels(op, input.shape[1], out_channels, groups, rows)
    _check_indices(op, input, -(-out_channels // rows), crow_indices, col_indices)
    check(
        bias is None or tuple(bias.shape) == (out_channels,),
        f"{op}: `bias` must have shape [{out_channels}], got {getattr(bias, 'shape', None)}",
    )
    size = _output_size(op, input.shape[2:], kernel_size, stride, padding, dilation)
    return _empty_images(input, (input.shape[0], out_channels, *size))


def _inference_fake(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_channels: int,
    geometry: list[int],
    activation: str,
    allow_tf32: bool = False,
) -> Tensor:
    check(len(geometry) == 11, f"block_sparse_conv2d: `geometry` must have 11 integers, got {len(geometry)}")
    kernel_size, stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:8], geometry[8:10]
    operands = (input, packed_values, crow_indices, col_indices, bias, out_channels)
    return _forward_fake(*operands, kernel_size, stride, padding, dilation, geometry[10], activation)


def _check_grad_output(op: str, grad_output: Tensor, input_size: Any, geometry: tuple) -> None:
    kernel_size, stride, padding, dilation, _ = geometry
    size = _output_size(op, input_size[2:], kernel_size, stride, padding, dilation)
    expected = [input_size[0], grad_output.shape[1], *size]
    check(
        list(grad_output.shape) == expected,
        f"{op}: `grad_output` must have shape {expected}, got {list(grad_output.shape)}",
    )


def _input_gradient_fake(
    grad_output: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    allow_tf32: bool = False,
) -> Tensor:
    op = "block_sparse_conv2d_input_gradient"
    _check_geometry(op, kernel_size, stride, padding, dilation)
    _check_images(op, "grad_output", grad_output)
    check(len(input_size) == 4, f"{op}: `input_size` must have 4 integers, got {len(input_size)}")
    _check_blocks(op, packed_values)
    check_like(op, grad_output, packed_values=packed_values)
    rows = packed_values.shape[2]
    _check_channels(op, input_size[1], grad_output.shape[1], groups, rows)
    _check_indices(op, grad_output, -(-grad_output.shape[1] // rows), crow_indices, col_indices)
    _check_grad_output(op, grad_output, input_size, (kernel_size, stride, padding, dilation, groups))
    return _empty_images(grad_output, input_size)


def _weight_gradient_fake(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    rows: int,
    cols: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    allow_tf32: bool = False,
) -> Tensor:
    op = "block_sparse_conv2d_weight_gradient"
    _check_geometry(op, kernel_size, stride, padding, dilation)
    _check_images(op, "grad_output", grad_output)
    _check_images(op, "input", input)
    check_like(op, grad_output, input=input)
    check(
        1 <= rows <= 128 and 1 <= cols <= 128,
        f"{op}: `rows` and `cols` must be from 1 to 128, got {rows} and {cols}",
    )
    _check_channels(op, input.shape[1], grad_output.shape[1], groups, rows)
    _check_indices(op, grad_output, -(-grad_output.shape[1] // rows), crow_indices, col_indices)
    _check_grad_output(op, grad_output, input.shape, (kernel_size, stride, padding, dilation, groups))
    return grad_output.new_empty((col_indices.shape[0], cols, rows))


# As for the linear: the convolution and its two gradients are each linear in two tensors, and one another's
# derivatives. `geometry` is kernel_size, stride, padding, dilation, groups.


def _convolution(
    input: Tensor,
    packed_values: Tensor,
    structure: tuple,
    out_channels: int,
    geometry: tuple,
    allow_tf32: bool = False,
) -> Tensor:
    return _ops.block_sparse_conv2d(
        input, packed_values, *structure, None, out_channels, *geometry, "none", allow_tf32
    )


def _input_gradient(
    grad_output: Tensor,
    packed_values: Tensor,
    structure: tuple,
    input_size: Any,
    geometry: tuple,
    allow_tf32: bool = False,
) -> Tensor:
    return _ops.block_sparse_conv2d_input_gradient(
        grad_output, packed_values, *structure, input_size, *geometry, allow_tf32
    )


def _weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    structure: tuple,
    blocksize: tuple[int, int],
    geometry: tuple,
    allow_tf32: bool = False,
) -> Tensor:
    return _ops.block_sparse_conv2d_weight_gradient(
        grad_output, input, *structure, *blocksize, *geometry, allow_tf32
    )


def _blocksize(packed_values: Tensor) -> tuple[int, int]:
    return packed_values.shape[2], packed_values.shape[1]


def _forward_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, packed_values, crow_indices, col_indices, bias, out_channels, *geometry, activation, tf32 = inputs
    ctx.save_for_backward(
        input,
        packed_values,
        crow_indices,
        col_indices,
        output if activation in CLIPPING else None,
        bias if activation != "none" and activation not in CLIPPING else None,
    )
    ctx.geometry = tuple(geometry)
    ctx.allow_tf32 = tf32
    ctx.activation = activation
    ctx.out_channels = out_channels
    ctx.has_bias = bias is not None


def _forward_backward(ctx: Any, grad: Tensor) -> tuple:
    input, packed_values, *indices, output, bias = ctx.saved_tensors
    structure = tuple(indices)
    if ctx.activation in CLIPPING:
        grad = clipped_gradient(grad, output, ctx.activation)
    elif ctx.activation != "none":
        # What went into the activation is computed anew rather than kept.
        before = _convolution(input, packed_values, structure, ctx.out_channels, ctx.geometry, ctx.allow_tf32)
        before = before if bias is None else before + bias[:, None, None]
        grad = activation_gradient(grad, before, ctx.activation)
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _input_gradient(
            grad, packed_values, structure, input.shape, ctx.geometry, ctx.allow_tf32
        )
    if ctx.needs_input_grad[1]:
        grad_values = _weight_gradient(
            grad, input, structure, _blocksize(packed_values), ctx.geometry, ctx.allow_tf32
        )
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3))
    return (grad_input, grad_values, None, None, grad_bias, *[None] * 8)


def block_sparse_conv2d_inference(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    activation: str,
    allow_tf32: bool,
) -> Tensor:
    """Call the op without gradients, with its geometry in one list: torch converts each in 0.8 us."""
    try:
        (kernel_height, kernel_width), (stride_height, stride_width) = kernel_size, stride
        (top, bottom, left, right), (dilation_height, dilation_width) = padding, dilation
    except ValueError:
        _check_geometry("block_sparse_conv2d", kernel_size, stride, padding, dilation)
        raise
    sizes = (kernel_height, kernel_width, stride_height, stride_width, top, bottom, left, right)
    geometry = (*sizes, dilation_height, dilation_width, groups)
    return _ops.block_sparse_conv2d_inference(
        input, packed_values, crow_indices, col_indices, bias, out_channels, geometry, activation, allow_tf32
    )


block_sparse_conv2d_function = autograd_function(
    block_sparse_conv2d_inference, _forward_setup, _forward_backward
)


def _input_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    *geometry, ctx.allow_tf32 = inputs[5:]
    ctx.geometry = tuple(geometry)


def _input_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, packed_values, *indices = ctx.saved_tensors
    structure = tuple(indices)
    grad_grad_output = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _convolution(
            grad, packed_values, structure, grad_output.shape[1], ctx.geometry, ctx.allow_tf32
        )
    if ctx.needs_input_grad[1]:
        blocksize = _blocksize(packed_values)
        grad_values = _weight_gradient(grad_output, grad, structure, blocksize, ctx.geometry, ctx.allow_tf32)
    return (grad_grad_output, grad_values, *[None] * 9)


def _weight_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    *geometry, ctx.allow_tf32 = inputs[6:]
    ctx.geometry = tuple(geometry)


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, input, *indices = ctx.saved_tensors
    structure = tuple(indices)
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _convolution(
            input, grad, structure, grad_output.shape[1], ctx.geometry, ctx.allow_tf32
        )
    if ctx.needs_input_grad[1]:
        grad_input = _input_gradient(grad_output, grad, structure, input.shape, ctx.geometry, ctx.allow_tf32)
    return (grad_grad_output, grad_input, *[None] * 10)


def _flops(outputs: Any, kept: int, cols: int, rows: int) -> int:
    return 2 * outputs[0] * outputs[2] * outputs[3] * kept * cols * rows


def _forward_flops(input: Any, packed_values: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return _flops(out_shape, *packed_values)


def _input_gradient_flops(grad_output: Any, packed_values: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(grad_output, *packed_values)


def _weight_gradient_flops(
    grad_output: Any, input: Any, crow: Any, col: Any, rows: int, cols: int, *args: Any, **kwargs: Any
) -> int:
    return _flops(grad_output, col[0], cols, rows)


for _name, _fake in (
    ("block_sparse_conv2d", _forward_fake),
    ("block_sparse_conv2d_inference", _inference_fake),
    ("block_sparse_conv2d_input_gradient", _input_gradient_fake),
    ("block_sparse_conv2d_weight_gradient", _weight_gradient_fake),
):
    torch.library.register_fake(f"fastprune::{_name}", _fake)
for _name, _backward, _setup in (
    ("block_sparse_conv2d", _forward_backward, _forward_setup),
    ("block_sparse_conv2d_input_gradient", _input_gradient_backward, _input_gradient_setup),
    ("block_sparse_conv2d_weight_gradient", _weight_gradient_backward, _weight_gradient_setup),
):
    torch.library.register_autograd(f"fastprune::{_name}", _backward, setup_context=_setup)
# The CPU has no half precision: under autocast it keeps float32. On CUDA `ops_conv` casts to the dtype of
# autocast.
for _name in ("block_sparse_conv2d", "block_sparse_conv2d_inference"):
    torch.library.register_autocast(f"fastprune::{_name}", "cpu", torch.float32)
register_flop_formula([_ops.block_sparse_conv2d, _ops.block_sparse_conv2d_inference])(_forward_flops)
register_flop_formula([_ops.block_sparse_conv2d_input_gradient])(_input_gradient_flops)
register_flop_formula([_ops.block_sparse_conv2d_weight_gradient])(_weight_gradient_flops)
