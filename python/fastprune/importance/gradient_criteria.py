"""Criteria of the loss gradient: gradient, taylor, fisher, gradient_change."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..batches import Batch
from ..granularity import Granularity, Layer, ParameterTensor
from .calibration import Calibration
from .criterion import Criterion, Merging
from .sample_gradients import SampleGradients


def _mean_gradients(calibration: Calibration) -> dict[str, list[Tensor]]:
    """The gradient of the mean loss for each part of each layer, in float64."""
    sums = {
        name: [torch.zeros_like(part.tensor, dtype=torch.float64, requires_grad=False) for part in parts]
        for name, parts in ((name, calibration.parts(name)) for name in calibration.layers)
    }
    for batch in calibration.batches():
        gradients, _ = calibration.gradients(batch)
        for name, layer in gradients.items():
            for total, gradient in zip(sums[name], layer, strict=True):
                total += gradient
    weight = calibration.check_weight()
    return {name: [total / weight for total in layer] for name, layer in sums.items()}


@dataclasses.dataclass(frozen=True)
class Gradient(Criterion):
    """The L2 norm of the mean loss's gradient with respect to each piece: ``(sum (dL/dw)^2)^(1/2)``.

    The gradient counts for the weights of a piece, and for units the bias and the batch norm's channel;
    that of a masked weight is zero. One forward and backward for each batch. Scores of shards cannot be
    merged: the norm of a mean is not made of the norms of its parts.

    Example:
        >>> fp.score(model, loader, criterion="gradient", granularity=fp.Unit())

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", section 3, where the
    magnitude of a weight's gradient tells which connections to grow; its norm for larger pieces.

    """

    def join(self, means: Tensor) -> Tensor:
        """Return the norm over all layers."""
        return torch.linalg.vector_norm(means, dim=0)

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the norms."""
        norms = {}
        for name, gradients in _mean_gradients(calibration).items():
            parts = zip(calibration.parts(name), gradients, strict=True)
            squares = [part.sum(gradient.square()) for part, gradient in parts]
            norms[name] = torch.stack(squares).sum(0).sqrt() if squares else calibration.zeros()[name]
        return norms


@dataclasses.dataclass(frozen=True)
class Taylor(Criterion):
    """The first-order estimate of what the loss changes when a piece becomes zero: ``|sum w dL/dw|``.

    The sum is over the weights of a piece, for units also the bias and the batch norm's channel, for whole
    layers all parameters. One forward and backward for each batch; ``per_sample`` needs the gradients of
    each sample, and takes the absolute value before the mean over samples, so that changes of opposite
    sign do not cancel.

    Example:
        >>> fp.score(model, loader, criterion="taylor", granularity=fp.Unit())
        >>> fp.score(model, loader, criterion=fp.criteria.Taylor(per_sample=True))

    Args:
        per_sample: whether the absolute value is that of each sample's estimate.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8, whose
    square root this is; ``per_sample`` as in Molchanov et al. 2017, "Pruning Convolutional Neural Networks
    for Resource Efficient Inference", section 2.2, there for activations.

    """

    per_sample: bool = False

    def merging(self, granularity: Granularity) -> Merging:
        """Return "absolute mean": the signed estimates are kept; or "mean" for ``per_sample``."""
        return "mean" if self.per_sample else "absolute mean"

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the mean of ``sum w dL/dw``, signed, or of its absolute value for each sample."""
        sums = calibration.zeros()
        if self.per_sample:
            self._add_samples(calibration, sums)
            return calibration.mean(sums)
        for batch in calibration.batches():
            gradients, _ = calibration.gradients(batch)
            for name, layer in gradients.items():
                for part, gradient in zip(calibration.parts(name), layer, strict=True):
                    sums[name] += part.sum(part.tensor.detach().double() * gradient.double())
        return calibration.mean(sums)

    def _add_samples(self, calibration: Calibration, sums: dict[str, Tensor]) -> None:
        engine = SampleGradients(calibration)
        for batch in calibration.batches():
            estimates = {name: layer.new_zeros(batch.size, *layer.shape) for name, layer in sums.items()}
            for name, index, begin, gradients in engine.of(batch):
                part = calibration.parts(name)[index]
                weight = part.tensor.detach().double()
                for offset, gradient in enumerate(gradients):
                    estimates[name][begin + offset] += part.sum(weight * gradient)
            for name, layer in estimates.items():
                sums[name] += layer.abs().sum(0)


@dataclasses.dataclass(frozen=True)
class Fisher(Criterion):
    """The second-order estimate of what the loss changes when a piece becomes zero: ``1/2 sum F w^2``.

    ``F`` is the diagonal of the empirical Fisher information, which stands in for the Hessian: the squares
    of each sample's gradient, summed over samples and divided by the weight of the loss, the number of
    samples for a plain loss. Pieces are as in :class:`Taylor`.

    Per-sample gradients of Linear and Conv2d layers and their batch norms come from one forward and backward
    of a batch, those of other modules from one of each sample.

    Example:
        >>> fp.score(model, loader, criterion="fisher", granularity=fp.Block(16, 16))

    Source: LeCun et al. 1990, "Optimal Brain Damage", section 2, with the Fisher information for the
    diagonal Hessian as in Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher
    pruning".

    """

    def merging(self, granularity: Granularity) -> Merging:
        """Return "mean"."""
        return "mean"

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the scores."""
        sums = calibration.zeros()
        engine = SampleGradients(calibration)
        for batch in calibration.batches():
            for name, index, squares in engine.squares(batch):
                part = calibration.parts(name)[index]
                sums[name] += part.sum(0.5 * part.tensor.detach().double().square() * squares)
        return calibration.mean(sums)


