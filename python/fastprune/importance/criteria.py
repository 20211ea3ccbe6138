"""The criteria, by name."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .activation_criteria import Activation, Wanda
from .calibration import Calibration
from .criterion import Criterion
from .gradient_criteria import Fisher, Gradient, GradientChange, Taylor
from .weight_criteria import Magnitude, Random


@dataclasses.dataclass(frozen=True)
class LossDelta(Criterion):
    """The exact change of the loss when a piece is masked, from the labels or from the model's predictions.

    Against labels a piece's delta is mostly of first order, ``-g.w``, of either sign and, for a trained model
    and a few samples, noise: what goes first is what happens to lower the loss of these samples. Against
    the probabilities that the unmasked model gives, it is their Kullback-Leibler divergence from those of
    the masked one: never negative, its first order is zero, no label is read, and it is what
    distillation then brings down. Use it to prune much with few samples (docs/results.md, "Fashion-MNIST").

    Example:
        >>> fp.score(model, loader, criterion=fp.criteria.LossDelta(targets="predictions"))

    Args:
        targets: "labels" of the loader, as the name "loss_delta" stands for, or "predictions".

    Raises:
        ValueError: ``targets`` is something else; or, in :func:`score`, a ``loss_fn`` other than
            cross-entropy goes with "predictions".

    """

    targets: str = "labels"

    def __post_init__(self) -> None:
        if self.targets not in ("labels", "predictions"):
            raise ValueError(f"LossDelta `targets` must be 'labels' or 'predictions', got {self.targets!r}")

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Raise TypeError: these deltas are no sums over one pass of the model."""
        raise TypeError("LossDelta is computed by fp.score itself: give it as `criterion`")


CRITERIA: dict[str, type[Criterion]] = {
    str(kind()): kind
    for kind in (Magnitude, Gradient, GradientChange, Taylor, Fisher, Activation, Wanda, Random)
}
"""Name to class of those beside the loss delta, as :func:`fastprune.score` takes them."""

__all__ = [
    "CRITERIA", "Activation", "Criterion", "Fisher", "Gradient", "GradientChange", "LossDelta", "Magnitude",
    "Random", "Taylor", "Wanda",
]  # fmt: skip
