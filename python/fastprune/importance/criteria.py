"""Criteria that need no masked forward."""

from __future__ import annotations

from torch import Tensor

from ..granularity import Granularity


def magnitude(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return the L2 norm of each piece of a weight, in float64.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks",
    section 3, for single weights; the norm of a group as in Li et al. 2017, "Pruning filters for
    efficient ConvNets", which takes L1.
    """
    return granularity.sum_pieces(weight.detach().double().square()).sqrt()
