"""Floors: what stays of each layer, however low its scores are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from ..granularity import Block, Granularity, Head, InputUnit, Unit, check_count
from .scopes import by_glob


@dataclasses.dataclass(frozen=True)
class Floor:
    """What stays of each layer whatever it scores, so that none is emptied; at least one is given.

    The pieces that score highest stay. A floor always holds: where too few pieces are left by an earlier
    round, it brings some back.

    Example:
        >>> scores.select(sparsity=0.9, floor=fp.Floor(max_sparsity=0.98))
        >>> scores.select(sparsity=0.9, floor=fp.Floor(blocks_per_row=1))      # no output becomes a constant
        >>> scores.select(sparsity=0.9, floor={"head": fp.Floor(max_sparsity=0.5), "*": fp.Floor(units=8)})

    Args:
        units: at least so many units of a layer stay, input units or heads where those are the pieces; all of
            a layer with fewer. A group of units (``Unit(group_size)``) counts as many as it has.
        blocks_per_row: at least so many blocks of each block row stay, all taps of a convolution together;
            all of a row with fewer.
        max_sparsity: at most this share of a layer's weights goes, in [0, 1].

    Raises:
        ValueError: none is given, one is out of range, or (when it is used) the pieces are others.

    """

    units: int | None = None
    blocks_per_row: int | None = None
    max_sparsity: float | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in dataclasses.asdict(self).values()):
            raise ValueError("Floor needs at least one of units, blocks_per_row, max_sparsity, got none")
        for name in ("units", "blocks_per_row"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        share = self.max_sparsity
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, Real) or not 0.0 <= float(share) <= 1.0
        ):
            raise ValueError(f"`max_sparsity` must be a number in [0, 1], got {share!r}")

    def protected(self, scores: Tensor, granularity: Granularity, weight_shape: torch.Size) -> Tensor:
        """Return a bool tensor of the scores' shape, True for pieces that stay whatever they score.

        Of equal scores the later piece stays, since the earlier one is pruned first.

        Args:
            scores: one layer's, -inf for pieces that are pruned already.
            granularity: of the layer.
            weight_shape: of the layer.

        Raises:
            ValueError: the granularity has no units, or no blocks, to count.

        """
        keep = torch.zeros(scores.shape, dtype=torch.bool)
        if self.units is not None:
            keep |= highest(scores, _unit_counts(granularity, weight_shape), self.units)
        if self.blocks_per_row is not None:
            if not isinstance(granularity, Block):
                raise ValueError(f"Floor `blocks_per_row` needs fp.Block pieces, got {granularity}")
            for row, row_scores in enumerate(scores):
                keep[row] |= highest(row_scores, torch.ones(row_scores.shape), self.blocks_per_row)
        if self.max_sparsity is not None:
            sizes = granularity.sizes(weight_shape)
            keep |= highest(scores, sizes, (1.0 - self.max_sparsity) * float(sizes.sum()))
        return keep


def floors_by_layer(floor: Floor | Mapping[str, Floor] | None, names: list[str]) -> dict[str, Floor]:
    """Return the floor of each layer that has one.

    Raises:
        TypeError: ``floor`` is no :class:`Floor` and no dict of them.
        ValueError: one of its globs matches no layer.

    """
    if floor is None:
        return {}
    floors = floor if isinstance(floor, Mapping) else {"*": floor}
    for entry in floors.values():
        if not isinstance(entry, Floor):
            raise TypeError(
                f"`floor` must be an fp.Floor, or a dict from name globs to them, got {type(entry).__name__}"
            )
    return by_glob(floors, names, "floor")


def highest(scores: Tensor, counts: Tensor, least: float) -> Tensor:
    """Return a bool tensor, True for the fewest highest scores whose counts reach ``least``, or for all.

    Example:
        >>> highest(torch.tensor([3.0, 1.0, 3.0]), torch.ones(3), 1)
        tensor([False, False,  True])

    """
    order = torch.sort(scores.flatten(), stable=True).indices.flip(0)
    before = counts.flatten()[order].double().cumsum(0) - counts.flatten()[order]
    result = torch.zeros(scores.numel(), dtype=torch.bool)
    result[order[before < least * (1 - 1e-12) - 1e-9]] = True
    return result.view(scores.shape)


def _unit_counts(granularity: Granularity, weight_shape: torch.Size) -> Tensor:
    """How many units each piece is made of."""
    if isinstance(granularity, Unit):
        row = torch.Size([weight_shape[0], 1])
        return granularity.sizes(row)
    if isinstance(granularity, (InputUnit, Head)):
        return torch.ones(granularity.shape(weight_shape))
    raise ValueError(f"Floor `units` needs fp.Unit, fp.InputUnit or fp.Head pieces, got {granularity}")
