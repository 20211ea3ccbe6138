"""Importance: a score for every piece of a model."""

from . import criteria
from .calibration import Calibration, Part
from .floors import Floor
from .scores import ImportanceScores
from .scoring import check_criterion, score
from .thresholds import Threshold

__all__ = [
    "Calibration",
    "Floor",
    "ImportanceScores",
    "Part",
    "Threshold",
    "check_criterion",
    "criteria",
    "score",
]
