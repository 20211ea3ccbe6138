"""The ops as typed functions. All else in fastprune calls kernels through this module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _library, reference
from . import _registration_ablation as _registration_ablation  # fake kernels, gradients and autocast
from ._dispatch import (
    autocast_linear,
    is_transformed,
    lacks_cuda_kernel,
    needs_grad,
    takes_registered_gradients,
)
from ._fake_checks import CUDA_DTYPES, is_mixed
from ._registration import CLIPPING, block_sparse_linear_function
from .ops_conv import (
    block_sparse_conv2d as block_sparse_conv2d,
)
from .ops_conv import (
    block_sparse_conv2d_input_gradient as block_sparse_conv2d_input_gradient,
)
from .ops_conv import (
    block_sparse_conv2d_weight_gradient as block_sparse_conv2d_weight_gradient,
)
from .ops_conv_changes import (
    ablate_conv2d as ablate_conv2d,
)
from .ops_conv_changes import (
    updated_conv2d as updated_conv2d,
)
from .ops_conv_changes import (
    winograd_weight as winograd_weight,
)

_ops = torch.ops.fastprune


@torch.compiler.assume_constant_result
def _tf32_allowed() -> bool:
    # Of the two switches this one can always be read: it shows what was set through `allow_tf32` too.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _allow_tf32(tensor: Tensor) -> bool:
    """Whether products of a tensor may round their float32 operands to tf32, as torch's own do."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _tf32_allowed()


def _widened_on_cuda(input: Tensor, packed_values: Tensor) -> Tensor:
    """Return weights that a kernel takes with an input: on CUDA none takes two dtypes."""
    return packed_values.float() if input.is_cuda and is_mixed(input, packed_values) else packed_values


def _autocast_to_float32(tensor: Tensor) -> bool:
    """Whether a tensor reaches a float32 kernel: as it is, or by way of autocast."""
    return tensor.dtype == torch.float32 or (tensor.is_cuda and torch.is_autocast_enabled("cuda"))


