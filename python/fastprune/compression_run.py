"""One run of compress to one goal: its rounds, each of which scores, prunes, distils and measures."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ._library import cpu_isa, version
from .batches import Batch, keep_generators, model_device
from .checkpoints import Checkpoints, counted_rounds
from .compression_result import CompressionResult
from .distillation import distill
from .granularity import Block, Element, Granularity, GranularityRule
from .importance import Floor, ImportanceScores, score
from .importance.scopes import Scope
from .importance.scores_file import granularity_from_json, granularity_to_json
from .latency import LatencyTable
from .masks import Budget, Masks, apply_masks_
from .metrics import evaluate, measure_costs
from .modules import layer_choices, leave_dense_, measure_latency, sparsify_
from .modules.examples import example_batches


def _seed(seed: int, round_index: int, part: int) -> None:
    """Seed a part of a round by itself: one that is read from a file draws nothing."""
    value = (seed * 1_000_003 + 2 * round_index + part) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _samples(batch: Batch) -> int:
    """Return how many samples example inputs hold."""
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor)]
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a run is to reach: a sparsity or a budget, one of which is None."""

    sparsity: float | None
    budget: Budget | None = None

    def after(self, rounds: int, round_index: int) -> Goal:
        """Return the goal of a round: each keeps the same share of what the round before left."""
        share = (round_index + 1) / rounds
        if self.budget is None:
            assert self.sparsity is not None
            return Goal(1.0 - (1.0 - self.sparsity) ** share)
        fraction = self.budget.fraction**share
        return Goal(None, dataclasses.replace(self.budget, **{self.budget.cost: fraction}))

    def select(
        self, scores: ImportanceScores, scope: Scope, floor: Floor | Mapping[str, Floor] | None
    ) -> Masks:
        """Return the masks that reach the goal."""
        return scores.select(sparsity=self.sparsity, budget=self.budget, scope=scope, floor=floor)

    def entry(self) -> dict[str, float]:
        """Return what the history says of the goal."""
        if self.budget is None:
            assert self.sparsity is not None
            return {"target_sparsity": self.sparsity}
        return {f"target_{self.budget.cost}": self.budget.fraction}


