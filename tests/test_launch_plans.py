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
        {"kept": -1},
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
        "kernel": "block_sparse_linear_bf16_256x64_by_32",
        "grid": (8 * 32, 1, 1),
        "block": (256, 1, 1),
        "shared_bytes": 80 * 1024,
    }
    names = {48: "by_16", 64: "by_64", 96: "by_32", 128: "by_64"}
    for rows, name in names.items():
        assert tensor_core_plan(rows=rows)["kernel"] == f"block_sparse_linear_bf16_256x64_{name}"
    gradient = tensor_core_plan(input_gradient=True)
    assert gradient["kernel"] == "block_sparse_linear_input_gradient_bf16_256x64_by_16"
    assert gradient["grid"] == (8 * 16, 1, 1)
    for arithmetic, type in (("tf32", "tf32"), ("float16", "f16")):
        assert f"_{type}_256x64" in tensor_core_plan(arithmetic=arithmetic)["kernel"]


def test_small_tiles_where_large_ones_leave_half_the_multiprocessors_idle() -> None:
    small = tensor_core_plan(samples=512)
    assert small["kernel"] == "block_sparse_linear_bf16_64x64_by_16"
    assert small["grid"] == (8 * 32, 1, 1)
    assert small["block"] == (128, 1, 1)
    assert small["shared_bytes"] == 40 * 1024
    assert tensor_core_plan(samples=512, multiprocessors=65)["grid"] == (8 * 32, 1, 1)
    assert tensor_core_plan(samples=512, multiprocessors=64)["grid"] == (2 * 32, 1, 1)
    # The last tile counts for as much as it holds.
    assert "64x64" in tensor_core_plan(samples=511, multiprocessors=64)["kernel"]


def test_small_tiles_where_large_ones_would_be_half_empty() -> None:
    assert "64x64" in tensor_core_plan(samples=128, multiprocessors=1)["kernel"]
    assert "256x64" in tensor_core_plan(samples=129, multiprocessors=1)["kernel"]


@pytest.mark.parametrize("input_gradient", [False, True])
def test_inputs_that_are_not_aligned_have_kernels_of_their_own(input_gradient: bool) -> None:
    for samples in (1, 16, 129, 4096):
        tile = "few_samples" if samples <= 16 else "64x64_by_16"
        narrow = tensor_core_plan(samples=samples, aligned_input=False, input_gradient=input_gradient)
        assert narrow["kernel"].endswith(f"bf16_{tile}_narrow")
    assert narrow["grid"] == (64 * (16 if input_gradient else 32), 1, 1)
    assert plan(arithmetic="float32", aligned_input=False)["kernel"] == "block_sparse_linear_f32"


def test_few_samples_have_a_kernel_of_their_own() -> None:
    few = tensor_core_plan(samples=16)
    assert few["kernel"] == "block_sparse_linear_bf16_few_samples"
    assert few["grid"] == (128, 1, 1)
    assert few["block"] == (256, 1, 1)
    assert tensor_core_plan(samples=0)["grid"] == (0, 1, 1)
    assert tensor_core_plan(samples=64)["grid"] == (4 * 128, 1, 1)
    for side, most in ((16, 128), (48, 128), (32, 64), (96, 64), (64, 32), (128, 32)):
        for sides in ({"rows": side}, {"cols": side, "input_gradient": True}):
            assert "few_samples" in tensor_core_plan(samples=most, **sides)["kernel"]
            assert "64x64" in tensor_core_plan(samples=most + 1, multiprocessors=10**6, **sides)["kernel"]


@pytest.mark.parametrize(
    "unfit",
    [
        *({"rows": 24}, {"cols": 8}, {"rows": 144}, {"aligned": False}, {"arithmetic": "float32"}),
        # What offsets of 32 bits do not reach.
        *({"kept": 2**23 + 1}, {"in_features": INT32_MAX}, {"out_features": INT32_MAX, "samples": 64}),
    ],
    ids=str,
)
def test_what_tensor_cores_do_not_take(unfit: dict[str, object]) -> None:
    name = "f32" if "arithmetic" in unfit else "bf16"
    assert tensor_core_plan(**unfit)["kernel"] == f"block_sparse_linear_{name}"  # type: ignore[arg-type]


def test_tensor_cores_take_as_many_weights_as_offsets_of_32_bits_reach() -> None:
    assert "256x64" in tensor_core_plan(kept=2**23)["kernel"]


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


def gradient_plan(**sizes: object) -> dict:
    usual = {"samples": 64, "in_features": 64, "out_features": 64, "rows": 16, "cols": 16, "kept": 8}
    usual |= {"dtype": "bfloat16", "allow_tf32": False, "aligned": True}
    return _C.plan_block_sparse_linear_weight_gradient_cuda(**{**usual, **sizes})


