"""Which layers' units can only be removed together: those whose outputs a sum adds up.

In ``x + f(x)`` channel i of one summand cannot go while that of the other stays. Activations, batch
norms, pools and depthwise convolutions pass the tie on, since each of their channels depends on one alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from .granularity import weight_of
from .graph import TracedModel
from .node_ops import ConvOp, NodeOp, node_op

Coupled = tuple[tuple[str, ...], ...]
"""Groups of two layers or more, each in the order of the model."""


def coupled_layers(
    traced: TracedModel, values: dict[fx.Node, Any], layers: Mapping[str, nn.Module]
) -> Coupled:
    """Return the groups of layers whose units can only be removed together.

    Example:
        >>> traced = TracedModel.trace(resnet)
        >>> layers = {"stem": resnet.stem, "block.conv2": resnet.block.conv2}
        >>> coupled_layers(traced, traced.run(batch), layers)
        (('stem', 'block.conv2'),)

    Args:
        traced: the model.
        values: the value of every node.
        layers: name to Linear or Conv2d; one that is used more than once is left alone.

    """
    parents: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while node in parents:
            node = parents[node]
        return node

    for node in traced.nodes:
        op = node_op(traced, node)
        sources = _own_depthwise(traced, node) if op is None else _same_channels(op, node, values)
        for source in sources:
            first, second = root(node), root(source)
            if first is not second:
                parents[first] = second
    groups: dict[tuple[fx.Node, int], list[str]] = {}
    for name, module in layers.items():
        call = traced.single_call(module)
        if call is not None:
            groups.setdefault((root(call), len(weight_of(module))), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _same_channels(op: NodeOp, node: fx.Node, values: dict[fx.Node, Any]) -> list[fx.Node]:
    """The inputs whose channel i is all of them that the node's channel i depends on."""
    output, source = values[node], values[op.input]
    if op.kind == "elementwise":
        return [other for other in node.all_input_nodes if _has_channels_of(values[other], output)]
    if op.kind == "batch_norm":
        return [op.input]
    if op.kind == "channelwise":
        kept = source.dim() == 4 and output.dim() >= 2 and output.shape[1] == source.shape[1]
        return [op.input] if kept else []
    if op.kind == "flatten":
        return [op.input] if output.shape[1] == source.shape[1] else []
    if isinstance(op, ConvOp):
        depthwise = source.dim() == 4 and op.groups == source.shape[1] == output.shape[1]
        return [op.input] if depthwise else []
    return []


def _own_depthwise(traced: TracedModel, node: fx.Node) -> list[fx.Node]:
    """The input of a depthwise convolution with a forward of its own, such as one that pads."""
    module = traced.module_of(node)
    if (
        not isinstance(module, nn.Conv2d)
        or not 1 < module.groups == module.in_channels == module.out_channels
    ):
        return []
    return node.all_input_nodes[:1]


def _has_channels_of(value: Any, output: Tensor) -> bool:
    """Tell whether an input has the shape of the result, or is one number for each image and channel."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return value.shape == output.shape or (value.dim() == 4 and value.shape == (*output.shape[:2], 1, 1))
