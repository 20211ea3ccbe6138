"""What the tests of the weight gradients, of linear layers and of convolutions, share."""

from __future__ import annotations

import numpy as np

from . import harness
from .harness_weight_gradient import op_of
from .mutants import Run, Runs, mutants_of, sample_of, unnoticed

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


# Mutants that compute the same, by what is done to which source line, and how many there are.
SEARCH = {
    ("bound + 1", "while (high - low > 1) {"): 1,  # one step more over one block row
    ("bound + 1", "if (tile.first_column >= tile.columns) return;"): 1,  # an empty tile stores nothing
    ("no guard", "if (tile.first_column >= tile.columns) return;"): 1,
}
# Kept columns end at a multiple of 16, which only the first column of a fragment can be.
BF16_COLUMNS = {("bound + 1", "if (column >= tile.columns) continue;"): 4}
TF32_COLUMNS = {("bound + 1", "if (column >= tile.columns) continue;"): 6}


def of_whole_chunks(kind: str, exists: str, matrices: int) -> dict[tuple[str, str], int]:
    """Return the mutants that compute the same where features come in whole chunks of 16 bytes.

    Columns but the first of a chunk, and the first of a block, are never the first of the padding, of which
    the source line ``exists`` asks. Nor is the second row of a pair, nor the first where the pair is the
    second of its chunk (tf32), or the first of the block (16 bits) unless its whole column is padding. How
    many elements of a chunk exist, of which both operands or one of them is a matrix, matters only in
    whether any do.
    """
    store = "store_pair(values + row, row < filled ? first : 0.0f, row + 1 < filled ? second : 0.0f);"
    columns, rows = {"bf16": (4, 16 + 4), "tf32": (6, 16 + 8)}[kind]
    elements = "elements = static_cast<int>(max(min(columns - column, int64_t{kElements}), int64_t{0}));"
    return {
        ("bound + 1", exists): columns,
        ("bound + 1", store): rows,
        ("tile - 1", elements): matrices,
        ("bound + 1", ""): 2,
    }


def unnoticed_mutants(
    kernel: str, runs: list[Run], equivalent: dict[tuple[str, str], int]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what is done where by the mutants that no run notices, and what is wrong with the kernel.

    ``equivalent`` says how many mutants compute the same, by what is done to which line of source.
    """
    chosen = mutants = mutants_of(op_of(kernel), kernel)
    if not harness.FULL_SWEEP:
        # The waits, the barriers, and some of each other kind.
        chosen = [mutant for mutant in mutants if mutant.kind in ("no barrier", "no wait")]
        chosen += [mutant for mutant in sample_of(mutants, 6, equivalent) if mutant not in chosen]
    notices = Runs(chosen, runs)
    known = [mutant for mutant, count in equivalent.items() for _ in range(count)]
    return unnoticed(chosen, notices, known), notices.faults
