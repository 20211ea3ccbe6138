"""What a criterion is: a callable from a Calibration to scores."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..granularity import Granularity
from .calibration import Calibration

Merging = Literal["mean", "absolute mean", "root mean", "max", "same", "never"]
ScoreFunction = Callable[[Calibration], Mapping[str, Tensor]]

_FINISH: dict[str, Callable[[Tensor], Tensor]] = {"absolute mean": torch.abs, "root mean": torch.sqrt}


def finish(merging: Merging, means: Tensor) -> Tensor:
    """Return the scores that means stand for: their absolute value, their root, or the means themselves."""
    return _FINISH[merging](means) if merging in _FINISH else means


@dataclasses.dataclass(frozen=True)
class Named:
    """Options whose string is the name that scores carry."""

    def __str__(self) -> str:
        """Return the name, with the options that are not at their defaults."""
        options = ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")
        return f"{name}({options})" if options else name


@dataclasses.dataclass(frozen=True)
class LossDelta(Named):
    """The exact change of the loss when a piece is masked, which :func:`fastprune.score` computes itself.

    With ``targets="labels"`` it is ``loss(masked) - loss(original)``, of either sign. With "predictions" the
    cross-entropy is taken against the model's own probabilities ``p``, so that the change is the divergence
    ``KL(p || p_masked)``: never below zero, and without the first-order term, which for a small piece is
    most of the other and has either sign. Labels then count for ``ignore_index`` and ``scores.loss`` alone,
    class weights and label smoothing for nothing.

    Example:
        >>> fp.score(model, loader, criterion=fp.criteria.LossDelta(targets="predictions"))

    Args:
        targets: what the cross-entropy compares with, "labels" or "predictions".

    Raises:
        ValueError: ``targets`` is neither; or, in :func:`score`, ``loss_fn`` is no cross-entropy.

    Source: the loss that distillation recovers, Hinton et al. 2015, "Distilling the Knowledge in a Neural
    Network", section 2, at temperature 1. To second order in the logits it is ``1/2 d^T (diag(p) - p p^T) d``
    with their change ``d``, the Fisher information of the model's own distribution as in Martens 2020, "New
    Insights and Perspectives on the Natural Gradient Method".

    """

    targets: Literal["labels", "predictions"] = "labels"

    def __post_init__(self) -> None:
        """Check the option."""
        if self.targets not in ("labels", "predictions"):
            raise ValueError(f"`targets` must be 'labels' or 'predictions', got {self.targets!r}")


UserCriterion = ScoreFunction | LossDelta


@dataclasses.dataclass(frozen=True)
class Criterion(Named, abc.ABC):
    """A criterion with options: a frozen dataclass that is called with a :class:`Calibration`.

    ``means`` gives what is averaged over the data, and ``merging`` says what scores are made of it, so that
    scores of two shards can be merged:

    - "mean": the score is the mean itself
    - "absolute mean", "root mean": its absolute value, or its square root
    - "max": a largest value, not a mean
    - "same": the data plays no part
    - "never": a score of the whole data that cannot be made of those of its parts

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size(fp.criteria.Criterion):
        ...     needs_data = False
        ...     def means(self, calibration):
        ...         return {n: calibration.granularities[n].sizes(l.weight.shape).double()
        ...                 for n, l in calibration.layers.items()}
        >>> fp.score(model, None, criterion=Size())

    """

    needs_data: ClassVar[bool] = True
    needs_trace: ClassVar[bool] = False
    refuses: ClassVar[tuple[type[Granularity], ...]] = ()

    @abc.abstractmethod
    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return one float64 tensor per layer, in the granularity's shape."""

    def merging(self, granularity: Granularity) -> Merging:
        """Return how scores of two shards become those of both."""
        return "never"

    def join(self, means: Tensor) -> Tensor:
        """Return the means of units that are masked together, from those of each layer, ``[layers, units]``.

        Their sum here, since most criteria sum over the weights of a piece.
        """
        return means.sum(0)

    def check_granularity(self, granularity: Granularity) -> None:
        """Raise ValueError for pieces that the criterion has no score for."""
        if isinstance(granularity, self.refuses):
            raise ValueError(f"criterion '{self}' has no score for `granularity` {granularity}")

    def __call__(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the scores."""
        means = self.means(calibration)
        return {
            name: finish(self.merging(calibration.granularities[name]), layer)
            for name, layer in means.items()
        }


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a criterion found, and what merging with another shard needs."""

    scores: Mapping[str, Tensor]
    merging: Merging = "never"
    means: Mapping[str, Tensor] | None = None
    weights: Mapping[str, float] | None = None
    loss: float | None = None
    num_samples: int = 0


def name_of(criterion: object) -> str:
    """Return the name of a criterion as scores carry it."""
    if isinstance(criterion, Named):
        return str(criterion)
    return getattr(criterion, "__name__", type(criterion).__name__)


def evaluate(criterion: ScoreFunction, calibration: Calibration) -> Findings:
    """Ask a criterion for its scores and check them.

    Raises:
        TypeError: it gives no dict of tensors; the message names the criterion.
        ValueError: names or shapes are not those of the layers, or scores are NaN or inf.

    """
    name = name_of(criterion)
    if not isinstance(criterion, Criterion):
        scores = _checked(name, criterion(calibration), calibration)
        scores = _joined(scores, calibration, lambda layers: layers.sum(0))
        return Findings(scores, num_samples=calibration.num_samples, loss=_mean_loss(calibration))
    means = _joined(_checked(name, criterion.means(calibration), calibration), calibration, criterion.join)
    merging = criterion.merging(next(iter(calibration.granularities.values())))
    scores = {layer: finish(merging, values) for layer, values in means.items()}
    weights = [{calibration.weights.get(member) for member in group} for group in calibration.coupled]
    if any(len(over) > 1 for over in weights):
        merging = "never"  # what is joined is not over the same samples or activations
    return Findings(
        scores,
        merging=merging,
        means=means if merging in _FINISH else None,
        weights=calibration.weights,
        loss=_mean_loss(calibration),
        num_samples=calibration.num_samples,
    )


def _joined(
    means: dict[str, Tensor], calibration: Calibration, join: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The means of layers whose units are one piece, joined, for each of them."""
    for group in calibration.coupled:
        joint = join(torch.stack([means[name] for name in group]))
        means |= {name: joint.clone() for name in group}
    return means


def _mean_loss(calibration: Calibration) -> float | None:
    return calibration.loss_sum / calibration.total_weight if calibration.total_weight else None


def _checked(name: str, found: object, calibration: Calibration) -> dict[str, Tensor]:
    """Scores by layer, in the model's order, as float64 on the CPU."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"`criterion` {name} must return a dict of tensors by layer, got a {type(found).__name__}"
        )
    missing = [layer for layer in calibration.layers if layer not in found]
    unexpected = [layer for layer in found if layer not in calibration.layers]
    if missing or unexpected:
        raise ValueError(
            f"`criterion` {name} must return scores for each of {list(calibration.layers)[:5]}, "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    scores = {}
    for layer in calibration.layers:
        values, shape = found[layer], calibration.pieces(layer)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"`criterion` {name} must return tensors, got a {type(values).__name__} for layer '{layer}'"
            )
        if values.shape != shape or values.is_complex():
            raise ValueError(
                f"`criterion` {name} must return real scores of shape {list(shape)} for layer '{layer}', "
                f"got {values.dtype} of shape {list(values.shape)}"
            )
        scores[layer] = values.detach().double().cpu().clone()
    return scores
