"""What torch must know of block_sparse_linear besides its kernels: shapes, gradients, autocast and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library as _library  # loads the schemas this module registers for
from ._fake_checks import check, check_activation, check_floating, check_like, is_mixed

_ops = torch.ops.fastprune

CLIPPING = ("relu", "relu6")
"""Activations whose gradient is read from their output."""


def _check_indices(op: str, like: Tensor, block_rows: int, crow_indices: Tensor, col_indices: Tensor) -> None:
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        check(tensor.device == like.device, f"{op}: `{name}` must be on {like.device}, got {tensor.device}")
        check(tensor.dtype == torch.int32, f"{op}: `{name}` must have dtype torch.int32, got {tensor.dtype}")
        check(tensor.dim() == 1, f"{op}: `{name}` must have 1 dimension, got {tensor.dim()}")
    check(
        crow_indices.shape[0] == block_rows + 1,
        f"{op}: `crow_indices` must have size {block_rows + 1}, got {list(crow_indices.shape)}",
    )


def _check_blocks(op: str, packed_values: Tensor) -> None:
    check(
        packed_values.dim() == 3,
        f"{op}: `packed_values` must have 3 dimensions, got {list(packed_values.shape)}",
    )
    check(
        1 <= packed_values.shape[1] <= 128 and 1 <= packed_values.shape[2] <= 128,
        f"{op}: `packed_values` must have cols and rows from 1 to 128, got {list(packed_values.shape)}",
    )


def _check_weight(op: str, input: Tensor, packed_values: Tensor) -> None:
    """Check device and dtype: those of ``input``, or on the CPU 16 bits beside float32."""
    if is_mixed(input, packed_values) and not input.is_cuda:
        packed_values = packed_values.float()
    check_like(op, input, packed_values=packed_values)


def _block_sparse_linear_fake(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    allow_tf32: bool = False,
) -> Tensor:
    op = "block_sparse_linear"
    check_activation(op, activation)
    check_floating(op, "input", input, half=True)
    _check_blocks(op, packed_values)
    _check_weight(op, input, packed_values)
    check_like(op, input, bias=bias)
    _check_indices(op, input, -(-out_features // packed_values.shape[2]), crow_indices, col_indices)
    check(
        bias is None or tuple(bias.shape) == (out_features,),
        f"{op}: `bias` must have shape [{out_features}], got {getattr(bias, 'shape', None)}",
    )
    return input.new_empty((*input.shape[:-1], out_features))


def _block_sparse_linear_input_gradient_fake(
    grad_output: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    in_features: int,
    allow_tf32: bool = False,
) -> Tensor:
    op = "block_sparse_linear_input_gradient"
    check_floating(op, "grad_output", grad_output, half=True)
    _check_blocks(op, packed_values)
    _check_weight(op, grad_output, packed_values)
    block_rows = -(-grad_output.shape[-1] // packed_values.shape[2])
    _check_indices(op, grad_output, block_rows, crow_indices, col_indices)
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


def _block_sparse_linear_weight_gradient_fake(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    rows: int,
    cols: int,
    allow_tf32: bool = False,
) -> Tensor:
    op = "block_sparse_linear_weight_gradient"
    check_floating(op, "grad_output", grad_output, half=True)
    check_like(op, grad_output, input=input)
    check(
        input.shape[:-1] == grad_output.shape[:-1],
        f"{op}: `input` must have the samples of `grad_output`, {list(grad_output.shape)}, "
        f"got {list(input.shape)}",
    )
    check(
        1 <= rows <= 128 and 1 <= cols <= 128,
        f"{op}: `rows` and `cols` must be from 1 to 128, got {rows} and {cols}",
    )
    _check_indices(op, grad_output, -(-grad_output.shape[-1] // rows), crow_indices, col_indices)
    return grad_output.new_empty((col_indices.shape[0], cols, rows))


# The three ops are each other's gradients: y = x W^T, dx = dy W and dW = dy^T x in the kept blocks are linear
# in both of their tensors.


def _product(
    input: Tensor, packed_values: Tensor, structure: tuple, out_features: int, allow_tf32: bool
) -> Tensor:
    return _ops.block_sparse_linear(input, packed_values, *structure, None, out_features, "none", allow_tf32)


def _input_gradient(
    grad_output: Tensor, packed_values: Tensor, structure: tuple, in_features: int, allow_tf32: bool
) -> Tensor:
    return _ops.block_sparse_linear_input_gradient(
        grad_output, packed_values, *structure, in_features, allow_tf32
    )


def _weight_gradient(
    grad_output: Tensor, input: Tensor, structure: tuple, blocksize: tuple[int, int], allow_tf32: bool
) -> Tensor:
    return _ops.block_sparse_linear_weight_gradient(grad_output, input, *structure, *blocksize, allow_tf32)


def _blocksize(packed_values: Tensor) -> tuple[int, int]:
    return packed_values.shape[2], packed_values.shape[1]


def clipped_gradient(grad: Tensor, output: Tensor, activation: str) -> Tensor:
    """Return the gradient of what went into an activation of CLIPPING, from that of its output."""
    clipped = output <= 0  # NaN passes, as in torch's relu
    if activation == "relu6":
        clipped |= output >= 6
    return torch.where(clipped, 0.0, grad)


def activation_gradient(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """Return the gradient of what went into another activation, ``before``."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, before)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, before, approximate=approximate)


