"""AutoBlock: the block size with which a model is fast enough for the least loss."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .batches import check_reiterable, iterate_batches, keep_generators, model_device
from .granularity import Block, Granularity, GranularityRule
from .importance import Floor, ImportanceScores
from .latency import LatencyTable
from .masks import Budget, Masks, apply_masks_
from .metrics import evaluate
from .modules import measure_latency

# Smaller blocks lose less of the model, larger ones run faster; CUDA's kernels start at 16.
_CPU_BLOCKS = (Block(8, 8), Block(16, 16), Block(32, 32))
_CUDA_BLOCKS = (Block(16, 16), Block(32, 32), Block(64, 64))


@dataclasses.dataclass(frozen=True)
class BlockCandidate:
    """What one block size gives at the latency that was asked for.

    Attributes:
        granularity: the blocks.
        latency: what remains of the time of the dense layers, by the measured table.
        sparsity: the share of the weights that goes.
        loss_delta: the loss with all those blocks masked, less the loss without masks.

    """

    granularity: Block
    latency: float
    sparsity: float
    loss_delta: float


class AutoBlock(GranularityRule, name="auto"):
    """Chooses a block size by measured latency and loss; what ``granularity="auto"`` stands for.

    For each candidate the layers are timed at several densities (:func:`measure_latency`), the blocks are
    scored, and masks are selected that bring the layers to the wanted latency. The candidate whose masks
    raise the loss least wins, the earlier one where two are equal; one that misses the latency
    wins only if all do, and then the fastest does. The loss is that of the masked model, all blocks
    together and without training. Scores and masks are computed once for each candidate.

    Example:
        >>> auto = fp.AutoBlock(example_inputs=x, latency=0.5)
        >>> scores = fp.score(model, loader, granularity=auto)
        >>> print(auto)                                                   # what each candidate gave
        >>> masks = scores.select(budget=fp.Budget(latency=0.5, costs=auto.costs))
        >>> fp.score(model, loader, granularity="auto").granularity       # all defaults
        Block(rows=16, cols=16)

    Args:
        example_inputs: that the layers are timed on, as for :func:`sparsify_`; None for the first batch of
            the loader.
        latency: the fraction of the dense layers' time that may remain, in (0, 1].
        candidates: block sizes; None for 8x8, 16x16 and 32x32, on CUDA 16x16, 32x32 and 64x64.
        floor: that the masks keep, see :meth:`ImportanceScores.select`.
        measure: a function from model and block to a :class:`LatencyTable`, None to measure. Measured times
            differ from run to run: a run that is to be repeated keeps its tables.

    Attributes:
        report: one :class:`BlockCandidate` for each candidate, after scoring.
        granularity: the chosen block size, after scoring.
        costs: its table.

    Raises:
        TypeError: a candidate is no :class:`Block`.
        ValueError: ``latency`` is out of range, or there is no candidate.

    """

    def __init__(
        self,
        *,
        example_inputs: Any = None,
        latency: float = 0.5,
        candidates: Sequence[Block] | None = None,
        floor: Floor | Mapping[str, Floor] | None = None,
        measure: Callable[[nn.Module, Block], LatencyTable] | None = None,
    ) -> None:
        Budget(latency=latency, costs=LatencyTable({}))  # checks the range
        for candidate in candidates or ():
            if not isinstance(candidate, Block):
                raise TypeError(f"`candidates` must be fp.Block(rows, cols), got {candidate!r}")
        if candidates is not None and not candidates:
            raise ValueError("`candidates` must hold at least one fp.Block(rows, cols), got none")
        self.example_inputs = example_inputs
        self.latency = latency
        self.candidates = None if candidates is None else tuple(candidates)
        self.floor = floor
        self.measure = measure
        self.report: list[BlockCandidate] = []
        self.granularity: Block | None = None
        self.costs: LatencyTable | None = None

    def choose(
        self,
        score: Callable[[Granularity], Any],
        model: nn.Module,
        loader: Iterable[Any] | None,
        options: Mapping[str, Any],
    ) -> Any:
        """Return the scores of the block size that loses least at the wanted latency; see :func:`score`.

        Raises:
            TypeError: there is no loader, which the loss is measured with, or it is an iterator.

        """
        if loader is None:
            raise TypeError("`loader` must be an iterable of batches for granularity 'auto', got None")
        check_reiterable(loader, "loader")
        device = model_device(model)
        measure = self.measure or self._measure(loader, device, options)
        candidates = self.candidates or (_CUDA_BLOCKS if device.type == "cuda" else _CPU_BLOCKS)
        dense_loss = _loss(model, loader, options)
        self.report, best = [], None
        for granularity in candidates:
            costs = measure(model, granularity)
            scores: ImportanceScores = score(granularity)
            with warnings.catch_warnings():
                # What a candidate cannot reach is in the report.
                warnings.filterwarnings("ignore", message="fastprune: ")
                masks = scores.select(budget=Budget(latency=self.latency, costs=costs), floor=self.floor)
            candidate = BlockCandidate(
                granularity,
                costs.seconds(masks) / (costs.dense_seconds(masks) or 1.0),
                masks.sparsity(),
                _masked_loss(model, masks, loader, options) - dense_loss,
            )
            self.report.append(candidate)
            if best is None or self._rank(candidate) < self._rank(best[0]):
                best = candidate, scores, costs
        assert best is not None
        self.granularity, self.costs = best[0].granularity, best[2]
        return best[1]

    def _rank(self, candidate: BlockCandidate) -> tuple[bool, float]:
        """Lowest first: those that reach the latency by their loss, then the others by their latency."""
        missed = candidate.latency > self.latency * (1 + 1e-6)
        return missed, candidate.latency if missed else candidate.loss_delta

    def _measure(
        self, loader: Iterable[Any], device: torch.device, options: Mapping[str, Any]
    ) -> Callable[[nn.Module, Block], LatencyTable]:
        example_inputs = self.example_inputs
        if example_inputs is None:
            with keep_generators():
                batch = next(iterate_batches(loader, device))
            example_inputs = batch.kwargs or batch.args
        layers = {key: options[key] for key in ("include", "exclude")}
        return lambda model, granularity: measure_latency(
            model, example_inputs=example_inputs, granularity=granularity, **layers
        )

    def __repr__(self) -> str:
        lines = [f"AutoBlock(latency={self.latency})"]
        if self.report:
            lines.append(f"  {'blocks':<28} {'latency':>8} {'pruned':>8} {'loss delta':>11}")
        for candidate in self.report:
            note = "  chosen" if candidate.granularity == self.granularity else ""
            lines.append(
                f"  {candidate.granularity!s:<28} {candidate.latency:>8.1%} {candidate.sparsity:>8.1%} "
                f"{candidate.loss_delta:>11.4g}{note}"
            )
        return "\n".join(lines)


def _loss(model: nn.Module, loader: Iterable[Any], options: Mapping[str, Any]) -> float:
    """The mean loss over the samples that scoring reads."""

    def batches() -> Iterator[Any]:
        for batch in iterate_batches(loader, model_device(model), options["max_samples"]):
            yield batch.kwargs or batch.args, batch.targets

    with keep_generators():  # a shuffling loader gives every candidate the same samples
        return evaluate(
            model, batches(), loss_fn=options["loss_fn"], output_transform=options["output_transform"]
        )["loss"]


def _masked_loss(model: nn.Module, masks: Masks, loader: Iterable[Any], options: Mapping[str, Any]) -> float:
    return _loss(apply_masks_(copy.deepcopy(model), masks), loader, options)
