"""Selecting units so that what remains of a layer is a multiple: kernels run fastest on whole vectors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from ..granularity import Granularity, Head, InputUnit, Unit, check_count


def check_round_to(round_to: int, granularities: Mapping[str, Granularity]) -> None:
    """Raise ValueError unless pieces are single units, input units or heads (which are not rounded)."""
    check_count(round_to, "round_to")
    for name, granularity in granularities.items() if round_to > 1 else ():
        single = isinstance(granularity, Unit) and granularity.group_size == 1
        if not single and not isinstance(granularity, (InputUnit, Head)):
            raise ValueError(
                f"`round_to` needs pieces of fp.Unit(), fp.InputUnit() or fp.Head(), got {granularity} "
                f"for layer '{name}'"
            )


def is_rounded(granularity: Granularity) -> bool:
    """Tell whether the pieces are channels; a head is many of them already."""
    return isinstance(granularity, (Unit, InputUnit))


def chunk_scores(scores: Tensor, round_to: int) -> Tensor:
    """Return for each unit the mean score of those that have to go with it to leave a multiple.

    The units of a layer go from the lowest up, so the first that go are those above the largest multiple.

    Example:
        >>> chunk_scores(torch.tensor([1.0, 9.0, 2.0, 4.0, 3.0]), 2)
        tensor([1.0000, 6.5000, 2.5000, 6.5000, 2.5000])

    Args:
        scores: of one layer; -inf for units that are pruned already, which count in no mean.
        round_to: the number of which a multiple is to remain.

    """
    order = torch.sort(scores, stable=True).indices
    first = len(scores) % round_to
    bounds = [0, *range(first or round_to, len(scores) + 1, round_to)]
    result = scores.clone()
    for begin, end in itertools.pairwise(bounds):
        chunk = scores[order[begin:end]]
        finite = chunk[chunk > -torch.inf]
        if len(finite):
            result[order[begin:end]] = finite.mean()
    return torch.where(scores == -torch.inf, scores, result)


def rounded_up(keep: Tensor, scores: Tensor, round_to: int) -> Tensor:
    """Return a keep-mask in which the highest of the dropped units are back, up to the next multiple.

    Example:
        >>> rounded_up(torch.tensor([True, False, False]), torch.tensor([3.0, 1.0, 2.0]), 2)
        tensor([ True, False,  True])

    """
    kept = int(keep.sum())
    wanted = min(-(-kept // round_to) * round_to, len(keep))
    order = torch.sort(torch.where(keep, torch.inf, scores), stable=True).indices
    result = torch.zeros_like(keep)
    result[order[len(order) - wanted :]] = True
    return result
