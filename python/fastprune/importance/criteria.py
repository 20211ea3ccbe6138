"""Criteria beside the exact loss delta, by name, and the options of that."""

from __future__ import annotations

from .activation_criteria import Activation, Wanda
from .criterion import Criterion, LossDelta
from .gradient_criteria import Fisher, Gradient, GradientChange, Taylor
from .weight_criteria import Magnitude, Random

CRITERIA: dict[str, type[Criterion]] = {
    str(kind()): kind
    for kind in (Magnitude, Gradient, GradientChange, Taylor, Fisher, Activation, Wanda, Random)
}
"""Name to class, as :func:`fastprune.score` takes them."""

__all__ = [
    "CRITERIA", "Activation", "Criterion", "Fisher", "Gradient", "GradientChange", "LossDelta", "Magnitude",
    "Random", "Taylor", "Wanda",
]  # fmt: skip
