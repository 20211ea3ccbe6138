"""The PTX of transposed_structure.cu, run in the simulator."""

import functools

import numpy as np
import pytest

from . import harness
from . import harness_block_sparse_linear as linear
from .block_sparse_linear_cases import SCHEDULES, transposed
from .mutants import Runs, mutants_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)


def structure(block_rows: int, block_cols: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    mask = np.random.default_rng([block_rows, block_cols]).random((block_rows, block_cols)) < density
    crow = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    return crow, np.argwhere(mask)[:, 1].astype(np.int32)


def wrong(block_rows: int, block_cols: int, density: float, **options) -> list[str]:
    crow, col = structure(block_rows, block_cols, density)
    found, findings = linear.transposed_structure(crow, col, block_cols, **options)
    return findings + [
        f"wrong {name}"
        for name, ours, other in zip(
            ("offsets", "sources", "blocks"), found, transposed(crow, col, block_cols), strict=True
        )
        if not np.array_equal(ours, other)
    ]


# The kernel takes 256 block rows at a time, in warps of 32.
@pytest.mark.parametrize("block_rows", [0, 1, 31, 32, 33, 255, 256, 257, 513])
@pytest.mark.parametrize(("block_cols", "density"), [(1, 0.5), (5, 0.3), (9, 1.0), (3, 0.0)])
def test_clean_and_right_on_every_schedule(block_rows, block_cols, density):
    for order, seed in SCHEDULES:
        assert wrong(block_rows, block_cols, density, order=order, seed=seed) == []
    if harness.FULL_SWEEP:
        assert wrong(block_rows, block_cols, density, arch="compute_90") == []


def test_no_block_columns():
    assert wrong(3, 0, 0.5) == []


# Mutants that compute the same, by what is done to which source line; each stands for one.
EQUIVALENT = {
    ("no guard", "if (lane == 0) warp_counts[warp] = before;"): "all lanes have the same sum",
    ("no guard", "if (thread == 0) args.offsets[column] = next;"): "all threads have the same sum",
    ("no guard", "if (blockIdx.x + 1 == gridDim.x) return;"): "no block has the column past the last one",
    ("no guard", "if (lane == 0) warp_counts[warp] = __popc(kept_lanes);"): "all lanes have the same count",
    (
        "bound + 1",
        "for (int64_t first = 0; first < args.block_rows; first += kStructureThreads) {",
    ): "one part more without a block row",
}


def test_every_mutant_is_noticed():
    sizes = ((1, 1, 1.0), (33, 5, 0.4), (300, 7, 0.3), (513, 3, 1.0), (257, 1, 0.0))
    mutants = mutants_of("transposed_structure", "transposed_structure")
    assert {mutant.kind for mutant in mutants} == {"no barrier", "bound + 1", "no guard"}
    runs = Runs(
        mutants,
        [functools.partial(wrong, *size, order=order) for size in sizes for order in ("forward", "reverse")],
    )
    assert unnoticed(mutants, runs, EQUIVALENT) == []
    assert runs.faults == []
