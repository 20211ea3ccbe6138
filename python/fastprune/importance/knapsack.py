"""Latency budgets: how much of each layer goes, so that the model is fast enough for the least loss."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..latency import LayerLatency

# Sums of seconds are compared with a budget that may be one of them, but for rounding.
_SLACK = 1e-9


@dataclasses.dataclass(frozen=True)
class Curve:
    """What removing the lowest pieces of one layer costs, for each number of them.

    Attributes:
        order: indices of the pieces that may go, lowest first; the first ``already`` are pruned already.
        already: how many of them are.
        seconds: of the layer after 0, 1, ... of them, non-increasing.
        losses: sums of their scores, 0 for those that are pruned already.

    """

    order: Tensor
    already: int
    seconds: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, scores: Tensor, protected: Tensor, layers: Sequence[LayerLatency]) -> Curve:
        """Return the curve of a layer, or of several whose pieces go together.

        Args:
            scores: any shape, -inf for pieces that are pruned already.
            protected: bool, the same shape, True for pieces that stay.
            layers: the latency of each.

        """
        flat = scores.flatten()
        order = torch.sort(flat, stable=True).indices
        order = order[~protected.flatten()[order]]
        ascending = flat[order]
        already = int((ascending == -torch.inf).sum())
        losses = np.concatenate([[0.0], ascending.where(ascending > -torch.inf, 0.0).cumsum(0).numpy()])
        kept = flat.numel() - np.arange(len(order) + 1)
        densities = kept / max(flat.numel(), 1)
        return cls(order, already, np.sum([layer.seconds(densities) for layer in layers], axis=0), losses)

    def steps(self) -> list[int]:
        """Return the numbers of pieces at the corners of the lower convex hull of loss over seconds saved.

        The first is ``already``. Pieces whose removal saves nothing are taken only with one that does.
        """
        saved = self.seconds[self.already] - self.seconds[self.already :]
        fastest = np.maximum.accumulate(np.concatenate([[-np.inf], saved[:-1]]))
        corners: list[int] = []
        for count in np.flatnonzero(saved > fastest).tolist():
            while len(corners) > 1 and self._slope(saved, corners[-2], corners[-1]) > self._slope(
                saved, corners[-1], count
            ):
                corners.pop()
            corners.append(count)
        return [self.already + count for count in corners]

    def _slope(self, saved: np.ndarray, first: int, second: int) -> float:
        losses = self.losses[self.already :]
        return float((losses[second] - losses[first]) / (saved[second] - saved[first]))


def allocate(curves: Mapping[str, Curve], allowed_seconds: float) -> tuple[dict[str, int], float]:
    """Return how many pieces of each layer go so that together they take no more than the allowed seconds.

    This is a multiple-choice knapsack: for each layer one number of pieces, the sum of their scores as small
    as can be. Steps along the convex hull of each layer's curve are taken in the order of loss per second
    saved, lowest first (ties: the earlier layer), until the budget is met; the last step goes only as far as
    it has to. That solves the linear relaxation: with scores of at least 0, the sum is the smallest there is
    where the budget is met exactly at a corner, and otherwise exceeds it by no more than the sum of the last
    step. Scores below 0 are taken for the seconds they save, and no further. Layers are counted as
    independent: scores add up, and so do seconds.

    Source: Sinha & Zoltners 1979, "The multiple-choice knapsack problem" (dominance and the relaxation);
    Kellerer, Pferschy & Pisinger 2004, "Knapsack problems", section 11.2 (the greedy over hulls).

    Args:
        curves: layer name to its curve.
        allowed_seconds: that may remain.

    Returns:
        Layer name to the number of pieces of ``order`` that go, and the seconds that remain, which are more
        than the allowed ones where removing everything that may go is not enough.

    """
    taken = {name: curve.already for name, curve in curves.items()}
    steps: list[tuple[float, str, int, int]] = []
    for name, curve in curves.items():
        corners, steepest = curve.steps(), -np.inf
        for begin, end in itertools.pairwise(corners):
            gain = curve.seconds[begin] - curve.seconds[end]
            # Rounding must not bring the steps of a layer out of order.
            steepest = max(steepest, float(curve.losses[end] - curve.losses[begin]) / float(gain))
            steps.append((steepest, name, begin, end))

    allowed = allowed_seconds * (1 + _SLACK)
    total = _seconds(curves, taken)
    for _, name, begin, end in sorted(steps, key=lambda step: step[0]):
        if total <= allowed:
            break
        curve = curves[name]
        others = total - float(curve.seconds[begin])
        enough = [count for count in range(begin + 1, end + 1) if others + curve.seconds[count] <= allowed]
        # Of the counts that meet the budget the one with the least loss, the first of equal ones.
        taken[name] = min(enough, key=lambda count: curve.losses[count]) if enough else end
        total = others + float(curve.seconds[taken[name]])
    return taken, _seconds(curves, taken)


def _seconds(curves: Mapping[str, Curve], taken: Mapping[str, int]) -> float:
    return float(sum(curves[name].seconds[count] for name, count in taken.items()))
