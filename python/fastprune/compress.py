"""compress: rounds of score, prune and distil, and one conversion at the end."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
from .distillation import check_distillation, distill
from .distillation_losses import FeatureLoss
from .files import state_digest, write_atomically
from .granularity import Block, Granularity, check_granularity
from .importance import Floor, check_criterion, score
from .importance.scopes import Scope
from .layers import Selection, check_model
from .learners import OptimizerFactory
from .masks import Masks, apply_masks_, check_scope, check_sparsity, piece_mask_of
from .metrics import evaluate
from .modules import leave_dense_, sparsify_
from .serialization import load, save


@dataclasses.dataclass
class CompressionResult:
    """What :func:`compress` gives.

    Attributes:
        model: the compressed copy.
        history: one dict per round that counts: ``round``, ``target_sparsity``, ``sparsity``,
            ``accuracy``, ``loss``, ``train_loss``, ``seconds`` and ``layers`` (layer name to sparsity).
        dense_accuracy: of the model before, on the same validation loader.

    """

    model: nn.Module
    history: list[dict[str, Any]]
    dense_accuracy: float


def _seed_round(seed: int, round_index: int) -> None:
    value = (seed * 1_000_003 + round_index) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def round_sparsity(sparsity: float, rounds: int, round_index: int) -> float:
    """Return the target of a round: each keeps the same share of what the round before left."""
    return 1.0 - (1.0 - sparsity) ** ((round_index + 1) / rounds)


def _name_of(function: Any) -> str | None:
    """A name of a callable that a later process gives it too."""
    if function is None:
        return None
    return getattr(function, "__qualname__", type(function).__qualname__)


def _describe(value: Any) -> Any:
    """Return an argument as text that a later process gives too."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: _describe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(entry) for entry in value]
    return _name_of(value) if callable(value) else repr(value)


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