@dataclasses.dataclass(frozen=True)
class GradientChange(Criterion):
    """The L2 norm of the change of the mean loss's gradient when a piece is masked.

    The gradient is that of all scored parameters of the model; masked weights have none. Exact and slow:
    one forward and backward of all batches for each piece. The batches are kept in memory meanwhile. Scores
    of shards cannot be merged: the norm of a mean is not made of the norms of its parts.

    Example:
        >>> fp.score(model, loader, criterion="gradient_change", granularity=fp.Unit(), max_samples=256)

    Source: the exact form of what Wang et al. 2020, "Picking winning tickets before training by preserving
    gradient flow", section 4, estimate to first order by a Hessian-gradient product.

    """

    refuses: ClassVar[tuple[type[Granularity], ...]] = (Layer,)

    def check_granularity(self, granularity: Granularity) -> None:
        """Raise ValueError for whole layers, which masks replace by their input."""
        if not isinstance(granularity, ParameterTensor):
            super().check_granularity(granularity)

    def join(self, means: Tensor) -> Tensor:
        """Return what the first layer was given: units of all layers were masked together."""
        return means[0]

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the norms."""
        batches = list(calibration.batches())
        original = _flat_gradient(calibration, batches)
        loss, weight = calibration.loss_sum, calibration.check_weight()
        norms = calibration.zeros()
        others = {first: rest for first, *rest in calibration.coupled}
        followers = {name for rest in others.values() for name in rest}
        pieces = [
            (name, index)
            for name, layer in norms.items()
            for index in range(layer.numel())
            if name not in followers
        ]
        for name, index in calibration.progress(pieces, "piece"):
            keep = torch.ones(norms[name].shape, dtype=torch.bool, device=norms[name].device)
            keep.view(-1)[index] = False
            with contextlib.ExitStack() as masks:
                for member in (name, *others.get(name, ())):
                    masks.enter_context(calibration.masked(member, keep))
                changed = _flat_gradient(calibration, batches)
            norms[name].view(-1)[index] = (changed - original).norm() / weight
        calibration.loss_sum, calibration.total_weight = loss, weight
        return norms


def _flat_gradient(calibration: Calibration, batches: list[Batch]) -> Tensor:
    """The gradient of the summed loss over all batches as one vector, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        gradients, _ = calibration.gradients(batch)
        vector = torch.cat([part.double().flatten() for layer in gradients.values() for part in layer])
        total = total.to(vector.device) + vector
    return total
