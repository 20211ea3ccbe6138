"""What compress gives: the model, and the history of how it came about."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from torch import nn

from .files import finite, write_atomically
from .importance import ImportanceScores
from .masks import Masks
from .report.page import write_page


@dataclasses.dataclass
class CompressionResult:
    """What :func:`compress` gives; printing it shows the rounds.

    Attributes:
        model: the compressed copy.
        history: one dict per round that counts: ``round``; ``target_sparsity``, or ``target_flops`` and the
            like; ``sparsity`` and ``layers`` (layer name to sparsity), of the scored weights; ``accuracy``
            and ``loss`` on the validation loader; ``train_loss``; ``parameters``, ``bytes``, ``flops`` and
            ``latency_seconds`` of the round's model as it would be returned, ``dense_latency_seconds``
            of the model before, measured in turn with it; ``layer_latency``, layer name to what
            :func:`sparsify_` measured and chose; ``seconds`` that the round took.
        dense_accuracy: of the model before, on the same validation loader.
        probes: with ``target="auto"``, one dict per sparsity that was tried, in order: ``sparsity``,
            ``accuracy`` of the last round, and whether it ``holds``.
        dense: ``accuracy``, ``loss``, ``parameters``, ``bytes`` and ``flops`` of the model before.
        settings: the arguments, functions by name; with "auto" those of the run that is returned.
        environment: versions, instruction set, threads, and the batch sizes of the example inputs.
        scores: by which the last round that counts was pruned; None where no round counts, or where a resumed
            run could not read them, as pieces of your own kind have no file format.
        masks: that were selected from them.

    """

    model: nn.Module
    history: list[dict[str, Any]]
    dense_accuracy: float
    probes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    dense: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    scores: ImportanceScores | None = None
    masks: Masks | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, as JSON takes them: None where one is not finite.

        Example:
            >>> result.to_dict()["history"][-1]["sparsity"]
            0.75

        """
        names = ("dense_accuracy", "history", "probes", "dense", "settings", "environment")
        return {name: finite(getattr(self, name)) for name in names}

    def save_history(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a JSON file, atomically.

        Example:
            >>> result.save_history("history.json")

        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def report(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write one HTML page with all figures, charts, and maps of the scores and masks, atomically.

        The page needs nothing beside it, neither a network nor scripts. :func:`fastprune.report` writes it
        later, from the files of a run.

        Example:
            >>> result.report("report.html")

        Args:
            path: of the page, in a folder that exists.
            title: of the page.

        Raises:
            TypeError: ``path`` is no path, or ``title`` no string.
            ValueError: ``path`` is a folder, or in one that does not exist.

        """
        write_page(path, self.to_dict(), self.scores, self.masks, title)

    def __str__(self) -> str:
        lines = [
            f"{'round':>5} {'sparsity':>9} {'accuracy':>9} {'loss':>8} {'parameters':>12} {'bytes':>13} "
            f"{'FLOPs':>15} {'latency':>11} {'speed-up':>8} {'seconds':>8}",
            f"{'dense':>5} {'':>9} {self.dense_accuracy:>9.2%}",
        ]
        for entry in self.history:
            latency = entry["latency_seconds"]
            lines.append(
                f"{entry['round']:>5} {entry['sparsity']:>9.1%} {entry['accuracy']:>9.2%} "
                f"{entry['loss']:>8.4f} {entry['parameters']:>12,} {entry['bytes']:>13,} "
                f"{entry['flops']:>15,} {latency * 1e3:>8.3f} ms "
                f"{entry['dense_latency_seconds'] / latency:>7.2f}x {entry['seconds']:>8.1f}"
            )
        return "\n".join(lines)
