"""The ops as typed functions. All else in fastprune calls kernels through this module."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _registration, reference
from ._dispatch import is_transformed, lacks_cuda_kernel, needs_grad
from .ops_conv import (
    block_sparse_conv2d as block_sparse_conv2d,
)
from .ops_conv import (
    block_sparse_conv2d_input_gradient as block_sparse_conv2d_input_gradient,
)
from .ops_conv import (
    block_sparse_conv2d_weight_gradient as block_sparse_conv2d_weight_gradient,
)

_ops = torch.ops.fastprune


def block_sparse_linear(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str | None = None,
) -> Tensor:
    """Return ``activation(input @ weight.T + bias)`` for a block-sparse weight.

    Differentiable in ``input``, ``packed_values`` and ``bias``; under ``torch.func`` transforms and
    forward-mode differentiation it is computed through the dense weight. The bits of the result depend
    neither on the number of threads nor on the other samples of the batch.

    Example:
        >>> weight = fp.BlockSparseTensor.from_dense(torch.eye(32), blocksize=(16, 16))
        >>> y = fp.ops.block_sparse_linear(
        ...     torch.randn(4, 32), weight.packed_values, weight.crow_indices, weight.col_indices,
        ...     out_features=32)
        >>> y.shape
        torch.Size([4, 32])

    Args:
        input: ``[*, in_features]``, float32 or float64 (CUDA: float32).
        packed_values: ``[kept, cols, rows]``, the kept blocks of the weight, each transposed; the dtype
            of ``input``.
        crow_indices: ``[ceil(out_features / rows) + 1]``, int32: where each block row begins.
        col_indices: ``[kept]``, int32, increasing within a block row.
        bias: ``[out_features]`` or None.
        out_features: rows of the weight; the last block row may reach past them.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", fused into the store where no
            gradient is needed (relu and, on the CPU, relu6: always). ``csrc/kernels/cpu/activation.h`` has the formulas.

    Returns:
        ``[*, out_features]``, contiguous, the dtype of ``input``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) the indices are not a valid structure.

    """
    supported = input.dtype == torch.float32 or (input.is_cuda and torch.is_autocast_enabled("cuda"))
    if is_transformed() or lacks_cuda_kernel("block_sparse_linear", input, supported):
        return reference.block_sparse_linear(
            input,
            packed_values,
            crow_indices,
            col_indices,
            bias,
            out_features=out_features,
            activation=activation,
        )
    if not needs_grad(input, packed_values, bias):
        # The op with gradients costs some microseconds more for each call.
        op = _ops.block_sparse_linear_inference
        fused = activation in (None, "relu") or not input.is_cuda
    else:
        # Kept for the backward, what goes into a curved activation costs less than computing it anew.
        op = _ops.block_sparse_linear
        fused = activation not in reference.ACTIVATIONS or activation in _registration.CLIPPING
        fused = fused and (activation != "relu6" or not input.is_cuda)
    name = activation if fused and activation is not None else "none"
    output = op(input, packed_values, crow_indices, col_indices, bias, out_features, name)
    return output if fused else reference.ACTIVATIONS[activation](output)  # type: ignore[index]


def block_sparse_linear_input_gradient(
    grad_output: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    in_features: int,
) -> Tensor:
    """Return ``grad_output @ weight`` for a block-sparse weight: the gradient of its product's input.

    Differentiable in ``grad_output`` and ``packed_values``.

    Example:
        >>> grad_input = fp.ops.block_sparse_linear_input_gradient(
        ...     torch.randn(4, 32), weight.packed_values, weight.crow_indices, weight.col_indices,
        ...     in_features=32)

    Args:
        grad_output: ``[*, out_features]``, float32 or float64.
        packed_values: ``[kept, cols, rows]``, the dtype of ``grad_output``.
        crow_indices: ``[ceil(out_features / rows) + 1]``, int32.
        col_indices: ``[kept]``, int32, increasing within a block row.
        in_features: columns of the weight; the last block column may reach past them.

    Returns:
        ``[*, in_features]``, contiguous, the dtype of ``grad_output``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) the indices are not a valid structure.

    """
    op = "block_sparse_linear_input_gradient"
    if is_transformed() or lacks_cuda_kernel(op, grad_output, False):
        return reference.block_sparse_linear_input_gradient(
            grad_output, packed_values, crow_indices, col_indices, in_features=in_features
        )
    return _ops.block_sparse_linear_input_gradient(
        grad_output, packed_values, crow_indices, col_indices, in_features
    )


def block_sparse_linear_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    blocksize: tuple[int, int],
) -> Tensor:
    """Return the kept blocks of ``grad_output.T @ input``: the gradient of a block-sparse weight.

    Differentiable in ``grad_output`` and ``input``. Only the kept blocks are computed. Sums accumulate in the
    dtype of ``grad_output``, on CUDA in float32, in an order that depends on the sizes alone. On CUDA
    blocks whose sides are multiples of 16 run on tensor cores, float32 only where
    ``torch.backends.cuda.matmul`` allows tf32.

    Example:
        >>> grad_values = fp.ops.block_sparse_linear_weight_gradient(
        ...     grad_output, input, weight.crow_indices, weight.col_indices, blocksize=(16, 16))

    Args:
        grad_output: ``[*, out_features]``, float32 or float64 (CUDA: float32, float16 or bfloat16; float64
            runs through the dense product).
        input: ``[*, in_features]``, its samples and dtype those of ``grad_output``.
        crow_indices: ``[ceil(out_features / rows) + 1]``, int32.
        col_indices: ``[kept]``, int32, increasing within a block row.
        blocksize: ``(rows, cols)``, each from 1 to 128.

    Returns:
        ``[kept, cols, rows]``, the dtype of ``grad_output``; zero in the padding.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) the indices are not a valid structure.

    """
    op = "block_sparse_linear_weight_gradient"
    supported = grad_output.dtype in _registration.CUDA_DTYPES
    if is_transformed() or lacks_cuda_kernel(op, grad_output, supported):
        return reference.block_sparse_linear_weight_gradient(
            grad_output, input, crow_indices, col_indices, blocksize=blocksize
        )
    allow_tf32 = grad_output.is_cuda and _registration.allow_tf32()
    return _ops.block_sparse_linear_weight_gradient(
        grad_output, input, crow_indices, col_indices, *blocksize, allow_tf32
    )


def ablate_linear(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    """Return a linear layer's output for each of many masked pieces of its weight.

    Each is ``output`` less ``input[:, cols] @ weight[rows, cols].T`` in the columns ``rows`` of its piece:
    the layer does not run again. Differentiable in ``output``, ``input`` and ``weight``. The bits of the
    result do not depend on the number of threads.

    Example:
        >>> heads = torch.tensor([[0, 768, h * 64, h * 64 + 64] for h in range(12)], dtype=torch.int32)
        >>> masked = fp.ops.ablate_linear(layer(input), input, layer.weight, heads)
        >>> masked.shape
        torch.Size([12, 100, 768])

    Args:
        output: ``[samples, out_features]``, the layer's output; float32 or float64.
        input: ``[samples, in_features]``, the layer's input.
        weight: ``[out_features, in_features]``.
        pieces: ``[pieces, 4]``, int32: row_begin, row_end, col_begin, col_end of a rectangle of ``weight``.

    Returns:
        ``[pieces, samples, out_features]``, contiguous, the dtype of ``output``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or pieces are out of range.

    """
    if lacks_cuda_kernel("ablate_linear", output, False) or is_transformed():
        return reference.ablate_linear(output, input, weight, pieces)
    return _ops.ablate_linear(output, input, weight, pieces)


def ablated_cross_entropy(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return the summed change of the cross-entropy when pieces of the last layer are masked.

    No ``[pieces, samples, classes]`` tensor is made. The formula, which loses no digits for deltas that
    are a millionth of the loss, is in ``csrc/kernels/ablated_cross_entropy.h``.

    Example:
        >>> pieces = torch.tensor([[0, 10, j, j + 1] for j in range(64)], dtype=torch.int32)
        >>> delta_sum = fp.ops.ablated_cross_entropy(logits, hidden, last.weight, targets, pieces)
        >>> loss_deltas = delta_sum / len(targets)          # one for each of 64 hidden units

    Args:
        logits: ``[samples, classes]``, the last layer's output, its bias included; float32 or float64.
        hidden: ``[samples, features]``, the last layer's input. Where masking a unit leaves an input of
            ``a`` and not 0 (a sigmoid's 0.5), pass ``hidden - a``.
        weight: ``[classes, features]``.
        targets: ``[samples]``, int64 class indices in ``[0, classes)``.
        pieces: ``[pieces, 4]``, int32: row_begin, row_end, col_begin, col_end of a rectangle of ``weight``.
        sample_weight: ``[samples]`` or None for ones; 0 leaves a sample out.

    Returns:
        ``[pieces]``, float64: the sum over the samples of ``sample_weight * (masked loss - loss)``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or targets or pieces are out of range.

    """
    if lacks_cuda_kernel("ablated_cross_entropy", logits, False) or is_transformed():
        return reference.ablated_cross_entropy(logits, hidden, weight, targets, pieces, sample_weight)
    return _ops.ablated_cross_entropy(logits, hidden, weight, targets, pieces, sample_weight)


