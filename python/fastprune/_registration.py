"""What torch must know of the ops besides their kernels: shapes, gradients, autocast and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library as _library  # loads the schemas this module registers for
from . import reference

_ops = torch.ops.fastprune

CLIPPING = ("relu", "relu6")
"""Activations whose gradient is read from their output."""

CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the CUDA kernels of the weight gradient take."""


def allow_tf32() -> bool:
    """Tell whether torch's own float32 products may round their operands to tf32 on CUDA.

    ``fp32_precision`` of ``torch.backends.cuda.matmul`` follows the older ``allow_tf32`` too, which may not
    be read once the newer one was set.

    Example:
        >>> torch.backends.cuda.matmul.allow_tf32 = True
        >>> allow_tf32()
        True

    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_kernel_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Check the dtype for an op whose CUDA kernels serve the 16-bit types too."""
    if not tensor.is_cuda:
        return _check_floating(op, name, tensor)
    _check(
        tensor.dtype in CUDA_DTYPES,
        f"{op}: on CUDA `{name}` must have dtype float32, float16 or bfloat16, got {tensor.dtype}",
    )
    _check(tensor.dim() >= 1, f"{op}: `{name}` must have at least 1 dimension, got 0")


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    dtypes = (torch.float32,) if tensor.is_cuda else (torch.float32, torch.float64)
    _check(tensor.dtype in dtypes, f"{op}: `{name}` must have dtype float32 or float64, got {tensor.dtype}")
    _check(tensor.dim() >= 1, f"{op}: `{name}` must have at least 1 dimension, got 0")


def _check_activation(op: str, activation: str) -> None:
    activations = ("none", *reference.ACTIVATIONS)
    _check(activation in activations, f"{op}: `activation` must be one of {activations}, got '{activation}'")


