"""How the CUDA kernel of a convolution's weight gradient is launched, without a GPU."""

from __future__ import annotations

import pytest

import fastprune  # noqa: F401  (loads torch's libraries, which _C needs)
from fastprune import _C


def gradient_plan(**sizes: object) -> dict:
    usual: dict = {"input_size": (2, 32, 9, 7), "out_channels": 48, "output_size": (9, 7)}
    usual |= {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
    usual |= {"groups": 1, "rows": 16, "cols": 16, "kept": 8}
    usual |= {"dtype": "bfloat16", "allow_tf32": False, "aligned": True}
    return _C.plan_block_sparse_conv2d_weight_gradient_cuda(**{**usual, **sizes})


def test_the_weight_gradient_of_a_convolution_is_launched_as_that_of_a_linear_layer() -> None:
    convolution = gradient_plan(input_size=(20, 32, 9, 7))
    linear = _C.plan_block_sparse_linear_weight_gradient_cuda(
        samples=20 * 9 * 7,
        in_features=32,
        out_features=48,
        rows=16,
        cols=16,
        kept=8,
        dtype="bfloat16",
        allow_tf32=False,
        aligned=True,
    )
    assert convolution["product"] == {
        **linear["product"],
        "kernel": "block_sparse_conv2d_weight_gradient_bf16_16",
    }
    assert convolution["slices"] > 1
    for name in ("sum", "slices", "samples_per_slice"):
        assert convolution[name] == linear[name]
    assert gradient_plan(kept=0)["product"]["grid"][0] == 0


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ({"rows": 48}, "bf16_64"),
        ({"dtype": "float32"}, "plain_f32_16"),
        ({"dtype": "float32", "allow_tf32": True}, "tf32_16"),
        ({"cols": 8, "rows": 64}, "plain_bf16_64"),
        # Chunks of 16 bytes begin neither in the middle of a pixel nor of a group.
        ({"aligned": False}, "bf16_16_narrow"),
        ({"input_size": (2, 36, 9, 7)}, "bf16_16_narrow"),
        ({"input_size": (2, 36, 9, 7), "dtype": "float32", "allow_tf32": True}, "tf32_16"),
        ({"out_channels": 44}, "bf16_16_narrow"),
        ({"input_size": (2, 24, 9, 7), "groups": 2}, "bf16_16_narrow"),
        ({"input_size": (2, 48, 9, 7), "groups": 3}, "bf16_16"),
    ],
    ids=str,
)
def test_convolutions_take_the_kernel_that_their_channels_allow(sizes: dict, kernel: str) -> None:
    plan = gradient_plan(**sizes)
    assert plan["product"]["kernel"] == f"block_sparse_conv2d_weight_gradient_{kernel}"
    assert not plan["pointwise"]


def test_one_pixel_that_reads_where_it_writes_is_a_linear_layer() -> None:
    point: dict = {"kernel_size": (1, 1), "padding": (0, 0, 0, 0)}
    plan = gradient_plan(**point)
    assert plan["pointwise"]
    assert plan["product"]["kernel"] == "block_sparse_linear_weight_gradient_bf16_16"
    for other in (
        {"kernel_size": (2, 1), "output_size": (8, 7)},
        {"stride": (2, 1), "output_size": (5, 7)},
        {"padding": (1, 0, 0, 0), "output_size": (10, 7)},
        {"groups": 2},
    ):
        assert not gradient_plan(**{**point, **other})["pointwise"]


@pytest.mark.parametrize(("dtype", "apart"), [("float16", 8), ("float32", 1)])
@pytest.mark.parametrize(
    ("size", "output_size", "stride"),
    [((9, 7), (9, 7), (1, 1)), ((5, 4), (3, 2), (2, 2)), ((8, 1), (3, 1), (3, 1)), ((1, 1), (1, 1), (1, 1))],
)
def test_a_walk_over_positions_meets_every_pixel_that_a_division_finds(
    dtype: str, apart: int, size: tuple, output_size: tuple, stride: tuple
) -> None:
    plan = gradient_plan(input_size=(20, 32, *size), output_size=output_size, stride=stride, dtype=dtype)
    names = "row_step column_step row_span column_span advance_row advance_column advance next_row next_image"
    values = [*plan["positions"][4:6], *plan["positions"][11:]]
    walk = dict(zip(names.split(), values, strict=True))
    row = column = pixel = 0
    for position in range(0, 20 * output_size[0] * output_size[1], apart):
        image, rest = divmod(position, output_size[0] * output_size[1])
        i, j = divmod(rest, output_size[1])
        assert (row, column) == (i * stride[0], j * stride[1])
        assert pixel % 2**32 == (image * size[0] + row) * size[1] + column
        row, column = row + walk["advance_row"], column + walk["advance_column"]
        pixel += walk["advance"]
        if column >= walk["column_span"]:
            row, column = row + walk["row_step"], column - walk["column_span"]
            pixel += walk["next_row"]
        if row >= walk["row_span"]:
            row -= walk["row_span"]
            pixel += walk["next_image"]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"input_size": (2**20, 32, 2**6, 2**6), "output_size": (2**6, 2**6)}, f"images={2**20}"),
        ({"input_size": (1, 32, 2**29, 1), "output_size": (2**29, 1)}, f"height={2**29}"),
        ({"padding": (2**28, 0, 1, 1)}, "height=9"),
        ({"stride": (1, 2**29)}, "width=7"),
        ({"out_channels": 2**30}, f"out_channels={2**30}"),
        ({"input_size": (2, 2**30, 9, 7)}, f"in_channels={2**30}"),
        ({"rows": 129}, "rows=129"),
        ({"groups": 0}, "rows=16"),
    ],
    ids=str,
)
def test_convolutions_that_32_bits_do_not_hold_are_named(sizes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        gradient_plan(**sizes)
