"""Regrowth: weak pieces make room for removed ones that the gradient asks for (RigL)."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real

import torch
from torch import Tensor

from .granularity import Block, Element, Granularity, Head, InputUnit
from .schedules import check_steps, is_update


@dataclasses.dataclass(frozen=True)
class RigL:
    """Drops the weakest pieces of each layer, and grows as many removed ones where the gradient is largest.

    At an update after step t, of the ``k`` pieces that a layer keeps ``f(t) k`` with the smallest norm are
    dropped, ``f(t) = fraction / 2 (1 + cos(pi t / end))``, and as many of the others grow whose gradient has
    the largest norm. What has grown starts at 0, without momentum if the :class:`Pruner` knows the optimiser.

    Example:
        >>> pruner = fp.Pruner(model, schedule=fp.OneShotSchedule(0.9), regrowth=fp.RigL(end=7500),
        ...                    granularity=fp.Element(), optimizer=optimizer)

    Args:
        fraction: share of the kept pieces that is dropped at step 0, in (0, 1).
        begin: the first step with an update.
        end: the last one; nothing is left to drop there.
        every: steps from one update to the next, a divisor of ``end - begin``.

    Raises:
        ValueError: an argument is out of range.

    Source: Evci et al. 2020, "Rigging the lottery: making all tickets winners", section 3 and algorithm 1;
    defaults as in its section 4 (fraction 0.3, updates every 100 steps). There pieces are single weights;
    for larger ones norms take the place of absolute values.

    """

    fraction: float = 0.3
    begin: int = dataclasses.field(default=0, kw_only=True)
    end: int = dataclasses.field(kw_only=True)
    every: int = dataclasses.field(default=100, kw_only=True)

    def __post_init__(self) -> None:
        share = self.fraction
        if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 < float(share) < 1.0:
            raise ValueError(f"`fraction` must be a number in (0, 1), got {share!r}")
        check_steps(self.begin, self.end, self.every)
        if self.end < 1:
            raise ValueError(f"`end` must be at least 1, got {self.end}")

    def share(self, step: int) -> float:
        """Return the share of the kept pieces that is dropped after a step."""
        return self.fraction / 2 * (1 + math.cos(math.pi * step / self.end))

    def is_update(self, step: int) -> bool:
        """Tell whether pieces are exchanged after a step."""
        return step > 0 and is_update(step, self.begin, self.end, self.every)


def check_regrows(granularity: Granularity) -> None:
    """Raise ValueError for pieces to which no gradient flows while they are removed."""
    if not isinstance(granularity, (Block, Element, InputUnit, Head)):
        raise ValueError(
            "`regrowth` needs fp.Block, fp.Element, fp.InputUnit or fp.Head pieces: a unit that is held at "
            f"zero gets no gradient through its activation, got {granularity}"
        )


def exchange(keep: Tensor, norms: Tensor, gradients: Tensor, protected: Tensor, share: float) -> Tensor:
    """Return a keep-mask of as many pieces: the weakest dropped, those with the largest gradients grown.

    A piece that has been dropped may grow again at once. Ties go to the lower index, dropping and growing.

    Args:
        keep: bool, any shape.
        norms: of the weights of each piece, the same shape.
        gradients: norms of the gradients, the same shape.
        protected: bool, the same shape; True for pieces that are not dropped.
        share: of the kept pieces to drop.

    """
    kept = keep.flatten().clone()
    if bool(kept.all()):
        return keep
    candidates = kept & ~protected.flatten()
    count = min(int(share * int(kept.sum()) + 1e-9), int(candidates.sum()))
    weakest = torch.sort(norms.flatten().where(candidates, torch.inf), stable=True).indices[:count]
    kept[weakest] = False
    wanted = gradients.flatten().where(~kept, -torch.inf)
    kept[torch.sort(wanted, stable=True, descending=True).indices[:count]] = True
    return kept.view(keep.shape)
