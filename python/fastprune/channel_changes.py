"""How a change of a few channels travels through a traced model.

Masking a block, a unit or a filter changes only some channels of a layer's output. Elementwise
functions, batch norms and pools keep it that way, and a product with the next weight turns it into a
low-rank update of a value that is known already:

    linear(x + d) = linear(x) + d[..., channels] @ weight[:, channels].T

So from the masked layer to the one after it only the changed channels are computed, and the first
whole value after that costs a product with a few columns. What no rule covers gets the whole value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .graph import Chain, TracedModel
from .node_ops import ConvOp, NodeOp, node_op


class ChannelChange(NamedTuple):
    """New values for the channels [begin, end) of a tensor, along dimension ``dim``."""

    dim: int
    begin: int
    end: int
    value: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the same channels of another tensor."""
        return tensor.narrow(self.dim, self.begin, self.end - self.begin)

    def applied_to(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor with the new values."""
        result = tensor.clone()
        self.of(result).copy_(self.value)
        return result

    def same_channels(self, other: ChannelChange) -> bool:
        """Tell whether another change is of the same channels."""
        return (self.dim, self.begin, self.end) == (other.dim, other.begin, other.end)


Change = ChannelChange | Tensor
"""What masking does to a value: new channels, or a whole new value."""
Values = dict[fx.Node, Any]
Rule = Callable[[NodeOp, fx.Node, Values, dict[fx.Node, ChannelChange]], "Change | None"]


def run_changed(traced: TracedModel, values: Values, changes: Mapping[fx.Node, Change]) -> Any:
    """Return the model's output when the values of some nodes change.

    Args:
        traced: the traced model.
        values: the value of every node, as ``traced.run`` gives them; they are not written to.
        changes: node to its new value, or its new channels, which hold whatever reaches that node from
            another.

    """
    whole: Values = {}
    partial: dict[fx.Node, ChannelChange] = {}

    def value_of(node: fx.Node) -> Any:
        if node in partial:
            whole[node] = partial.pop(node).applied_to(values[node])
        return whole[node] if node in whole else values[node]

    def set_change(node: fx.Node, change: Change) -> None:
        if isinstance(change, ChannelChange):
            partial[node] = change
        else:
            whole[node] = change

    def step(node: fx.Node) -> None:
        changed = {source: partial[source] for source in node.all_input_nodes if source in partial}
        result = None
        if changed and not any(source in whole for source in node.all_input_nodes):
            result = _propagate(traced, node, values, changed)
        if result is None:
            result = traced.evaluate(node, value_of)
        if node in changes:
            partial.pop(node, None)
            result = _overruled(result, changes[node], values[node])
        set_change(node, result)

    def end(chain: Chain) -> None:
        result = chain.updated(values, whole, partial)
        if result is not None:
            whole[chain.nodes[-1]] = result
            return
        for node in chain.nodes:
            if node in suffix:
                step(node)

    for node, change in changes.items():
        set_change(node, change)
    # A dictionary keeps the order. A chain that a change begins within runs node by node.
    suffix = dict.fromkeys(traced.suffix(*changes))
    chains = {
        node: chain
        for node, chain in traced.chains.items()
        if node in suffix and not any(member in changes for member in chain.nodes)
    }
    with traced.functional():
        for node in suffix:
            if node not in chains:
                step(node)
            elif node is chains[node].nodes[-1]:
                end(chains[node])
            else:
                continue
            # Memory that is free again is in the caches, and no fresh page.
            for read in traced.last_read_by(node):
                whole.pop(read, None)
                partial.pop(read, None)
        return value_of(traced.output_node)


def _overruled(reached: Change, own: Change, value: Tensor) -> Change:
    """A node's own change put over what reaches it from other nodes."""
    if isinstance(own, Tensor):
        return own
    if isinstance(reached, ChannelChange):
        if own.same_channels(reached):
            return own
        reached = reached.applied_to(value)
    return own.applied_to(reached)


def _propagate(
    traced: TracedModel, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]
) -> Change | None:
    op = node_op(traced, node)
    if op is None:
        return None
    return _RULES[op.kind](op, node, values, changed)


