"""What masking each piece of one layer does to the values of a traced model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import ops
from ..channel_changes import Change, ChannelChange, add_product
from ..granularity import Block, Granularity, Head, InputUnit, Layer, Unit
from ..node_ops import ConvOp, NodeOp

# Masked outputs of one layer that are made together stay near the caches.
_MASKED_BYTES = 4 << 20

# The kernel is for updates of low rank; beyond, a plain product is as fast and needs no copy of the weights.
_MOST_COLUMNS = 128

Values = dict[fx.Node, Any]
Masked = dict[fx.Node, Change]
"""The nodes whose values a mask changes, and what it makes of them."""


def piece_changes(
    node: fx.Node,
    op: NodeOp,
    pieces: Granularity,
    units: Sequence[tuple[fx.Node, NodeOp]],
    values: Values,
) -> Iterator[Masked | None] | None:
    """Yield what masking each piece changes, in order; None for a piece that changes nothing.

    Args:
        node: the call of a Linear or Conv2d.
        op: what it computes.
        pieces: the granularity, with what the layer adds to it.
        units: of this layer, and of those whose units are masked with its own, the node whose channels a
            masked unit sets to zero (the layer's, or the batch norm's after it) and what the layer computes.
        values: the value of every node.

    Returns:
        The changes, or None where the layer has to run again with a masked weight.

    """
    source, output, weight = values[op.input], values[node], op.tensors(values)[0]
    assert weight is not None
    if isinstance(op, ConvOp) and source.dim() != 4:
        return None
    if isinstance(pieces, Unit):
        return _units(units, pieces, pieces.shape(weight.shape).numel(), values)
    if type(pieces) is Layer:
        return iter([{node: source if source.shape == output.shape else torch.zeros_like(output)}])
    if isinstance(pieces, (InputUnit, Head)):
        return _columns(node, op, weight, _nonzero(pieces, weight), source, output)
    if not isinstance(pieces, Block):
        return None
    if isinstance(op, ConvOp):
        blocks = _grouped_blocks if op.groups > 1 else _conv_blocks
        return blocks(node, op, weight, pieces, values)
    return _linear_blocks(node, weight, pieces, source, output)


def _nonzero(pieces: Granularity, weight: Tensor) -> list[bool]:
    """Which pieces are not all zero; of the whole layer at once, since on a GPU the host waits for it.

    Sizes are summed and not counts, which torch would copy as int64: twice the weight's memory.
    """
    sizes = pieces.sum_pieces(weight.abs().contiguous())
    return (sizes != 0).flatten().tolist()


def _nonzero_channels(value: Tensor, dim: int) -> list[bool]:
    others = [other for other in range(value.dim()) if other != dim]
    return (value.any(others) if others else value != 0).tolist()


def _units(
    layers: Sequence[tuple[fx.Node, NodeOp]], pieces: Unit, count: int, values: Values
) -> Iterator[Masked | None]:
    dims = {start: 1 if isinstance(op, ConvOp) else values[start].dim() - 1 for start, op in layers}
    # Of each layer at once: on a GPU the host waits.
    active = [_nonzero_channels(values[start], dim) for start, dim in dims.items()]
    nonzero = [any(channels) for channels in zip(*active, strict=True)]
    out = len(nonzero)
    for begin in range(0, count * pieces.group_size, pieces.group_size):
        end = min(begin + pieces.group_size, out)
        if any(nonzero[begin:end]):
            channels = {start: values[start].narrow(dim, begin, end - begin) for start, dim in dims.items()}
            yield {
                start: ChannelChange(dims[start], begin, end, torch.zeros_like(value))
                for start, value in channels.items()
            }
        else:
            yield None


def _columns(
    node: fx.Node, op: NodeOp, weight: Tensor, nonzero: list[bool], source: Tensor, output: Tensor
) -> Iterator[Masked | None]:
    """Input units and heads: some inputs of all outputs, or of those of one group."""
    if not isinstance(op, ConvOp):
        yield from _linear_columns(node, weight, nonzero, source, output)
        return
    outputs, inputs, taps = weight.shape[0] // op.groups, weight.shape[1], weight[0, 0].numel()
    bounds = [(column, column + 1, 0, taps) for column in range(inputs)]
    for group in range(op.groups):
        channels = slice(group * inputs, (group + 1) * inputs)
        rows = slice(group * outputs, (group + 1) * outputs)
        yield from _conv_pieces(
            node,
            op,
            weight[rows],
            bounds,
            nonzero[channels],
            source[:, channels],
            output[:, rows],
            rows.start,
        )


def has_conv_kernel(output: Tensor) -> bool:
    """Tell whether the kernel for pieces of a convolution reads an output where it lies."""
    return output.stride(1) == 1 and not output.is_cuda and ops.has_ablation_kernels(output)


def _conv_pieces(
    node: fx.Node,
    op: ConvOp,
    weight: Tensor,
    bounds: Sequence[tuple[int, int, int, int]],
    nonzero: Sequence[bool],
    source: Tensor,
    output: Tensor,
    first_row: int,
) -> Iterator[Masked | None]:
    """Pieces of the same outputs of a convolution: channels of the input and taps, several at a time.

    ``source`` is padded already where torch computes pieces of one tap of several.
    """
    left, right, top, bottom = op.sides((weight.shape[2], weight.shape[3]))
    wanted = [piece for piece, flag in zip(bounds, nonzero, strict=True) if flag]
    at_once = max(1, _MASKED_BYTES // max(1, output.numel() * output.element_size()))

    def masked() -> Iterator[Tensor]:
        for begin in range(0, len(wanted), at_once):
            chunk = torch.tensor(wanted[begin : begin + at_once], dtype=torch.int32)
            yield from ops.ablate_conv2d(
                output,
                source,
                weight,
                chunk,
                stride=op.strides,
                padding=(top, bottom, left, right),
                dilation=op.dilations,
            )

    if has_conv_kernel(output):
        outputs = masked()
    else:
        outputs = _convolved_pieces(op, weight, wanted, source, output)
    for flag in nonzero:
        if flag:
            yield {node: ChannelChange(1, first_row, first_row + len(weight), next(outputs))}
        else:
            yield None


def _convolved_pieces(
    op: ConvOp, weight: Tensor, bounds: Iterable[tuple[int, int, int, int]], source: Tensor, output: Tensor
) -> Iterator[Tensor]:
    """The same by torch: a piece of all taps as one convolution, one of a tap as a 1x1 convolution."""
    height, width = weight.shape[2:]
    strides, dilations = op.strides, op.dilations
    for first, last, tap, last_tap in bounds:
        if last_tap - tap == height * width:
            yield output - op.convolve(source[:, first:last], weight[:, first:last], None, 1)
            continue
        (top, left) = (offset * step for offset, step in zip(divmod(tap, width), dilations, strict=True))
        bottom = top + (output.shape[2] - 1) * strides[0] + 1
        right = left + (output.shape[3] - 1) * strides[1] + 1
        seen = source[:, first:last, top : bottom : strides[0], left : right : strides[1]]
        part = weight[:, first:last].flatten(2)[:, :, tap]
        yield output - F.conv2d(seen, part[:, :, None, None])


def _linear_columns(
    node: fx.Node, weight: Tensor, nonzero: list[bool], source: Tensor, output: Tensor
) -> Iterator[Masked | None]:
    """Several masks at a time: the kernel reads the output once for each, and writes it once."""
    pieces, features = len(nonzero), len(weight)
    size = weight.shape[1] // pieces
    bounds = [(0, features, index * size, (index + 1) * size) for index in range(pieces)]
    at_once = max(1, _MASKED_BYTES // max(1, output.numel() * output.element_size()))
    inputs, outputs = source.flatten(0, -2), output.flatten(0, -2)
    for begin in range(0, pieces, at_once):
        chunk = bounds[begin : begin + at_once]
        masked: Iterable[Tensor]
        if not ops.has_ablation_kernels(output) or size > _MOST_COLUMNS:
            masked = (
                add_product(outputs, inputs[:, first:last], weight[:, first:last], scale=-1)
                for _, _, first, last in chunk
            )
        else:
            bounds_of_chunk = torch.tensor(chunk, dtype=torch.int32, device=output.device)
            masked = ops.ablate_linear(outputs, inputs, weight, bounds_of_chunk)
        for index, whole in enumerate(masked, begin):
            yield {node: whole.view(output.shape)} if nonzero[index] else None


def rectangles(block: Block, weight_shape: torch.Size) -> list[tuple[int, int, int, int]]:
    """Return the blocks of a Linear weight as row_begin, row_end, col_begin, col_end, row-major."""
    out_features, in_features = weight_shape
    return [
        (row, min(row + block.rows, out_features), col, min(col + block.cols, in_features))
        for row in range(0, out_features, block.rows)
        for col in range(0, in_features, block.cols)
    ]


def _linear_blocks(
    node: fx.Node, weight: Tensor, block: Block, source: Tensor, output: Tensor
) -> Iterator[Masked | None]:
    dim = output.dim() - 1
    bounds = rectangles(block, weight.shape)
    for (row, row_end, col, col_end), nonzero in zip(bounds, _nonzero(block, weight), strict=True):
        if nonzero:
            part = weight[row:row_end, col:col_end]
            masked = add_product(output[..., row:row_end], source[..., col:col_end], part, scale=-1)
            yield {node: ChannelChange(dim, row, row_end, masked)}
        else:
            yield None


def _conv_blocks(
    node: fx.Node, op: ConvOp, weight: Tensor, block: Block, values: Values
) -> Iterator[Masked | None]:
    """Blocks of one kernel tap, the block rows one after the other."""
    inputs, taps = weight.shape[1], weight[0, 0].numel()
    bounds = [
        (col, min(col + block.cols, inputs), tap, tap + 1)
        for tap in range(taps)
        for col in range(0, inputs, block.cols)
    ]
    nonzero, source, output = _nonzero(block, weight), values[op.input], values[node]
    if taps > 1 and not has_conv_kernel(output):
        source = F.pad(source, op.sides((weight.shape[2], weight.shape[3])))
    for index, row in enumerate(range(0, weight.shape[0], block.rows)):
        rows = slice(row, row + block.rows)
        flags = nonzero[index * len(bounds) : (index + 1) * len(bounds)]
        yield from _conv_pieces(node, op, weight[rows], bounds, flags, source, output[:, rows], row)


def _grouped_blocks(
    node: fx.Node, op: ConvOp, weight: Tensor, block: Block, values: Values
) -> Iterator[Masked | None]:
    """Blocks of a grouped convolution, which runs again with the masked weight: its own channels alone
    where each is a group.
    """  # noqa: D205
    source, bias = values[op.input], op.tensors(values)[1]
    shape = block.shape(weight.shape)
    depthwise = op.groups == source.shape[1] == len(weight)
    for index, nonzero in enumerate(_nonzero(block, weight)):
        if not nonzero:
            yield None
            continue
        piece = torch.zeros(shape.numel(), dtype=torch.bool, device=weight.device)
        piece[index] = True
        masked = weight.masked_fill(block.expand(piece.view(shape), weight.shape), 0.0)
        if depthwise:
            begin = index // shape[1] * block.rows
            rows = slice(begin, min(begin + block.rows, len(weight)))
            part = None if bias is None else bias[rows]
            value = op.convolve(source[:, rows], masked[rows], part, rows.stop - rows.start)
            yield {node: ChannelChange(1, rows.start, rows.stop, value)}
        else:
            yield {node: op.convolve(source, masked, bias, op.groups)}