def ablated_mlp_cross_entropy(
    logits: Tensor,
    input: Tensor,
    pre_activation: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    activation: str | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return the summed change of the cross-entropy when pieces of the last but one layer are masked.

    The head is ``logits = activation(pre_activation) @ second_weight.T + bias`` with
    ``pre_activation = input @ first_weight.T + bias``. Neither a ``[pieces, samples, hidden]`` nor a
    ``[pieces, samples, classes]`` tensor is made. The formula, which loses no digits however small the
    changes are, is in ``csrc/kernels/ablated_mlp_cross_entropy.h``.

    Example:
        >>> blocks = [(r, r + 16, c, c + 16) for r in range(0, 512, 16) for c in range(0, 784, 16)]
        >>> delta_sum = fp.ops.ablated_mlp_cross_entropy(
        ...     logits, inputs, first(inputs), first.weight, last.weight, targets,
        ...     torch.tensor(blocks, dtype=torch.int32), "relu")
        >>> loss_deltas = (delta_sum / len(targets)).view(32, 49)

    Args:
        logits: ``[samples, classes]``, the last layer's output, its bias included; float32 or float64.
        input: ``[samples, in_features]``, the first layer's input.
        pre_activation: ``[samples, hidden]``, the first layer's output, its bias included.
        first_weight: ``[hidden, in_features]``.
        second_weight: ``[classes, hidden]``.
        targets: ``[samples]``, int64 class indices in ``[0, classes)``.
        pieces: ``[pieces, 4]``, int32: row_begin, row_end, col_begin, col_end of a rectangle of
            ``first_weight``.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu".
        sample_weight: ``[samples]`` or None for ones; 0 leaves a sample out.

    Returns:
        ``[pieces]``, float64: the sum over the samples of ``sample_weight * (masked loss - loss)``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, targets or pieces are out of range, or the activation
            is unknown.

    """
    layers = (logits, input, pre_activation, first_weight, second_weight, targets, pieces)
    if lacks_cuda_kernel("ablated_mlp_cross_entropy", logits, False) or is_transformed():
        return reference.ablated_mlp_cross_entropy(*layers, activation, sample_weight)
    return _ops.ablated_mlp_cross_entropy(
        *layers, "none" if activation is None else activation, sample_weight
    )
