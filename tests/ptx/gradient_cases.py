"""What the tests of the weight gradients, of linear layers and of convolutions, share."""

from __future__ import annotations

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
# Half a unit in the last place: of each operand as the kernel multiplies it, and of the result.
OPERAND_ROUNDING = {"f32": 0.0, "tf32": 2.0**-11, "f16": 0.0, "bf16": 0.0}
RESULT_ROUNDING = {"f32": 0.0, "tf32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}


def convert(array: np.ndarray, kind: str) -> np.ndarray:
    """Round to a type; bfloat16 as its bits."""
    if kind == "bf16":
        bits = np.where(np.isnan(array), np.nan, array).astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return array.astype(np.float16 if kind == "f16" else np.float32)


def random_structure(
    rng: np.random.Generator, grid: tuple[int, int], density: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return crow_indices and col_indices, with an empty block row where some blocks are lost."""
    mask = rng.random(grid) < density
    if 0 < density < 1 and grid[0] > 1:
        mask[rng.integers(grid[0])] = False
    crow_indices = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    return crow_indices, np.argwhere(mask)[:, 1].astype(np.int32)
