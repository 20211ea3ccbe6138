"""Importance: a score for every piece of a model."""

from . import criteria
from .calibration import Calibration, Part
from .floors import Floor, floors_by_layer
from .scores import ImportanceScores
from .scoring import check_criterion, needs_data, score
from .thresholds import Threshold

__all__ = [
    "Calibration",
    "Floor",
    "ImportanceScores",
    "Part",
    "Threshold",
    "check_criterion",
    "criteria",
    "floors_by_layer",
    "needs_data",
    "score",
]
