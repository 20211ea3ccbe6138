"""Importance: a score for every piece of a model."""

from .scores import ImportanceScores
from .scoring import score

__all__ = ["ImportanceScores", "score"]
