"""score: the one call that turns a model and data into importance scores."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
)
from ..granularity import (
    Block,
    Granularity,
    Layer,
    ParameterTensor,
    check_granularity,
    is_scorable,
    weight_of,
)
from ..graph import TracedModel
from ..layers import Selection, select_scored
from ..masks import piece_mask_of
from .calibration import Calibration, weight_shape_of
from .criteria import CRITERIA
from .criterion import Criterion, Findings, UserCriterion, evaluate, name_of
from .eval_mode import EvalMode
from .loss_delta import LossDeltas
from .scores import ImportanceScores

# What a trace is compared on with its model, and how often weights are used is counted on.
_PROBE_SAMPLES = 32


def check_criterion(criterion: str) -> None:
    """Raise ValueError for the name of a criterion that does not exist."""
    names = ("loss_delta", *CRITERIA)
    if not isinstance(criterion, str) or criterion not in names:
        raise ValueError(f"`criterion` must be one of {', '.join(names)}, got {criterion!r}")


def score(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    criterion: str | UserCriterion = "loss_delta",
    granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
    include: Selection = None,
    exclude: Selection = None,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    max_samples: int | None = None,
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
            "gradient_change", "taylor", "fisher", "activation", "wanda", "random"), such an object with
            options, or any callable from a :class:`Calibration` to a dict of scores.
        granularity: ``fp.Block(rows, cols)``, ``fp.Unit()``, ``fp.InputUnit()``, ``fp.Head()``,
            ``fp.Element()``, ``fp.Layer()`` or ``fp.ParameterTensor()``.
        include: layers to score: module types, name globs, predicates; None for all. Modules of any kind
            with ``fp.Layer()``, parameters with ``fp.ParameterTensor()``.
        exclude: layers to leave out, in the same forms.
        loss_fn: ``loss_fn(outputs, targets)``, a mean or one value per sample; None for cross-entropy.
        output_transform: picks the logits out of a structured output.
        max_samples: how many samples of the loader are read.
        progress: whether a progress bar is shown.

    Returns:
        float64 scores per layer, on the CPU.

    Raises:
        TypeError: an argument is of the wrong kind, or the loader yields something else than batches.
        ValueError: the loader is empty, no layer is left, the criterion has no score for such pieces, or
            weights, losses or scores are NaN or inf.

    """
    chosen = _chosen(criterion)
    check_granularity(granularity)
    layers, granularities = select_scored(model, granularity, include, exclude)
    if isinstance(chosen, Criterion):
        chosen.check_granularity(granularity)
    loss = Loss(loss_fn)
    needs_data = chosen is None or (isinstance(chosen, Criterion) and chosen.needs_data)
    if loader is None and needs_data:
        raise TypeError(f"`loader` must be an iterable of batches for criterion '{criterion}', got None")
    with keep_generators(), EvalMode(model):
        digest = _digest_of(model)
        traces = chosen is None or granularity.masks_norms or getattr(chosen, "needs_trace", False)
        traced = TracedModel.trace(model) if traces else None
        norms = _norms(model, layers, traced) if granularity.masks_norms else {}
        source = _Source(loader, model_device(model), max_samples)
        first = None
        if loader is not None:
            probe = source.first().head(_PROBE_SAMPLES)
            first = _first_forward(model, layers, granularities, probe)
            norms = _fitting(norms, layers, first)
            if chosen is None:
                traced = _checked(model, traced, probe, first.output)
        shapes = {name: weight_shape_of(module, granularities[name], name) for name, module in layers.items()}
        if chosen is None:
            assert loader is not None
            found = _loss_deltas(
                model, layers, granularity, loss, output_transform, traced, norms, source, progress, shapes
            )
        else:
            calibration = Calibration(
                model,
                layers,
                granularities,
                norms=norms,
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


def _chosen(criterion: object) -> UserCriterion | None:
    """The callable to ask, None for the exact loss delta."""
    if isinstance(criterion, str):
        check_criterion(criterion)
        return None if criterion == "loss_delta" else CRITERIA[criterion]()
    if isinstance(criterion, type) or not callable(criterion):
        check_criterion(criterion)  # type: ignore[arg-type]
    return criterion  # type: ignore[return-value]


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


def _loss_deltas(
    model: nn.Module,
    layers: dict[str, nn.Module],
    granularity: Granularity,
    loss: Loss,
    output_transform: OutputTransform | None,
    traced: TracedModel | None,
    norms: dict[str, str],
    source: _Source,
    progress: bool,
    shapes: dict[str, torch.Size],
) -> Findings:
    batches = source.count()
    num_samples = 0
    with tqdm(desc="loss deltas", unit="mask", disable=not progress) as bar:
        deltas = LossDeltas(model, layers, granularity, loss, output_transform, traced, norms, bar.update)
        if batches is not None:
            bar.total = batches * sum(len(sums) for sums in deltas.sums.values())
        for batch in source.batches():
            deltas.add(batch)
            num_samples += batch.size
    return Findings(
        deltas.result(),
        merging="mean",
        weights=dict.fromkeys(layers, deltas.total_weight),
        loss=deltas.loss_sum / deltas.total_weight,
        num_samples=num_samples,
    )


def _norms(model: nn.Module, layers: dict[str, nn.Module], traced: TracedModel | None) -> dict[str, str]:
    """Layer name to the name of the batch norm that is the only consumer of its output."""
    if traced is None:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            warnings.warn(
                "fastprune: the model cannot be traced, so units are scored and masked without the batch "
                "norm after them",
                stacklevel=3,
            )
        return {}
    norms = {}
    for name, module in layers.items():
        node = traced.single_call(module)
        norm_node = traced.batch_norm_of(node) if node is not None else None
        norm = traced.module_of(norm_node) if norm_node is not None else None
        if norm is not None and norm.affine and norm.num_features == weight_of(module).shape[0]:
            norms[name] = str(traced.module_name(norm_node))  # type: ignore[arg-type]
    return norms


def _element_size(name: str, module: nn.Module, granularity: Granularity) -> int:
    """Bytes of one weight."""
    if isinstance(granularity, ParameterTensor):
        return int(getattr(module, name.rpartition(".")[2]).element_size())
    if is_scorable(module):
        return weight_of(module).element_size()
    return next((parameter.element_size() for parameter in module.parameters()), 0)


def _digest_of(model: nn.Module) -> str:
    """What tells two models apart: a hash of all values of the state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


class _FirstForward(NamedTuple):
    """What one plain forward shows: its output, and for each layer the dimensions of its output and how
    often its weights are multiplied for one sample, as FLOPs count it.
    """  # noqa: D205

    output: Any
    weight_uses: dict[str, float]
    output_dims: dict[str, int]


@torch.no_grad()
def _first_forward(
    model: nn.Module, layers: dict[str, nn.Module], granularities: dict[str, Granularity], batch: Batch
) -> _FirstForward:
    multiplying = {
        name: [module] * (is_scorable(module) and name.rpartition(".")[2] == "weight")
        if isinstance(granularities[name], ParameterTensor)
        else [part for part in module.modules() if is_scorable(part)]
        for name, module in layers.items()
    }
    counts: dict[nn.Module, float] = {}
    dims: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            out = weight_of(module).shape[0]
            counts[module] = counts.get(module, 0.0) + output.numel() / out / batch.size
            dims[module] = output.dim()

    with contextlib.ExitStack() as undo:
        for module in dict.fromkeys(itertools.chain(*multiplying.values())):
            undo.callback(module.register_forward_hook(count).remove)
        output = batch.fresh().call(model)
    uses = {}
    for name, module in layers.items():
        size = weight_shape_of(module, granularities[name], name).numel()
        flops = sum(counts.get(part, 0.0) * weight_of(part).numel() for part in multiplying[name])
        uses[name] = flops / size if size else 0.0
    return _FirstForward(output, uses, {name: dims.get(module, 0) for name, module in layers.items()})


def _fitting(norms: dict[str, str], layers: dict[str, nn.Module], first: _FirstForward) -> dict[str, str]:
    """The norms whose channels are the layer's units: after a Linear on ``[*, L, features]`` they are L."""
    return {
        name: norm
        for name, norm in norms.items()
        if not (isinstance(layers[name], nn.Linear) and first.output_dims[name] != 2)
    }


@torch.no_grad()
def _checked(model: nn.Module, traced: TracedModel | None, batch: Batch, expected: Any) -> TracedModel | None:
    """Return the traced model if it gives what the model gave; a warning and None if not."""
    reason = "torch.fx cannot trace it"
    for attempt in range(2):
        if traced is None:
            break
        try:
            output = traced.run(batch)[traced.output_node]
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
            return traced
        except Exception as error:  # whatever differs, masked forwards are right
            reason = f"its trace does not give the same output ({type(error).__name__})"
        TracedModel.forget(model)
        if attempt == 0:  # the trace may be one of an earlier call
            traced = TracedModel.trace(model)
    warnings.warn(
        f"fastprune: the model is scored by masked forwards, which is slower: {reason}", stacklevel=4
    )
    return None
