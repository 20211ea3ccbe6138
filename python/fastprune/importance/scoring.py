"""score: the one call that turns a model and data into importance scores."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..batches import (
    Batch,
    Loss,
    LossFunction,
    OutputTransform,
    check_reiterable,
    count_batches,
    iterate_batches,
    keep_generators,
    model_device,
    read_logits,
)
from ..coupling import Coupled, coupled_layers
from ..files import state_digest
from ..granularity import (
    Block,
    Granularity,
    GranularityRule,
    Layer,
    ParameterTensor,
    Unit,
    check_count,
    check_granularity,
    is_scorable,
    weight_of,
)
from ..graph import TracedModel
from ..layers import Selection, select_scored
from ..masks import piece_mask_of
from ..tracing import Traces
from .calibration import Calibration, weight_shape_of
from .chunks import PROBE_SAMPLES, default_memory_budget
from .criteria import CRITERIA
from .criterion import Criterion, Findings, LossDelta, UserCriterion, evaluate, name_of
from .eval_mode import EvalMode, outside_inference_mode
from .first_forward import find_norms, first_forward, fitting_norms
from .loss_delta import LossDeltas
from .scores import ImportanceScores


def check_criterion(criterion: str | UserCriterion) -> None:
    """Raise ValueError for what is no criterion."""
    _chosen(criterion)


def needs_data(criterion: str | UserCriterion) -> bool:
    """Tell whether a criterion reads the loader, or raise ValueError for one that does not exist."""
    chosen = _chosen(criterion)
    return isinstance(chosen, LossDelta) or (isinstance(chosen, Criterion) and chosen.needs_data)


def score(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    criterion: str | UserCriterion = "loss_delta",
    granularity: Granularity | GranularityRule | str = Block(16, 16),  # noqa: B008  frozen
    include: Selection = None,
    exclude: Selection = None,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    max_samples: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ImportanceScores:
    """Score every piece of a model; larger matters more.

    ``loss_delta = loss(masked) - loss(original)``, the mean over all samples of the loader, exact for any
    network; the other criteria are cheaper stand-ins. The model runs in eval mode and is left as it was,
    also on an error.

    Example:
        >>> scores = fp.score(model, loader, criterion="loss_delta", granularity=fp.Unit(), max_samples=1000)
        >>> masks = scores.select(sparsity=0.5)
        >>> fp.score(model, loader, criterion=fp.criteria.Taylor(per_sample=True)).correlation(scores)

    Args:
        model: any module; traced models are scored much faster.
        loader: an iterable of ``(inputs, targets)`` or of dicts with ``labels``; None for "magnitude" and
            "random", which read one batch of it to count FLOPs.
        criterion: "loss_delta", the name of a class of ``fp.criteria`` ("magnitude", "gradient",
            "gradient_change", "taylor", "fisher", "activation", "wanda", "random"), such an object or
            ``fp.criteria.LossDelta`` with options, or any callable from a :class:`Calibration` to a dict of
            scores.
        granularity: ``fp.Block(rows, cols)``, ``fp.Unit()``, ``fp.InputUnit()``, ``fp.Head()``,
            ``fp.Element()``, ``fp.Layer()`` or ``fp.ParameterTensor()``; "auto" chooses the blocks by
            measured latency and loss, as :class:`AutoBlock` does, which has options.
        include: layers to score: module types, name globs, predicates; None for all. Modules of any kind
            with ``fp.Layer()``, parameters with ``fp.ParameterTensor()``.
        exclude: layers to leave out, in the same forms.
        loss_fn: ``loss_fn(outputs, targets)``, a mean or one value per sample; None for cross-entropy.
        output_transform: picks the logits out of a structured output.
        max_samples: how many samples of the loader are read.
        memory_budget: bytes that the kept values of a traced model, and what is computed from them, may
            take; None for a quarter of the free memory.
        progress: whether a progress bar is shown.

    Returns:
        float64 scores per layer, on the CPU.

    Raises:
        TypeError: an argument is of the wrong kind, or the loader yields something else than batches.
        ValueError: the loader is empty, no layer is left, the criterion has no score for such pieces or
            such a ``loss_fn``, or weights, losses or scores are NaN or inf.

    """
    chosen = _chosen(criterion)
    if isinstance(granularity, str) and granularity in GranularityRule.named:
        granularity = GranularityRule.named[granularity]()
    if isinstance(granularity, GranularityRule):
        options: dict[str, Any] = {
            "criterion": criterion,
            "include": include,
            "exclude": exclude,
            "loss_fn": loss_fn,
            "output_transform": output_transform,
            "max_samples": max_samples,
            "memory_budget": memory_budget,
            "progress": progress,
        }
        return granularity.choose(
            lambda each: score(model, loader, granularity=each, **options), model, loader, options
        )
    granularity = check_granularity(granularity)
    layers, granularities = select_scored(model, granularity, include, exclude)
    if isinstance(chosen, Criterion):
        chosen.check_granularity(granularity)
    if memory_budget is None:
        memory_budget = default_memory_budget(model_device(model))
    check_count(memory_budget, "memory_budget")
    loss = Loss(loss_fn)
    if chosen == LossDelta("predictions") and not loss.is_cross_entropy:
        raise ValueError(f"`loss_fn` must be cross-entropy for criterion {chosen}, got {loss_fn!r}")
    if loader is None and needs_data(criterion):
        raise TypeError(f"`loader` must be an iterable of batches for criterion '{criterion}', got None")
    couples = isinstance(granularity, Unit) and granularity.coupled
    with outside_inference_mode(), keep_generators(), EvalMode(model):
        digest = state_digest(model)
        traces = Traces(model, layers.values(), lambda output: read_logits(output, output_transform))
        source = _Source(loader, model_device(model), max_samples)
        first = probe = traced = None
        if loader is not None:
            probe = source.first().head(PROBE_SAMPLES)
            first = first_forward(model, layers, granularities, probe)
        if isinstance(chosen, LossDelta):
            assert probe is not None
            traced = _trace_of(traces, probe)
        elif granularity.masks_norms or couples or getattr(chosen, "needs_trace", False):
            traced = TracedModel.trace(model)
        norms = find_norms(model, layers, traced) if granularity.masks_norms else {}
        if first is not None:
            norms = fitting_norms(norms, layers, first)
        coupled = _coupled(traced, probe, layers) if couples else ()
        shapes = {name: weight_shape_of(module, granularities[name], name) for name, module in layers.items()}
        if isinstance(chosen, LossDelta):
            deltas = LossDeltas(
                model,
                layers,
                granularities,
                loss,
                output_transform,
                traces,
                norms,
                coupled,
                memory_budget,
                to_predictions=chosen.targets == "predictions",
            )
            found = _loss_deltas(deltas, source, progress)
        else:
            calibration = Calibration(
                model,
                layers,
                granularities,
                norms=norms,
                coupled=coupled,
                traced=traced,
                loss=loss,
                output_transform=output_transform,
                read=source.batches,
                num_batches=source.count(),
                progress=progress,
            )
            with calibration:
                found = evaluate(chosen, calibration)
        return ImportanceScores(
            found.scores,
            granularity=granularity,
            granularities=granularities,
            criterion=criterion if isinstance(criterion, str) else name_of(criterion),
            weight_shapes=shapes,
            pruned=_pruned(layers, granularities),
            norms=norms,
            coupled=coupled,
            weight_uses=None if first is None else first.weight_uses,
            element_sizes={
                name: _element_size(name, module, granularities[name]) for name, module in layers.items()
            },
            loss=found.loss,
            num_samples=found.num_samples,
            merging=found.merging,
            means=found.means,
            weights=found.weights,
            digest=digest,
        )


@torch.no_grad()
def _coupled(traced: TracedModel | None, batch: Batch | None, layers: dict[str, nn.Module]) -> Coupled:
    """Layers whose units are one piece; a warning, and none, where the model cannot be traced."""
    if batch is None:
        raise TypeError(
            "`loader` must be an iterable of batches for fp.Unit(coupled=True), got None: the model runs on "
            "the first batch to find its sums"
        )
    if traced is None:
        warnings.warn(
            "fastprune: the model cannot be traced, so no sums are found and the units of each layer are "
            "scored by themselves",
            stacklevel=4,
        )
        return ()
    return coupled_layers(traced, traced.run(batch), layers)


def _chosen(criterion: object) -> UserCriterion:
    """The callable to ask, or the options of the exact loss delta."""
    if isinstance(criterion, LossDelta):
        return criterion
    if callable(criterion) and not isinstance(criterion, type):
        return criterion
    names = ("loss_delta", *CRITERIA)
    if not isinstance(criterion, str) or criterion not in names:
        raise ValueError(f"`criterion` must be one of {', '.join(names)}, got {criterion!r}")
    return LossDelta() if criterion == "loss_delta" else CRITERIA[criterion]()


class _Source:
    """The batches of a loader, of which the first is looked at before they are read."""

    def __init__(self, loader: Iterable[Any] | None, device: torch.device, max_samples: int | None) -> None:
        self.loader = loader
        self.device = device
        self.max_samples = max_samples
        self._ahead: Iterator[Batch] | None = None
        self._passes = 0

    def _read(self) -> Iterator[Batch]:
        if self.loader is None:
            raise TypeError("`loader` must be an iterable of batches for this criterion, got None")
        return iterate_batches(self.loader, self.device, self.max_samples)

    def first(self) -> Batch:
        """Return the first batch, which ``batches`` yields again."""
        batches = self._read()
        batch = next(batches)
        self._ahead = itertools.chain([batch], batches)
        return batch

    def batches(self) -> Iterator[Batch]:
        """Return the batches; from the second pass on the loader is read anew."""
        self._passes += 1
        if self._passes > 1:
            check_reiterable(self.loader, "loader")
        ahead, self._ahead = self._ahead, None
        return self._read() if ahead is None else ahead

    def count(self) -> int | None:
        """Return how many batches there will be, or None."""
        return None if self.loader is None or self.max_samples is not None else count_batches(self.loader)


def _loss_deltas(deltas: LossDeltas, source: _Source, progress: bool) -> Findings:
    batches = source.count()
    num_samples = 0
    with tqdm(desc="loss deltas", unit="mask", disable=not progress) as bar:
        if batches is not None:
            bar.total = batches * sum(len(sums) for sums in deltas.sums.values())
        for batch in source.batches():
            deltas.add(batch, bar.update)
            num_samples += batch.size
    return Findings(
        deltas.result(),
        merging="mean",
        weights=dict.fromkeys(deltas.layers, deltas.total_weight),
        loss=deltas.loss_sum / deltas.total_weight,
        num_samples=num_samples,
    )


def _element_size(name: str, module: nn.Module, granularity: Granularity) -> int:
    """Bytes of one weight."""
    if isinstance(granularity, ParameterTensor):
        return int(getattr(module, name.rpartition(".")[2]).element_size())
    if is_scorable(module):
        return weight_of(module).element_size()
    return next((parameter.element_size() for parameter in module.parameters()), 0)


def _pruned(layers: dict[str, nn.Module], granularities: dict[str, Granularity]) -> dict[str, Tensor]:
    """Pieces of which a mask has left nothing."""
    pruned = {}
    for name, module in layers.items():
        granularity = granularities[name]
        if isinstance(granularity, ParameterTensor):
            mask = piece_mask_of(module, name.rpartition(".")[2])
        elif isinstance(granularity, Layer):
            mask = None  # no mask on a weight takes a layer out
        else:
            mask = piece_mask_of(module)
        if mask is not None:
            pruned[name] = granularity.sum_pieces(mask.long()).cpu() == 0
    return pruned


@torch.no_grad()
def _trace_of(traces: Traces, batch: Batch) -> TracedModel | None:
    """Return the trace for the first batch; a warning and None where there is none."""
    traced = traces.of(batch)
    if traced is None:
        warnings.warn(
            f"fastprune: the model is scored by masked forwards, which is slower: {traces.problem}",
            stacklevel=5,
        )
    return traced
