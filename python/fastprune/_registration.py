"""What torch must know of the ops besides their kernels: shapes, gradients, autocast and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _library as _library  # loads the schemas this module registers for
from . import reference

_ops = torch.ops.fastprune


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
    _check(activation in ("none", "relu"), f"{op}: `activation` must be 'none' or 'relu', got '{activation}'")
    dtypes = (torch.float32,) if input.is_cuda else (torch.float32, torch.float64)
    _check(input.dtype in dtypes, f"{op}: `input` must have dtype float32 or float64, got {input.dtype}")
    _check(input.dim() >= 1, f"{op}: `input` must have at least 1 dimension, got 0")
    _check(
        packed_values.dim() == 3,
        f"{op}: `packed_values` must have 3 dimensions, got {list(packed_values.shape)}",
    )
    tensors = {"packed_values": packed_values, "crow_indices": crow_indices, "col_indices": col_indices}
    for name, tensor in (*tensors.items(), ("bias", bias)):
        _check(
            tensor is None or tensor.device == input.device,
            f"{op}: `{name}` must be on {input.device}, got {getattr(tensor, 'device', None)}",
        )
    for name, tensor in (("packed_values", packed_values), ("bias", bias)):
        _check(
            tensor is None or tensor.dtype == input.dtype,
            f"{op}: `{name}` must have dtype {input.dtype}, got {getattr(tensor, 'dtype', None)}",
        )
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        _check(tensor.dtype == torch.int32, f"{op}: `{name}` must have dtype torch.int32, got {tensor.dtype}")
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        _check(tensor.dim() == 1, f"{op}: `{name}` must have 1 dimension, got {tensor.dim()}")
    _check(
        1 <= packed_values.shape[1] <= 128 and 1 <= packed_values.shape[2] <= 128,
        f"{op}: `packed_values` must have cols and rows from 1 to 128, got {list(packed_values.shape)}",
    )
    block_rows = -(-out_features // packed_values.shape[2])
    _check(
        crow_indices.shape[0] == block_rows + 1,
        f"{op}: `crow_indices` must have size {block_rows + 1}, got {list(crow_indices.shape)}",
    )
    _check(
        bias is None or tuple(bias.shape) == (out_features,),
        f"{op}: `bias` must have shape [{out_features}], got {getattr(bias, 'shape', None)}",
    )
    return input.new_empty((*input.shape[:-1], out_features))


def _block_sparse_linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, packed_values, crow_indices, col_indices, bias, out_features, activation = inputs
    ctx.save_for_backward(
        input, packed_values, crow_indices, col_indices, output if activation == "relu" else None
    )
    ctx.out_features = out_features
    ctx.has_bias = bias is not None


def _block_sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    input, packed_values, crow_indices, col_indices, output = ctx.saved_tensors
    if output is not None:
        grad = torch.where(output <= 0, 0.0, grad)  # NaN passes, as in torch's relu
    flat_grad = grad.reshape(-1, ctx.out_features)
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = reference.dense_weight(
            packed_values,
            crow_indices,
            col_indices,
            out_features=ctx.out_features,
            in_features=input.shape[-1],
        )
        grad_input = (flat_grad @ weight).view(input.shape)
    if ctx.needs_input_grad[1]:
        dense = flat_grad.T @ input.reshape(-1, input.shape[-1])
        grad_values = _gather_blocks(dense, packed_values, crow_indices, col_indices)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = flat_grad.sum(0)
    return grad_input, grad_values, None, None, grad_bias, None, None


def _gather_blocks(dense: Tensor, packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """Return the kept blocks of a dense matrix, packed."""
    kept, cols, rows = packed_values.shape
    block_rows = crow_indices.numel() - 1
    block_cols = -(-dense.shape[1] // cols)
    padding = (0, block_cols * cols - dense.shape[1], 0, block_rows * rows - dense.shape[0])
    blocks = torch.nn.functional.pad(dense, padding).view(block_rows, rows, block_cols, cols)
    row_indices = torch.repeat_interleave(
        torch.arange(block_rows, device=dense.device),
        (crow_indices[1:] - crow_indices[:-1]).long(),
        output_size=kept,
    )
    return blocks.permute(0, 2, 3, 1)[row_indices, col_indices.long()]


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
    for name, tensor, shape in (
        ("hidden", hidden, (logits.shape[0], weight.shape[1])),
        ("weight", weight, (logits.shape[1], hidden.shape[1])),
        ("targets", targets, (logits.shape[0],)),
        ("pieces", pieces, (pieces.shape[0], 4)),
    ):
        _check(
            tuple(tensor.shape) == shape,
            f"{op}: `{name}` must have shape {list(shape)}, got {list(tensor.shape)}",
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


def _block_sparse_linear_flops(input: Any, packed_values: Any, *args: Any, **kwargs: Any) -> int:
    samples = 1
    for size in input[:-1]:
        samples *= size
    kept, cols, rows = packed_values
    return 2 * samples * kept * cols * rows


torch.library.register_fake("fastprune::block_sparse_linear", _block_sparse_linear_fake)
torch.library.register_fake("fastprune::block_sparse_linear_inference", _block_sparse_linear_fake)
torch.library.register_fake("fastprune::ablated_cross_entropy", _ablated_cross_entropy_fake)
torch.library.register_autograd(
    "fastprune::block_sparse_linear", _block_sparse_linear_backward, setup_context=_block_sparse_linear_setup
)
torch.library.register_autograd(
    "fastprune::ablated_cross_entropy",
    _ablated_cross_entropy_backward,
    setup_context=_ablated_cross_entropy_setup,
)
for _device in ("cpu", "cuda"):
    # The kernels are float32: under autocast they keep that precision.
    torch.library.register_autocast("fastprune::block_sparse_linear", _device, torch.float32)
    torch.library.register_autocast("fastprune::block_sparse_linear_inference", _device, torch.float32)
    torch.library.register_autocast("fastprune::ablated_cross_entropy", _device, torch.float32)
register_flop_formula([_ops.block_sparse_linear, _ops.block_sparse_linear_inference])(
    _block_sparse_linear_flops
)
