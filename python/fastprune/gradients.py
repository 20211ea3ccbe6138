"""Gradients on their way to an optimizer, in any training loop: accumulation, clipping and thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .granularity import check_count
from .layers import check_model


def check_positive(value: float, name: str) -> float:
    """Return a finite number above 0, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) < math.inf:
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}")
    return float(value)


def check_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Return the optimizer, or raise TypeError for anything else."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def optimized_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class GradientAccumulator:
    """Steps an optimizer once for so many batches, with the gradient of the mean over all their samples.

    The gradient is ``sum_i w_i grad(loss_i) / sum_i w_i``: with ``weight`` the number of samples (or of
    targets) that the mean ``loss_i`` is over, that of one large batch, however ragged the small ones are.

    Example:
        >>> accumulator = fp.GradientAccumulator(optimizer, steps=4, max_grad_norm=1.0)
        >>> for x, y in loader:
        ...     accumulator.backward(F.cross_entropy(model(x), y), weight=len(x))
        >>> accumulator.flush()        # a step with what the last batches left over

    Args:
        optimizer: any; its gradients are set to None at the first batch of each step.
        steps: batches for each step, at least 1.
        max_grad_norm: the L2 norm, over all parameters of the optimizer, that gradients are scaled down
            to before the step; None for no clipping.
        grad_scaler: a ``torch.amp.GradScaler`` for float16: losses are scaled, gradients unscaled before
            they are clipped, and a step whose gradients overflow is left out.

    Raises:
        TypeError: ``optimizer`` or ``grad_scaler`` is none.
        ValueError: ``steps`` or ``max_grad_norm`` is out of range.

    Source of the clipping: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1; of the scaling: Micikevicius et al. 2018, "Mixed precision training", section 3.2.

    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int = 1,
        *,
        max_grad_norm: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        check_count(steps, "steps")
        if max_grad_norm is not None:
            check_positive(max_grad_norm, "max_grad_norm")
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"`grad_scaler` must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
        self.steps = steps
        self.max_grad_norm = max_grad_norm
        self.grad_scaler = grad_scaler
        self._batches = 0
        self._weight = 0.0

    def backward(self, loss: Tensor, weight: float = 1.0) -> bool:
        """Add the gradient of a batch's loss, and step if it is the last batch of a step.

        Args:
            loss: a scalar.
            weight: what the batch counts among those of the step, above 0.

        Returns:
            Whether the parameters were updated.

        Raises:
            ValueError: ``weight`` is not above 0, or the gradient to be clipped is NaN or inf.

        """
        weight = check_positive(weight, "weight")
        if self._batches == 0:
            self.optimizer.zero_grad(set_to_none=True)
        self._batches += 1
        self._weight += weight
        share = weight / self._weight
        if self._batches > 1:
            # So that the sum of weights need not be known ahead.
            for gradient in self._gradients():
                gradient.mul_(1.0 - share)
            loss = loss * share
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return self.flush() if self._batches == self.steps else False

    def flush(self) -> bool:
        """Step with the batches since the last step, if any; return whether the parameters were updated."""
        if self._batches == 0:
            return False
        self._batches, self._weight = 0, 0.0
        if self.max_grad_norm is not None:
            self._clip(self.max_grad_norm)
        if self.grad_scaler is None:
            self.optimizer.step()
            return True
        scale = self.grad_scaler.get_scale()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return self.grad_scaler.get_scale() >= scale

    def _gradients(self) -> Iterator[Tensor]:
        for parameter in optimized_parameters(self.optimizer):
            if parameter.grad is not None:
                yield parameter.grad

    def _clip(self, max_grad_norm: float) -> None:
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(optimized_parameters(self.optimizer), max_grad_norm)
        # A scaler leaves such a step out by itself.
        if self.grad_scaler is None and not bool(norm.isfinite()):
            raise ValueError("the gradient became NaN or inf; try a lower learning rate")


def _check_thresholds(local: float | None, global_: float | None) -> None:
    if local is None and global_ is None:
        raise ValueError("one of `local` and `global_` must be given, got neither")
    for name, value in (("local", local), ("global_", global_)):
        if value is not None:
            check_positive(value, name)


@torch.no_grad()
def _small_entries(
    gradients: list[Tensor], local: float | None, global_: float | None, scale: Any = 1.0
) -> list[Tensor]:
    """Bool tensors of the gradients' shapes, True where a gradient, scaled by ``scale``, is too small."""
    dense = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
    small = [torch.zeros_like(gradient, dtype=torch.bool) for gradient in dense]
    if local is not None:
        small = [gradient.abs() < local * scale for gradient in dense]
    if global_ is not None and dense:
        below = nn.utils.get_total_norm(dense) < global_ * scale
        small = [entries | below.to(entries.device) for entries in small]
    return small


