"""Exact loss deltas: the change of the loss when one piece is masked.

Three ways, each exact, the first that applies:
  fused    the last Linear, or units that reach it channel by channel: one kernel for all masks
  suffix   a traced model: from the masked layer on, only what changes is computed again
  forward  any model: the whole model runs with the masked weight
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..batches import Batch, Loss, OutputTransform, read_logits
from ..channel_changes import run_changed
from ..granularity import Block, Element, Granularity, Unit, weight_from_taps, weight_of
from ..graph import TracedModel
from ..layers import has_forward_hooks, is_plain
from ..node_ops import node_op
from .fused import fused_deltas
from .piece_changes import piece_changes

Advance = Callable[[int], None]


class LossDeltas:
    """Sums of loss deltas over batches, for the layers of one model.

    Args:
        model: in eval mode.
        layers: name to Linear or Conv2d.
        granularity: Block, Unit or Element.
        loss: how samples are weighed.
        output_transform: picks the logits out of the output, or None.
        traced: the traced model, or None.
        norms: layer name to the name of the batch norm whose channels go with units.
        advance: called with the number of pieces that were scored.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        granularity: Granularity,
        loss: Loss,
        output_transform: OutputTransform | None,
        traced: TracedModel | None,
        norms: dict[str, str],
        advance: Advance,
    ) -> None:
        self.model = model
        self.layers = layers
        self.granularity = granularity
        self.loss = loss
        self.output_transform = output_transform
        self.traced = traced
        self.norms = norms
        self.advance = advance
        # An element is a block of one; its scores are put back into the weight's shape at the end.
        self.pieces = Block(1, 1) if isinstance(granularity, Element) else granularity
        self.sums = {
            name: torch.zeros(self.pieces.shape(weight_of(module).shape).numel(), dtype=torch.float64)
            for name, module in layers.items()
        }
        # The trace is that of the first batch: one with other arguments may take another way.
        self.signature: tuple | None = None
        self.loss_sum = 0.0
        self.total_weight = 0.0

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add the deltas of one batch.

        Raises:
            ValueError: the loss, or the delta of a layer, is NaN or inf; the message names the layer.

        """
        if self.signature is None:
            self.signature = batch.signature()
        values = None
        if self.traced is not None and batch.signature() == self.signature:
            values = self.traced.run(batch)
        output = batch.fresh().call(self.model) if values is None else values[self.traced.output_node]  # type: ignore[union-attr]
        logits = read_logits(output, self.output_transform)
        losses, weight = self.loss(logits, batch.targets, batch.size)
        if not bool(losses.isfinite().all()):
            raise ValueError(f"the loss is NaN or inf{self._where_not_finite(values)}")
        self.loss_sum += float(losses.sum())
        self.total_weight += weight
        for name, module in self.layers.items():
            deltas = self._fused(name, module, batch, values, logits)
            if deltas is None:
                deltas = self._one_by_one(name, module, batch, values, losses)
            else:
                self.advance(len(deltas))
            if not bool(deltas.isfinite().all()):
                raise ValueError(f"the loss is NaN or inf when a piece of layer '{name}' is masked")
            self.sums[name] += deltas.cpu()

    def result(self) -> dict[str, Tensor]:
        """Return the mean deltas in the granularity's shape.

        Raises:
            ValueError: every target was left out by ``ignore_index``.

        """
        if self.total_weight == 0:
            raise ValueError("the loss has no target to average over: all are `ignore_index`")
        scores = {}
        for name, sums in self.sums.items():
            shape = weight_of(self.layers[name]).shape
            layer = (sums / self.total_weight).view(self.pieces.shape(shape))
            if isinstance(self.granularity, Element):
                layer = weight_from_taps(layer.view(shape[0], -1, shape[1]), shape).contiguous()
            scores[name] = layer
        return scores

    def _where_not_finite(self, values: dict[fx.Node, Any] | None) -> str:
        for name, module in self.layers.items():
            if not bool(weight_of(module).isfinite().all()):
                return f": layer '{name}' has such weights"
        for node, value in (values or {}).items():
            if node.op == "call_module" and isinstance(value, Tensor) and not bool(value.isfinite().all()):
                return f": layer '{node.target}' is the first with such outputs"
        return " for a batch of `loader`"

    def _fused(
        self,
        name: str,
        module: nn.Module,
        batch: Batch,
        values: dict[fx.Node, Any] | None,
        logits: Tensor,
    ) -> Tensor | None:
        """Deltas by one kernel, or None where there is none."""
        targets, node = batch.targets, self._plain_call(name, module)
        if (
            node is None
            or values is None
            or not self.loss.is_plain_cross_entropy
            or self.output_transform is not None
            or not isinstance(targets, Tensor)
            or targets.dtype != torch.int64
            or targets.dim() != 1
            or logits.dim() != 2
            or logits.is_cuda
            or logits.dtype not in (torch.float32, torch.float64)
        ):
            return None
        kept = targets != self.loss.ignore_index
        assert self.traced is not None
        return fused_deltas(
            self.traced,
            values,
            self._unit_node(name, node),
            node,
            self.pieces,
            torch.where(kept, targets, 0),
            None if bool(kept.all()) else kept.to(logits.dtype),
        )

    def _one_by_one(
        self,
        name: str,
        module: nn.Module,
        batch: Batch,
        values: dict[fx.Node, Any] | None,
        losses: Tensor,
    ) -> Tensor:
        """Deltas by one masked suffix, or one masked forward, for each piece."""
        node = self._plain_call(name, module)
        outputs = None
        if node is not None and values is not None:
            outputs = self._masked_suffixes(name, node, values)
        if outputs is None:
            outputs = self._masked_forwards(name, module, batch)
        deltas = torch.zeros_like(self.sums[name])
        for index, output in enumerate(outputs):
            if output is not None:
                logits = read_logits(output, self.output_transform)
                masked_losses, _ = self.loss(logits, batch.targets, batch.size)
                deltas[index] = float((masked_losses - losses).sum())
            self.advance(1)
        return deltas

    def _plain_call(self, name: str, module: nn.Module) -> fx.Node | None:
        """The node that is the only use of a layer, if the layer computes what torch's own would."""
        if self.traced is None or not is_plain(module):
            return None
        if name in self.norms and has_forward_hooks(self.model.get_submodule(self.norms[name])):
            return None
        return self.traced.single_call(module)

    def _unit_node(self, name: str, node: fx.Node) -> fx.Node:
        """The node whose channel a masked unit sets to zero: the layer, or the batch norm after it."""
        assert self.traced is not None
        return (self.traced.batch_norm_of(node) or node) if name in self.norms else node

    def _masked_suffixes(self, name: str, node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Any] | None:
        """The model's output for each piece masked, None where masking changes nothing; or None where the
        layer's pieces are not changes of its output.
        """  # noqa: D205
        traced = self.traced
        assert traced is not None
        op = node_op(traced, node)
        if op is None:
            return None
        changes = piece_changes(node, op, self.pieces, self._unit_node(name, node), values)
        if changes is None:
            return None
        return (None if change is None else run_changed(traced, values, *change) for change in changes)

    def _masked_forwards(self, name: str, module: nn.Module, batch: Batch) -> Iterator[Any]:
        """The same by running the whole model with replaced parameters, which come back after each run."""

        def run(replaced: list[tuple[nn.Module, str, Tensor]]) -> Any:
            with _replaced(replaced):
                return batch.fresh().call(self.model)

        if isinstance(self.pieces, Unit):
            owners = [module]
            if name in self.norms:
                owners.append(self.model.get_submodule(self.norms[name]))
            for unit in range(weight_of(module).shape[0]):
                replaced = []
                for owner in owners:
                    for parameter in ("weight", "bias"):
                        tensor = getattr(owner, parameter)
                        if tensor is not None:
                            masked = tensor.clone()
                            masked[unit] = 0
                            replaced.append((owner, parameter, masked))
                yield run(replaced)
            return
        for masked_weight in _masked_weights(self.pieces, weight_of(module)):
            yield None if masked_weight is None else run([(module, "weight", masked_weight)])


