"""score: the one call that turns a model and data into importance scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from ..batches import (
    Batch,
    Loss,
    LossFunction,
    OutputTransform,
    count_batches,
    iterate_batches,
    keep_generators,
    model_device,
    read_logits,
)
from ..granularity import Block, Granularity, check_count, check_granularity, weight_of
from ..graph import TracedModel
from ..layers import Selection, select_layers
from ..masks import piece_mask_of
from ..tracing import Traces
from .chunks import PROBE_SAMPLES, default_memory_budget
from .criteria import magnitude
from .loss_delta import LossDeltas
from .scores import ImportanceScores

CRITERIA = ("loss_delta", "magnitude")


class _EvalMode:
    """Eval mode for a while; every module's flags, attributes and buffers come back, whatever happens."""

    def __init__(self, model: nn.Module) -> None:
        self.attributes = [(module, dict(vars(module))) for module in model.modules()]
        self.buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        for module, attributes in self.attributes:
            # A forward may keep what it computes, and a trace leaves its own tensors on the model.
            vars(module).update(attributes)
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
        for module, name, buffer, before in self.buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):  # a forward that counts its calls, say
                buffer.copy_(before)


def check_criterion(criterion: str) -> None:
    """Raise ValueError for a criterion that does not exist."""
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}")


def score(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    criterion: str = "loss_delta",
    granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
    include: Selection = None,
    exclude: Selection = None,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    max_samples: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ImportanceScores:
    """Score every piece of a model's Linear and Conv2d layers; larger matters more.

    ``loss_delta = loss(masked) - loss(original)``, the mean over all samples of the loader, exact for any
    network. The model runs in eval mode and is left as it was, also on an error.

    Example:
        >>> scores = fp.score(model, loader, criterion="loss_delta", granularity=fp.Unit(), max_samples=1000)
        >>> masks = scores.select(sparsity=0.5)

    Args:
        model: any module; traced models are scored much faster.
        loader: an iterable of ``(inputs, targets)`` or of dicts with ``labels``; None for "magnitude",
            which reads one batch of it to count FLOPs.
        criterion: "loss_delta", or "magnitude" (the L2 norm of each piece).
        granularity: ``fp.Block(rows, cols)``, ``fp.Unit()`` or ``fp.Element()``.
        include: layers to score: module types, name globs, predicates; None for all.
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
        ValueError: the loader is empty, no layer is left, or weights, losses or deltas are NaN or inf.

    """
    check_criterion(criterion)
    check_granularity(granularity)
    layers = select_layers(model, include, exclude)
    found = {name: granularity.for_layer(name, module, model) for name, module in layers.items()}
    granularities = {name: own for name, own in found.items() if own is not None}
    layers = {name: layers[name] for name in granularities}
    if memory_budget is None:
        memory_budget = default_memory_budget(model_device(model))
    check_count(memory_budget, "memory_budget")
    loss = Loss(loss_fn)
    if loader is None and criterion != "magnitude":
        raise TypeError(f"`loader` must be an iterable of batches for criterion '{criterion}', got None")
    with keep_generators(), _EvalMode(model):
        norms: dict[str, str] = {}
        if granularity.masks_norms and criterion != "loss_delta":
            norms = _norms(model, layers, TracedModel.trace(model))
        first = None
        num_samples = 0
        mean_loss = None
        if criterion == "magnitude":
            scores = {
                name: magnitude(weight_of(module), granularity).cpu() for name, module in layers.items()
            }
            if loader is not None:
                batch = next(iterate_batches(loader, model_device(model), max_samples))
                first = _first_forward(model, layers, batch)
                norms = _fitting(norms, layers, first)
        else:
            assert loader is not None
            total = sum(
                granularities[name].shape(weight_of(module).shape).numel() for name, module in layers.items()
            )
            batches = count_batches(loader) if max_samples is None else None
            with tqdm(
                total=None if batches is None else total * batches,
                desc="loss deltas",
                unit="mask",
                disable=not progress,
            ) as bar:
                deltas = None
                for batch in iterate_batches(loader, model_device(model), max_samples):
                    if deltas is None:
                        probe = batch.head(PROBE_SAMPLES)
                        first = _first_forward(model, layers, probe)
                        traces = Traces(
                            model, layers.values(), lambda output: read_logits(output, output_transform)
                        )
                        traced = _trace_of(traces, probe)
                        if granularity.masks_norms:
                            norms = _fitting(_norms(model, layers, traced), layers, first)
                        deltas = LossDeltas(
                            model,
                            layers,
                            granularities,
                            loss,
                            output_transform,
                            traces,
                            norms,
                            memory_budget,
                            bar.update,
                        )
                    deltas.add(batch)
                    num_samples += batch.size
            assert deltas is not None
            scores = deltas.result()
            mean_loss = deltas.loss_sum / deltas.total_weight
        return ImportanceScores(
            scores,
            granularity=granularity,
            criterion=criterion,
            weight_shapes={name: weight_of(module).shape for name, module in layers.items()},
            pruned=_pruned(layers, granularity),
            norms=norms,
            weight_uses=None if first is None else first.weight_uses,
            element_sizes={name: weight_of(module).element_size() for name, module in layers.items()},
            loss=mean_loss,
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


def _pruned(layers: dict[str, nn.Module], granularity: Granularity) -> dict[str, Tensor]:
    """Pieces of which a mask has left nothing."""
    pruned = {}
    for name, module in layers.items():
        mask = piece_mask_of(module) if parametrize.is_parametrized(module, "weight") else None
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
def _first_forward(model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> _FirstForward:
    uses = dict.fromkeys(layers, 0.0)
    dims = dict.fromkeys(layers, 0)

    def count(name: str, out: int) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                uses[name] += output.numel() / out / batch.size
                dims[name] = output.dim()

        return hook

    handles = [
        module.register_forward_hook(count(name, weight_of(module).shape[0]))
        for name, module in layers.items()
    ]
    try:
        output = batch.fresh().call(model)
    finally:
        for handle in handles:
            handle.remove()
    return _FirstForward(output, uses, dims)


def _fitting(norms: dict[str, str], layers: dict[str, nn.Module], first: _FirstForward) -> dict[str, str]:
    """The norms whose channels are the layer's units: after a Linear on ``[*, L, features]`` they are L."""
    return {
        name: norm
        for name, norm in norms.items()
        if not (isinstance(layers[name], nn.Linear) and first.output_dims[name] != 2)
    }


@torch.no_grad()
def _trace_of(traces: Traces, batch: Batch) -> TracedModel | None:
    """Return the trace for the first batch; a warning and None where there is none."""
    traced = traces.of(batch)
    if traced is None:
        warnings.warn(
            f"fastprune: the model is scored by masked forwards, which is slower: {traces.problem}",
            stacklevel=4,
        )
    return traced
