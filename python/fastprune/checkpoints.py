"""The directory of a compression: finished rounds, and what has to be the same after a kill."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from .files import remove_stale_temporaries, write_atomically
from .granularity import ParameterTensor
from .importance import ImportanceScores
from .importance.scores_file import has_file_format
from .masks import Masks
from .serialization import load, save

_FILES = re.compile(r"state\.json|round_\d{3,}(_compressed|_scores)?\.safetensors")


def name_of(function: Any) -> str | None:
    """Return a name of a callable that a later process gives it too."""
    if function is None:
        return None
    return getattr(function, "__qualname__", type(function).__qualname__)


def describe(value: Any) -> Any:
    """Return an argument as JSON takes it, and as a later process gives it too."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, (set, frozenset)):  # whose order no other process has
        return sorted((describe(entry) for entry in value), key=str)
    return name_of(value) if callable(value) else repr(value)


def read_state(directory: Path) -> dict[str, Any]:
    """Return ``settings``, ``facts`` and ``history`` of a directory that :class:`Checkpoints` wrote.

    Raises:
        ValueError: the state is damaged.

    """
    path = directory / "state.json"
    try:
        state = json.loads(path.read_text())
        return {
            "settings": state["settings"],
            "facts": state.get("facts", {}),
            "history": state["history"],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`checkpoint_dir` holds a damaged {path.name}: {error}") from error


def counted_rounds(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rounds that count: all but a last one that was not accurate enough."""
    history, drop = state["history"], state["settings"].get("max_accuracy_drop")
    too_low = (
        history and drop is not None and state["facts"]["dense"]["accuracy"] - history[-1]["accuracy"] > drop
    )
    return history[:-1] if too_low else history


def read_masks(path: str | os.PathLike[str], scores: ImportanceScores) -> Masks:
    """Return the masks of a masked model that :func:`save` wrote, in the pieces of its scores.

    Raises:
        ValueError: the file is truncated, or of another model.

    """
    masks = {}
    try:
        with safe_open(path, framework="pt") as file:
            aliases = json.loads(file.metadata()["fastprune"])["aliases"]
            for name in scores:
                granularity = scores.granularities[name]
                module, _, parameter = (
                    name.rpartition(".") if type(granularity) is ParameterTensor else (name, "", "weight")
                )
                prefix = f"{module}." if module else ""
                key = f"{prefix}parametrizations.{parameter}.0.mask"
                mask = file.get_tensor(aliases.get(key, key))
                masks[name] = granularity.sum_pieces(mask.long()) > 0
        return Masks(masks, scores.granularity, scores.weight_shapes, scores.norms, scores.granularities)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"'{os.fspath(path)}' does not hold the masks of these scores: {error}") from error


class Checkpoints:
    """Finished rounds in a directory: two model files each, and one JSON file that commits them.

    ``state.json`` holds the arguments, what was measured once for the whole run, and the history.
    ``round_000.safetensors`` is the masked student, which training goes on from;
    ``round_000_compressed.safetensors`` what it becomes, to be loaded into the dense architecture;
    ``round_000_scores.safetensors`` the scores that it was pruned by, which are there before the round is.
    What a run that was killed within a write left half written is removed.

    Args:
        directory: None keeps everything in memory.
        settings: the arguments of the run, as :func:`describe` gives them.

    Attributes:
        facts: what is measured once, by name.
        history: one dict per finished round.

    Raises:
        ValueError: the directory holds a run with other arguments, or a damaged state.

    """

    def __init__(self, directory: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.directory = None if directory is None else Path(directory)
        self.settings = dict(settings)
        self.facts: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._read(self.directory / "state.json")
            remove_stale_temporaries(self.directory, _FILES)

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        state = read_state(path.parent)
        settings, self.facts, self.history = state["settings"], state["facts"], state["history"]
        # What JSON makes of the arguments: tuples become lists.
        own = json.loads(json.dumps(self.settings))
        if settings != own:
            keys = {*own, *settings}
            different = sorted(key for key in keys if settings.get(key) != own.get(key))
            raise ValueError(
                f"`checkpoint_dir` holds a run with other arguments ({', '.join(different)}); "
                "pass an empty directory or the same arguments"
            )

    def _path(self, round_index: int, part: str = "") -> Path:
        assert self.directory is not None
        return self.directory / f"round_{round_index:03d}{part}.safetensors"

    def _write(self) -> None:
        if self.directory is not None:
            state = {"settings": self.settings, "facts": self.facts, "history": self.history}
            text = json.dumps(state, indent=1)
            write_atomically(self.directory / "state.json", lambda path: path.write_text(text))

    def record(self, name: str, fact: Any) -> None:
        """Keep what was measured once for the whole run."""
        self.facts[name] = fact
        self._write()

    def load_student(self, round_index: int, fresh: nn.Module) -> nn.Module:
        """Return the masked student as it was after a round."""
        return load(self._path(round_index), fresh)

    def load_compressed(self, round_index: int, fresh: nn.Module) -> nn.Module:
        """Return what the student of a round became."""
        return load(self._path(round_index, "_compressed"), fresh)

    def load_scores(self, round_index: int) -> ImportanceScores | None:
        """Return the scores of a round that was stopped after them."""
        if self.directory is None or not self._path(round_index, "_scores").exists():
            return None
        return ImportanceScores.load(self._path(round_index, "_scores"))

    def load_masks(self, round_index: int, scores: ImportanceScores) -> Masks:
        """Return the masks of a finished round, which were selected from these scores."""
        return read_masks(self._path(round_index), scores)

    def save_scores(self, round_index: int, scores: ImportanceScores) -> None:
        """Keep the scores of a round; those of a granularity of the user's own have no file format."""
        own = (scores.granularity, *scores.granularities.values())
        if self.directory is not None and all(map(has_file_format, own)):
            scores.save(self._path(round_index, "_scores"))

    def commit(self, student: nn.Module, compressed: nn.Module, entry: dict[str, Any]) -> None:
        """Write a round; it counts once the JSON file names it."""
        if self.directory is not None:
            save(student, self._path(len(self.history)))
            save(compressed, self._path(len(self.history), "_compressed"))
        self.history.append(entry)
        self._write()
