"""Where one kernel gives the loss deltas of all pieces of a layer at once.

The last Linear in front of a cross-entropy, and what reaches it through functions that keep channels
apart: activations, batch norms, residual sums, pools.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import ops
from ..granularity import Block, Granularity, Head, InputUnit, Unit
from ..graph import TracedModel
from ..node_ops import NodeOp, fused_activation, node_op
from .piece_changes import rectangles

Values = dict[fx.Node, Any]

# One kernel call for each class costs their number squared; from here on the suffix is run instead.
MOST_CLASSES = 32

_KEEP_CHANNELS_APART = ("elementwise", "batch_norm", "channelwise", "flatten")


def fused_deltas(
    traced: TracedModel,
    values: Values,
    start: fx.Node,
    layer: fx.Node,
    pieces: Granularity,
    targets: Tensor,
    kept: Tensor | None,
) -> Tensor | None:
    """Return the summed cross-entropy deltas of a layer's pieces, or None where no kernel applies.

    Args:
        traced: the model; its output is the logits, ``[samples, classes]``.
        values: the value of every node.
        start: the node whose channels a masked unit sets to zero: the layer, or the batch norm after it.
        layer: the call of the layer.
        pieces: the granularity, with what the layer adds to it.
        targets: ``[samples]``, class indices; or ``[samples, classes]``, probabilities.
        kept: ``[samples]``, 0 for samples that are left out; None where all count.

    Returns:
        ``[pieces]``, float64.

    """
    last_node = traced.output_node.args[0]
    last = node_op(traced, last_node) if isinstance(last_node, fx.Node) else None
    if last is None or last.kind != "linear":
        return None
    assert isinstance(last_node, fx.Node)
    logits, hidden = values[last_node], values[last.input]
    if hidden.dim() != 2 or hidden.dtype != logits.dtype:
        return None
    weight, bias = last.tensors(values)
    assert weight is not None
    classes, features = weight.shape
    if layer is last_node:
        if isinstance(pieces, Unit):
            # A unit's bias goes with its row: one more column of weights, whose input is 1.
            column = bias if bias is not None else weight.new_zeros(classes)
            weight = torch.cat([weight, column[:, None]], dim=1)
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
        masked = _rectangles_of(pieces, weight.shape)
    elif not isinstance(pieces, Unit):
        return _through_one_activation(traced, values, layer, pieces, targets, kept, last_node, last)
    else:
        scored = node_op(traced, layer)
        if scored is not None and scored.kind == "linear" and values[layer].dim() != 2:
            return None  # its units are not the second dimension
        width = _columns_of_a_unit(traced, values, start, last_node, last)
        if width is None:
            return None
        zero = _input_of_last(traced, values, start, last_node, last)
        if bool(zero.any()):
            hidden = hidden - zero
        size = pieces.group_size * width
        count = pieces.shape(values[start].shape[1:]).numel()
        masked = [(0, classes, j * size, min((j + 1) * size, features)) for j in range(count)]
    if masked is None:
        return None
    table = _as_tensor(masked, logits)
    return _over_targets(
        lambda logits, hidden, weight, labels, kept: ops.ablated_cross_entropy(
            logits, hidden, weight, labels, table, kept
        ),
        (logits, hidden),
        (weight,),
        targets,
        kept,
    )


def _over_targets(
    deltas: Callable[..., Tensor],
    samples: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """Deltas for class indices; for probabilities, those of each sample with each class, weighted by them.

    In float64 where the kernels have it, since the first-order terms of the classes cancel; a part of the
    samples at a time, so that there are about as many repeated rows as samples.
    """
    if targets.dim() == 1:
        return deltas(*samples, *weights, targets, kept)
    count, classes = targets.shape
    dtype = samples[0].dtype if samples[0].is_cuda else torch.float64
    wide = [weight.to(dtype) for weight in weights]
    labels = torch.arange(classes, device=targets.device)
    parts = zip(*(tensor.tensor_split(min(count, classes)) for tensor in (*samples, targets)), strict=True)
    sums = [
        deltas(
            *(tensor.to(dtype).repeat_interleave(classes, 0) for tensor in part),
            *wide,
            labels.repeat(len(probabilities)),
            probabilities.flatten().to(dtype),
        )
        for *part, probabilities in parts
    ]
    return torch.stack(sums).sum(0)


def _as_tensor(rectangles: list[tuple[int, int, int, int]], like: Tensor) -> Tensor:
    return torch.tensor(rectangles, dtype=torch.int32, device=like.device).view(-1, 4)


def _through_one_activation(
    traced: TracedModel,
    values: Values,
    layer: fx.Node,
    pieces: Granularity,
    targets: Tensor,
    kept: Tensor | None,
    last_node: fx.Node,
    last: NodeOp,
) -> Tensor | None:
    """Pieces of a Linear whose output goes through one activation into the last Linear and nowhere else."""
    op = node_op(traced, layer)
    if op is None or op.kind != "linear" or values[layer].dim() != 2:
        return None
    activations = []
    node = layer
    while node is not last.input:
        consumer = traced.only_consumer(node)
        activation = None if consumer is None else fused_activation(traced, consumer)
        if consumer is None or activation is None:
            return None
        activations += [activation] * (activation != "none")
        node = consumer
    if len(activations) > 1 or traced.only_consumer(node) is not last_node:
        return None
    weight, last_weight = op.tensors(values)[0], last.tensors(values)[0]
    assert weight is not None
    assert last_weight is not None
    masked = _rectangles_of(pieces, weight.shape)
    if masked is None:
        return None
    logits = values[last_node]
    activation = activations[0] if activations else None
    table = _as_tensor(masked, logits)
    return _over_targets(
        lambda logits, input, before, first, second, labels, kept: ops.ablated_mlp_cross_entropy(
            logits, input, before, first, second, labels, table, activation, kept
        ),
        (logits, values[op.input], values[layer]),
        (weight, last_weight),
        targets,
        kept,
    )


def _rectangles_of(pieces: Granularity, shape: torch.Size) -> list[tuple[int, int, int, int]] | None:
    """The pieces of the last layer as row_begin, row_end, col_begin, col_end."""
    classes, features = shape
    if isinstance(pieces, Block):
        return rectangles(pieces, shape)
    if isinstance(pieces, Unit):
        size = pieces.group_size
        return [(row, min(row + size, classes), 0, features) for row in range(0, classes, size)]
    if isinstance(pieces, (InputUnit, Head)):
        size = features // pieces.shape(shape).numel()
        return [(0, classes, col, col + size) for col in range(0, features, size)]
    return None


def _columns_of_a_unit(
    traced: TracedModel, values: Values, start: fx.Node, last_node: fx.Node, last: NodeOp
) -> int | None:
    """How many neighbouring inputs of the last layer one channel of ``start`` feeds, and nothing else
    does; None where channels mix on the way.
    """  # noqa: D205
    channels, features = values[start].shape[1:2], values[last.input].shape[1]
    if values[start].dim() not in (2, 4) or features % channels[0]:
        return None
    for node in traced.suffix(start):
        if node is last_node:
            return features // channels[0]
        op = node_op(traced, node)
        if op is None or op.kind not in _KEEP_CHANNELS_APART or not _keeps_channels(op, node, values):
            return None
    return None


def _keeps_channels(op: NodeOp, node: fx.Node, values: Values) -> bool:
    before, after = values[op.input], values[node]
    if op.kind == "elementwise":
        tensors = [values[source] for source in node.all_input_nodes]
        return all(
            not isinstance(tensor, Tensor) or tensor.numel() == 1 or tensor.shape == after.shape
            for tensor in tensors
        )
    if op.kind == "batch_norm":
        return True
    if before.dim() != 4:
        return False
    if op.kind == "flatten":
        return after.shape == (before.shape[0], before[0].numel())
    return after.dim() >= 2 and after.shape[1] == before.shape[1]


def _input_of_last(
    traced: TracedModel, values: Values, start: fx.Node, last_node: fx.Node, last: NodeOp
) -> Tensor:
    """What reaches the last layer when ``start`` is zero: of one sample, where it is the same for all."""
    chain = list(itertools.takewhile(lambda node: node is not last_node, traced.suffix(start)))
    inside = {start, *chain}
    others = [values[source] for node in chain for source in node.all_input_nodes if source not in inside]
    # A residual sum brings in another value for each sample.
    alike = not any(isinstance(other, Tensor) and other.dim() > 1 for other in others)
    value = values[start][:1] if alike else values[start]
    changed: Values = {start: torch.zeros_like(value)}
    with traced.functional():
        for node in chain:
            changed[node] = traced.evaluate(
                node, lambda source: changed[source] if source in changed else values[source]
            )
    return changed[last.input]