def _check_shapes(op: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        _check(
            tuple(tensor.shape) == shape,
            f"{op}: `{name}` must have shape {list(shape)}, got {list(tensor.shape)}",
        )


def _check_like(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Check that tensors have the device and the dtype of another."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check(
                tensor.device == like.device, f"{op}: `{name}` must be on {like.device}, got {tensor.device}"
            )
            _check(
                tensor.dtype == like.dtype, f"{op}: `{name}` must have dtype {like.dtype}, got {tensor.dtype}"
            )


def _check_indices(op: str, like: Tensor, block_rows: int, crow_indices: Tensor, col_indices: Tensor) -> None:
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        _check(tensor.device == like.device, f"{op}: `{name}` must be on {like.device}, got {tensor.device}")
        _check(tensor.dtype == torch.int32, f"{op}: `{name}` must have dtype torch.int32, got {tensor.dtype}")
        _check(tensor.dim() == 1, f"{op}: `{name}` must have 1 dimension, got {tensor.dim()}")
    _check(
        crow_indices.shape[0] == block_rows + 1,
        f"{op}: `crow_indices` must have size {block_rows + 1}, got {list(crow_indices.shape)}",
    )


def _check_blocks(op: str, packed_values: Tensor) -> None:
    _check(
        packed_values.dim() == 3,
        f"{op}: `packed_values` must have 3 dimensions, got {list(packed_values.shape)}",
    )
    _check(
        1 <= packed_values.shape[1] <= 128 and 1 <= packed_values.shape[2] <= 128,
        f"{op}: `packed_values` must have cols and rows from 1 to 128, got {list(packed_values.shape)}",
    )


def _block_sparse_linear_fake(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    op = "block_sparse_linear"
    _check_activation(op, activation)
    _check_floating(op, "input", input)
    _check_blocks(op, packed_values)
    _check_like(op, input, packed_values=packed_values, bias=bias)
    _check_indices(op, input, -(-out_features // packed_values.shape[2]), crow_indices, col_indices)
    _check(
        bias is None or tuple(bias.shape) == (out_features,),
        f"{op}: `bias` must have shape [{out_features}], got {getattr(bias, 'shape', None)}",
    )
    return input.new_empty((*input.shape[:-1], out_features))


def _block_sparse_linear_input_gradient_fake(
    grad_output: Tensor, packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int
) -> Tensor:
    op = "block_sparse_linear_input_gradient"
    _check_floating(op, "grad_output", grad_output)
    _check_blocks(op, packed_values)
    _check_like(op, grad_output, packed_values=packed_values)
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
    _check_kernel_dtype(op, "grad_output", grad_output)
    _check_like(op, grad_output, input=input)
    _check(
        input.shape[:-1] == grad_output.shape[:-1],
        f"{op}: `input` must have the samples of `grad_output`, {list(grad_output.shape)}, "
        f"got {list(input.shape)}",
    )
    _check(
        1 <= rows <= 128 and 1 <= cols <= 128,
        f"{op}: `rows` and `cols` must be from 1 to 128, got {rows} and {cols}",
    )
    _check_indices(op, grad_output, -(-grad_output.shape[-1] // rows), crow_indices, col_indices)
    return grad_output.new_empty((col_indices.shape[0], cols, rows))


# The three ops are each other's gradients: y = x W^T, dx = dy W and dW = dy^T x in the kept blocks are linear
# in both of their tensors. On CUDA the twins stand in where there is no kernel: for the input gradient, for
# the product in other types than float32, and for the weight gradient in float64.


def _product(input: Tensor, packed_values: Tensor, structure: tuple, out_features: int) -> Tensor:
    if input.is_cuda and input.dtype != torch.float32:
        return reference.block_sparse_linear(input, packed_values, *structure, out_features=out_features)
    return _ops.block_sparse_linear(input, packed_values, *structure, None, out_features, "none")


def _input_gradient(grad_output: Tensor, packed_values: Tensor, structure: tuple, in_features: int) -> Tensor:
    if grad_output.is_cuda:
        return reference.block_sparse_linear_input_gradient(
            grad_output, packed_values, *structure, in_features=in_features
        )
    return _ops.block_sparse_linear_input_gradient(grad_output, packed_values, *structure, in_features)


def _weight_gradient(
    grad_output: Tensor, input: Tensor, structure: tuple, blocksize: tuple[int, int]
) -> Tensor:
    if grad_output.is_cuda and grad_output.dtype not in CUDA_DTYPES:
        return reference.block_sparse_linear_weight_gradient(
            grad_output, input, *structure, blocksize=blocksize
        )
    tf32 = grad_output.is_cuda and allow_tf32()
    return _ops.block_sparse_linear_weight_gradient(grad_output, input, *structure, *blocksize, tf32)


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
    input, packed_values, crow_indices, col_indices, bias, out_features, activation = inputs
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
        before = _product(input, packed_values, tuple(structure), ctx.out_features)
        before = before if bias is None else before + bias
        grad = activation_gradient(grad, before, ctx.activation)
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _input_gradient(grad, packed_values, tuple(structure), input.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_values = _weight_gradient(grad, input, tuple(structure), _blocksize(packed_values))
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0)
    return grad_input, grad_values, None, None, grad_bias, None, None


def _input_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _input_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, packed_values, *structure = ctx.saved_tensors
    grad_grad_output = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _product(grad, packed_values, tuple(structure), grad_output.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_values = _weight_gradient(grad_output, grad, tuple(structure), _blocksize(packed_values))
    return grad_grad_output, grad_values, None, None, None


def _weight_gradient_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_output, input, *structure = ctx.saved_tensors
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _product(input, grad, tuple(structure), grad_output.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_input = _input_gradient(grad_output, grad, tuple(structure), input.shape[-1])
    return grad_grad_output, grad_input, None, None, None, None, None


def _ablated_cross_entropy_fake(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    sample_weight: Tensor | None,
) -> Tensor:
    op = "ablated_cross_entropy"
    _check(logits.dim() == 2, f"{op}: `logits` must have 2 dimensions, got {list(logits.shape)}")
    _check_shapes(
        op,
        hidden=(hidden, (logits.shape[0], weight.shape[1])),
        weight=(weight, (logits.shape[1], hidden.shape[1])),
        targets=(targets, (logits.shape[0],)),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return logits.new_empty(pieces.shape[0], dtype=torch.float64)


def _ablated_cross_entropy_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ablated_cross_entropy_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, targets, pieces, sample_weight = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        logits, hidden, weight = leaves
        deltas = reference.ablated_cross_entropy(logits, hidden, weight, targets, pieces, sample_weight)
        gradients = torch.autograd.grad(deltas, leaves, grad, allow_unused=True)
    return (*gradients, None, None, None)


def _ablated_mlp_cross_entropy_fake(
    logits: Tensor,
    input: Tensor,
    pre_activation: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    activation: str,
    sample_weight: Tensor | None,
) -> Tensor:
    op = "ablated_mlp_cross_entropy"
    _check_activation(op, activation)
    for name, tensor in (("logits", logits), ("input", input), ("pre_activation", pre_activation)):
        _check(tensor.dim() == 2, f"{op}: `{name}` must have 2 dimensions, got {list(tensor.shape)}")
    samples, classes = logits.shape
    hidden = pre_activation.shape[1]
    _check_shapes(
        op,
        input=(input, (samples, input.shape[1])),
        pre_activation=(pre_activation, (samples, hidden)),
        first_weight=(first_weight, (hidden, input.shape[1])),
        second_weight=(second_weight, (classes, hidden)),
        targets=(targets, (samples,)),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return logits.new_empty(pieces.shape[0], dtype=torch.float64)


def _ablated_mlp_cross_entropy_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation, sample_weight = inputs
    ctx.save_for_backward(*tensors, sample_weight)


def _ablated_mlp_cross_entropy_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, targets, pieces, sample_weight = ctx.saved_tensors
    activation = None if ctx.activation == "none" else ctx.activation
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        logits, input, before, first, second = leaves
        deltas = reference.ablated_mlp_cross_entropy(
            logits, input, before, first, second, targets, pieces, activation, sample_weight
        )
        gradients = torch.autograd.grad(deltas, leaves, grad, allow_unused=True)
    return (*gradients, None, None, None, None)


def _ablate_linear_fake(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    op = "ablate_linear"
    for name, tensor in (("output", output), ("input", input), ("pieces", pieces)):
        _check(tensor.dim() == 2, f"{op}: `{name}` must have 2 dimensions, got {list(tensor.shape)}")
    _check_shapes(
        op,
        input=(input, (output.shape[0], input.shape[1])),
        weight=(weight, (output.shape[1], input.shape[1])),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return output.new_empty(pieces.shape[0], *output.shape)


def _ablate_linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ablate_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, pieces = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output, input, weight = leaves
        masked = reference.ablate_linear(output, input, weight, pieces)
        gradients = torch.autograd.grad(masked, leaves, grad)
    return (*gradients, None)


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
    ("ablated_cross_entropy", _ablated_cross_entropy_fake),
    ("ablated_mlp_cross_entropy", _ablated_mlp_cross_entropy_fake),
    ("ablate_linear", _ablate_linear_fake),
):
    torch.library.register_fake(f"fastprune::{_name}", _fake)
for _name, _backward, _setup in (
    ("block_sparse_linear", _block_sparse_linear_backward, _block_sparse_linear_setup),
    ("block_sparse_linear_input_gradient", _input_gradient_backward, _input_gradient_setup),
    ("block_sparse_linear_weight_gradient", _weight_gradient_backward, _weight_gradient_setup),
    ("ablated_cross_entropy", _ablated_cross_entropy_backward, _ablated_cross_entropy_setup),
    ("ablated_mlp_cross_entropy", _ablated_mlp_cross_entropy_backward, _ablated_mlp_cross_entropy_setup),
    ("ablate_linear", _ablate_linear_backward, _ablate_linear_setup),
):
    torch.library.register_autograd(f"fastprune::{_name}", _backward, setup_context=_setup)
for _device in ("cpu", "cuda"):
    # The kernels are float32: under autocast they keep that precision.
    for _name in (
        "block_sparse_linear",
        "block_sparse_linear_inference",
        "ablated_cross_entropy",
        "ablated_mlp_cross_entropy",
        "ablate_linear",
    ):
        torch.library.register_autocast(f"fastprune::{_name}", _device, torch.float32)
register_flop_formula(
    [_ops.block_sparse_linear, _ops.block_sparse_linear_inference, _ops.block_sparse_linear_input_gradient]
)(_block_sparse_linear_flops)
register_flop_formula([_ops.block_sparse_linear_weight_gradient])(_weight_gradient_flops)
