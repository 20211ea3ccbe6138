"""What a finished compression left in its folder, read back for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import counted_rounds, read_masks, read_state
from ..files import finite
from ..importance import ImportanceScores
from ..masks import Masks

Saved = tuple[dict[str, Any], ImportanceScores | None, Masks | None]


def read_saved(folder: Path, checkpoint_dir: Path | None = None) -> Saved:
    """Return the figures, and the scores and masks of the last round, that a compression left.

    Args:
        folder: with ``history.json``, a checkpoint directory, or both: ``checkpoints`` in it, or itself.
        checkpoint_dir: where the checkpoints are, if elsewhere; of a search, the directory of all its runs.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: a file is damaged, or the checkpoints are those of another run.

    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must be one that a compression wrote, got '{folder}'")
    history_path = folder / "history.json"
    figures = _read_history(history_path) if history_path.is_file() else None
    places = [checkpoint_dir] if checkpoint_dir is not None else [folder, folder / "checkpoints"]
    directories = [place for place in places if place.is_dir()]
    # The runs of a search stand side by side.
    directories += [path for place in directories for path in sorted(place.glob("sparsity_*"))]
    states = {path: read_state(path) for path in directories if (path / "state.json").is_file()}
    if figures is None:
        if len(states) != 1:
            raise FileNotFoundError(
                f"`folder` must hold history.json or the checkpoints of one run, '{folder}' has "
                f"{len(states) or 'none'}"
            )
        directory, state = next(iter(states.items()))
        return _figures_of(state), *_pieces(directory, state)
    for directory, state in states.items():
        if finite(counted_rounds(state)) == figures["history"]:
            return {**finite(_figures_of(state)), **figures}, *_pieces(directory, state)
    if checkpoint_dir is not None:
        raise ValueError(
            f"`checkpoint_dir` must hold the run of '{history_path}', '{checkpoint_dir}' does not"
        )
    return figures, None, None


def _read_history(path: Path) -> dict[str, Any]:
    try:
        figures = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is no history of a compression: {error}") from error
    whole = isinstance(figures, dict) and isinstance(figures.get("history"), list)
    if not whole or "dense_accuracy" not in figures:
        raise ValueError(f"'{path}' is no history of a compression: it has no history and dense_accuracy")
    for entry in figures["history"]:
        if not isinstance(entry, dict) or not {"round", "sparsity", "layers"} <= entry.keys():
            raise ValueError(f"'{path}' is no history of a compression: a round without sparsity and layers")
    return figures


def _figures_of(state: Mapping[str, Any]) -> dict[str, Any]:
    dense = state["facts"].get("dense", {})
    return {
        "dense_accuracy": dense.get("accuracy"),
        "history": counted_rounds(state),
        "probes": [],
        "dense": dense,
        "settings": state["settings"],
        "environment": state["facts"].get("environment", {}),
    }


def _pieces(directory: Path, state: Mapping[str, Any]) -> tuple[ImportanceScores | None, Masks | None]:
    index = len(counted_rounds(state)) - 1
    path = directory / f"round_{index:03d}_scores.safetensors"
    if index < 0 or not path.is_file():
        return None, None
    scores = ImportanceScores.load(path)
    return scores, read_masks(directory / f"round_{index:03d}.safetensors", scores)
