"""Schedules: how sparse a model is to be after each optimiser step, or in each round."""

from __future__ import annotations

import abc
import dataclasses
import math

from .masks import check_sparsity


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """A sparsity for each step, from ``initial`` at step ``begin`` to ``sparsity`` at step ``end``.

    A step is how many optimiser steps are done; 0 is before the first. Derive a schedule of your own by
    :meth:`between`. Compared by value.

    Args:
        sparsity: in the end, in [0, 1).
        begin: the first step at which pieces go, at least 0.
        end: the last one, at least ``begin``.
        every: steps from one update to the next, a divisor of ``end - begin``.
        initial: sparsity at ``begin``, at most ``sparsity``.

    Raises:
        ValueError: an argument is out of range.

    """

    sparsity: float
    begin: int = dataclasses.field(default=0, kw_only=True)
    end: int = dataclasses.field(kw_only=True)
    every: int = dataclasses.field(default=1, kw_only=True)
    initial: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_sparsity(self.initial, "initial")
        check_steps(self.begin, self.end, self.every)
        if self.initial > self.sparsity:
            raise ValueError(
                f"`initial` must be at most the sparsity of {self.sparsity} in the end, got {self.initial}"
            )

    @abc.abstractmethod
    def between(self, progress: float) -> float:
        """Return the sparsity after a share of the way, strictly between 0 and 1."""

    def at(self, step: int) -> float:
        """Return the sparsity for a step: 0 before ``begin``, ``sparsity`` from ``end`` on.

        Example:
            >>> fp.CubicSchedule(0.8, begin=100, end=200, every=10).at(150)
            0.7

        """
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return float(self.sparsity)
        if step == self.begin:
            return float(self.initial)
        return self.between((step - self.begin) / (self.end - self.begin))

    def is_update(self, step: int) -> bool:
        """Tell whether pieces go after a step."""
        return is_update(step, self.begin, self.end, self.every)


def check_steps(begin: int, end: int, every: int) -> None:
    """Raise ValueError unless updates can be made at ``begin``, ``begin + every``, ... up to ``end``."""
    for name, value, least in (("begin", begin, 0), ("end", end, begin), ("every", every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")
    if (end - begin) % every:
        raise ValueError(f"`every` must divide the {end - begin} steps from begin to end, got {every}")


def is_update(step: int, begin: int, end: int, every: int) -> bool:
    """Tell whether a step is one of ``begin``, ``begin + every``, ... ``end``."""
    return begin <= step <= end and (step - begin) % every == 0


@dataclasses.dataclass(frozen=True)
class OneShotSchedule(Schedule):
    """Everything goes at once, after one step.

    Example:
        >>> fp.Pruner(model, schedule=fp.OneShotSchedule(0.75))                 # before the first step
        >>> fp.Pruner(model, schedule=fp.OneShotSchedule(0.75, begin=1000))     # after a warm-up

    Args:
        sparsity: in [0, 1).
        begin: the step; ``end`` is the same, and may be left out.

    """

    end: int = dataclasses.field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        if self.end == -1:
            object.__setattr__(self, "end", self.begin)
        super().__post_init__()
        if self.end != self.begin:
            raise ValueError(f"`end` must be the same step as `begin`, {self.begin}, got {self.end}")

    def between(self, progress: float) -> float:
        """Return the sparsity: no step lies between."""
        return float(self.sparsity)


@dataclasses.dataclass(frozen=True)
class CubicSchedule(Schedule):
    """Fast while many weak connections are there, slower and slower towards the end.

    ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3`` for ``t`` in ``t_0, t_0 + dt, ..., t_0 + n dt``,
    with ``s_f = sparsity``, ``s_i = initial``, ``t_0 = begin``, ``dt = every`` and ``n dt = end - begin``.

    Example:
        >>> schedule = fp.CubicSchedule(0.9, begin=500, end=5500, every=100)
        >>> pruner = fp.Pruner(model, schedule=schedule)

    Source: Zhu & Gupta 2017, "To prune, or not to prune", equation 1.

    """

    def between(self, progress: float) -> float:
        """Return the sparsity."""
        return self.sparsity + (self.initial - self.sparsity) * (1.0 - progress) ** 3


@dataclasses.dataclass(frozen=True)
class LinearSchedule(Schedule):
    """The same share of all weights at each update: ``s_t = s_i + (s_f - s_i) (t - t_0) / (n dt)``.

    Example:
        >>> fp.LinearSchedule(0.8, end=1000, every=100).at(500)
        0.4

    """

    def between(self, progress: float) -> float:
        """Return the sparsity."""
        return self.initial + (self.sparsity - self.initial) * progress


@dataclasses.dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    """The same share of what is left at each update: ``1 - s_t = (1 - s_i) ((1 - s_f) / (1 - s_i))^p``.

    ``p = (t - t_0) / (n dt)``. As in the rounds of :func:`compress`.

    Example:
        >>> fp.ExponentialSchedule(0.75, end=2).at(1)
        0.5

    Source: Frankle & Carbin 2019, "The lottery ticket hypothesis", section 1 (iterative pruning: each of n
    rounds takes the same share of the weights that survive the one before).

    """

    def between(self, progress: float) -> float:
        """Return the sparsity."""
        kept = math.log1p(-self.initial) * (1.0 - progress) + math.log1p(-self.sparsity) * progress
        return -math.expm1(kept)
