"""Problems, pieces and tolerances that the PTX tests of the loss-delta kernels share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import harness

SCHEDULES = harness.SCHEDULES


def describe(case: Any) -> str:
    """Return the fields of a dataclass that differ from their defaults, as the name of a test."""
    unusual = (f for f in fields(case) if getattr(case, f.name) != f.default)
    return "-".join(f"{f.name}={getattr(case, f.name)}" for f in unusual) or "usual"


def generator(case: Any) -> np.random.Generator:
    return np.random.default_rng([*map(ord, repr(case))])


def with_gaps(matrix: np.ndarray, row_gap: int) -> np.ndarray:
    """Return the matrix with ``row_gap`` elements between its rows, NaN, which must not be read."""
    memory = np.full((len(matrix), matrix.shape[1] + row_gap), np.nan, np.float32)
    memory[:, : matrix.shape[1]] = matrix
    return memory[:, : matrix.shape[1]]


def pieces_of(kind: str, rows: int, cols: int) -> np.ndarray:
    """Return rectangles of a weight of rows x cols."""
    half_rows, half_cols = -(-rows // 2), -(-cols // 2)
    found = {
        "columns": [[0, rows, j, j + 1] for j in range(cols)],
        "rows": [[i, i + 1, 0, cols] for i in range(rows)],
        "whole": [[0, rows, 0, cols]],
        "none": [],
        "empty": [[0, 0, 0, cols], [0, rows, cols, cols], [rows, rows, 0, cols], [0, rows, 0, 1]],
        "corners": [
            [0, half_rows, 0, half_cols],
            [rows - half_rows, rows, cols - half_cols, cols],
            [rows - 1, rows, 0, 1],
            [0, 1, cols - 1, cols],
            [rows // 3, rows, cols // 3, cols],
        ],
    }[kind]
    return np.array(found, np.int32).reshape(-1, 4)


def make_targets(kind: str, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return labels: at random, what the network says ("right"), or what it thinks least likely."""
    return {
        "random": rng.integers(0, logits.shape[1], len(logits)),
        "right": logits.argmax(1),
        "wrong": logits.argmin(1),
        "first": np.zeros(len(logits), np.int64),
    }[kind]


def make_sample_weight(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray | None:
    """Return None for "none", else weights of which a third are 0; all for "zero"."""
    if kind == "none":
        return None
    weight = rng.random(samples).astype(np.float32)
    weight[:: 3 if kind == "some" else 1] = 0
    return weight


def wanted_deltas(twin: Callable[..., torch.Tensor], arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference twin's deltas in float64, and a tenth of the error that the design allows."""
    logits, sample_weight = arguments["logits"], arguments["sample_weight"]
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    wanted = twin(**tensors).numpy()
    losses = F.cross_entropy(tensors["logits"].double(), tensors["targets"], reduction="none").numpy()
    loss = losses.sum() if sample_weight is None else (losses * sample_weight)[sample_weight != 0].sum()
    # float64's own rounding of the logits is all there is where the loss is 1e-12.
    rounding = 4e-15 * len(logits) * max(1.0, float(np.abs(logits[np.isfinite(logits)]).max(initial=0)))
    return wanted, 1e-5 * np.abs(wanted) + 1e-7 * loss + rounding


def wrong_deltas(deltas: np.ndarray, wanted: np.ndarray, tolerance: np.ndarray) -> list[str]:
    """Compare with ``wanted_deltas``."""
    agrees = np.abs(deltas - wanted) <= tolerance
    wrong = np.flatnonzero(~np.where(np.isfinite(wanted), agrees, ~np.isfinite(deltas)))
    return [f"{len(wrong)} wrong deltas, the first {wrong[0]}: {deltas[wrong[0]]}"] if len(wrong) else []
