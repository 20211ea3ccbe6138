"""Distillation: a student learns from a teacher's outputs and from the labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import (
    Loss,
    LossFunction,
    OutputTransform,
    check_reiterable,
    count_batches,
    count_correct,
    iterate_batches,
    model_device,
    read_logits,
)
from .layers import check_model

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OptimizerOrFactory = torch.optim.Optimizer | OptimizerFactory | None


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the mean KL divergence of the softened outputs, times the temperature squared.

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2; the square
    keeps the size of the gradients when the temperature changes.

    Args:
        student_logits: ``[samples, classes, *]``.
        teacher_logits: the same shape; ``[samples]`` or one class: the log-odds of two.
        temperature: above 0.

    Raises:
        ValueError: the shapes differ.

    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`teacher` must give outputs of the student's shape {list(student_logits.shape)}, "
            f"got {list(teacher_logits.shape)}"
        )
    if student_logits.dim() == 1 or student_logits.shape[1] == 1:
        student_logits, teacher_logits = (
            torch.stack([logits, torch.zeros_like(logits)], 1) for logits in (student_logits, teacher_logits)
        )
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
    return divergence.mean() * temperature**2


def check_distillation(temperature: float, hard_label_weight: float) -> None:
    """Raise ValueError unless the temperature is above 0 and the weight in [0, 1]."""
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if not 0.0 <= hard_label_weight <= 1.0:
        raise ValueError(f"`hard_label_weight` must be in [0, 1], got {hard_label_weight}")


def make_optimizer(optimizer: OptimizerOrFactory, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer itself, what the factory makes, or AdamW with a learning rate of 1e-3.

    Raises:
        TypeError: it is neither an optimizer nor a callable that returns one.

    """
    if isinstance(optimizer, torch.optim.Optimizer):
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own.isdisjoint(id(parameter) for parameter in model.parameters()):
            raise ValueError("`optimizer` must hold parameters of the model that is trained, it holds none")
        return optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer is None:
        return torch.optim.AdamW(parameters, lr=1e-3)
    made = optimizer(parameters) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            "`optimizer` must be a torch.optim.Optimizer or a function from parameters to one, "
            f"got {optimizer!r}"
        )
    return made


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    temperature: float = 2.0,
    hard_label_weight: float = 0.5,
    mode: str = "one_way",
    optimizer: OptimizerOrFactory = None,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``student`` in place to give what ``teacher`` gives; masked weights stay exactly zero.

    The loss is ``hard_label_weight * loss_fn + (1 - hard_label_weight) * T^2 KL(teacher || student)``.
    The teacher runs in eval mode and is left as it was; the student trains in train mode, and its modes
    come back at the end.

    Example:
        >>> teacher = copy.deepcopy(model)
        >>> fp.apply_masks_(model, masks)
        >>> history = fp.distill(model, teacher, train_loader, epochs=2)

    Args:
        student: the model that learns.
        teacher: the model it learns from.
        loader: training batches, iterated once per epoch.
        epochs: how often, at least 1.
        temperature: of the softened outputs, above 0.
        hard_label_weight: from 0 (the teacher alone) to 1 (the labels alone).
        mode: "one_way": only the student learns.
        optimizer: an optimizer over the student's parameters, a function from parameters to one, or None
            for AdamW with a learning rate of 1e-3.
        loss_fn: ``loss_fn(outputs, targets)`` for the labels; None for cross-entropy.
        output_transform: picks the logits out of a structured output.
        progress: whether a progress bar is shown.

    Returns:
        One dict per epoch with ``loss``, ``accuracy`` (on the training batches) and ``seconds``.

    Raises:
        ValueError: an argument is out of range, the loader is empty, or the loss became NaN or inf.
        TypeError: an argument is of the wrong kind.

    """
    if mode != "one_way":
        raise ValueError(f"`mode` must be 'one_way', got {mode!r}")
    check_model(student, "student")
    check_model(teacher, "teacher")
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"`epochs` must be an integer of at least 1, got {epochs!r}")
    check_distillation(temperature, hard_label_weight)
    if epochs > 1:
        check_reiterable(loader, "loader")
    loss = Loss(loss_fn)
    chosen_optimizer = make_optimizer(optimizer, student)
    device = model_device(student)
    flags = [(module, module.training) for model in (student, teacher) for module in model.modules()]
    history = []
    try:
        teacher.eval()
        student.train()
        for epoch in range(epochs):
            start = time.perf_counter()
            with tqdm(
                iterate_batches(loader, device),
                total=count_batches(loader),
                desc=f"distill {epoch + 1}/{epochs}",
                disable=not progress,
            ) as bar:
                history.append(
                    _run_epoch(
                        student,
                        teacher,
                        bar,
                        chosen_optimizer,
                        loss,
                        temperature,
                        hard_label_weight,
                        output_transform,
                    )
                )
                history[-1]["seconds"] = time.perf_counter() - start
    finally:
        for module, training in flags:
            module.training = training
    return history


def _run_epoch(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    temperature: float,
    hard_label_weight: float,
    output_transform: OutputTransform | None,
) -> dict[str, float]:
    loss_sum = 0.0
    samples = correct = counted = 0
    for batch in batches:
        logits = read_logits(batch.fresh().call(student), output_transform)
        total = logits.new_zeros(())
        if hard_label_weight > 0:
            values, weight = loss(logits, batch.targets, batch.size)
            # A batch whose targets are all left out teaches nothing by its labels.
            total = total + hard_label_weight * (values.sum() / max(weight, 1e-12)).to(total.dtype)
        if hard_label_weight < 1:
            with torch.no_grad():
                teacher_logits = read_logits(batch.fresh().call(teacher), output_transform)
            total = total + (1 - hard_label_weight) * distillation_loss(logits, teacher_logits, temperature)
        if not bool(total.isfinite()):
            raise ValueError("the distillation loss became NaN or inf; try a lower learning rate")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        loss_sum += float(total.detach()) * batch.size
        samples += batch.size
        hits, seen = count_correct(logits, batch.targets, loss)
        correct += hits
        counted += seen
    return {"loss": loss_sum / samples, "accuracy": correct / counted if counted else float("nan")}
