"""One round of distillation: what a batch's loss is made of, and how the models learn from it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import Batch, Loss, OutputTransform, count_batches, iterate_batches, read_logits
from .capture import capture_outputs
from .distillation_losses import FeatureLoss, SoftLoss, at_least_float32
from .gradients import GradientAccumulator
from .learners import (
    Learner,
    OptimizerOrFactory,
    SchedulerOrFactory,
    check_scheduler,
    lending,
    make_optimizer,
    make_scheduler,
)

Penalty = Callable[[nn.Module], Tensor]


class Window(NamedTuple):
    """The batches of one optimizer step."""

    batches: list[Batch]
    samples: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The arguments of distill that every round uses."""

    loader: Iterable[Any]
    epochs: int
    mode: str
    loss: Loss
    hard_label_weight: float
    soft_loss: SoftLoss
    features: FeatureLoss | list[tuple[str, str]] | None
    feature_weight: float
    penalty: Penalty | None
    output_transform: OutputTransform | None
    optimizers: tuple[OptimizerOrFactory, OptimizerOrFactory]
    scheduler: SchedulerOrFactory
    scheduler_interval: str
    accumulation_steps: int
    max_grad_norm: float | None
    autocast_dtype: torch.dtype | None
    after_step: Callable[[nn.Module], Any] | None
    device: torch.device
    progress: bool

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return a model's logits for a batch."""
        return read_logits(batch.fresh().call(model), self.output_transform)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of forwards and losses: that of mixed precision where it is asked for."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def windows(self, batches: Iterable[Batch]) -> Iterator[Window]:
        """Yield the batches of each optimizer step, with what their mean loss is divided by."""
        held: list[Batch] = []
        for batch in batches:
            held.append(batch)
            if len(held) == self.accumulation_steps:
                yield self._window(held)
                held = []
        if held:
            yield self._window(held)

    def _window(self, batches: list[Batch]) -> Window:
        hard = self.hard_label_weight > 0
        weight = sum(self.loss.weight(batch.targets, batch.size) for batch in batches) if hard else 0.0
        return Window(batches, sum(batch.size for batch in batches), weight)

    def total(
        self,
        model: nn.Module,
        logits: Tensor,
        peer_logits: Tensor | None,
        hidden: Callable[[], Tensor] | None,
        batch: Batch,
        window: Window,
    ) -> Tensor:
        """Return the loss of a batch; weighted by samples, the mean over the window is the window's loss."""
        total = at_least_float32(logits.new_zeros(()))
        if self.hard_label_weight > 0:
            values, _ = self.loss(logits, batch.targets, batch.size)
            # A window whose targets are all left out teaches nothing by its labels.
            weight = max(window.weight, 1e-12) * (batch.size / window.samples)
            total = total + self.hard_label_weight * (values.sum() / weight).to(total.dtype)
        if self.hard_label_weight < 1:
            soft = _scalar(self.soft_loss(logits, peer_logits), "soft_loss")  # type: ignore[arg-type]
            total = total + (1 - self.hard_label_weight) * soft
        if hidden is not None:
            total = total + self.feature_weight * _scalar(hidden(), "features")
        if self.penalty is not None:
            total = total + _scalar(self.penalty(model), "penalty")
        return total


def _scalar(value: Tensor, argument: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{argument}` must give a scalar tensor, got {got}")
    return value


def train_round(run: Run, student: nn.Module, teacher: nn.Module, description: str) -> list[dict[str, float]]:
    """Train for the epochs of one round, and put all but the weights back as it was."""
    history = []
    with contextlib.ExitStack() as undo:
        undo.callback(_set_flags, [(m, m.training) for model in (student, teacher) for m in model.modules()])
        round_ = Round(run, student, teacher, undo)
        student.train()
        teacher.train(run.mode == "mutual")  # what both hold, frozen, runs as the teacher's
        for epoch in range(run.epochs):
            start = time.perf_counter()
            with tqdm(
                iterate_batches(run.loader, run.device),
                total=count_batches(run.loader),
                desc=f"{description}distill {epoch + 1}/{run.epochs}",
                disable=not run.progress,
            ) as bar:
                history.append(round_.run_epoch(bar))
                history[-1]["seconds"] = time.perf_counter() - start
    return history


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training


class Round:
    """The models that learn, their optimizers, and the hidden features they learn from."""

    def __init__(self, run: Run, student: nn.Module, teacher: nn.Module, undo: contextlib.ExitStack) -> None:
        self.run = run
        self.student, self.teacher = student, teacher
        models = (student, teacher) if run.mode == "mutual" else (student,)
        optimizers = [
            make_optimizer(run.optimizers[index], model, ("optimizer", "teacher_optimizer")[index])
            for index, model in enumerate(models)
        ]
        check_scheduler(run.scheduler, optimizers)
        self.learners = [
            Learner(
                model,
                GradientAccumulator(
                    optimizer,
                    run.accumulation_steps,
                    max_grad_norm=run.max_grad_norm,
                    grad_scaler=torch.amp.GradScaler(run.device.type)
                    if run.autocast_dtype == torch.float16
                    else None,
                ),
                make_scheduler(run.scheduler, optimizer, run.scheduler_interval),
                run.scheduler_interval,
                run.after_step,
            )
            for model, optimizer in zip(models, optimizers, strict=True)
        ]
        self.hidden: list[Callable[[], Tensor] | None] = [None] * len(models)
        if run.features is not None:
            forth = run.features if isinstance(run.features, FeatureLoss) else FeatureLoss(run.features)
            losses = [forth]
            if run.mode == "mutual":
                losses.append(FeatureLoss([(theirs, ours) for ours, theirs in forth.pairs]))
            names = (forth.student_layers, forth.teacher_layers)
            captured = [
                undo.enter_context(capture_outputs(model, layers, "features"))
                for model, layers in zip((student, teacher), names, strict=True)
            ]
            for index, loss in enumerate(losses):
                lend = undo.enter_context(lending(optimizers[index]))
                lend(loss.parameters())
                ours, theirs = captured[index], captured[1 - index]
                self.hidden[index] = functools.partial(_hidden_loss, loss, ours, theirs, lend)

    def run_epoch(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Train on all batches once, and return what the history says of it."""
        for learner in self.learners:
            learner.begin_epoch()
        for window in self.run.windows(batches):
            for batch in window.batches:
                self._learn(batch, window)
            for learner in self.learners:
                learner.end_window()
        figures = [learner.end_epoch() for learner in self.learners]
        return {
            **figures[0],
            **{f"teacher_{key}": value for more in figures[1:] for key, value in more.items()},
        }

    def _learn(self, batch: Batch, window: Window) -> None:
        run = self.run
        with run.autocast():
            logits = [run.forward(self.student, batch)]
            if run.mode == "mutual":
                logits.append(run.forward(self.teacher, batch))
                peers = [logits[1].detach(), logits[0].detach()]
            else:
                peers = [None]
                if run.hard_label_weight < 1 or run.features is not None:
                    with torch.no_grad():
                        peers = [run.forward(self.teacher, batch)]
            totals = [
                run.total(learner.model, logits[index], peers[index], self.hidden[index], batch, window)
                for index, learner in enumerate(self.learners)
            ]
        for learner, total, own in zip(self.learners, totals, logits, strict=True):
            learner.learn(total, own, batch, run.loss)


def _hidden_loss(
    loss: FeatureLoss,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    lend: Callable[[Iterable[nn.Parameter]], None],
) -> Tensor:
    lend(loss.make_projections(ours, theirs))
    return loss(ours, theirs)
