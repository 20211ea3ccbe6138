"""prune_: pruning at once, or in rounds that score anew, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .batches import LossFunction, OutputTransform, check_reiterable
from .granularity import Block, Granularity, check_granularity
from .importance import Floor, ImportanceScores, needs_data, score
from .importance.criterion import UserCriterion
from .importance.scopes import Scope
from .layers import Selection, check_model, reusable
from .masks import Budget, Masks, add_masks_, masks_back_on_error
from .schedules import Schedule

COSTS = ("params", "flops", "bytes")


def check_schedule(
    schedule: Schedule, cost: str, criterion: str | UserCriterion, loader: Iterable[Any] | None
) -> None:
    """Raise TypeError or ValueError for a schedule of no known kind, or a loader that is missing."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"`schedule` must be a fastprune Schedule, got {type(schedule).__name__}")
    if cost not in COSTS:
        raise ValueError(f"`cost` must be one of {', '.join(COSTS)}, got {cost!r}")
    if loader is None and (needs_data(criterion) or cost == "flops"):
        raise TypeError(
            f"`loader` must be an iterable of batches for criterion {criterion!r} and cost '{cost}', got None"
        )
    check_reiterable(loader, "loader")


def select_at(
    scores: ImportanceScores, sparsity: float, cost: str, scope: Scope, floor: Floor | Mapping | None
) -> Masks:
    """Return masks that prune a share of a cost."""
    remaining: dict[str, Any] = {cost: 1.0 - sparsity}
    target: dict[str, Any] = {"sparsity": sparsity} if cost == "params" else {"budget": Budget(**remaining)}
    return scores.select(**target, scope=scope, floor=floor)


def prune_(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    schedule: Schedule,
    criterion: str | UserCriterion = "loss_delta",
    granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
    scope: Scope = "global",
    floor: Floor | Mapping[str, Floor] | None = None,
    cost: str = "params",
    include: Selection = None,
    exclude: Selection = None,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
    max_samples: int | None = None,
    progress: bool = True,
) -> Masks:
    """Mask a model in place without training: at once, or in rounds that score it anew; return the masks.

    Each update of the schedule is a round: the pieces that are left are scored, and the lowest go until the
    round's sparsity is reached. A piece that becomes important because others are gone is seen so. On an
    error the model gets the masks back that it had.

    Example:
        >>> fp.prune_(model, loader, schedule=fp.OneShotSchedule(0.5))                  # scored once
        >>> fp.prune_(model, loader, schedule=fp.ExponentialSchedule(0.75, end=10))     # ten times
        >>> fp.prune_(model, loader, schedule=fp.LinearSchedule(0.6, end=6), cost="flops")

    Args:
        model: dense, or masked.
        loader: see :func:`score`.
        schedule: whose steps are rounds; :class:`OneShotSchedule` is one.
        criterion: see :func:`score`.
        granularity: what a piece is.
        scope: see :meth:`ImportanceScores.select`.
        floor: see :meth:`ImportanceScores.select`.
        cost: that the schedule's sparsity is a share of: "params", "flops" or "bytes".
        include: layers, see :func:`score`.
        exclude: layers to leave out, see :func:`score`.
        loss_fn: see :func:`score`.
        output_transform: see :func:`score`.
        max_samples: how many samples each scoring reads.
        progress: whether progress bars are shown.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.

    """
    check_model(model)
    check_schedule(schedule, cost, criterion, loader)
    check_granularity(granularity)
    include, exclude = reusable(include), reusable(exclude)
    rounds = [step for step in range(schedule.begin, schedule.end + 1) if schedule.is_update(step)]
    masks = None
    with masks_back_on_error(model):
        for step in rounds:
            if schedule.at(step) == 0.0 and step != rounds[-1]:
                continue
            scores = score(
                model,
                loader,
                criterion=criterion,
                granularity=granularity,
                include=include,
                exclude=exclude,
                loss_fn=loss_fn,
                output_transform=output_transform,
                max_samples=max_samples,
                progress=progress,
            )
            masks = select_at(scores, schedule.at(step), cost, scope, floor)
            add_masks_(model, masks)
    assert masks is not None
    return masks
