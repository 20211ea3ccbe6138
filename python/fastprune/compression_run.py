"""One run of compress to one goal: its rounds, each of which scores, prunes, distils and measures."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
import warnings
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
from .masks import Budget, Masks, add_masks_, remove_masks_
from .metrics import evaluate, measure_costs
from .modules import layer_choices, leave_dense_, measure_latency, sparsify_
from .modules.examples import example_batches
from .shrinking import shrink
from .unit_scores import score_units


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
        return self.leaving(self.fraction ** ((round_index + 1) / rounds))

    @property
    def fraction(self) -> float:
        """What may remain, of the weights or of the budget's cost."""
        if self.budget is not None:
            return self.budget.fraction
        assert self.sparsity is not None
        return 1.0 - self.sparsity

    def leaving(self, fraction: float) -> Goal:
        """Return the goal that leaves another fraction of the same."""
        if self.budget is None:
            return Goal(1.0 - fraction)
        changes: dict[str, Any] = {self.budget.cost: fraction}
        return Goal(None, dataclasses.replace(self.budget, **changes))

    def select(
        self,
        scores: ImportanceScores,
        scope: Scope,
        floor: Floor | Mapping[str, Floor] | None,
        round_to: int = 1,
    ) -> Masks:
        """Return the masks that reach the goal."""
        return scores.select(
            sparsity=self.sparsity, budget=self.budget, scope=scope, floor=floor, round_to=round_to
        )

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
    structure: str = "blocks"
    round_to: int = 1
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
        best = None
        if counted:
            fresh = remove_masks_(copy.deepcopy(self.model))  # what was compressed has none
            best = self.checkpoints.load_compressed(counted - 1, fresh)
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
            if self.structure == "both" and round_index == self._unit_rounds():
                student = self._shrunk(student)  # blocks of what is left of it
            _seed(self.seed, round_index, 0)
            scores = self._scores(student, round_index)
            goal = self._goal().after(self.rounds, round_index)
            masks = self._select(goal, scores, round_index)
            add_masks_(student, masks)
            _seed(self.seed, round_index, 1)
            trained = distill(
                student, teacher, self.train_loader, progress=self.progress, **self.training, **self.reading
            )
            figures = evaluate(student, self.val_loader, **self.reading)
            compressed = self._converted(student, round_index)
            entry = {
                "round": round_index,
                **({} if self.structure == "blocks" else {"structure": self._kind(round_index)}),
                **goal.entry(),
                "sparsity": self._sparsity(masks, scores, round_index),
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
        units = self._kind(round_index) == "units"
        options = {"progress": self.progress, **self.scoring, **self.reading}
        if scores is None and units:
            scores = score_units(student, self.train_loader, example_inputs=self.example_inputs, **options)
        elif scores is None:
            scores = score(student, self.train_loader, granularity=self._granularity(), **options)
        if round_index == 0:
            self.first_scores["scores"] = scores
        if isinstance(self.granularity, GranularityRule) and not units:
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

    def _converted(self, student: nn.Module, round_index: int) -> nn.Module:
        """Return what runs: smaller layers for units, block-sparse ones for blocks, else plain zeros."""
        if self._kind(round_index) == "units":
            return self._converted_units(student)
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

    def _converted_units(self, student: nn.Module) -> nn.Module:
        """Return the student without what is masked."""
        compressed = leave_dense_(self._shrunk(student), "units that cannot be cut leave plain zeros")
        if not self.fold_batch_norm:
            return compressed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fastprune: sparsify_ found no masked layer")
            return sparsify_(compressed, example_inputs=self.example_inputs, fold_batch_norm=True)

    def _shrunk(self, student: nn.Module) -> nn.Module:
        """Return a copy of a student without what is masked whole."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fastprune: masked units stay")
            return shrink(student, None, self.example_inputs)

    def _kind(self, round_index: int) -> str:
        """Return of what a round is."""
        return "units" if round_index < self._unit_rounds() else "blocks"

    def _unit_rounds(self) -> int:
        """How many rounds are of units: all, none, or the first half and the one in the middle."""
        return {"units": self.rounds, "blocks": 0, "both": (self.rounds + 1) // 2}[self.structure]

    def _select(self, goal: Goal, scores: ImportanceScores, round_index: int) -> Masks:
        """Return the masks of a round.

        Where blocks follow units, goals are fractions of the dense model's weights or cost. A layer that
        keeps a share of its units, and reads a share of those in front of it, keeps the product of both, so
        that the root of the fraction is asked of units; and blocks are of what is left of the layers.
        """
        round_to = 1
        if self._kind(round_index) == "units":
            round_to = self.round_to
            goal = goal.leaving(goal.fraction**0.5) if self.structure == "both" else goal
        elif self.structure == "both":
            left = self._left("params" if goal.budget is None else goal.budget.cost, scores)
            goal = goal.leaving(min(goal.fraction / left, 1.0))
        return goal.select(scores, self.scope, self.floor, round_to)

    def _sparsity(self, masks: Masks, scores: ImportanceScores, round_index: int) -> float:
        """Return the share of the dense weights that is pruned; of those of all units where units go."""
        kept = 1.0 - masks.sparsity()
        if self.structure == "both" and self._kind(round_index) == "blocks":
            kept *= self._left("params", scores)
        return 1.0 - kept

    def _left(self, cost: str, scores: ImportanceScores) -> float:
        """Return what share of the dense weights, or of another cost, the scored layers of a student have."""
        fact = f"dense_{cost}"
        if fact not in self.checkpoints.facts:
            with keep_generators():
                dense = score(
                    self.model,
                    self.train_loader,  # of which one batch is read
                    criterion="magnitude",
                    granularity=scores.granularity,
                    include=self.scoring["include"],
                    exclude=self.scoring["exclude"],
                    output_transform=self.reading["output_transform"],
                    progress=False,
                )
            self.checkpoints.record(fact, dense.total_cost(cost))
        return scores.total_cost(cost) / self.checkpoints.facts[fact]

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
