"""Thresholds that follow the distribution of the scores."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A threshold computed from the scores it is applied to; exactly one rule is given.

    ``select``'s ``scope`` says which scores those are: of all layers, of each layer or of each group. Pieces
    that are pruned already do not count, so that later rounds go on from what is left; units that can only
    be removed together count once.

    Example:
        >>> scores.select(threshold=fp.Threshold(quantile=0.25))                       # of all pieces
        >>> scores.select(threshold=fp.Threshold(mean_minus_std=1.0), scope="layer")   # of each layer

    Args:
        quantile: q in [0, 1]; the threshold is the score that a share q of the pieces lies below, linearly
            interpolated between neighbours as :func:`torch.quantile` does. Scores equal to it stay, so that
            fewer may go where there are ties; a target that counts weights is ``sparsity``.
        mean_minus_std: k; the threshold is ``mean - k * std`` with the standard deviation of the
            population, which is 0 for a single piece. It may be negative.

    Raises:
        ValueError: not exactly one is given, or it is out of range.

    """

    quantile: float | None = None
    mean_minus_std: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"Threshold needs exactly one of quantile, mean_minus_std, got {given or 'none'}"
            )
        (name, value) = next(iter(given.items()))
        number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
        if name == "quantile" and not (number and 0.0 <= float(value) <= 1.0):
            raise ValueError(f"Threshold `quantile` must be a number in [0, 1], got {value!r}")
        if not number:
            raise ValueError(f"Threshold `mean_minus_std` must be a finite number, got {value!r}")

    def of(self, scores: Tensor) -> float:
        """Return the threshold for some scores: those below it are pruned.

        Args:
            scores: 1-D float64; -inf for pieces that are pruned already. Without others the threshold is 0.

        """
        live = scores[scores > -torch.inf].numpy()
        if not live.size:
            return 0.0
        if self.quantile is not None:
            # torch's own refuses more than 16 million values.
            return float(np.quantile(live, self.quantile))
        assert self.mean_minus_std is not None
        return float(live.mean() - self.mean_minus_std * live.std())


def check_threshold(threshold: float | Threshold) -> Threshold | float:
    """Return the threshold, or raise ValueError for what is neither a number nor a :class:`Threshold`."""
    if isinstance(threshold, Threshold):
        return threshold
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or math.isnan(threshold):
        raise ValueError(f"`threshold` must be a number or an fp.Threshold, got {threshold!r}")
    return float(threshold)
