"""Importance: a score for every piece of a model."""

from . import criteria
from .calibration import Calibration, Part
from .scores import ImportanceScores
from .scoring import check_criterion, score

__all__ = ["Calibration", "ImportanceScores", "Part", "check_criterion", "criteria", "score"]
