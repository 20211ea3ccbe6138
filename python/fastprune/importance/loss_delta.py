"""Exact loss deltas: the change of the loss when one piece is masked.

Three ways, each exact, the first that applies:
  fused    the last Linear, or units that reach it channel by channel: one kernel for all masks
  suffix   a traced model: from the masked layer on, only what changes is computed again
  forward  any model: the whole model runs with the masked weight
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..batches import Batch, Loss, OutputTransform, read_logits
from ..channel_changes import run_changed
from ..coupling import Coupled
from ..granularity import Block, Element, Granularity, is_scorable, weight_from_taps, weight_of
from ..graph import TracedModel
from ..layers import has_forward_hooks, is_plain
from ..node_ops import NodeOp, node_op
from ..tracing import Traces
from .calibration import weight_shape_of
from .chunks import PROBE_SAMPLES, samples_at_once
from .fused import MOST_CLASSES, fused_deltas
from .masked_forwards import masked_forwards
from .packed_layers import PackedLayers
from .piece_changes import piece_changes

Advance = Callable[[int], None]
Values = dict[fx.Node, Any]


def _ignore(count: int) -> None:
    """Show no progress."""


class _Call(NamedTuple):
    """One layer in one traced batch: its node and what it computes; and for this layer and those that are
    coupled to it, the node whose channels a masked unit sets to zero (the layer's own, or that of the batch
    norm after it) and what the layer computes.
    """  # noqa: D205

    traced: TracedModel
    values: Values
    node: fx.Node
    op: NodeOp
    units: tuple[tuple[fx.Node, NodeOp], ...]


class LossDeltas:
    """Sums of loss deltas over batches, for the layers of one model.

    Args:
        model: in eval mode.
        layers: name to Linear or Conv2d.
        granularities: name to the granularity, with what the layer adds to it.
        loss: how samples are weighed.
        output_transform: picks the logits out of the output, or None.
        traces: the model's traces.
        norms: layer name to the name of the batch norm whose channels go with units.
        coupled: groups of layers whose units are masked together.
        memory_budget: bytes that the values of a traced model and what is computed from them may take.
        to_predictions: whether the loss is the cross-entropy against the model's own probabilities.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        granularities: dict[str, Granularity],
        loss: Loss,
        output_transform: OutputTransform | None,
        traces: Traces,
        norms: dict[str, str],
        coupled: Coupled,
        memory_budget: int,
        *,
        to_predictions: bool = False,
    ) -> None:
        self.model = model
        self.layers = layers
        self.granularities = granularities
        self.to_predictions = to_predictions
        self.loss = Loss(nn.CrossEntropyLoss(ignore_index=loss.ignore_index)) if to_predictions else loss
        # With probabilities as targets torch's cross-entropy takes no ignore_index.
        self.masked_loss = Loss() if to_predictions else loss
        self.output_transform = output_transform
        self.traces = traces
        self.norms = norms
        # The first layer of a group is scored, for all of them.
        self.coupled = {first: others for first, *others in coupled}
        self.memory_budget = memory_budget
        self.advance: Advance = _ignore
        # An element is a block of one; its scores are put back into the weight's shape at the end.
        self.pieces = {
            name: Block(1, 1) if isinstance(granularity, Element) else granularity
            for name, granularity in granularities.items()
        }
        followers = {name for others in self.coupled.values() for name in others}
        self.sums = {
            name: torch.zeros(self.pieces[name].shape(self._shape(name)).numel(), dtype=torch.float64)
            for name in layers
            if name not in followers
        }
        self.packed = PackedLayers(memory_budget)
        self._sped_up: set[TracedModel] = set()
        self.samples_at_once: int | None = None
        self.num_batches = 0
        self.loss_sum = 0.0
        self.total_weight = 0.0

    @torch.no_grad()
    def add(self, batch: Batch, advance: Advance | None = None) -> None:
        """Add the deltas of one batch.

        Args:
            batch: of the loader.
            advance: called with the number of pieces that were scored.

        Raises:
            ValueError: the loss, or the delta of a layer, is NaN or inf; the message names the layer.

        """
        if self.samples_at_once is None:
            self.samples_at_once = self._samples_at_once(batch)
        self.num_batches += 1
        self.advance = advance or _ignore
        *parts, last = batch.split(self.samples_at_once, equal=self.traces.needs_equal_shapes)
        for part in parts:
            self._add(part, last=False)
        self._add(last, last=True)

    def _trace_of(self, batch: Batch) -> TracedModel | None:
        """The trace for a batch, made faster the first time that it is asked for."""
        traced = self.traces.of(batch)
        if traced is not None and traced not in self._sped_up:
            self.packed.speed_up(traced)
            self._sped_up.add(traced)
        return traced

    def _samples_at_once(self, batch: Batch) -> int:
        """How many samples are traced at once: all, if the loss wants them together."""
        probe = batch.head(PROBE_SAMPLES)
        traced = self._trace_of(probe)
        if traced is None or not self.traces.splits(probe):
            return sys.maxsize
        values = traced.run(probe)
        logits = read_logits(values[traced.output_node], self.output_transform)
        losses, _ = self.loss(logits, probe.targets, probe.size)
        if losses.dim() == 0:  # the mean of a loss function that may weigh its samples
            return sys.maxsize
        count = samples_at_once(values, probe.size, self.memory_budget)
        return min(count, PROBE_SAMPLES) if self.traces.needs_equal_shapes else count

    def _add(self, batch: Batch, last: bool) -> None:
        traced = self._trace_of(batch)
        values = None if traced is None else traced.run(batch)
        output = batch.fresh().call(self.model) if values is None else values[traced.output_node]  # type: ignore[union-attr]
        logits = read_logits(output, self.output_transform)
        losses, weight = self.loss(logits, batch.targets, batch.size)
        if not bool(losses.isfinite().all()):
            where = self._where_not_finite(traced, values or {})
            raise ValueError(f"the loss is NaN or inf in batch {self.num_batches} of `loader`{where}")
        self.loss_sum += float(losses.sum())
        self.total_weight += weight
        if self.to_predictions:
            batch = batch._replace(targets=_predictions(logits, batch.targets, self.loss.ignore_index))
            losses, _ = self.masked_loss(logits, batch.targets, batch.size)
        for name in self.sums:
            call = None if values is None else self._call(traced, values, name)  # type: ignore[arg-type]
            deltas = None if call is None else self._fused(name, call, batch, logits)
            if deltas is None:
                deltas = self._one_by_one(name, call, batch, losses, last)
            elif last:  # of a batch: the progress bar counts each piece once for it
                self.advance(len(deltas))
            if not bool(deltas.isfinite().all()):
                raise ValueError(
                    f"the loss is NaN or inf in batch {self.num_batches} of `loader` when a piece of layer "
                    f"'{name}' is masked"
                )
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
            shape = self._shape(name)
            layer = (sums / self.total_weight).view(self.pieces[name].shape(shape))
            if isinstance(self.granularities[name], Element):
                layer = weight_from_taps(layer.view(shape[0], -1, shape[1]), shape).contiguous()
            for member in (name, *self.coupled.get(name, ())):
                scores[member] = layer.clone()
        return {name: scores[name] for name in self.layers}

    def _shape(self, name: str) -> torch.Size:
        return weight_shape_of(self.layers[name], self.granularities[name], name)

    def _where_not_finite(self, traced: TracedModel | None, values: Values) -> str:
        for name, module in self.layers.items():
            if is_scorable(module) and not bool(weight_of(module).isfinite().all()):
                return f": layer '{name}' has such weights"
        for node, value in values.items():
            layer = None if traced is None else traced.module_name(node)
            if layer is not None and isinstance(value, Tensor) and not bool(value.isfinite().all()):
                return f": layer '{layer}' is the first with such outputs"
        return ""

    def _call(self, traced: TracedModel, values: Values, name: str) -> _Call | None:
        """The only use of a layer, if it, and what is coupled to it, computes what torch's own would."""
        units = []
        for member in (name, *self.coupled.get(name, ())):
            module, norm = self.layers[member], self._norm_of(member)
            if not is_plain(module) or (norm is not None and has_forward_hooks(norm)):
                return None
            node = traced.single_call(module)
            op = None if node is None else node_op(traced, node)
            if node is None or op is None:
                return None
            norm_node = None if norm is None else traced.batch_norm_of(node)
            units.append((node, norm_node or node, op))
        (first, _, op), *_ = units
        return _Call(traced, values, first, op, tuple((start, op) for _, start, op in units))

    def _norm_of(self, name: str) -> nn.Module | None:
        return self.model.get_submodule(self.norms[name]) if name in self.norms else None

    def _masked_with(self, name: str) -> list[nn.Module]:
        """Modules whose channels go with the units of a layer."""
        others = self.coupled.get(name, ())
        norms = [self._norm_of(member) for member in (name, *others)]
        return [*(self.layers[other] for other in others), *(norm for norm in norms if norm is not None)]

    def _fused(self, name: str, call: _Call, batch: Batch, logits: Tensor) -> Tensor | None:
        """Deltas by one kernel, or None where there is none."""
        targets = batch.targets
        if (
            len(call.units) > 1
            or not self.masked_loss.is_plain_cross_entropy
            or self.output_transform is not None
            or not isinstance(targets, Tensor)
            or logits.dim() != 2
            or not ops.has_ablation_kernels(logits)
        ):
            return None
        kept: Tensor | None = None
        if self.to_predictions:
            if logits.shape[1] > MOST_CLASSES:
                return None
        elif targets.dtype != torch.int64 or targets.dim() != 1:
            return None
        else:
            kept = targets != self.loss.ignore_index
            targets = torch.where(kept, targets, 0)
            kept = None if bool(kept.all()) else kept.to(logits.dtype)
        return fused_deltas(
            call.traced, call.values, call.units[0][0], call.node, self.pieces[name], targets, kept
        )

    def _one_by_one(self, name: str, call: _Call | None, batch: Batch, losses: Tensor, last: bool) -> Tensor:
        """Deltas by one masked suffix, or one masked forward, for each piece."""
        outputs = None if call is None else _masked_suffixes(call, self.pieces[name])
        if outputs is None:
            outputs = masked_forwards(
                lambda: batch.fresh().call(self.model),
                name,
                self.layers[name],
                self.pieces[name],
                self._masked_with(name),
            )
        # Where the losses are: a number for each piece would make the host wait for the device.
        deltas = torch.zeros_like(self.sums[name], device=losses.device)
        with contextlib.closing(outputs):  # what is masked comes back at once, also on an error
            for index, output in enumerate(outputs):
                if output is not None:
                    logits = read_logits(output, self.output_transform)
                    masked_losses, _ = self.masked_loss(logits, batch.targets, batch.size)
                    deltas[index] = (masked_losses - losses).sum()
                if last:
                    self.advance(1)
        return deltas


def _predictions(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The model's probabilities as targets; zeros, which have no loss, where a label is left out."""
    probabilities = logits.double().softmax(1)
    if targets.is_floating_point():
        return probabilities
    return torch.where((targets != ignore_index).unsqueeze(1), probabilities, 0.0)


def _masked_suffixes(call: _Call, pieces: Granularity) -> Generator[Any, None, None] | None:
    """The model's output for each piece masked, None where masking changes nothing; or None where the
    layer's pieces are not changes of its output.
    """  # noqa: D205
    changes = piece_changes(call.node, call.op, pieces, call.units, call.values)
    if changes is None:
        return None
    return (None if change is None else run_changed(call.traced, call.values, change) for change in changes)