def _describe_options(options: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the options as text that a later process gives too."""
    return {
        name: _name_of(value) if callable(value) else repr(value) for name, value in sorted(options.items())
    }


class _Checkpoints:
    """Finished rounds in a directory: a model file each, and one JSON file that commits them."""

    def __init__(self, directory: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.directory = None if directory is None else Path(directory)
        self.settings = settings
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)

    def _model_path(self, round_index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"round_{round_index:03d}.safetensors"

    def history(self) -> list[dict[str, Any]]:
        """Return the finished rounds."""
        state_path = None if self.directory is None else self.directory / "state.json"
        if state_path is None or not state_path.exists():
            return []
        try:
            state = json.loads(state_path.read_text())
            settings, history = state["settings"], state["history"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`checkpoint_dir` holds a damaged {state_path.name}: {error}") from error
        if settings != self.settings:
            keys = {*self.settings, *settings}
            different = sorted(key for key in keys if settings.get(key) != self.settings.get(key))
            raise ValueError(
                f"`checkpoint_dir` holds a run with other arguments ({', '.join(different)}); "
                "pass an empty directory or the same arguments"
            )
        return history

    def load(self, round_index: int, fresh: nn.Module) -> nn.Module:
        """Return the student as it was after a round."""
        return load(self._model_path(round_index), fresh)

    def commit(self, student: nn.Module, history: list[dict[str, Any]]) -> None:
        """Write the last round; it counts once the JSON file names it."""
        if self.directory is None:
            return
        save(student, self._model_path(len(history) - 1))
        text = json.dumps({"settings": self.settings, "history": history}, indent=1)
        write_atomically(self.directory / "state.json", lambda path: path.write_text(text))


def compress(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    sparsity: float = 0.75,
    rounds: int = 5,
    epochs: int = 1,
    granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
    criterion: str = "loss_delta",
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
    max_samples: int | None = None,
    max_accuracy_drop: float | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CompressionResult:
    """Compress a copy of a model: in each round score it, prune the lowest pieces, and distil.

    The sparsity grows so that each round keeps the same share of what is left. At the end, block masks
    become block-sparse layers where those are faster (:func:`sparsify_`), other masks plain zeros.

    Example:
        >>> result = fp.compress(model, train_loader, val_loader, sparsity=0.75, rounds=5)
        >>> result.history[-1]["accuracy"], result.history[-1]["sparsity"]
        (0.975, 0.75)

    Args:
        model: trained; it is not changed.
        train_loader: batches for scoring and distillation; iterated several times.
        val_loader: batches for accuracy.
        sparsity: share of the weights to prune in the end, in [0, 1).
        rounds: at least 1.
        epochs: distillation epochs of each round.
        granularity: what a piece is.
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
            ``{"max_grad_norm": 1.0, "features": {"layer3": "layer3"}}``.
        example_inputs: for :func:`sparsify_`; None for the first batch of ``val_loader``.
        max_samples: how many samples of ``train_loader`` each scoring reads.
        max_accuracy_drop: stop, and return the round before, when the validation accuracy falls by more
            than this below the dense model's (0.01 is one percentage point).
        checkpoint_dir: where finished rounds are kept; a call with the same model and arguments goes on from
            there. Functions are compared by name, and the data not at all.
        seed: seeds Python's, NumPy's and torch's generators for each round; yours are left as they were.
        progress: whether progress bars are shown.

    Raises:
        ValueError: an argument is out of range, or ``checkpoint_dir`` holds a run with other arguments.
        TypeError: an argument is of the wrong kind.

    """
    check_model(model)
    sparsity, seed = check_sparsity(sparsity), int(seed)
    check_granularity(granularity)
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
    distillation = _check_distillation_options(distillation)
    if max_accuracy_drop is not None and max_accuracy_drop < 0:
        raise ValueError(f"`max_accuracy_drop` must not be negative, got {max_accuracy_drop}")
    settings = {
        "model": state_digest(model),
        "sparsity": sparsity,
        "rounds": rounds,
        "epochs": epochs,
        "granularity": repr(granularity),
        "criterion": criterion,
        "include": _describe(include),
        "exclude": _describe(exclude),
        "scope": _describe(scope),
        "floor": _describe(floor),
        "teacher": teacher,
        "temperature": float(temperature),
        "hard_label_weight": float(hard_label_weight),
        "loss_fn": _name_of(loss_fn),
        "output_transform": _name_of(output_transform),
        "optimizer": _name_of(optimizer),
        "max_samples": max_samples,
        "max_accuracy_drop": None if max_accuracy_drop is None else float(max_accuracy_drop),
        "seed": seed,
    }
    if distillation:
        settings["distillation"] = _describe_options(distillation)
    checkpoints = _Checkpoints(checkpoint_dir, settings)
    history = checkpoints.history()
    with keep_generators():  # loaders draw from them
        dense_accuracy = evaluate(model, val_loader, loss_fn=loss_fn, output_transform=output_transform)[
            "accuracy"
        ]

    if max_accuracy_drop is not None and math.isnan(dense_accuracy):
        raise ValueError(
            "`max_accuracy_drop` needs an accuracy, but the targets of `val_loader` are no classes"
        )

    def too_low(entry: dict[str, Any]) -> bool:
        return max_accuracy_drop is not None and dense_accuracy - entry["accuracy"] > max_accuracy_drop

    original = copy.deepcopy(model)
    student = copy.deepcopy(model)
    before_round: nn.Module | None = None
    if history:
        if too_low(history[-1]) and len(history) > 1:
            before_round = checkpoints.load(len(history) - 2, copy.deepcopy(model))
        student = checkpoints.load(len(history) - 1, student)
    with keep_generators():
        for round_index in range(len(history), rounds):
            if history and too_low(history[-1]):
                break
            _seed_round(seed, round_index)
            start = time.perf_counter()
            before_round = copy.deepcopy(student)
            target = round_sparsity(sparsity, rounds, round_index)
            scores = score(
                student,
                train_loader,
                criterion=criterion,
                granularity=granularity,
                include=include,
                exclude=exclude,
                loss_fn=loss_fn,
                output_transform=output_transform,
                max_samples=max_samples,
                progress=progress,
            )
            masks = scores.select(sparsity=target, scope=scope, floor=floor)
            apply_masks_(student, masks)
            trained = distill(
                student,
                original if teacher == "original" else before_round,
                train_loader,
                epochs=epochs,
                temperature=temperature,
                hard_label_weight=hard_label_weight,
                optimizer=optimizer,
                loss_fn=loss_fn,
                output_transform=output_transform,
                progress=progress,
                **distillation,
            )
            figures = evaluate(student, val_loader, loss_fn=loss_fn, output_transform=output_transform)
            history.append(_entry(round_index, target, masks, figures, trained, time.perf_counter() - start))
            checkpoints.commit(student, history)

    if history and too_low(history[-1]):
        student = before_round if before_round is not None else copy.deepcopy(model)
        history = history[:-1]
    with keep_generators():
        _convert(student, granularity, example_inputs, val_loader)
    return CompressionResult(student, history, dense_accuracy)


def _entry(
    round_index: int,
    target: float,
    masks: Masks,
    figures: dict[str, float],
    trained: list[dict[str, float]],
    seconds: float,
) -> dict[str, Any]:
    return {
        "round": round_index,
        "target_sparsity": target,
        "sparsity": masks.sparsity(),
        "accuracy": figures["accuracy"],
        "loss": figures["loss"],
        "train_loss": trained[-1]["loss"],
        "seconds": seconds,
        "layers": {name: masks.sparsity(name) for name in masks},
    }


def _convert(
    student: nn.Module, granularity: Granularity, example_inputs: Any, val_loader: Iterable[Any]
) -> None:
    """Turn masks into what runs: block-sparse layers for blocks, plain zeros for the rest."""
    if not isinstance(granularity, Block):
        leave_dense_(student, f"{granularity} masks leave plain zeros")
        return
    if all(piece_mask_of(module) is None for module in student.modules()):
        return  # not even the first round was accurate enough
    if example_inputs is None:
        batch = next(iterate_batches(val_loader, model_device(student)))
        example_inputs = batch.kwargs or batch.args
    sparsify_(student, example_inputs=example_inputs, blocksize=(granularity.rows, granularity.cols))
