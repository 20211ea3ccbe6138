"""Plain-torch twins of every op: slow, differentiable, and the definition of correct.

Run in float64 they are what the tests compare the kernels with. Each takes the arguments of its
twin in :mod:`fastprune.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor


def dense_weight(
    packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor, *, out_features: int, in_features: int
) -> Tensor:
    """Return the dense ``[out_features, in_features]`` weight of a packed block-sparse one.

    Args:
        packed_values: ``[kept, cols, rows]``, each block transposed.
        crow_indices: ``[block_rows + 1]``.
        col_indices: ``[kept]``.
        out_features: rows of the result; padded rows are cut off.
        in_features: columns of the result; padded columns are cut off.

    """
    _, cols, rows = packed_values.shape
    block_rows = crow_indices.numel() - 1
    block_cols = -(-in_features // cols)
    row_indices = torch.repeat_interleave(
        torch.arange(block_rows, device=crow_indices.device),
        (crow_indices[1:] - crow_indices[:-1]).long(),
        output_size=packed_values.shape[0],
    )
    blocks = packed_values.new_zeros(block_rows * block_cols, cols, rows)
    blocks = blocks.index_copy(0, row_indices * block_cols + col_indices.long(), packed_values)
    dense = blocks.view(block_rows, block_cols, cols, rows).permute(0, 3, 1, 2)
    return dense.reshape(block_rows * rows, block_cols * cols)[:out_features, :in_features]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
"""The activations that the kernels fuse, by name."""


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
    """Return ``activation(input @ weight.T + bias)`` through the dense weight, in the dtype of ``input``."""
    weight = dense_weight(
        packed_values, crow_indices, col_indices, out_features=out_features, in_features=input.shape[-1]
    )
    output = F.linear(input, weight.to(input.dtype), bias)
    return output if activation is None else ACTIVATIONS[activation](output)


def block_sparse_linear_input_gradient(
    grad_output: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    in_features: int,
) -> Tensor:
    """Return ``grad_output @ weight`` through the dense weight, in the dtype of ``grad_output``."""
    weight = dense_weight(
        packed_values,
        crow_indices,
        col_indices,
        out_features=grad_output.shape[-1],
        in_features=in_features,
    )
    return grad_output @ weight.to(grad_output.dtype)


def block_sparse_linear_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    blocksize: tuple[int, int],
) -> Tensor:
    """Return the kept blocks of ``grad_output.T @ input``, packed, through the dense product."""
    dense = grad_output.reshape(-1, grad_output.shape[-1]).T @ input.reshape(-1, input.shape[-1])
    return _kept_blocks(dense, crow_indices, col_indices, blocksize)


def _kept_blocks(
    dense: Tensor, crow_indices: Tensor, col_indices: Tensor, blocksize: tuple[int, int]
) -> Tensor:
    """Return the kept blocks of a dense matrix, packed."""
    rows, cols = blocksize
    block_rows, block_cols = crow_indices.numel() - 1, -(-dense.shape[1] // cols)
    padding = (0, block_cols * cols - dense.shape[1], 0, block_rows * rows - dense.shape[0])
    blocks = F.pad(dense, padding).view(block_rows, rows, block_cols, cols)
    row_indices = torch.repeat_interleave(
        torch.arange(block_rows, device=dense.device),
        (crow_indices[1:] - crow_indices[:-1]).long(),
        output_size=col_indices.numel(),
    )
    return blocks.permute(0, 2, 3, 1)[row_indices, col_indices.long()]


def dense_conv2d_weight(
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    *,
    out_channels: int,
    in_channels: int,
    kernel_size: tuple[int, int],
    groups: int = 1,
) -> Tensor:
    """Return the dense ``[out_channels, in_channels / groups, *kernel_size]`` weight of a packed one.

    Args:
        packed_values: ``[kept, cols, rows]``, each block transposed.
        crow_indices: ``[block_rows + 1]``.
        col_indices: ``[kept]``, in block columns of all taps, row-major, channels innermost.
        out_channels: output channels; padded rows are cut off.
        in_channels: input channels of all groups; padded ones are cut off in each tap.
        kernel_size: ``(height, width)``.
        groups: those of the convolution.

    """
    cols = packed_values.shape[1]
    channels = in_channels // groups
    padded = -(-channels // cols) * cols
    weight = dense_weight(
        packed_values,
        crow_indices,
        col_indices,
        out_features=out_channels,
        in_features=kernel_size[0] * kernel_size[1] * padded,
    )
    return weight.view(out_channels, *kernel_size, padded)[..., :channels].permute(0, 3, 1, 2)


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
    """Return ``activation(conv2d(input, weight, bias))`` through the dense weight."""
    weight = dense_conv2d_weight(
        packed_values,
        crow_indices,
        col_indices,
        out_channels=out_channels,
        in_channels=input.shape[1],
        kernel_size=kernel_size,
        groups=groups,
    )
    output = F.conv2d(_padded(input, padding), weight, bias, stride, 0, dilation, groups)
    return output if activation is None else ACTIVATIONS[activation](output)


def _padded(input: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(input, (left, right, top, bottom))


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
    """Return the gradient of the input of ``conv2d`` through the dense weight."""
    images, channels, height, width = input_size
    weight = dense_conv2d_weight(
        packed_values,
        crow_indices,
        col_indices,
        out_channels=grad_output.shape[1],
        in_channels=channels,
        kernel_size=kernel_size,
        groups=groups,
    )
    top, bottom, left, right = padding
    size = (images, channels, height + top + bottom, width + left + right)
    padded = torch.nn.grad.conv2d_input(size, weight, grad_output, stride, 0, dilation, groups)
    return padded[:, :, top : top + height, left : left + width]


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
    """Return the kept blocks of the gradient of ``conv2d``'s weight, packed, through the dense one."""
    channels = input.shape[1] // groups
    size = (grad_output.shape[1], channels, *kernel_size)
    padded = _padded(input, padding)
    dense = torch.nn.grad.conv2d_weight(padded, size, grad_output, stride, 0, dilation, groups)
    taps = F.pad(dense.permute(0, 2, 3, 1), (0, -channels % blocksize[1]))
    return _kept_blocks(taps.flatten(1), crow_indices, col_indices, blocksize)


