"""Criteria beside the exact loss delta, by name."""

from __future__ import annotations

from .criterion import Criterion
from .weight_criteria import Magnitude, Random

CRITERIA: dict[str, type[Criterion]] = {str(kind()): kind for kind in (Magnitude, Random)}
"""Name to class, as :func:`fastprune.score` takes them."""

__all__ = ["CRITERIA", "Criterion", "Magnitude", "Random"]
