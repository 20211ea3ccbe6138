"""What compress gives: the model, and the history of how it came about."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from .files import write_atomically


@dataclasses.dataclass
class CompressionResult:
    """What :func:`compress` gives; printing it shows the rounds.

    Attributes:
        model: the compressed copy.
        history: one dict per round that counts: ``round``; ``target_sparsity``, or ``target_flops`` and the
            like; ``sparsity`` and ``layers`` (layer name to sparsity), of the scored weights; ``accuracy``
            and ``loss`` on the validation loader; ``train_loss``; ``parameters``, ``bytes``, ``flops`` and
            ``latency_seconds`` of the round's model as it would be returned, ``dense_latency_seconds``
            of the model before, measured in turn with it; ``seconds`` that the round took.
        dense_accuracy: of the model before, on the same validation loader.
        probes: with ``target="auto"``, one dict per sparsity that was tried, in order: ``sparsity``,
            ``accuracy`` of the last round, and whether it ``holds``.

    """

    model: nn.Module
    history: list[dict[str, Any]]
    dense_accuracy: float
    probes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model, as JSON takes it: None where a figure is not finite.

        Example:
            >>> result.to_dict()["history"][-1]["sparsity"]
            0.75

        """
        figures = {"dense_accuracy": self.dense_accuracy, "history": self.history, "probes": self.probes}
        return {key: _finite(value) for key, value in figures.items()}

    def save_history(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a JSON file, atomically.

        Example:
            >>> result.save_history("history.json")

        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_atomically(path, lambda temporary: temporary.write_text(text))

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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
