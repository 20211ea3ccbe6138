"""compress: rounds of score, prune and distil to a target, each of which is measured as it will run."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .batches import (
    LossFunction,
    OutputTransform,
    check_reiterable,
    iterate_batches,
    keep_generators,
    model_device,
)
from .block_choice import AutoBlock
from .checkpoints import Checkpoints, describe
from .compression_result import CompressionResult
from .compression_run import CompressionRun, Goal
from .compression_search import search
from .distillation import check_distillation
from .distillation_losses import FeatureLoss
from .files import state_digest
from .granularity import Block, Granularity, GranularityRule, check_count, check_granularity
from .importance import Floor, ImportanceScores, check_criterion, score
from .importance.criterion import UserCriterion, name_of
from .importance.scopes import Scope
from .layers import Selection, check_model, reusable
from .learners import OptimizerFactory
from .masks import Budget, check_scope, check_sparsity
from .serialization import check_saved
from .unit_scores import score_units

# What `distillation` may hold: no object with a state, which a resumed run would not have.
_DISTILLATION_OPTIONS = (
    "accumulation_steps",
    "after_step",
    "autocast_dtype",
    "feature_weight",
    "features",
    "max_grad_norm",
    "penalty",
    "scheduler",
    "scheduler_interval",
    "soft_loss",
)


def _check_distillation_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of the options, or raise for one that distill does not take or that has a state."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"`distillation` must map names of arguments to values, got {type(options).__name__}")
    for name, value in options.items():
        if name not in _DISTILLATION_OPTIONS:
            raise ValueError(f"`distillation` may hold {', '.join(_DISTILLATION_OPTIONS)}, got {name!r}")
        if isinstance(value, (LRScheduler, FeatureLoss)):
            raise TypeError(
                f"`distillation` must give '{name}' as "
                + ("a function from an optimizer" if name == "scheduler" else "pairs of names")
                + f", got a {type(value).__name__}, whose state a resumed run would not have"
            )
    return dict(options)


def compress(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    sparsity: float | None = None,
    budget: Budget | None = None,
    target: str | None = None,
    tolerance: float = 0.01,
    rounds: int = 5,
    epochs: int = 1,
    granularity: Granularity | GranularityRule | str = Block(16, 16),  # noqa: B008  frozen
    structure: str = "blocks",
    round_to: int = 8,
    criterion: str | UserCriterion = "loss_delta",
    include: Selection = None,
    exclude: Selection = None,
    scope: Scope = "global",
    floor: Floor | Mapping[str, Floor] | None = None,
    teacher: str = "original",
    temperature: float = 2.0,
    hard_label_weight: float = 0.5,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    optimizer: OptimizerFactory | None = None,
    distillation: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    fold_batch_norm: bool = False,
    max_samples: int | None = None,
    max_accuracy_drop: float | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CompressionResult:
    """Compress a copy of a model: in each round score it, prune the lowest pieces, distil, and measure.

    The sparsity grows so that each round keeps the same share of what is left, of the weights or of the
    budget's cost. At the end of a round, a copy is converted: masks of blocks and of single weights become
    block-sparse layers where those are faster (:func:`sparsify_`), units and heads are cut out
    (:func:`shrink`, with ``structure``), other masks become plain zeros. That copy is measured, and the last
    is returned.

    Example:
        >>> result = fp.compress(model, train_loader, val_loader, sparsity=0.75, rounds=5)
        >>> result.history[-1]["accuracy"], result.history[-1]["sparsity"]
        (0.975, 0.75)
        >>> fp.compress(model, train_loader, val_loader, budget=fp.Budget(latency=0.4))
        >>> fp.compress(model, train_loader, val_loader, sparsity=0.5, structure="units")
        >>> fp.compress(model, train_loader, val_loader, target="auto", max_accuracy_drop=0.01)

    Args:
        model: trained; it is not changed.
        train_loader: batches for scoring and distillation; iterated several times.
        val_loader: batches for accuracy.
        sparsity: share of the scored weights to prune in the end, in [0, 1); None for 0.75 where there is no
            budget, and for 0.99 with ``target="auto"``, which tries no more than that.
        budget: what may remain of the scored layers' FLOPs, parameters, bytes or latency, in the place of
            ``sparsity``. The costs of a latency budget are measured, once, where it has none.
        target: "auto" for the largest sparsity with which the model stays within ``max_accuracy_drop``: whole
            runs to 0.5, 0.75, 0.875, ... until one does not, then bisection. None for what is given.
        tolerance: how far, in absolute sparsity, the answer of "auto" may lie below one that was too much.
        rounds: at least 1.
        epochs: distillation epochs of each round.
        granularity: what a piece is; "auto" chooses a block size in the first round, by measured latency and
            loss (:class:`AutoBlock`).
        structure: what goes. "blocks": pieces of ``granularity``. "units": all units and attention heads that
            can be cut out, ``Unit(coupled=True)`` and ``Head()``, ranked together; ``sparsity`` is the share
            of their own weights (half of all channels for 0.5; what the layers behind them lose comes on
            top).
            "both": units in the first half of the rounds, then blocks of what is left of the layers;
            ``sparsity`` is the share of the dense model's weights.
        round_to: what remains of a layer's units is a multiple, see :meth:`ImportanceScores.select`; blocks
            are not rounded.
        criterion: see :func:`score`.
        include: layers, see :func:`score`.
        exclude: layers to leave out, see :func:`score`.
        scope: see :meth:`ImportanceScores.select`.
        floor: what stays of each layer, see :meth:`ImportanceScores.select`.
        teacher: "original" (the model itself) or "previous" (the student of the round before).
        temperature: see :func:`distill`.
        hard_label_weight: see :func:`distill`.
        loss_fn: see :func:`score`.
        output_transform: see :func:`score`.
        optimizer: a function from parameters to an optimizer, called each round; None for AdamW, 1e-3.
        distillation: more arguments of :func:`distill` for each round, such as
            ``{"max_grad_norm": 1.0, "features": {"layer3": "layer3"}}``; all but ``mode``, ``rounds`` and
            ``teacher_optimizer``.
        example_inputs: for :func:`sparsify_`, and for the latency of a round's model; None for the first
            batch of ``val_loader``.
        fold_batch_norm: see :func:`sparsify_`; of the model that is returned, training keeps its batch norms.
        max_samples: how many samples of ``train_loader`` each scoring reads.
        max_accuracy_drop: stop, and return the round before, when the validation accuracy falls by more
            than this below the dense model's (0.01 is one percentage point).
        checkpoint_dir: where finished rounds are kept, and the scores of the one that runs; a call with
            the same model and arguments goes on from there, and ends with the same masks and weights.
            Functions are compared by name, and the data not at all.
        seed: seeds Python's, NumPy's and torch's generators for each round; yours are left as they were.
        progress: whether progress bars are shown.

    Raises:
        ImportError: ``structure`` needs Torch-Pruning: ``pip install 'fastprune[structured]'``.
        ValueError: an argument is out of range, two do not go together, or ``checkpoint_dir`` holds a run
            with other arguments.
        TypeError: an argument is of the wrong kind.

    """
    check_model(model)
    check_reiterable(train_loader, "train_loader")
    check_reiterable(val_loader, "val_loader")
    check_criterion(criterion)
    if isinstance(scope, str):
        check_scope(scope)
    check_distillation(temperature, hard_label_weight)
    for name, value in (("rounds", rounds), ("epochs", epochs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}")
    if teacher not in ("original", "previous"):
        raise ValueError(f"`teacher` must be 'original' or 'previous', got {teacher!r}")
    if optimizer is not None and (isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer)):
        raise TypeError(
            f"`optimizer` must be a function from parameters to an optimizer, got {type(optimizer).__name__}"
        )
    include, exclude = reusable(include), reusable(exclude)
    distillation = _check_distillation_options(distillation)
    if max_accuracy_drop is not None and not max_accuracy_drop >= 0:
        raise ValueError(f"`max_accuracy_drop` must not be negative, got {max_accuracy_drop}")
    if not isinstance(fold_batch_norm, bool):
        raise ValueError(f"`fold_batch_norm` must be True or False, got {fold_batch_norm!r}")
    goal = _check_goal(sparsity, budget, target, tolerance, max_accuracy_drop)
    if example_inputs is None:
        with keep_generators():
            batch = next(iterate_batches(val_loader, model_device(model)))
        example_inputs = batch.kwargs or batch.args
    _check_structure(structure, round_to, rounds, budget)
    if isinstance(granularity, str) and granularity in GranularityRule.named:
        latency = 0.5 if goal.budget is None else goal.budget.latency or 0.5
        granularity = AutoBlock(example_inputs=example_inputs, latency=latency, floor=floor)
    if not isinstance(granularity, GranularityRule):
        check_granularity(granularity)
    # What cannot be cut or saved, selectors and floors that fit no layer are found out now, not after an
    # hour of scoring.
    if checkpoint_dir is not None or structure != "blocks":
        check_saved(model)
    trial: dict[str, Any] = {
        "criterion": "magnitude",  # of which one batch is read
        "include": include,
        "exclude": exclude,
        "output_transform": output_transform,
        "progress": False,
    }
    if structure != "blocks":
        trial_scores = score_units(model, train_loader, example_inputs=example_inputs, **trial)
        trial_scores.select(sparsity=0.0, scope=scope, floor=floor)
    elif not isinstance(granularity, GranularityRule):
        score(model, train_loader, granularity=granularity, **trial).select(
            sparsity=0.0, scope=scope, floor=floor
        )
    _check_latency_budget(goal.budget, scope, granularity)

    settings = {
        "model": state_digest(model),
        "sparsity": goal.sparsity,
        "budget": _describe_budget(budget),
        "target": target,
        "rounds": rounds,
        "epochs": epochs,
        "granularity": repr(granularity) if isinstance(granularity, Granularity) else "auto",
        "criterion": criterion if isinstance(criterion, str) else name_of(criterion),
        "include": include,
        "exclude": exclude,
        "scope": scope,
        "floor": floor,
        "teacher": teacher,
        "temperature": float(temperature),
        "hard_label_weight": float(hard_label_weight),
        "loss_fn": loss_fn,
        "output_transform": output_transform,
        "optimizer": optimizer,
        "distillation": distillation,
        "fold_batch_norm": fold_batch_norm,
        "max_samples": max_samples,
        "max_accuracy_drop": max_accuracy_drop,
        "seed": int(seed),
        # Runs of before there was a choice go on.
        **({} if structure == "blocks" else {"structure": structure, "round_to": round_to}),
    }
    first_scores: dict[str, ImportanceScores] = {}

    def run_to(goal: Goal, directory: Path | None) -> CompressionRun:
        return CompressionRun(
            model=copy.deepcopy(model),
            train_loader=train_loader,
            val_loader=val_loader,
            goal=goal,
            rounds=rounds,
            granularity=granularity,  # type: ignore[arg-type]
            scope=scope,
            floor=floor,
            teacher=teacher,
            scoring={
                "criterion": criterion,
                "include": include,
                "exclude": exclude,
                "max_samples": max_samples,
            },
            training={
                "epochs": epochs,
                "temperature": temperature,
                "hard_label_weight": hard_label_weight,
                "optimizer": optimizer,
                **distillation,
            },
            reading={"loss_fn": loss_fn, "output_transform": output_transform},
            example_inputs=example_inputs,
            fold_batch_norm=fold_batch_norm,
            max_accuracy_drop=max_accuracy_drop,
            seed=int(seed),
            progress=progress,
            checkpoints=Checkpoints(directory, describe({**settings, "sparsity": goal.sparsity})),
            first_scores=first_scores,
            structure=structure,
            round_to=round_to,
        )

    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    if target is None:
        return run_to(goal, directory).result()
    assert goal.sparsity is not None
    return search(
        lambda sparsity: run_to(
            Goal(sparsity), None if directory is None else directory / f"sparsity_{sparsity:.4f}"
        ),
        largest=goal.sparsity,
        tolerance=tolerance,
    )


def _check_goal(
    sparsity: float | None,
    budget: Budget | None,
    target: str | None,
    tolerance: float,
    max_accuracy_drop: float | None,
) -> Goal:
    """Return what is to be reached; for a search, the largest sparsity that is tried."""
    if target not in (None, "auto"):
        raise ValueError(f"`target` must be None or 'auto', got {target!r}")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"`budget` must be a fastprune Budget, got {type(budget).__name__}")
    if budget is not None and (sparsity is not None or target is not None):
        other = "`sparsity`" if sparsity is not None else "`target`"
        raise ValueError(f"`budget` takes the place of {other}, got both")
    if target == "auto":
        if max_accuracy_drop is None:
            raise ValueError("`max_accuracy_drop` must be given with target='auto', got None")
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0.0 < float(tolerance) < 1.0:
            raise ValueError(f"`tolerance` must be a number in (0, 1), got {tolerance!r}")
        return Goal(check_sparsity(0.99 if sparsity is None else sparsity))
    if budget is not None:
        return Goal(None, budget)
    return Goal(check_sparsity(0.75 if sparsity is None else sparsity))


def _check_structure(structure: str, round_to: int, rounds: int, budget: Budget | None) -> None:
    if structure not in ("blocks", "units", "both"):
        raise ValueError(f"`structure` must be 'blocks', 'units' or 'both', got {structure!r}")
    check_count(round_to, "round_to")
    if structure == "both" and rounds < 2:
        raise ValueError(f"`rounds` must be at least 2 for structure='both', got {rounds}")
    if structure != "blocks" and budget is not None and budget.latency is not None:
        raise ValueError(
            f"`budget` must be of flops, params or bytes for structure='{structure}', got one of latency"
        )


def _check_latency_budget(
    budget: Budget | None, scope: Scope, granularity: Granularity | GranularityRule | str
) -> None:
    if budget is None or budget.latency is None:
        return
    if scope != "global":
        raise ValueError(f"`scope` must be 'global' for a latency budget, got {scope!r}")
    if budget.costs is None and not isinstance(granularity, (Block, GranularityRule)):
        raise ValueError(
            f"`budget` needs `costs` for a latency of {granularity}: only that of fp.Block is measured"
        )


def _describe_budget(budget: Budget | None) -> dict[str, Any] | None:
    if budget is None:
        return None
    costs = None if budget.costs is None else budget.costs.to_dict()
    return {budget.cost: budget.fraction, "costs": costs}
