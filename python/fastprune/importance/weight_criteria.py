"""Criteria that read no data."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ..granularity import Granularity, is_scorable
from .calibration import Calibration, Part
from .criterion import Criterion, Merging


@dataclasses.dataclass(frozen=True)
class Magnitude(Criterion):
    """The norm of each piece's weights: ``(sum |w|^p)^(1/p)``.

    The bias and the batch norm of a unit do not count; all parameters of a module that is no Linear or
    Conv2d do.

    Example:
        >>> fp.score(model, None, criterion=fp.criteria.Magnitude(p=1), granularity=fp.Unit())

    Args:
        p: 1, 2 or ``math.inf`` (the largest ``|w|``).

    Raises:
        ValueError: ``p`` is something else.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks", section
    3, for single weights; Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1, for the L1
    norm of filters.

    """

    p: float = 2
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or self.p not in (1, 2, math.inf):
            raise ValueError(f"Magnitude `p` must be 1, 2 or math.inf, got {self.p!r}")

    def merging(self, granularity: Granularity) -> Merging:
        """Return "same": the data plays no part."""
        return "same"

    def join(self, means: Tensor) -> Tensor:
        """Return the norm over all layers."""
        return torch.linalg.vector_norm(means, self.p, dim=0)

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the norms."""
        return {name: self._norm(calibration, name) for name in calibration.layers}

    def _norm(self, calibration: Calibration, name: str) -> Tensor:
        parts = calibration.parts(name)
        if is_scorable(calibration.layers[name]):
            parts = parts[:1]
        norm = torch.zeros(calibration.pieces(name), dtype=torch.float64)
        for part in parts:
            weight = part.tensor.detach().double().abs()
            if self.p == math.inf:
                norm = torch.maximum(norm, _largest(part, weight, norm.shape).cpu())
            else:
                norm = norm + part.sum(weight**self.p).cpu()
        return norm.sqrt() if self.p == 2 else norm


def _largest(part: Part, weight: Tensor, pieces: torch.Size) -> Tensor:
    indices = torch.arange(pieces.numel(), device=weight.device).view(pieces)
    piece_of = part.expand(indices).flatten()
    largest = weight.new_zeros(pieces.numel())
    return largest.scatter_reduce_(0, piece_of, weight.flatten(), "amax").view(pieces)


@dataclasses.dataclass(frozen=True)
class Random(Criterion):
    """Uniform random numbers in [0, 1), the same for the same seed and layers: what others must beat.

    Example:
        >>> fp.score(model, None, criterion=fp.criteria.Random(seed=3))

    Args:
        seed: of the generator, an integer.

    Raises:
        ValueError: ``seed`` is no integer.

    """

    seed: int = 0
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"Random `seed` must be an integer, got {self.seed!r}")

    def merging(self, granularity: Granularity) -> Merging:
        """Return "same": the data plays no part."""
        return "same"

    def join(self, means: Tensor) -> Tensor:
        """Return the numbers of the first layer: a sum would no longer be uniform."""
        return means[0]

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the random numbers, drawn layer by layer."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: torch.rand(calibration.pieces(name), dtype=torch.float64, generator=generator)
            for name in calibration.layers
        }