def _block_sparse_linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, packed_values, crow_indices, col_indices, bias, out_features, activation, ctx.allow_tf32 = inputs
    ctx.save_for_backward(
        input,
        packed_values,
        crow_indices,
        col_indices,
        output if activation in CLIPPING else None,
        bias if activation != "none" and activation not in CLIPPING else None,
    )
    ctx.activation = activation
    ctx.out_features = out_features
    ctx.has_bias = bias is not None


def _block_sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    input, packed_values, *structure, output, bias = ctx.saved_tensors
    if ctx.activation in CLIPPING:
        grad = clipped_gradient(grad, output, ctx.activation)
    elif ctx.activation != "none":
        # What went into the activation is computed anew rather than kept.
        before = _product(input, packed_values, tuple(structure), ctx.out_features, ctx.allow_tf32)
        before = before if bias is None else before + bias
        grad = activation_gradient(grad, before, ctx.activation)
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _input_gradient(grad, packed_values, tuple(structure), input.shape[-1], ctx.allow_tf32)
    if ctx.needs_input_grad[1]:
        grad_values = _weight_gradient(
            grad, input, tuple(structure), _blocksize(packed_values), ctx.allow_tf32
        ).to(packed_values.dtype)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0)
    return grad_input, grad_values, None, None, grad_bias, None, None, None


def autograd_function(
    op: Callable[..., Tensor], setup: Callable[..., None], backward: Callable[..., tuple]
) -> type[torch.autograd.Function]:
    """Return a function around an op without gradients: half of what a registered formula costs a call.

    Source: benchmarks/bench_call_overhead.py.

    Args:
        op: of one output.
        setup: as `torch.library.register_autograd` takes it.
        backward: likewise.

    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            output = op(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            return backward(ctx, grad)

    return Function


block_sparse_linear_function = autograd_function(
    _ops.block_sparse_linear_inference, _block_sparse_linear_setup, _block_sparse_linear_backward
)


def _input_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.allow_tf32 = inputs[5]


def _input_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, packed_values, *structure = ctx.saved_tensors
    grad_grad_output = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _product(
            grad, packed_values, tuple(structure), grad_output.shape[-1], ctx.allow_tf32
        )
    if ctx.needs_input_grad[1]:
        grad_values = _weight_gradient(
            grad_output, grad, tuple(structure), _blocksize(packed_values), ctx.allow_tf32
        ).to(packed_values.dtype)
    return grad_grad_output, grad_values, None, None, None, None


def _weight_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.allow_tf32 = inputs[6]


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, input, *structure = ctx.saved_tensors
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _product(input, grad, tuple(structure), grad_output.shape[-1], ctx.allow_tf32)
    if ctx.needs_input_grad[1]:
        grad_input = _input_gradient(grad_output, grad, tuple(structure), input.shape[-1], ctx.allow_tf32)
    return grad_grad_output, grad_input, None, None, None, None, None


def _samples(shape: Any) -> int:
    samples = 1
    for size in shape[:-1]:
        samples *= size
    return samples


def _block_sparse_linear_flops(input: Any, packed_values: Any, *args: Any, **kwargs: Any) -> int:
    kept, cols, rows = packed_values
    return 2 * _samples(input) * kept * cols * rows


def _weight_gradient_flops(
    grad_output: Any, input: Any, crow: Any, col: Any, rows: int, cols: int, *args: Any, **kwargs: Any
) -> int:
    return 2 * _samples(input) * col[0] * cols * rows


for _name, _fake in (
    ("block_sparse_linear", _block_sparse_linear_fake),
    ("block_sparse_linear_inference", _block_sparse_linear_fake),
    ("block_sparse_linear_input_gradient", _block_sparse_linear_input_gradient_fake),
    ("block_sparse_linear_weight_gradient", _block_sparse_linear_weight_gradient_fake),
):
    torch.library.register_fake(f"fastprune::{_name}", _fake)
for _name, _backward, _setup in (
    ("block_sparse_linear", _block_sparse_linear_backward, _block_sparse_linear_setup),
    ("block_sparse_linear_input_gradient", _input_gradient_backward, _input_gradient_setup),
    ("block_sparse_linear_weight_gradient", _weight_gradient_backward, _weight_gradient_setup),
):
    torch.library.register_autograd(f"fastprune::{_name}", _backward, setup_context=_setup)
register_flop_formula(
    [_ops.block_sparse_linear, _ops.block_sparse_linear_inference, _ops.block_sparse_linear_input_gradient]
)(_block_sparse_linear_flops)
register_flop_formula([_ops.block_sparse_linear_weight_gradient])(_weight_gradient_flops)
