"""What a change makes of a convolution's output, which :mod:`fastprune.ops` shows with the other ops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _registration_conv_changes as _registration_conv_changes  # registers shapes and gradients
from . import reference
from ._dispatch import is_transformed, lacks_cuda_kernel

_ops = torch.ops.fastprune


def ablate_conv2d(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    pieces: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str | None = None,
) -> Tensor:
    """Return a convolution's output for each of many masked pieces of its weight.

    Each is ``activation(output - conv2d(input[:, channels], weight[:, channels, taps]))``: the layer does not
    run again. For pieces of some outputs, such as blocks, pass ``output[:, rows]`` and ``weight[rows]``.
    Differentiable in ``output``, ``input`` and ``weight``. The bits of the result depend neither on the
    number of threads nor on the other images.

    Example:
        >>> conv = torch.nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
        >>> images = torch.randn(4, 16, 28, 28)
        >>> channels = torch.tensor([[c, c + 1, 0, 9] for c in range(16)], dtype=torch.int32)
        >>> masked = fp.ops.ablate_conv2d(conv(images), images, conv.weight, channels, padding=(1, 1, 1, 1))
        >>> masked.shape
        torch.Size([16, 4, 32, 28, 28])

    Args:
        output: ``[images, out_channels, output_height, output_width]``, what the convolution gave and
            whatever was added to it; float32 or float64, read in place where its channels lie side by side.
        input: ``[images, in_channels, height, width]``, the convolution's input, in any memory format.
        weight: ``[out_channels, in_channels, kernel_height, kernel_width]``.
        pieces: ``[pieces, 4]``, int32: channel_begin, channel_end, tap_begin, tap_end, of the input's
            channels and of the kernel's taps, row-major.
        stride: ``(height, width)`` in pixels, as are padding and dilation.
        padding: ``(top, bottom, left, right)``, zeros.
        dilation: ``(height, width)``.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu".

    Returns:
        ``[pieces, images, out_channels, output_height, output_width]``, the dtype of ``output``, each of the
        pieces channels-last.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the padded input is smaller than the kernel, or pieces
            are out of range.

    """
    if is_transformed() or lacks_cuda_kernel("ablate_conv2d", output, False):
        return reference.ablate_conv2d(
            output,
            input,
            weight,
            pieces,
            stride=stride,
            padding=padding,
            dilation=dilation,
            activation=activation,
        )
    return _ops.ablate_conv2d(output, input, weight, pieces, stride, padding, dilation, activation or "none")


def winograd_weight(weight: Tensor) -> Tensor:
    """Return a 3x3 convolution's weight as :func:`updated_conv2d` takes it: four times as large.

    Example:
        >>> fp.ops.winograd_weight(torch.randn(32, 16, 3, 3)).shape
        torch.Size([36, 2, 16, 16])

    Args:
        weight: ``[out_channels, in_channels, 3, 3]``.

    Returns:
        ``[36, ceil(out_channels / 16), in_channels, 16]``, contiguous, the dtype of ``weight``; zero in the
        padding. It is ``G w G^T`` of Lavin and Gray, Fast algorithms for convolutional neural networks
        (2016), section 4.3, F(4x4, 3x3), computed in float64.

    Raises:
        ValueError: the weight is not of that shape.

    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"winograd_weight: `weight` must have shape [out_channels, in_channels, 3, 3], got "
            f"{list(weight.shape)}"
        )
    return reference.winograd_weight(weight)


def updated_conv2d(
    known: Tensor,
    input: Tensor,
    new_input: Tensor,
    winograd_weight: Tensor,
    addend: Tensor | None = None,
    new_addend: Tensor | None = None,
    *,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    activation: str | None = None,
) -> Tensor:
    """Return what a sum with a 3x3 convolution in it becomes when the convolution's input changes.

    It is ``activation(known + conv2d(new_input - input, weight) + (new_addend - addend))``, of a stride of 1,
    by a quarter of the multiplications. Differences come first: what rounds off is a small part of the
    change, about 1e-6 and at most some 1e-5 of it in float32, and where nothing changes the result is
    ``activation(known)``. Differentiable in all tensors. The bits of the result depend neither on the number
    of threads nor on the other images.

    Example:
        >>> conv = torch.nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
        >>> images = torch.randn(4, 16, 28, 28)
        >>> masked = images * (torch.arange(16) != 5)[:, None, None]
        >>> weight = fp.ops.winograd_weight(conv.weight)
        >>> output = fp.ops.updated_conv2d(conv(images), images, masked, weight, padding=(1, 1, 1, 1))
        >>> torch.allclose(output, conv(masked), atol=1e-4)
        True

    Args:
        known: ``[images, out_channels, output_height, output_width]``, the sum for ``input`` and ``addend``;
            float32 or float64, as all others read in place where it is channels-last without gaps.
        input: ``[images, in_channels, height, width]``, the convolution's input.
        new_input: what it becomes.
        winograd_weight: of :func:`winograd_weight`; where the sum scales the convolution's channels, of the
            scaled weight.
        addend: another summand, of the shape of ``known``, or None.
        new_addend: what it becomes.
        padding: ``(top, bottom, left, right)`` in pixels, zeros.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu".

    Returns:
        A tensor of the shape and dtype of ``known``, channels-last.

    Raises:
        ValueError: shapes, dtypes or devices disagree, only one of the addends is given, or the padded input
            is smaller than the kernel.

    """
    tensors = (known, input, new_input, winograd_weight, addend, new_addend)
    if is_transformed() or lacks_cuda_kernel("updated_conv2d", known, False):
        return reference.updated_conv2d(*tensors, padding=padding, activation=activation)
    return _ops.updated_conv2d(*tensors, padding, activation or "none")