def test_the_weight_gradient_has_room_for_the_tiles_of_every_block_row() -> None:
    plan = gradient_plan()
    assert plan == {
        "product": {
            "kernel": "block_sparse_linear_weight_gradient_bf16_16",
            "grid": (8 * 16 // 128 + 4, 1, 1),
            "block": (128, 1, 1),
            "shared_bytes": 4 * 64 * (128 + 16),
        },
        "sum": {
            "kernel": "block_sparse_linear_weight_gradient_sum_bf16",
            "grid": (0, 1, 1),
            "block": (256, 1, 1),
            "shared_bytes": 0,
        },
        "slices": 1,
        "samples_per_slice": 64,
    }
    assert gradient_plan(kept=0)["product"]["grid"][0] == 0
    assert gradient_plan(rows=128, cols=3, kept=1)["product"]["grid"] == (1, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ({"rows": 48}, "bf16_64"),
        ({"rows": 128, "dtype": "float16", "aligned": False}, "f16_128_narrow"),
        ({"dtype": "float32"}, "plain_f32_16"),
        ({"dtype": "float32", "allow_tf32": True}, "tf32_16"),
        ({"rows": 33, "allow_tf32": True}, "plain_bf16_64"),
        ({"cols": 8}, "plain_bf16_16"),
    ],
    ids=str,
)
def test_tensor_cores_take_blocks_of_multiples_of_16(sizes: dict, kernel: str) -> None:
    plan = gradient_plan(**sizes)
    assert plan["product"]["kernel"] == f"block_sparse_linear_weight_gradient_{kernel}"
    assert plan["product"]["shared_bytes"] <= 48 * 1024


@pytest.mark.parametrize("samples", [0, 1, 511, 512, 513, 5000, 2**20, 2**20 + 1, 2**30])
@pytest.mark.parametrize("kept", [1, 8, 2000, 100_000])
def test_slices_cover_all_samples_and_none_is_empty(samples: int, kept: int) -> None:
    plan = gradient_plan(samples=samples, kept=kept, in_features=2**20, out_features=2**12)
    slices, length = plan["slices"], plan["samples_per_slice"]
    assert plan["product"]["grid"][2] == slices
    assert (plan["sum"]["grid"][0] > 0) == (slices > 1)
    assert length % 32 == 0
    assert length <= 2**20
    assert slices * length >= samples
    assert slices == 1 or (slices - 1) * length < samples
    # Few blocks and many samples are cut up; many blocks fill a GPU as they are.
    assert kept < 100_000 or samples > 2**20 or slices == 1
    assert kept > 8 or samples < 512 or slices >= 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"samples": -1},
        {"rows": 129},
        {"cols": 0},
        {"kept": 2**31},
        {"in_features": 2**31},
        {"samples": 2**60},
    ],
    ids=str,
)
def test_gradient_sizes_that_no_grid_covers_are_named(sizes: dict[str, int]) -> None:
    name, value = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        gradient_plan(**sizes)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="`dtype` must be 'float32', 'float16' or 'bfloat16', got 'float64'"):
        gradient_plan(dtype="float64")


def loss_plan(samples: int = 300, features: int = 8, classes: int = 10, num_pieces: int = 9):
    return _C.plan_ablated_cross_entropy_cuda(
        samples=samples, features=features, classes=classes, num_pieces=num_pieces
    )


def test_a_warp_for_each_piece_and_span_of_samples() -> None:
    plan = loss_plan()
    assert (plan["kernel"], plan["block"]) == ("ablated_cross_entropy_f32", (128, 1, 1))
    assert (plan["span"], plan["spans"], plan["grid"]) == (128, 3, (3 * 3, 1, 1))
    # Spans grow with the pieces, so that their sums stay fewer than a million.
    plan = loss_plan(samples=1000, num_pieces=2**18)
    assert (plan["span"], plan["spans"]) == (256, 4)
    assert loss_plan(samples=10**6, num_pieces=2**21)["spans"] == 1


@pytest.mark.parametrize("empty", [{"samples": 0}, {"num_pieces": 0}])
def test_no_loss_delta_has_an_empty_grid(empty: dict[str, int]) -> None:
    assert loss_plan(**empty)["grid"] == (0, 1, 1)


@pytest.mark.parametrize("name", ["samples", "features", "classes", "num_pieces"])
@pytest.mark.parametrize("size", [-1, INT64_MAX])
def test_sizes_that_no_loss_grid_covers_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="no CUDA grid"):
        loss_plan(**{name: size})


def test_hidden_units_stay_within_the_shared_memory_of_every_gpu() -> None:
    kernels = []
    for activation in range(5):
        plan = _C.plan_ablated_mlp_cross_entropy_cuda(
            samples=129, in_features=3, hidden=4, classes=2, num_pieces=3, activation=activation
        )
        assert (plan["grid"], plan["block"], plan["shared_bytes"]) == ((2 * 2, 1, 1), (64, 1, 1), 0)
        kernels.append(plan["kernel"])
    assert len(set(kernels)) == 5
    with pytest.raises(ValueError, match="no CUDA grid"):
        _C.plan_ablated_mlp_cross_entropy_cuda(
            samples=1, in_features=1, hidden=1, classes=2, num_pieces=1, activation=5
        )


def test_ablate_linear_has_a_thread_block_for_each_tile_of_each_piece() -> None:
    def ablate_plan(samples: int = 65, out_features: int = 64, num_pieces: int = 3):
        return _C.plan_ablate_linear_cuda(
            samples=samples, in_features=5, out_features=out_features, num_pieces=num_pieces
        )

    assert ablate_plan()["grid"] == (2 * 1 * 3, 1, 1)
    assert ablate_plan(out_features=65)["grid"] == (2 * 2 * 3, 1, 1)
    assert ablate_plan(samples=0)["grid"] == (0, 1, 1)
    for sizes in ({"samples": INT64_MAX}, {"out_features": INT64_MAX}, {"num_pieces": INT32_MAX}):
        with pytest.raises(ValueError, match="no CUDA grid"):
            ablate_plan(**sizes)