def has_ablation_kernels(tensor: Tensor) -> bool:
    """Return whether the ablation ops have kernels for tensors of a device and dtype.

    Where they have none, the ops give the same by way of all masked weights or logits, which takes far
    more memory.

    Example:
        >>> fp.ops.has_ablation_kernels(torch.zeros(3))
        True

    Args:
        tensor: the logits, or a layer's output.

    """
    if tensor.is_cuda:
        return tensor.dtype == torch.float32 and _library.cuda_kernels_unavailable_reason() is None
    return tensor.dtype in (torch.float32, torch.float64)


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
    neither on the number of threads nor on the other samples of the batch (float16, bfloat16 and tf32: as
    long as both batches have more than 16 samples, or both have not).

    float16 and bfloat16 are summed in float32. On the CPU they store and read half as many bytes, which is
    what a few samples take their time for; with more, weights are widened to float32 in each call. Under
    autocast the CPU computes in float32, unless all is of one dtype of 16 bits.

    On CUDA, float32 is multiplied as float32, or as tf32 where ``torch.backends.cuda.matmul`` allows it;
    under autocast all is cast to autocast's dtype, as for ``F.linear``.

    Example:
        >>> weight = fp.BlockSparseTensor.from_dense(torch.eye(32), blocksize=(16, 16))
        >>> y = fp.ops.block_sparse_linear(
        ...     torch.randn(4, 32), weight.packed_values, weight.crow_indices, weight.col_indices,
        ...     out_features=32)
        >>> y.shape
        torch.Size([4, 32])

    Args:
        input: ``[*, in_features]``, float32, float64, float16 or bfloat16; on CUDA float64 is multiplied by
            the dense weight.
        packed_values: ``[kept, cols, rows]``, the kept blocks of the weight, each transposed; the dtype
            of ``input``, or float16 or bfloat16 where that is float32.
        crow_indices: ``[ceil(out_features / rows) + 1]``, int32: where each block row begins.
        col_indices: ``[kept]``, int32, increasing within a block row.
        bias: ``[out_features]``, the dtype of ``input``, or None.
        out_features: rows of the weight; the last block row may reach past them.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", fused into the store where no
            gradient is needed (relu and relu6: always). The formulas are those of
            ``csrc/kernels/cpu/activation.h``.

    Returns:
        ``[*, out_features]``, contiguous, the dtype of ``input``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) the indices are not a valid structure.

    """
    input, packed_values, bias = autocast_linear(input, packed_values, bias)
    packed_values = _widened_on_cuda(input, packed_values)
    supported = input.dtype in CUDA_DTYPES
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
    if not needs_grad(input, packed_values, bias) and not torch.jit.is_tracing():
        # The op with gradients costs some microseconds more for each call. A trace is checked in both modes.
        op: Callable[..., Tensor] = _ops.block_sparse_linear_inference
        fused = True
    else:
        # Kept for the backward, what goes into a curved activation costs less than computing it anew.
        op = _ops.block_sparse_linear if takes_registered_gradients() else block_sparse_linear_function.apply
        fused = activation not in reference.ACTIVATIONS or activation in CLIPPING
    name = activation if fused and activation is not None else "none"
    allow_tf32 = _allow_tf32(input)
    output = op(input, packed_values, crow_indices, col_indices, bias, out_features, name, allow_tf32)
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

    Differentiable in ``grad_output`` and ``packed_values``. float16 and bfloat16 are summed in float32.

    Example:
        >>> grad_input = fp.ops.block_sparse_linear_input_gradient(
        ...     torch.randn(4, 32), weight.packed_values, weight.crow_indices, weight.col_indices,
        ...     in_features=32)

    Args:
        grad_output: ``[*, out_features]``, float32, float64, float16 or bfloat16; on CUDA float64 is
            multiplied by the dense weight.
        packed_values: ``[kept, cols, rows]``, the dtype of ``grad_output``, or float16 or bfloat16 where that
            is float32.
        crow_indices: ``[ceil(out_features / rows) + 1]``, int32.
        col_indices: ``[kept]``, int32, increasing within a block row.
        in_features: columns of the weight; the last block column may reach past them.

    Returns:
        ``[*, in_features]``, contiguous, the dtype of ``grad_output``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) the indices are not a valid structure.

    """
    op = "block_sparse_linear_input_gradient"
    packed_values = _widened_on_cuda(grad_output, packed_values)
    if is_transformed() or lacks_cuda_kernel(op, grad_output, grad_output.dtype in CUDA_DTYPES):
        return reference.block_sparse_linear_input_gradient(
            grad_output, packed_values, crow_indices, col_indices, in_features=in_features
        )
    return _ops.block_sparse_linear_input_gradient(
        grad_output, packed_values, crow_indices, col_indices, in_features, _allow_tf32(grad_output)
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

    Differentiable in ``grad_output`` and ``input``. Only the kept blocks are computed. Sums accumulate in
    float32 (float64 on the CPU: in float64), in an order that depends on the sizes alone. On CUDA
    blocks whose sides are multiples of 16 run on tensor cores, float32 only where
    ``torch.backends.cuda.matmul`` allows tf32.

    Example:
        >>> grad_values = fp.ops.block_sparse_linear_weight_gradient(
        ...     grad_output, input, weight.crow_indices, weight.col_indices, blocksize=(16, 16))

    Args:
        grad_output: ``[*, out_features]``, float32, float64, float16 or bfloat16 (CUDA: float64 runs through
            the dense product).
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
    supported = grad_output.dtype in CUDA_DTYPES
    if is_transformed() or lacks_cuda_kernel(op, grad_output, supported):
        return reference.block_sparse_linear_weight_gradient(
            grad_output, input, crow_indices, col_indices, blocksize=blocksize
        )
    return _ops.block_sparse_linear_weight_gradient(
        grad_output, input, crow_indices, col_indices, *blocksize, _allow_tf32(grad_output)
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
        output: ``[samples, out_features]``, the layer's output; float32 or float64 (CUDA: float32).
        input: ``[samples, in_features]``, the layer's input.
        weight: ``[out_features, in_features]``.
        pieces: ``[pieces, 4]``, int32: row_begin, row_end, col_begin, col_end of a rectangle of ``weight``.

    Returns:
        ``[pieces, samples, out_features]``, contiguous, the dtype of ``output``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) pieces are out of range; on CUDA, where
            reading them would make the host wait, such pieces give NaN.

    """
    if lacks_cuda_kernel("ablate_linear", output, _autocast_to_float32(output)) or is_transformed():
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
        logits: ``[samples, classes]``, the last layer's output, its bias included; float32 or float64
            (CUDA: float32).
        hidden: ``[samples, features]``, the last layer's input. Where masking a unit leaves an input of
            ``a`` and not 0 (a sigmoid's 0.5), pass ``hidden - a``.
        weight: ``[classes, features]``.
        targets: ``[samples]``, int64 class indices in ``[0, classes)``.
        pieces: ``[pieces, 4]``, int32: row_begin, row_end, col_begin, col_end of a rectangle of ``weight``.
        sample_weight: ``[samples]`` or None for ones; 0 leaves a sample out.

    Returns:
        ``[pieces]``, float64: the sum over the samples of ``sample_weight * (masked loss - loss)``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (CPU) targets or pieces are out of range; on
            CUDA, where reading them would make the host wait, these give NaN.

    """
    if lacks_cuda_kernel("ablated_cross_entropy", logits, _autocast_to_float32(logits)) or is_transformed():
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
        logits: ``[samples, classes]``, the last layer's output, its bias included; float32 or float64
            (CUDA: float32).
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
        ValueError: shapes, dtypes or devices disagree, the activation is unknown, or (CPU) targets or pieces
            are out of range; on CUDA, where reading them would make the host wait, these give NaN.

    """
    layers = (logits, input, pre_activation, first_weight, second_weight, targets, pieces)
    if (
        lacks_cuda_kernel(
            "ablated_mlp_cross_entropy", logits, _autocast_to_float32(logits) and activation != "relu6"
        )
        or is_transformed()
    ):
        return reference.ablated_mlp_cross_entropy(*layers, activation, sample_weight)
    return _ops.ablated_mlp_cross_entropy(
        *layers, "none" if activation is None else activation, sample_weight
    )