class _Fixed(nn.Module):
    """A parametrization that gives one tensor, whatever it is given."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


@contextlib.contextmanager
def _replaced(replacements: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Let modules compute with other tensors for a while.

    torch.func.functional_call is no help: a module that is registered under two names keeps the
    replacement for good, and it cannot reach behind a parametrization.
    """
    with contextlib.ExitStack() as undo:
        for module, parameter, tensor in replacements:
            if parametrize.is_parametrized(module, parameter):
                chain: Any = module.parametrizations[parameter]  # type: ignore[index]
                undo.callback(chain.__delitem__, len(chain))
                chain.append(_Fixed(tensor))
            else:
                undo.callback(module._parameters.__setitem__, parameter, module._parameters[parameter])
                module._parameters[parameter] = tensor  # type: ignore[assignment]
        yield


def _masked_weights(pieces: Granularity, weight: Tensor) -> Iterator[Tensor | None]:
    """The weight with one piece zeroed, for each piece; None where the piece is zero already."""
    shape = pieces.shape(weight.shape)
    nonzero = pieces.sum_pieces((weight != 0).long()).flatten().tolist()
    for index in range(shape.numel()):
        if not nonzero[index]:
            yield None
            continue
        piece = torch.zeros(shape.numel(), dtype=torch.bool, device=weight.device)
        piece[index] = True
        yield weight.masked_fill(pieces.expand(piece.view(shape), weight.shape), 0.0)
