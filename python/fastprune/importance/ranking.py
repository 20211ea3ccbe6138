"""How far two sets of scores agree on what matters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of two rankings of the same pieces.

    Attributes:
        spearman: the rank correlation, from -1 to 1; NaN where all scores of one side are equal.
        overlap: the share of the lowest pieces of one ranking that are among those of the other.

    """

    spearman: float
    overlap: float


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Agreement of two sets of scores for each layer, and over all pieces of the model; prints as a table."""

    layers: Mapping[str, Agreement]
    overall: Agreement
    k: float

    def __str__(self) -> str:
        """Return the table."""
        rows = [f"{'layer':<32} {'spearman':>9} {f'lowest {self.k:.0%}':>12}"]
        for name, agreement in (*self.layers.items(), ("all", self.overall)):
            rows.append(f"{name:<32} {agreement.spearman:>9.3f} {agreement.overlap:>12.1%}")
        return "\n".join(rows)


def correlate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], k: float) -> Correlation:
    """Compare scores of the same pieces, layer by layer and all together.

    Args:
        first: layer name to scores.
        second: the same layers and shapes.
        k: the share of pieces that counts as lowest; at least one piece does.

    Raises:
        ValueError: ``k`` is not in (0, 1], or layers or shapes differ.

    """
    if isinstance(k, bool) or not isinstance(k, Real) or not 0.0 < float(k) <= 1.0:
        raise ValueError(f"`k` must be a number in (0, 1], got {k!r}")
    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ValueError(f"`other` must have scores of the same layers; only one side has {differing[:5]}")
    for name, layer in first.items():
        if layer.shape != second[name].shape:
            raise ValueError(
                f"`other` must have scores of shape {list(layer.shape)} for layer '{name}', "
                f"got {list(second[name].shape)}"
            )
    layers = {name: _agreement(layer.flatten(), second[name].flatten(), k) for name, layer in first.items()}
    everything = [torch.cat([scores[name].flatten() for name in first]) for scores in (first, second)]
    return Correlation(layers, _agreement(everything[0], everything[1], k), float(k))


def average_ranks(values: Tensor) -> Tensor:
    """Return ranks from 1, float64; equal values share the mean of their ranks.

    Example:
        >>> average_ranks(torch.tensor([3.0, 1.0, 3.0]))
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)

    Args:
        values: 1-D, any real dtype.

    """
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _agreement(first: Tensor, second: Tensor, k: float) -> Agreement:
    ranks = [average_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = float(centred[0].norm() * centred[1].norm())
    spearman = float(centred[0] @ centred[1]) / norms if norms else math.nan
    count = max(1, int(k * len(first) + 1e-9))
    lowest = [set(torch.sort(values, stable=True).indices[:count].tolist()) for values in (first, second)]
    return Agreement(spearman, len(lowest[0] & lowest[1]) / count)