@torch.no_grad()
def zero_small_gradients_(
    model: nn.Module, *, local: float | None = None, global_: float | None = None
) -> Tensor:
    """Set gradients below a threshold to zero in place, between ``backward`` and the optimizer's step.

    An optimizer with momentum or weight decay moves a weight with a zero gradient all the same;
    :class:`GradientThreshold` holds it.

    Example:
        >>> loss.backward()
        >>> fp.zero_small_gradients_(model, local=1e-5, global_=1e-3)
        >>> optimizer.step()

    Args:
        model: its parameters' ``.grad`` are changed.
        local: each entry with ``|gradient| < local`` becomes zero.
        global_: all entries become zero if the L2 norm of all gradients together is below it.

    Returns:
        How many entries were below, an int64 scalar on the model's device.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: neither threshold is given, or one is not above 0.

    """
    _check_thresholds(local, global_)
    parameters = [parameter for parameter in check_model(model).parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    small = _small_entries(gradients, local, global_)
    for parameter, gradient, entries in zip(parameters, gradients, small, strict=True):
        if gradient.is_sparse:
            parameter.grad = gradient.to_dense().masked_fill_(entries, 0.0).to_sparse(gradient.sparse_dim())
        else:
            gradient.masked_fill_(entries, 0.0)
    counts = [entries.sum() for entries in small]
    return torch.stack([count.to(counts[0].device) for count in counts]).sum() if counts else torch.tensor(0)


class GradientThreshold:
    """Holds weights whose gradient is below a threshold where they are, in each step of an optimizer.

    What a step does to them is taken back bit for bit, whatever the optimizer: its momentum, weight decay
    and adaptive rates too. Its own state sees the gradients as they are. In effect from now on, in every
    loop that steps the optimizer, until :meth:`remove`.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        >>> threshold = fp.GradientThreshold(optimizer, local=1e-5)
        >>> fp.distill(model, teacher, loader, epochs=2, optimizer=optimizer)
        >>> threshold.remove()

    Args:
        optimizer: any whose step needs no closure.
        local: a weight is not updated in a step in which its ``|gradient| < local``.
        global_: no weight is updated in a step in which the L2 norm of all gradients is below it.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: neither threshold is given, or one is not above 0; in a step, a closure.

    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, local: float | None = None, global_: float | None = None
    ) -> None:
        check_optimizer(optimizer)
        _check_thresholds(local, global_)
        self.local = local
        self.global_ = global_
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Take the threshold off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ValueError(
                "`optimizer` must step without a closure, which makes gradients anew in the step"
            )
        parameters = [p for p in optimized_parameters(optimizer) if p.grad is not None]
        # Fused optimizers unscale the gradients of a GradScaler themselves, in the step.
        scale = getattr(optimizer, "grad_scale", None)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        small = _small_entries(gradients, self.local, self.global_, 1.0 if scale is None else scale)
        self._held = [
            (parameter, entries, parameter.detach().clone())
            for parameter, entries in zip(parameters, small, strict=True)
        ]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, entries, before in self._held:
            parameter.copy_(torch.where(entries, before, parameter))
        self._held = []
