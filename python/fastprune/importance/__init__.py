"""Importance: a score for every piece of a model."""

from .scores import ImportanceScores
from .scoring import check_criterion, score

__all__ = ["ImportanceScores", "check_criterion", "score"]
