"""Distillation: a student learns from a teacher's outputs and hidden features, and from the labels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .batches import Loss, LossFunction, OutputTransform, check_reiterable, model_device
from .distillation_losses import (
    FeatureLoss,
    FeaturePairs,
    SoftLoss,
    check_pairs,
    check_temperature,
    distillation_loss,
    logit_mse_loss,
)
from .distillation_rounds import Penalty, Run, train_round
from .gradients import check_positive
from .granularity import check_count
from .layers import check_model
from .learners import OptimizerOrFactory, SchedulerOrFactory


def check_distillation(temperature: float, hard_label_weight: float) -> None:
    """Raise ValueError unless the temperature is above 0 and the weight in [0, 1]."""
    check_temperature(temperature)
    if not 0.0 <= hard_label_weight <= 1.0:
        raise ValueError(f"`hard_label_weight` must be in [0, 1], got {hard_label_weight}")


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Any],
    *,
    epochs: int,
    temperature: float = 2.0,
    hard_label_weight: float = 0.5,
    mode: str = "one_way",
    optimizer: OptimizerOrFactory = None,
    teacher_optimizer: OptimizerOrFactory = None,
    scheduler: SchedulerOrFactory = None,
    scheduler_interval: str = "epoch",
    rounds: int = 1,
    soft_loss: str | SoftLoss = "kl",
    features: FeaturePairs | FeatureLoss | None = None,
    feature_weight: float = 1.0,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    autocast_dtype: torch.dtype | None = None,
    penalty: Penalty | None = None,
    after_step: Callable[[nn.Module], Any] | None = None,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``student`` in place to give what ``teacher`` gives; masked weights stay exactly zero.

    The loss is ``hard_label_weight * loss_fn + (1 - hard_label_weight) * soft_loss``, plus ``feature_weight``
    times that of hidden features, plus ``penalty``. The soft loss is ``T^2 KL(teacher || student)``. The
    student trains in train mode; its modes, and all of the teacher, are as they were at the end, also
    after an error.

    Example:
        >>> teacher = copy.deepcopy(model)
        >>> fp.apply_masks_(model, masks)
        >>> history = fp.distill(model, teacher, train_loader, epochs=2)
        >>> fp.distill(model, teacher, train_loader, epochs=2, features={"layer3": "layer3"},
        ...     optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), max_grad_norm=1.0,
        ...     scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2))

    Args:
        student: the model that learns, masked, block-sparse or dense.
        teacher: the model it learns from; with mode "self" None for a copy of the student.
        loader: training batches, iterated once per epoch.
        epochs: how often, at least 1.
        temperature: of the softened outputs, above 0; for "kl".
        hard_label_weight: from 0 (the teacher alone) to 1 (the labels alone).
        mode: "one_way": only the student learns, and the teacher runs in eval mode. "mutual": both learn from
            each other's outputs and train, from predictions made before either is updated. "self": as one
            way, and after each round a copy of the student becomes the teacher.
        optimizer: an optimizer over the student's parameters, a function from parameters to one, or None
            for AdamW with a learning rate of 1e-3. Its step must need no closure, as that of LBFGS does.
        teacher_optimizer: the teacher's in mode "mutual"; None makes it as the student's.
        scheduler: of ``optimizer`` (or of ``teacher_optimizer``), or a function from an optimizer to one.
        scheduler_interval: "epoch" or "step": when the scheduler steps. ``ReduceLROnPlateau``, by epochs
            alone, gets the loss.
        rounds: of ``epochs`` each, with mode "self". Functions make a new optimizer and scheduler each round.
        soft_loss: "kl", "mse" (:func:`logit_mse_loss`), or a function of the student's and the teacher's
            logits to a scalar mean.
        features: student layers to the teacher layers whose outputs they learn, or a :class:`FeatureLoss`.
            Projections between different widths are trained by the optimizer, in its first group, and
            leave it again at the end; those of a :class:`FeatureLoss` stay there.
        feature_weight: of their loss, at least 0.
        accumulation_steps: batches for each step of the optimizer; the gradient is that of the mean loss
            over all their samples, and the last step of an epoch may have fewer.
        max_grad_norm: see :class:`GradientAccumulator`.
        autocast_dtype: torch.bfloat16 or torch.float16 for mixed precision; losses of float16 are scaled.
        penalty: a function of a model that learns to a scalar, such as :func:`group_lasso_penalty`.
        after_step: called with a model that learns after each of its updates, such as :func:`max_norm_`.
        loss_fn: ``loss_fn(outputs, targets)`` for the labels; None for cross-entropy.
        output_transform: picks the logits out of a structured output.
        progress: whether a progress bar is shown.

    Returns:
        One dict per epoch with ``loss``, ``accuracy`` (on the training batches) and ``seconds``; with mode
        "mutual" also ``teacher_loss`` and ``teacher_accuracy``, with mode "self" the ``round``, from 0.

    Raises:
        ValueError: an argument is out of range, the loader is empty, or the loss became NaN or inf.
        TypeError: an argument is of the wrong kind.

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network" (soft and hard labels); Romero
    et al. 2015, "FitNets" (features); Zhang et al. 2018, "Deep mutual learning", equations 4 and 5, whose
    algorithm 1 predicts anew between the two updates; Furlanello et al. 2018, "Born-again neural networks"
    (self), where each student starts anew.

    """
    check_model(student, "student")
    if mode not in ("one_way", "mutual", "self"):
        raise ValueError(f"`mode` must be 'one_way', 'mutual' or 'self', got {mode!r}")
    if not (mode == "self" and teacher is None):
        _check_teacher(student, check_model(teacher, "teacher"), mode)
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"`epochs` must be an integer of at least 1, got {epochs!r}")
    check_distillation(temperature, hard_label_weight)
    for name, count in (("rounds", rounds), ("accumulation_steps", accumulation_steps)):
        check_count(count, name)
    if rounds > 1 and mode != "self":
        raise ValueError(f"`rounds` must be 1 unless `mode` is 'self', got {rounds}")
    if epochs * rounds > 1:
        check_reiterable(loader, "loader")
    if scheduler_interval not in ("epoch", "step"):
        raise ValueError(f"`scheduler_interval` must be 'epoch' or 'step', got {scheduler_interval!r}")
    if not feature_weight >= 0:
        raise ValueError(f"`feature_weight` must be at least 0, got {feature_weight}")
    if max_grad_norm is not None:
        check_positive(max_grad_norm, "max_grad_norm")
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"`autocast_dtype` must be torch.bfloat16, torch.float16 or None, got {autocast_dtype!r}"
        )
    for name, function in (("penalty", penalty), ("after_step", after_step)):
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` must be a function of the model, got {type(function).__name__}")
    run = Run(
        loader=loader,
        epochs=epochs,
        mode=mode,
        loss=Loss(loss_fn),
        hard_label_weight=hard_label_weight,
        soft_loss=_soft_loss(soft_loss, temperature),
        features=_features(features, mode),
        feature_weight=feature_weight,
        penalty=penalty,
        output_transform=output_transform,
        optimizers=_optimizers(optimizer, teacher_optimizer, mode),
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        accumulation_steps=accumulation_steps,
        max_grad_norm=max_grad_norm,
        autocast_dtype=autocast_dtype,
        after_step=after_step,
        device=model_device(student),
        progress=progress,
    )
    history: list[dict[str, float]] = []
    for index in range(rounds):
        if mode == "self" and (index > 0 or teacher is None):
            teacher = copy.deepcopy(student).requires_grad_(False)
        assert teacher is not None
        entries = train_round(run, student, teacher, f"round {index + 1}/{rounds} " if rounds > 1 else "")
        history += [{**entry, "round": index} for entry in entries] if mode == "self" else entries
    return history


def _check_teacher(student: nn.Module, teacher: nn.Module, mode: str) -> None:
    if student is teacher:
        raise ValueError("`teacher` must be another model than `student`: a copy, made before it is pruned")
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if mode == "mutual" and not trained.isdisjoint(id(parameter) for parameter in teacher.parameters()):
        raise ValueError("`teacher` must share no trained parameter with `student` where both learn")


def _soft_loss(soft_loss: str | SoftLoss, temperature: float) -> SoftLoss:
    if soft_loss == "kl":
        return functools.partial(distillation_loss, temperature=temperature)
    if soft_loss == "mse":
        return logit_mse_loss
    if isinstance(soft_loss, (str, type)) or not callable(soft_loss):
        raise ValueError(
            f"`soft_loss` must be 'kl', 'mse' or a function of the two models' logits, got {soft_loss!r}"
        )
    return soft_loss


def _features(
    features: FeaturePairs | FeatureLoss | None, mode: str
) -> FeatureLoss | list[tuple[str, str]] | None:
    if features is None:
        return None
    if not isinstance(features, FeatureLoss):
        return check_pairs(features)
    if mode == "mutual":
        raise ValueError("`features` must be pairs of names where both models learn, got a FeatureLoss")
    return features


def _optimizers(
    optimizer: OptimizerOrFactory, teacher_optimizer: OptimizerOrFactory, mode: str
) -> tuple[OptimizerOrFactory, OptimizerOrFactory]:
    if mode != "mutual":
        if teacher_optimizer is not None:
            raise ValueError("`teacher_optimizer` must be None unless `mode` is 'mutual'")
        return optimizer, None
    if teacher_optimizer is None and isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            "`teacher_optimizer` must be given where `optimizer` is one, not a function, got None"
        )
    return optimizer, optimizer if teacher_optimizer is None else teacher_optimizer