def _masked_weights(weight: Tensor, pieces: Tensor) -> Tensor:
    """Return ``[pieces, *weight.shape]``: the weight inside each piece, 0 outside."""
    rows = torch.arange(weight.shape[0], device=pieces.device)
    cols = torch.arange(weight.shape[1], device=pieces.device)
    in_rows = (rows >= pieces[:, 0:1]) & (rows < pieces[:, 1:2])
    in_cols = (cols >= pieces[:, 2:3]) & (cols < pieces[:, 3:4])
    return torch.where(in_rows[:, :, None] & in_cols[:, None, :], weight, 0.0)


def ablate_linear(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    """Return the layer's output for each masked piece, by way of ``[pieces, *weight.shape]`` weights."""
    return output - input @ _masked_weights(weight, pieces).transpose(1, 2)


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
    """Return the convolution's output for each masked piece, by one convolution for each."""
    taps = weight.flatten(2)
    channels = torch.arange(weight.shape[1], device=pieces.device)
    positions = torch.arange(taps.shape[2], device=pieces.device)
    masked = []
    for first_channel, last_channel, first_tap, last_tap in pieces.tolist():
        inside = ((channels >= first_channel) & (channels < last_channel))[:, None]
        inside = inside & (positions >= first_tap) & (positions < last_tap)
        part = torch.where(inside, taps, 0.0).view(weight.shape)
        masked.append(output - F.conv2d(_padded(input, padding), part, None, stride, 0, dilation))
    result = torch.stack(masked) if masked else output.new_empty(0, *output.shape)
    return result if activation is None else ACTIVATIONS[activation](result)


# Lavin and Gray, Fast algorithms for convolutional neural networks (2016), section 4.3: F(4x4, 3x3).
_WINOGRAD_INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
_WINOGRAD_WEIGHT = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
_WINOGRAD_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_WINOGRAD_PANEL = 16


def winograd_weight(weight: Tensor) -> Tensor:
    """Return the transformed weight ``[36, ceil(out_channels / 16), in_channels, 16]``."""
    matrix = torch.tensor(_WINOGRAD_WEIGHT, dtype=torch.float64, device=weight.device)
    transform = torch.kron(matrix, matrix)
    out_channels, in_channels = weight.shape[:2]
    panels = -(-out_channels // _WINOGRAD_PANEL)
    result = weight.new_zeros(36, panels, in_channels, _WINOGRAD_PANEL)
    # A panel at a time: the whole weight in float64 would take nine times its memory.
    for panel in range(panels):
        rows = weight[panel * _WINOGRAD_PANEL : (panel + 1) * _WINOGRAD_PANEL].transpose(0, 1)
        # Contiguous, so that the bits do not depend on the memory format.
        points = transform @ rows.double().reshape(-1, 9).contiguous().T
        result[:, panel, :, : rows.shape[1]] = points.view(36, in_channels, rows.shape[1])
    return result


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
    """Return ``activation(known + conv2d(new_input - input) + new_addend - addend)`` by tiles of 4x4."""
    out_channels, height, width = known.shape[1:]
    rows, columns = -(-height // 4), -(-width // 4)
    top, _, left, _ = padding
    change = new_input - input
    below, beside = rows * 4 + 2 - top - change.shape[2], columns * 4 + 2 - left - change.shape[3]
    patches = F.pad(change, (left, beside, top, below)).unfold(2, 6, 4).unfold(3, 6, 4)
    to_points, to_pixels = known.new_tensor(_WINOGRAD_INPUT), known.new_tensor(_WINOGRAD_OUTPUT)
    points = torch.einsum("ia,ncrsab,jb->ncrsij", to_points, patches, to_points)
    weight = winograd_weight.transpose(2, 3).flatten(1, 2)[:, :out_channels].unflatten(0, (6, 6))
    products = torch.einsum("ncrsij,ijoc->nrsoij", points, weight)
    tiles = torch.einsum("ai,nrsoij,bj->norasb", to_pixels, products, to_pixels)
    result = known + tiles.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    if addend is not None and new_addend is not None:
        result = result + (new_addend - addend)
    return result if activation is None else ACTIVATIONS[activation](result)


def _cross_entropy_deltas(
    logits: Tensor, masked: Tensor, targets: Tensor, sample_weight: Tensor | None
) -> Tensor:
    """Return the summed differences of the losses of ``[pieces, samples, classes]`` masked logits."""
    losses = -F.log_softmax(masked, dim=2).gather(2, targets.expand(len(masked), -1)[:, :, None]).squeeze(2)
    deltas = losses - F.cross_entropy(logits, targets, reduction="none")
    if sample_weight is not None:
        deltas = torch.where(sample_weight != 0, deltas * sample_weight.double(), 0.0)
    return deltas.sum(1)


def ablated_cross_entropy(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return the summed change of the cross-entropy for each masked piece, by way of all their logits.

    It holds ``[pieces, samples, classes]`` logits in float64, which its twin never makes.
    """
    logits, hidden, weight = logits.double(), hidden.double(), weight.double()
    masked = logits - hidden @ _masked_weights(weight, pieces).transpose(1, 2)
    return _cross_entropy_deltas(logits, masked, targets, sample_weight)


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
    """Return the summed change of the cross-entropy for each masked piece of the last but one layer.

    It holds ``[pieces, samples, hidden]`` units and ``[pieces, samples, classes]`` logits in float64, which
    its twin never makes.
    """
    logits, input, pre_activation = logits.double(), input.double(), pre_activation.double()
    first_weight, second_weight = first_weight.double(), second_weight.double()
    function = ACTIVATIONS[activation] if activation is not None else torch.Tensor.clone
    masked_units = function(pre_activation - input @ _masked_weights(first_weight, pieces).transpose(1, 2))
    masked = logits - (function(pre_activation) - masked_units) @ second_weight.T
    return _cross_entropy_deltas(logits, masked, targets, sample_weight)