def _elementwise(
    op: NodeOp, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]
) -> Change | None:
    """The same function of the changed channels; other inputs have the same shape, or are one number."""
    first, *others = changed.values()
    if not all(first.same_channels(other) for other in others):
        return None
    shape = values[next(iter(changed))].shape

    def channels(source: fx.Node) -> Any:
        if source in changed:
            return changed[source].value
        value = values[source]
        return first.of(value) if isinstance(value, Tensor) and value.numel() != 1 else value

    for source in node.all_input_nodes:
        value = values[source]
        if isinstance(value, Tensor) and value.numel() != 1 and value.shape != shape:
            return None
    return first._replace(value=op.traced.evaluate(node, channels))


def _only(op: NodeOp, changed: dict[fx.Node, ChannelChange]) -> ChannelChange | None:
    """The change, if it is of the op's input and nothing else."""
    return changed[op.input] if list(changed) == [op.input] else None


def _batch_norm(
    op: NodeOp, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]
) -> Change | None:
    change = _only(op, changed)
    if change is None or change.dim != 1:
        return None
    channels = slice(change.begin, change.end)
    mean, variance, weight, bias = (
        None if tensor is None else tensor[channels] for tensor in op.tensors(values)
    )
    return change._replace(value=F.batch_norm(change.value, mean, variance, weight, bias, eps=op.eps))


def _channelwise(
    op: NodeOp, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]
) -> Change | None:
    """Pools and means over what lies behind the channels of an image."""
    change = _only(op, changed)
    if change is None or change.dim != 1 or values[op.input].dim() != 4:
        return None
    result = op.traced.evaluate(node, lambda source: change.value if source is op.input else values[source])
    output = values[node]
    kept = isinstance(result, Tensor) and result.dim() >= 2 and result.shape[1] == change.end - change.begin
    return change._replace(value=result) if kept and output.shape[1] == values[op.input].shape[1] else None


def _flatten(
    op: NodeOp, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]
) -> Change | None:
    """Everything behind the batch dimension becomes one: a channel's values stay side by side."""
    change, source = _only(op, changed), values[op.input]
    if change is None or change.dim != 1 or values[node].shape != (source.shape[0], source[0].numel()):
        return None
    size = source[0, 0].numel()
    return ChannelChange(1, change.begin * size, change.end * size, change.value.flatten(1))


def _linear(
    op: NodeOp, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]
) -> Change | None:
    change, source = _only(op, changed), values[op.input]
    if change is None or change.dim != source.dim() - 1:
        return None
    weight = op.tensors(values)[0]
    assert weight is not None
    difference = change.value - change.of(source)
    columns = weight[:, change.begin : change.end]
    return add_product(values[node], difference, columns)


def add_product(output: Tensor, factor: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``output + scale * factor @ columns.T`` for any number of leading dimensions."""
    flat = torch.addmm(output.flatten(0, -2), factor.flatten(0, -2), columns.T, alpha=scale)
    return flat.view(output.shape)


def _conv(op: NodeOp, node: fx.Node, values: Values, changed: dict[fx.Node, ChannelChange]) -> Change | None:
    assert isinstance(op, ConvOp)
    change, source = _only(op, changed), values[op.input]
    if change is None or change.dim != 1 or source.dim() != 4:
        return None
    weight, bias = op.tensors(values)
    assert weight is not None
    if op.groups == 1:
        difference = change.value - change.of(source)
        return values[node] + op.convolve(difference, weight[:, change.begin : change.end], None, 1)
    if op.groups != source.shape[1]:
        return None
    multiplier = weight.shape[0] // op.groups
    outputs = slice(change.begin * multiplier, change.end * multiplier)
    value = op.convolve(
        change.value, weight[outputs], None if bias is None else bias[outputs], change.end - change.begin
    )
    return ChannelChange(1, outputs.start, outputs.stop, value)


_RULES: dict[str, Rule] = {
    "elementwise": _elementwise,
    "batch_norm": _batch_norm,
    "channelwise": _channelwise,
    "flatten": _flatten,
    "linear": _linear,
    "conv": _conv,
}
