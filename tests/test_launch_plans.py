"""How CUDA kernels are launched: computed on the host, so that it is tested without a GPU."""

from __future__ import annotations

import pytest

import fastprune  # noqa: F401  (loads torch's libraries, which _C needs)
from fastprune import _C

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def plan(samples: int = 64, in_features: int = 64, out_features: int = 64, rows: int = 16, cols: int = 16):
    return _C.plan_block_sparse_linear_cuda(
        samples=samples, in_features=in_features, out_features=out_features, rows=rows, cols=cols
    )


def test_one_thread_block_for_each_tile_of_each_block_row() -> None:
    assert plan() == {
        "kernel": "block_sparse_linear_f32",
        "grid": (4, 1, 1),
        "block": (128, 1, 1),
        "shared_bytes": 0,
    }
    assert plan(samples=65)["grid"] == (8, 1, 1)
    assert plan(out_features=65)["grid"] == (5, 1, 1)
    assert plan(rows=17)["grid"] == (4 * 2, 1, 1)
    assert plan(rows=1, cols=1)["grid"] == (64, 1, 1)


@pytest.mark.parametrize("empty", [{"samples": 0}, {"out_features": 0}])
def test_an_empty_output_has_an_empty_grid(empty: dict[str, int]) -> None:
    assert plan(**empty)["grid"] == (0, 1, 1)


def test_more_block_rows_than_a_grid_has_in_y() -> None:
    assert plan(samples=1, out_features=200_000, rows=1)["grid"] == (200_000, 1, 1)
    assert plan(samples=64 * INT32_MAX, out_features=16)["grid"] == (INT32_MAX, 1, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        {"samples": 64 * INT32_MAX + 1, "out_features": 16},
        {"samples": INT64_MAX},
        {"out_features": INT64_MAX},
        {"samples": INT64_MAX, "out_features": INT64_MAX, "rows": 1},
        {"rows": INT32_MAX + 1},
        {"cols": INT64_MAX},
        {"rows": 0},
        {"cols": 0},
        {"samples": -1},
    ],
    ids=str,
)
def test_sizes_that_no_grid_covers_are_named(sizes: dict[str, int]) -> None:
    name, value = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        plan(**sizes)
