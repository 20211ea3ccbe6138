"""Which pieces go: the lowest scores, under a target, a threshold or a budget, and above the floors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..granularity import Granularity
from ..masks import Budget
from .floors import Floor, floors_by_layer
from .knapsack import Curve, allocate
from .rounding import chunk_scores, is_rounded
from .scopes import Group
from .thresholds import Threshold


class Pieces(NamedTuple):
    """All that can be kept or pruned; units that go together stand once, under the first of their layers.

    Attributes:
        scores: layer name to scores, -inf for pieces that are pruned already.
        protected: layer name to bool tensor, True for pieces that a floor keeps.
        members: layer name to all the layers whose pieces these are.
        ranks: layer name to what the pieces are ranked by where shares are taken: their scores, or those of
            the lots in which they go.

    """

    scores: dict[str, Tensor]
    protected: dict[str, Tensor]
    members: dict[str, tuple[str, ...]]
    ranks: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Tensor],
        pruned: Mapping[str, Tensor],
        coupled: Sequence[Sequence[str]],
        granularities: Mapping[str, Granularity],
        weight_shapes: Mapping[str, torch.Size],
        floor: Floor | Mapping[str, Floor] | None,
        round_to: int = 1,
    ) -> Pieces:
        """Return the pieces of a model's scores.

        Raises:
            TypeError: ``floor`` is no :class:`Floor` and no dict of them.
            ValueError: a floor does not fit the granularity, or one of its globs matches no layer.

        """
        ranked = {
            name: torch.where(pruned[name], -torch.inf, layer) if name in pruned else layer
            for name, layer in scores.items()
        }
        floors = floors_by_layer(floor, list(scores))
        members: dict[str, tuple[str, ...]] = {name: (name,) for name in scores}
        for first, *others in coupled:
            # One piece for all of them, which is pruned already where it is in each.
            ranked[first] = torch.stack([ranked.pop(name) for name in (first, *others)]).amax(0)
            for name in others:
                del members[name]
            members[first] = (first, *others)
        protected = {}
        for first, names in members.items():
            keeps = [
                floors[name].protected(ranked[first], granularities[name], weight_shapes[name])
                for name in names
                if name in floors
            ]
            nothing = torch.zeros(ranked[first].shape, dtype=torch.bool)
            protected[first] = torch.stack([nothing, *keeps]).any(0)
        ranks = ranked
        if round_to > 1:
            ranks = {
                name: chunk_scores(layer, round_to) if is_rounded(granularities[name]) else layer
                for name, layer in ranked.items()
            }
        return cls(ranked, protected, members, ranks)

    def joined(self, costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the costs of the pieces: what they cost in all of their layers."""
        return {
            first: torch.stack([costs[name] for name in names]).sum(0)
            for first, names in self.members.items()
        }

    def spread(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks of all layers, each with a tensor of its own."""
        return {
            name: keep[first] if name == first else keep[first].clone()
            for first, names in self.members.items()
            for name in names
        }


def lowest_within(scores: Tensor, costs: Tensor, allowance: float, protected: Tensor | None = None) -> Tensor:
    """Return a bool tensor, True for the lowest scores whose costs together stay within an allowance.

    Ties are broken by index. Costs are taken in order of score until the next does not fit. What costs
    nothing is not taken: it would not help. What is protected is passed over. What is pruned already stays
    so, also where that is more than the allowance.
    """
    order = torch.sort(scores, stable=True).indices
    if protected is not None:
        order = order[~protected[order]]
    cumulative = costs[order].double().cumsum(0)
    taken = int((cumulative <= allowance * (1 + 1e-12) + 1e-9).sum())
    result = torch.zeros(scores.shape, dtype=torch.bool)
    result[order[:taken]] = True
    result &= costs > 0
    result[order[scores[order] == -torch.inf]] = True
    return result


def keep_shares(
    pieces: Pieces, costs: Mapping[str, Tensor], groups: Sequence[Group]
) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Return keep-masks in which each group has lost no more than its share of its cost.

    Args:
        pieces: of the model.
        costs: layer name to the cost of each piece.
        groups: the layers that are ranked together; one without a share keeps what it has.

    Returns:
        The masks, and the groups of which floors keep more than the share leaves.

    """
    keep: dict[str, Tensor] = {}
    short = []
    for layers, removable in groups:
        scores = _together(pieces.ranks, layers)
        if removable is None:
            keep |= _apart(scores > -torch.inf, pieces.scores, layers)
            continue
        flat_costs, protected = _together(costs, layers), _together(pieces.protected, layers)
        allowance = removable * float(flat_costs.sum())
        removed = lowest_within(scores, flat_costs, allowance, protected)
        kept = flat_costs[~removed & (flat_costs > 0)]
        if bool((removed | protected | (flat_costs == 0)).all()) and len(kept):
            left = allowance - float(flat_costs[removed].sum())
            short += [layers] if float(kept.min()) <= left * (1 + 1e-12) + 1e-9 else []
        keep |= _apart(~removed, pieces.scores, layers)
    return keep, short


def keep_above(pieces: Pieces, threshold: float | Threshold, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return keep-masks of what scores at least the threshold (that of its group) or a floor keeps."""
    keep: dict[str, Tensor] = {}
    for layers, _ in groups:
        scores = _together(pieces.scores, layers)
        limit = threshold.of(scores) if isinstance(threshold, Threshold) else threshold
        keep |= _apart((scores >= limit) | _together(pieces.protected, layers), pieces.scores, layers)
    return keep


def keep_within_latency(pieces: Pieces, budget: Budget) -> tuple[dict[str, Tensor], float | None]:
    """Return keep-masks with which the layers take no longer than a latency budget allows.

    Pieces that are pruned already stay so. See :func:`allocate`.

    Returns:
        The masks, and the fraction of the dense time that remains where the budget cannot be met, else None.

    Raises:
        ValueError: the budget's costs lack a layer.

    """
    costs = budget.costs
    assert costs is not None
    missing = [name for names in pieces.members.values() for name in names if name not in costs]
    if missing:
        raise ValueError(
            f"Budget `costs` must have every layer of the scores, {', '.join(missing)} is missing"
        )
    curves = {
        name: Curve.of(scores, pieces.protected[name], [costs[layer] for layer in pieces.members[name]])
        for name, scores in pieces.scores.items()
    }
    dense = costs.dense_seconds(name for names in pieces.members.values() for name in names)
    taken, remaining = allocate(curves, budget.fraction * dense)
    keep = {}
    for name, scores in pieces.scores.items():
        mask = torch.ones(scores.numel(), dtype=torch.bool)
        mask[curves[name].order[: taken[name]]] = False
        keep[name] = mask.view(scores.shape)
    missed = remaining > budget.fraction * dense * (1 + 1e-6)
    return keep, remaining / dense if missed else None


def _together(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in layers])


def _apart(flat: Tensor, like: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    parts = flat.split([math.prod(like[name].shape) for name in layers])
    return {name: part.view(like[name].shape) for name, part in zip(layers, parts, strict=True)}
