"""Convolutions with what follows them, computed at once from what changed.

A suffix of a network of convolutions is mostly chains of a convolution, a batch norm, a residual sum and an
activation, of which some may be missing. All before the activation is linear, so that

    act(norm(conv(x + d)) + s + e) = act(known + conv(d, scale * weight) + e)

where ``known`` is the value before the activation, which is there already. One call then reads and writes
each value once. Where all channels of the input changed that is :func:`ops.updated_conv2d`, for a few of them
:func:`ops.ablate_conv2d`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from . import ops
from .channel_changes import ChannelChange
from .graph import TracedModel
from .node_ops import ConvOp, fused_activation, node_op
from .reference import ACTIVATIONS

_SUMS = {operator.add, torch.add, torch.ops.aten.add.Tensor}

# The products of a tile of 4x4 outputs are 36 where a convolution has 144; of tiles that reach past the
# outputs too many are of no use.
_MOST_PRODUCTS = 0.6

# A change of more channels is one of the whole input.
_MOST_CHANNELS = 32


class ConvChain:
    """A convolution and what follows it.

    Attributes:
        nodes: the convolution, and each node that is the only consumer of the one before it.
        op: what the convolution computes.
        scale: ``[out_channels]``, what a batch norm multiplies with, or None.
        sources: the modules, or tensors, that weight and scale are made from.

    """

    def __init__(
        self,
        nodes: tuple[fx.Node, ...],
        op: ConvOp,
        known: fx.Node,
        addend: fx.Node | None,
        activation: str | None,
        weight: Tensor,
        scale: Tensor | None,
        sources: tuple[object, ...],
    ) -> None:
        self.nodes = nodes
        self.op = op
        self.scale = scale
        self.sources = sources
        self._known = known
        self._addend = addend
        self._activation = activation
        self._weight = weight
        self._winograd: Callable[[], Tensor] | None = None

    @property
    def winograd_bytes(self) -> int:
        """What ``transform`` takes; 0 where it would gain nothing."""
        out_channels, in_channels, *kernel = self._weight.shape
        plain = (*self.op.strides, *self.op.dilations) == (1, 1, 1, 1)
        if kernel != [3, 3] or not plain or min(out_channels, in_channels) < 16:
            return 0
        return 36 * -(-out_channels // 16) * 16 * in_channels * self._weight.element_size()

    def transform(self) -> Tensor:
        """Return the weight that changes of a whole input take."""
        return ops.winograd_weight(self._scaled(self._weight))

    def use(self, winograd: Callable[[], Tensor]) -> None:
        """Compute changes of a whole input by what ``transform`` gives, asked for at the first of them."""
        self._winograd = winograd

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight.detach() if self.scale is None else weight.detach() * self.scale[:, None, None, None]

    def updated(
        self, values: dict[fx.Node, Any], whole: dict[fx.Node, Any], partial: dict[fx.Node, ChannelChange]
    ) -> Tensor | None:
        """Return the new value of the last node, or None where the nodes have to run one by one.

        Args:
            values: of all nodes, before the change.
            whole: node to its new value.
            partial: node to its new channels.

        """
        source, known = self.op.input, values[self._known]
        if not self._has_kernels(known, values):
            return None
        change = partial.get(source)
        if change is not None and (change.dim != 1 or source in whole):
            return None
        if change is not None and change.end - change.begin <= _MOST_CHANNELS:
            if self._addend in whole or self._addend in partial:
                return None
            return self._update_channels(known, values[source], change)
        if self._winograd is None or not (source in whole or change is not None):
            return None
        height, width = known.shape[2:]
        if 36 * -(-height // 4) * -(-width // 4) > _MOST_PRODUCTS * 9 * height * width:
            return None
        new_input = whole[source] if change is None else change.applied_to(values[source])
        left, right, top, bottom = self.op.sides((3, 3))
        return ops.updated_conv2d(
            known,
            values[source],
            new_input,
            self._winograd(),
            *self._addends(values, whole, partial),
            padding=(top, bottom, left, right),
            activation=self._activation,
        )

    def _has_kernels(self, known: Tensor, values: dict[fx.Node, Any]) -> bool:
        """Whether the kernels read the values as they are."""
        summands = [values[node] for node in (self.nodes[0], self._addend) if node is not None]
        return (
            known.dim() == 4
            and not known.is_cuda
            and known.dtype == self._weight.dtype
            and ops.has_ablation_kernels(known)
            and known.is_contiguous(memory_format=torch.channels_last)
            and all(
                isinstance(value, Tensor) and value.shape == known.shape and value.dtype == known.dtype
                for value in summands
            )
        )

    def _addends(
        self, values: dict[fx.Node, Any], whole: dict[fx.Node, Any], partial: dict[fx.Node, ChannelChange]
    ) -> tuple[Tensor, ...]:
        addend = self._addend
        if addend in whole:
            return values[addend], whole[addend]
        if addend in partial:
            return values[addend], partial[addend].applied_to(values[addend])
        return ()

    def _update_channels(self, known: Tensor, source: Tensor, change: ChannelChange) -> Tensor:
        weight = self._scaled(self._weight[:, change.begin : change.end])
        count, kernel = weight.shape[1], (weight.shape[2], weight.shape[3])
        left, right, top, bottom = self.op.sides(kernel)
        (updated,) = ops.ablate_conv2d(
            known,
            change.of(source) - change.value,
            weight,
            torch.tensor([[0, count, 0, kernel[0] * kernel[1]]], dtype=torch.int32),
            stride=self.op.strides,
            padding=(top, bottom, left, right),
            dilation=self.op.dilations,
            activation=self._activation,
        )
        return updated


def find_chains(traced: TracedModel, constants: dict[fx.Node, Any]) -> list[ConvChain]:
    """Return the chains of a traced model, each node in one at most.

    Args:
        traced: the traced model.
        constants: the values of the nodes that depend on the model's tensors alone.

    """
    chains, taken = [], set[fx.Node]()
    for node in traced.nodes:
        op = node_op(traced, node)
        if isinstance(op, ConvOp) and op.groups == 1 and _all_constant(op.operands, constants):
            chain = _chain_from(traced, node, op, constants, taken)
            taken.update(chain.nodes)
            chains.append(chain)
    return chains


def _all_constant(operands: tuple[Any, ...], constants: dict[fx.Node, Any]) -> bool:
    return all(operand in constants for operand in operands if isinstance(operand, fx.Node))


def _chain_from(
    traced: TracedModel, conv: fx.Node, op: ConvOp, constants: dict[fx.Node, Any], taken: set[fx.Node]
) -> ConvChain:
    weight = op.tensors(constants)[0]
    assert weight is not None
    nodes, scale, addend, activation = [conv], None, None, None
    sources: list[object] = [weight if op.module is None else op.module]

    def following() -> fx.Node | None:
        users = list(nodes[-1].users)
        return users[0] if len(users) == 1 and users[0] not in taken else None

    node = following()
    norm = None if node is None else node_op(traced, node)
    if (
        node is not None
        and norm is not None
        and norm.kind == "batch_norm"
        and _all_constant(norm.operands, constants)
    ):
        _, variance, gain, _ = norm.tensors(constants)
        assert variance is not None
        scale = (variance.double() + norm.eps).rsqrt()
        scale = (scale if gain is None else scale * gain.double()).to(weight.dtype).detach()
        sources += [variance, gain] if norm.module is None else [norm.module]
        nodes.append(node)
        node = following()
    if node is not None and _is_sum(node):
        first, second = node.all_input_nodes
        addend = second if first is nodes[-1] else first
        nodes.append(node)
        node = following()
    known = nodes[-1]
    if node is not None and (name := fused_activation(traced, node)) in ACTIVATIONS:
        activation = name
        nodes.append(node)
    return ConvChain(tuple(nodes), op, known, addend, activation, weight, scale, tuple(sources))


def _is_sum(node: fx.Node) -> bool:
    """Tell whether a node adds two values of equal weight."""
    named = node.target in _SUMS if node.op == "call_function" else node.target == "add"
    return (
        named
        and node.op in ("call_function", "call_method")
        and not node.kwargs
        and len(node.args) == 2
        and len(node.all_input_nodes) == 2
    )
