"""The convolution's ops as typed functions, which :mod:`fastprune.ops` shows with the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from ._dispatch import (
    autocast_convolution,
    is_transformed,
    lacks_cuda_kernel,
    needs_grad,
    takes_registered_gradients,
)
from ._fake_checks import CUDA_DTYPES
from ._registration import CLIPPING
from ._registration_conv import block_sparse_conv2d_function, block_sparse_conv2d_inference

_ops = torch.ops.fastprune


@torch.compiler.assume_constant_result
def _tf32_allowed() -> bool:
    # Convolutions have a switch of their own, which torch leaves on; see also `ops._tf32_allowed`.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _allow_tf32(tensor: Tensor) -> bool:
    """Whether convolutions of a tensor may round their float32 operands to tf32, as torch's own do."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _tf32_allowed()


def block_sparse_conv2d(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Return ``activation(conv2d(input, weight, bias))`` for a block-sparse weight.

    The weight is seen as the matrix ``[out_channels, kernel_height * kernel_width * padded]`` with taps
    row-major and channels innermost, padded in each tap to ``padded``, the next multiple of ``cols`` from
    ``in_channels / groups`` on. Differentiable in ``input``, ``packed_values`` and ``bias``; under
    ``torch.func`` transforms and forward-mode differentiation it is computed through the dense weight. The
    bits of the result depend neither on the number of threads nor on the other images of the batch nor on
    the memory format (kernels of one pixel on CUDA: see :func:`fastprune.ops.block_sparse_linear`).

    On CUDA, float32 is multiplied as tf32 where ``torch.backends.cudnn`` allows it, which is torch's default
    for convolutions, else as float32; under autocast all is cast to autocast's dtype, as for ``F.conv2d``.

    Example:
        >>> taps = fp.granularity.weight_as_taps(torch.randn(32, 16, 3, 3)).flatten(1)
        >>> weight = fp.BlockSparseTensor.from_dense(taps, blocksize=(16, 16))
        >>> y = fp.ops.block_sparse_conv2d(
        ...     torch.randn(4, 16, 28, 28), weight.packed_values, weight.crow_indices, weight.col_indices,
        ...     out_channels=32, kernel_size=(3, 3), padding=(1, 1, 1, 1))
        >>> y.shape
        torch.Size([4, 32, 28, 28])

    Args:
        input: ``[images, in_channels, height, width]``, float32 or float64, in any memory format; on CUDA
            float32, float16 or bfloat16, copied where it is not channels-last, while float64 is computed
            through the dense weight.
        packed_values: ``[kept, cols, rows]``, the kept blocks of the weight, each transposed; the dtype
            of ``input``.
        crow_indices: ``[ceil(out_channels / rows) + 1]``, int32: where each block row begins.
        col_indices: ``[kept]``, int32, increasing within a block row: tap times
            ``ceil(in_channels / groups / cols)`` plus block of the group's channels.
        bias: ``[out_channels]`` or None.
        out_channels: rows of the weight; the last block row may reach past them.
        kernel_size: ``(height, width)`` in pixels, as are stride, padding and dilation.
        stride: ``(height, width)``.
        padding: ``(top, bottom, left, right)``, zeros.
        dilation: ``(height, width)``.
        groups: of channels, as in ``torch.nn.Conv2d``; above 1 the rows of a block lie in one group, so
            ``out_channels / groups`` is a multiple of ``rows``.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", fused into the store where no
            gradient is needed (relu and relu6: always). ``csrc/kernels/cpu/activation.h`` has the formulas.

    Returns:
        ``[images, out_channels, output_height, output_width]``, the dtype of ``input``, channels-last where
        ``input`` is and on CUDA, else contiguous.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the padded input is smaller than the kernel, groups
            do not divide the channels or cut a block, or (CPU) the indices are not a valid structure.

    """
    input, packed_values, bias = autocast_convolution(input, packed_values, bias)
    supported = input.dtype in CUDA_DTYPES
    if is_transformed() or lacks_cuda_kernel("block_sparse_conv2d", input, supported):
        return reference.block_sparse_conv2d(
            input,
            packed_values,
            crow_indices,
            col_indices,
            bias,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            activation=activation,
        )
    tf32 = _allow_tf32(input)
    if not needs_grad(input, packed_values, bias) and not torch.jit.is_tracing():
        # The op with gradients costs some microseconds more for each call. A trace is checked in both modes.
        return block_sparse_conv2d_inference(
            input,
            packed_values,
            crow_indices,
            col_indices,
            bias,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            "none" if activation is None else activation,
            tf32,
        )
    geometry = (kernel_size, stride, padding, dilation, groups)
    # Kept for the backward, what goes into a curved activation costs less than computing it anew.
    fused = activation not in reference.ACTIVATIONS or activation in CLIPPING
    name = activation if fused and activation is not None else "none"
    op: Callable[..., Tensor] = (
        _ops.block_sparse_conv2d if takes_registered_gradients() else block_sparse_conv2d_function.apply
    )
    output = op(input, packed_values, crow_indices, col_indices, bias, out_channels, *geometry, name, tf32)
    return output if fused else reference.ACTIVATIONS[activation](output)  # type: ignore[index]


def block_sparse_conv2d_input_gradient(
    grad_output: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    input_size: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the gradient of the input of :func:`block_sparse_conv2d`.

    Differentiable in ``grad_output`` and ``packed_values``. What is not named here is as there.

    Example:
        >>> grad_input = fp.ops.block_sparse_conv2d_input_gradient(
        ...     torch.randn(4, 32, 28, 28), weight.packed_values, weight.crow_indices, weight.col_indices,
        ...     input_size=(4, 16, 28, 28), kernel_size=(3, 3), padding=(1, 1, 1, 1))

    Args:
        grad_output: ``[images, out_channels, output_height, output_width]``, float32 or float64; on CUDA
            float32, float16 or bfloat16, while float64 is computed through the dense weight.
        packed_values: ``[kept, cols, rows]``, the dtype of ``grad_output``.
        crow_indices: ``[ceil(out_channels / rows) + 1]``, int32.
        col_indices: ``[kept]``, int32, increasing within a block row.
        input_size: ``(images, in_channels, height, width)``, the input's.
        kernel_size: ``(height, width)``.
        stride: ``(height, width)``.
        padding: ``(top, bottom, left, right)``.
        dilation: ``(height, width)``.
        groups: of channels.

    Returns:
        A tensor of ``input_size``, the dtype of ``grad_output`` and its memory format; on CUDA channels-last.

    Raises:
        ValueError: as :func:`block_sparse_conv2d`, or ``grad_output`` is not of the size that an input of
            ``input_size`` gives.

    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    supported = grad_output.dtype in CUDA_DTYPES
    if is_transformed() or lacks_cuda_kernel("block_sparse_conv2d_input_gradient", grad_output, supported):
        return reference.block_sparse_conv2d_input_gradient(
            grad_output,
            packed_values,
            crow_indices,
            col_indices,
            input_size=input_size,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    return _ops.block_sparse_conv2d_input_gradient(
        grad_output, packed_values, crow_indices, col_indices, input_size, *geometry, _allow_tf32(grad_output)
    )


def block_sparse_conv2d_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    blocksize: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the gradient of the kept blocks of the weight of :func:`block_sparse_conv2d`.

    Differentiable in ``grad_output`` and ``input``. Only the kept blocks are computed. Sums accumulate in the
    dtype of ``grad_output``, on CUDA in float32, in an order that depends on the sizes alone. On CUDA blocks
    whose sides are multiples of 16 run on tensor cores, float32 only where ``torch.backends.cudnn`` allows
    tf32; channels-last images are read in place, others copied. What is not named here is as there.

    Example:
        >>> grad_values = fp.ops.block_sparse_conv2d_weight_gradient(
        ...     grad_output, input, weight.crow_indices, weight.col_indices, blocksize=(16, 16),
        ...     kernel_size=(3, 3), padding=(1, 1, 1, 1))

    Args:
        grad_output: ``[images, out_channels, output_height, output_width]``, float32 or float64 (CUDA:
            float32, float16 or bfloat16; float64 runs through the dense gradient).
        input: ``[images, in_channels, height, width]``, the dtype of ``grad_output``.
        crow_indices: ``[ceil(out_channels / rows) + 1]``, int32.
        col_indices: ``[kept]``, int32, increasing within a block row.
        blocksize: ``(rows, cols)``, each from 1 to 128.
        kernel_size: ``(height, width)``.
        stride: ``(height, width)``.
        padding: ``(top, bottom, left, right)``.
        dilation: ``(height, width)``.
        groups: of channels.

    Returns:
        ``[kept, cols, rows]``, the dtype of ``grad_output``; zero in the padding.

    Raises:
        ValueError: as :func:`block_sparse_conv2d`, or ``grad_output`` is not of the size that
            ``input`` gives.

    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    op = "block_sparse_conv2d_weight_gradient"
    supported = grad_output.dtype in CUDA_DTYPES
    if is_transformed() or lacks_cuda_kernel(op, grad_output, supported):
        return reference.block_sparse_conv2d_weight_gradient(
            grad_output,
            input,
            crow_indices,
            col_indices,
            blocksize=blocksize,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    return _ops.block_sparse_conv2d_weight_gradient(
        grad_output, input, crow_indices, col_indices, *blocksize, *geometry, _allow_tf32(grad_output)
    )
