"""A model that is trained: its optimizer, scheduler and accumulated gradients, and what an epoch showed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .batches import Accuracy, Batch, Loss
from .gradients import GradientAccumulator, optimized_parameters

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OptimizerOrFactory = torch.optim.Optimizer | OptimizerFactory | None
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
SchedulerOrFactory = LRScheduler | SchedulerFactory | None


def make_optimizer(
    optimizer: OptimizerOrFactory, model: nn.Module, argument: str = "optimizer"
) -> torch.optim.Optimizer:
    """Return the optimizer itself, what the factory makes, or AdamW with a learning rate of 1e-3.

    Raises:
        TypeError: it is neither an optimizer nor a callable that returns one, or its step needs a closure.
        ValueError: the optimizer holds no parameter of the model, or none of these requires a gradient.

    """
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_step(optimizer, argument)
        own = {id(parameter) for parameter in optimized_parameters(optimizer)}
        if own.isdisjoint(id(parameter) for parameter in model.parameters()):
            raise ValueError(f"`{argument}` must hold parameters of the model that is trained, it holds none")
        return optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("a model that learns must have parameters that require a gradient, got none")
    if optimizer is None:
        return torch.optim.AdamW(parameters, lr=1e-3)
    made = optimizer(parameters) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"`{argument}` must be a torch.optim.Optimizer or a function from parameters to one, "
            f"got {optimizer!r}"
        )
    _check_step(made, argument)
    return made


def _check_step(optimizer: torch.optim.Optimizer, argument: str) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"`{argument}` must be an optimizer whose step needs no closure, got {type(optimizer).__name__}"
        )


def check_scheduler(scheduler: SchedulerOrFactory, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise unless the scheduler is None, a function, or one of these optimizers.

    Raises:
        TypeError: it is nothing of the kind.
        ValueError: it is one of another optimizer.

    """
    if isinstance(scheduler, LRScheduler):
        if not any(scheduler.optimizer is optimizer for optimizer in optimizers):
            raise ValueError("`scheduler` must be one of the optimizer that is passed, got one of another")
    elif scheduler is not None and not callable(scheduler):
        raise TypeError(
            "`scheduler` must be a torch LRScheduler or a function from an optimizer to one, "
            f"got {scheduler!r}"
        )


def make_scheduler(
    scheduler: SchedulerOrFactory, optimizer: torch.optim.Optimizer, interval: str
) -> LRScheduler | None:
    """Return the scheduler if it is the optimizer's, what the factory makes, or None.

    Raises:
        TypeError: the factory makes no scheduler.
        ValueError: it steps by the loss of an epoch, which there is none of in the interval "step".

    """
    if scheduler is None or isinstance(scheduler, LRScheduler):
        made = scheduler if scheduler is not None and scheduler.optimizer is optimizer else None
    else:
        made = scheduler(optimizer)
        if not isinstance(made, LRScheduler):
            raise TypeError(
                "`scheduler` must be a torch LRScheduler or a function from an optimizer to one, "
                f"got a function to {type(made).__name__}"
            )
    if interval == "step" and isinstance(made, ReduceLROnPlateau):
        raise ValueError("`scheduler_interval` must be 'epoch' for a ReduceLROnPlateau, got 'step'")
    return made


@contextlib.contextmanager
def lending(optimizer: torch.optim.Optimizer) -> Iterator[Callable[[Iterable[nn.Parameter]], None]]:
    """Give a function that adds parameters to an optimizer's first group; at the end they are out again.

    A group of their own would not do: schedulers count the groups when they are made.
    """
    group = optimizer.param_groups[0]
    lent: list[nn.Parameter] = []

    def add(parameters: Iterable[nn.Parameter]) -> None:
        present = {id(parameter) for parameter in optimized_parameters(optimizer)}
        new = [p for p in parameters if p.requires_grad and id(p) not in present]
        lent.extend(new)
        group["params"].extend(new)

    try:
        yield add
    finally:
        if lent:
            ids = {id(parameter) for parameter in lent}
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            for parameter in lent:
                optimizer.state.pop(parameter, None)


class Learner:
    """A model that learns, and the sums of an epoch.

    Args:
        model: trained in place.
        accumulator: steps its optimizer.
        scheduler: of the optimizer's learning rates, or None.
        interval: when the scheduler steps: "epoch" or "step".
        after_step: called with the model after each update, or None.

    """

    def __init__(
        self,
        model: nn.Module,
        accumulator: GradientAccumulator,
        scheduler: LRScheduler | None,
        interval: str,
        after_step: Callable[[nn.Module], Any] | None,
    ) -> None:
        self.model = model
        self.accumulator = accumulator
        self.scheduler = scheduler
        self.interval = interval
        self.after_step = after_step
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Set the sums to zero."""
        self.loss_sum = 0.0
        self.samples = 0
        self.accuracy = Accuracy()

    def learn(self, total: Tensor, logits: Tensor, batch: Batch, loss: Loss) -> None:
        """Take the gradient of a batch's loss, and step where it is time.

        Raises:
            ValueError: the loss is NaN or inf.

        """
        if not bool(total.isfinite()):
            raise ValueError("the distillation loss became NaN or inf; try a lower learning rate")
        self._after(self.accumulator.backward(total, batch.size))
        self.loss_sum += float(total.detach()) * batch.size
        self.samples += batch.size
        self.accuracy.add(logits, batch.targets, loss)

    def end_window(self) -> None:
        """Step with what an epoch's last batches left over."""
        self._after(self.accumulator.flush())

    def end_epoch(self) -> dict[str, float]:
        """Step the scheduler, and return the mean loss and the accuracy of the epoch."""
        loss = self.loss_sum / self.samples
        if self.scheduler is not None and self.interval == "epoch":
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(loss)
            else:
                self.scheduler.step()
        return {"loss": loss, "accuracy": self.accuracy.value()}

    def _after(self, updated: bool) -> None:
        if not updated:
            return
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.model)
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()