@dataclasses.dataclass
class CompressionRun:
    """The arguments of :func:`compress`, checked; see there.

    Attributes:
        scoring: arguments of :func:`score`.
        training: arguments of :func:`distill`.
        reading: ``loss_fn`` and ``output_transform``.
        first_scores: those of the model itself, under "scores": the same for all runs of a search.

    """

    model: nn.Module
    train_loader: Iterable[Any]
    val_loader: Iterable[Any]
    goal: Goal
    rounds: int
    granularity: Granularity | GranularityRule
    scope: Scope
    floor: Floor | Mapping[str, Floor] | None
    teacher: str
    scoring: dict[str, Any]
    training: dict[str, Any]
    reading: dict[str, Any]
    example_inputs: Any
    fold_batch_norm: bool
    max_accuracy_drop: float | None
    seed: int
    progress: bool
    checkpoints: Checkpoints
    first_scores: dict[str, ImportanceScores] = dataclasses.field(default_factory=dict)
    _pieces: tuple[ImportanceScores, Masks] | None = None

    def result(self) -> CompressionResult:
        """Run the rounds that are left, and return what came of all of them.

        Raises:
            ValueError: a drop of the accuracy is limited, but there is no accuracy.

        """
        model = self()
        scores, masks = self._last_pieces()
        return CompressionResult(
            model,
            self.counted(),
            self.dense["accuracy"],
            dense=self.dense,
            settings=self.checkpoints.settings,
            environment=self.checkpoints.facts.get("environment", {}),
            scores=scores,
            masks=masks,
        )

    def __call__(self) -> nn.Module:
        """Run the rounds that are left, and return the compressed model; :meth:`counted` are its rounds.

        Raises:
            ValueError: a drop of the accuracy is limited, but there is no accuracy.

        """
        self._measure_dense()
        history = self.checkpoints.history
        counted = len(self.counted())
        best = self.checkpoints.load_compressed(counted - 1, copy.deepcopy(self.model)) if counted else None
        if len(history) < self.rounds and len(history) == counted:
            with keep_generators():
                best = self._run_rounds(best)
        return copy.deepcopy(self.model) if best is None else best

    def _run_rounds(self, best: nn.Module | None) -> nn.Module | None:
        """Run the rounds that are left; return the model of the last that was accurate enough."""
        history = self.checkpoints.history
        student = copy.deepcopy(self.model)
        if history:
            student = self.checkpoints.load_student(len(history) - 1, student)
        for round_index in range(len(history), self.rounds):
            start = time.perf_counter()
            teacher = copy.deepcopy(self.model if self.teacher == "original" else student)
            _seed(self.seed, round_index, 0)
            scores = self._scores(student, round_index)
            goal = self._goal().after(self.rounds, round_index)
            masks = goal.select(scores, self.scope, self.floor)
            apply_masks_(student, masks)
            _seed(self.seed, round_index, 1)
            trained = distill(
                student, teacher, self.train_loader, progress=self.progress, **self.training, **self.reading
            )
            figures = evaluate(student, self.val_loader, **self.reading)
            compressed = self._converted(student)
            entry = {
                "round": round_index,
                **goal.entry(),
                "sparsity": masks.sparsity(),
                "layers": {name: masks.sparsity(name) for name in masks},
                **figures,
                "train_loss": trained[-1]["loss"],
                **self._costs(compressed),
                "layer_latency": layer_choices(compressed),
            }
            entry["seconds"] = time.perf_counter() - start
            self.checkpoints.commit(student, compressed, entry)
            if self._too_low(entry):
                break
            best, self._pieces = compressed, (scores, masks)
        return best

    def counted(self) -> list[dict[str, Any]]:
        """Return the rounds that count: all but a last one that was not accurate enough."""
        return counted_rounds(vars(self.checkpoints))

    def _last_pieces(self) -> tuple[ImportanceScores | None, Masks | None]:
        """Return the scores and the masks of the last round that counts, or None where they were not kept."""
        if self._pieces is not None:
            return self._pieces
        index = len(self.counted()) - 1
        scores = self.checkpoints.load_scores(index) if index >= 0 else None
        return scores, None if scores is None else self.checkpoints.load_masks(index, scores)

    @property
    def dense(self) -> dict[str, Any]:
        """What was measured of the model before."""
        return self.checkpoints.facts["dense"]

    def _measure_dense(self) -> None:
        if "dense" not in self.checkpoints.facts:
            with keep_generators():  # loaders draw from them
                self.checkpoints.record("dense", evaluate(self.model, self.val_loader, **self.reading))
        if self.max_accuracy_drop is not None and math.isnan(self.dense["accuracy"]):
            raise ValueError(
                "`max_accuracy_drop` needs an accuracy, but the targets of `val_loader` are no classes"
            )

    def _too_low(self, entry: dict[str, Any]) -> bool:
        drop = self.max_accuracy_drop
        return drop is not None and self.dense["accuracy"] - entry["accuracy"] > drop

    def _scores(self, student: nn.Module, round_index: int) -> ImportanceScores:
        """Return the scores of a round: those that were kept, or new ones, which are kept at once."""
        scores = self.first_scores.get("scores") if round_index == 0 else None
        scores = scores or self.checkpoints.load_scores(round_index)
        if scores is None:
            scores = score(
                student,
                self.train_loader,
                granularity=self._granularity(),
                progress=self.progress,
                **self.scoring,
                **self.reading,
            )
        if round_index == 0:
            self.first_scores["scores"] = scores
        if isinstance(self.granularity, GranularityRule):
            self.checkpoints.record("granularity", granularity_to_json(scores.granularity))
        self.checkpoints.save_scores(round_index, scores)
        return scores

    def _granularity(self) -> Granularity | GranularityRule:
        """Return the pieces of the run: a rule until the first round has chosen by it."""
        chosen = self.checkpoints.facts.get("granularity")
        return self.granularity if chosen is None else granularity_from_json(chosen)

    def _goal(self) -> Goal:
        """Return the goal of the whole run, with the costs that a budget of latency needs."""
        budget = self.goal.budget
        if budget is None or budget.latency is None or budget.costs is not None:
            return self.goal
        granularity = self._granularity()
        assert isinstance(granularity, Block)
        if "costs" not in self.checkpoints.facts:
            # Measured once: another table would give a resumed run other masks.
            costs = measure_latency(
                self.model,
                example_inputs=self.example_inputs,
                granularity=granularity,
                include=self.scoring["include"],
                exclude=self.scoring["exclude"],
            )
            self.checkpoints.record("costs", costs.to_dict())
        costs = LatencyTable.from_dict(self.checkpoints.facts["costs"], granularity)
        return Goal(None, dataclasses.replace(budget, costs=costs))

    def _converted(self, student: nn.Module) -> nn.Module:
        """Return what runs: block-sparse layers for blocks and single weights, else plain zeros."""
        compressed = copy.deepcopy(student)
        granularity = self._granularity()
        if not isinstance(granularity, (Block, Element)):
            return leave_dense_(compressed, f"{granularity} masks leave plain zeros")
        blocksize = (granularity.rows, granularity.cols) if isinstance(granularity, Block) else "auto"
        return sparsify_(
            compressed,
            example_inputs=self.example_inputs,
            blocksize=blocksize,
            fold_batch_norm=self.fold_batch_norm,
        )

    def _costs(self, compressed: nn.Module) -> dict[str, float]:
        """Return what a round's model costs, and the latency of the dense one in the same minute."""
        batches = example_batches(self.example_inputs, model_device(self.model))
        # Two seconds of a large batch are enough for a figure on the way.
        before, after = measure_costs((self.model, compressed), batches, maximum_seconds=2.0)
        facts = self.checkpoints.facts
        if "parameters" not in facts["dense"]:
            sizes = {"parameters": before.parameters, "bytes": before.bytes, "flops": before.flops}
            facts["dense"] = {**facts["dense"], **sizes}
        facts["environment"] = {
            "fastprune": version(),
            "torch": torch.__version__,
            "device": str(model_device(self.model)),
            "cpu_isa": cpu_isa(),
            "threads": torch.get_num_threads(),
            "batch_sizes": [_samples(batch) for batch in batches],
        }
        return {**dataclasses.asdict(after), "dense_latency_seconds": before.latency_seconds}
