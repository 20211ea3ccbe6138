"""Scores of different layers of a model as one, so that a selection ranks all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def joined_facts(
    criterion: str, first: Mapping[str, Any], second: Mapping[str, Any], layers: tuple[set[str], set[str]]
) -> dict[str, Any]:
    """Return the keyword arguments of ImportanceScores that hold the layers of two.

    Args:
        criterion: of the first.
        first: keyword arguments of the first, whose loss and samples count for both.
        second: those of the other.
        layers: the names of both.

    Raises:
        ValueError: they have a layer in common, or are of another criterion.

    """
    common = sorted(layers[0] & layers[1])
    if common:
        raise ValueError(f"`other` must be scores of other layers, got '{common[0]}' in both")
    if criterion != second["criterion"]:
        raise ValueError(f"`other` must be of criterion '{criterion}', got '{second['criterion']}'")
    facts = dict(first)
    for key in ("granularities", "weight_shapes", "pruned", "norms", "element_sizes", "weights"):
        facts[key] = {**first[key], **second[key]}
    for key in ("weight_uses", "means"):
        parts = (first[key], second[key])
        facts[key] = None if None in parts else {**parts[0], **parts[1]}
    facts["coupled"] = (*first["coupled"], *second["coupled"])
    return facts
