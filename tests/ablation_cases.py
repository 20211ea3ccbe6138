"""Problems, pieces and tolerances that the tests of the ablation ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_double(problem: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in float64, but for the integers."""
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in problem]


def column_pieces(rows: int, cols: int) -> Tensor:
    """Every column of a weight of rows x cols."""
    return torch.tensor([[0, rows, j, j + 1] for j in range(cols)], dtype=torch.int32)


def block_pieces(weight_rows: int, weight_cols: int, rows: int, cols: int) -> Tensor:
    """Blocks of rows x cols that cover a weight, row-major."""
    return torch.tensor(
        [
            [row, min(row + rows, weight_rows), col, min(col + cols, weight_cols)]
            for row in range(0, weight_rows, rows)
            for col in range(0, weight_cols, cols)
        ],
        dtype=torch.int32,
    )


def assert_exact(deltas: Tensor, wanted: Tensor, logits: Tensor, targets: Tensor) -> None:
    """Compare sums of deltas with those of the reference in float64."""
    loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    # A tenth of what the design allows for the whole of score().
    tolerance = 1e-5 * wanted.abs() + 1e-7 * loss
    assert deltas.dtype == torch.float64
    assert bool(((deltas - wanted).abs() <= tolerance).all()), ((deltas - wanted).abs() / tolerance).max()
