"""How CUDA kernels are launched: computed on the host, so that it is tested without a GPU."""

from __future__ import annotations

import pytest

import fastprune  # noqa: F401  (loads torch's libraries, which _C needs)
from fastprune import _C

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def plan(
    samples: int = 64,
    in_features: int = 64,
    out_features: int = 64,
    rows: int = 16,
    cols: int = 16,
    **options: object,
):
    return _C.plan_block_sparse_linear_cuda(
        samples=samples, in_features=in_features, out_features=out_features, rows=rows, cols=cols, **options
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


def tensor_core_plan(samples: int = 2048, **options: object):
    """Return the plan of a 2048 x 1024 weight of 32 x 16 blocks in bfloat16."""
    sizes = {"out_features": 2048, "in_features": 1024, "rows": 32, "cols": 16, "arithmetic": "bfloat16"}
    return plan(**{"samples": samples, "multiprocessors": 100, **sizes, **options})


def test_tensor_cores_take_tiles_of_whole_strips() -> None:
    assert tensor_core_plan() == {
        "kernel": "block_sparse_linear_bf16_128x128_by_32",
        "grid": (16 * 16, 1, 1),
        "block": (128, 1, 1),
        "shared_bytes": 48 * 1024,
    }
    names = {48: "by_16", 64: "by_64", 96: "by_32", 128: "by_64"}
    for rows, name in names.items():
        assert tensor_core_plan(rows=rows)["kernel"] == f"block_sparse_linear_bf16_128x128_{name}"
    gradient = tensor_core_plan(input_gradient=True)
    assert gradient["kernel"] == "block_sparse_linear_input_gradient_bf16_128x128_by_16"
    assert gradient["grid"] == (16 * 8, 1, 1)
    for arithmetic, type in (("tf32", "tf32"), ("float16", "f16")):
        assert f"_{type}_128x128" in tensor_core_plan(arithmetic=arithmetic)["kernel"]


def test_small_tiles_where_large_ones_leave_multiprocessors_idle() -> None:
    small = tensor_core_plan(samples=512)
    assert small["kernel"] == "block_sparse_linear_bf16_64x64_by_16"
    assert small["grid"] == (8 * 32, 1, 1)
    assert small["shared_bytes"] == 24 * 1024
    assert tensor_core_plan(samples=512, multiprocessors=64)["grid"] == (4 * 16, 1, 1)


def test_few_samples_have_a_kernel_of_their_own() -> None:
    few = tensor_core_plan(samples=16)
    assert few["kernel"] == "block_sparse_linear_bf16_few_samples"
    assert few["grid"] == (128, 1, 1)
    assert few["block"] == (256, 1, 1)
    assert tensor_core_plan(samples=0)["grid"] == (0, 1, 1)
    assert "few_samples" not in tensor_core_plan(samples=17)["kernel"]


@pytest.mark.parametrize(
    "unfit",
    [{"rows": 24}, {"cols": 8}, {"rows": 144}, {"aligned": False}, {"arithmetic": "float32"}],
    ids=str,
)
def test_what_tensor_cores_do_not_take(unfit: dict[str, object]) -> None:
    name = "f32" if "arithmetic" in unfit else "bf16"
    assert tensor_core_plan(**unfit)["kernel"] == f"block_sparse_linear_{name}"  # type: ignore[arg-type]


def test_an_unknown_arithmetic_is_named() -> None:
    with pytest.raises(ValueError, match=r"`arithmetic` must be .*'float64'"):
        plan(arithmetic="float64")


def test_the_transposed_structure_has_a_thread_block_for_each_block_column() -> None:
    plan = _C.plan_transposed_structure_cuda(block_cols=7)
    assert plan == {
        "kernel": "transposed_structure",
        "grid": (8, 1, 1),
        "block": (256, 1, 1),
        "shared_bytes": 0,
    }
    with pytest.raises(ValueError, match=f"block_cols={INT32_MAX}"):
        _C.plan_transposed_structure_cuda(block_cols=INT32_MAX)
