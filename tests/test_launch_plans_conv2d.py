"""How the CUDA kernels of block_sparse_conv2d are launched, and the numbers by which they find their way."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

import fastprune  # noqa: F401  (loads torch's libraries, which _C needs)
from fastprune import _C

INT32_MAX = 2**31 - 1

# PatchGeometry and PositionGeometry of csrc/kernels/cuda/block_sparse_conv2d_geometry.h.
DIVISOR = np.dtype([("divisor", "u4"), ("multiplier", "u4"), ("shift", "u4")])
PATCHES = np.dtype(
    [
        *((name, "i8") for name in ("rows", "cols", "image_size")),
        *((name, "i4") for name in ("height", "width", "channels", "row_step", "column_step")),
        *((name, "i4") for name in ("first_row", "row_spacing", "first_column", "column_spacing")),
        *((name, DIVISOR) for name in ("taps_across", "taps", "sources_per_tap")),
        *((name, DIVISOR) for name in ("output_width", "output_height")),
        *((name, "i4") for name in ("lists_per_group", "list_stride", "list_begin", "list_end")),
    ]
)
POSITIONS = np.dtype(
    [
        *((name, "i8") for name in ("cols", "first", "image_stride", "row_stride", "column_stride")),
        ("group_cols", DIVISOR),
        ("group_channels", "i4"),
    ]
)


def call(**options: Any) -> Any:
    sizes = {"images": 8, "in_channels": 64, "height": 56, "width": 56, "out_channels": 128}
    geometry = {"kernel_size": (3, 3), "padding": (1, 1, 1, 1), "multiprocessors": 100}
    return _C.Conv2dCall(**{**sizes, **geometry, **options})


def forward(**options: Any) -> dict:
    return _C.plan_block_sparse_conv2d_cuda(call(**options))


def gradient(row_phase: int = 0, column_phase: int = 0, **options: Any) -> dict:
    return _C.plan_block_sparse_conv2d_input_gradient_cuda(call(**options), row_phase, column_phase)


def patches(plan: dict) -> Any:
    return np.frombuffer(plan["input_geometry"], PATCHES)[0]


def positions(plan: dict) -> Any:
    return np.frombuffer(plan["output_geometry"], POSITIONS)[0]


def launch(plan: dict) -> tuple:
    return plan["kernel"], plan["grid"], plan["block"], plan["shared_bytes"]


def test_samples_are_positions_of_the_output() -> None:
    plan = forward()
    assert launch(plan) == ("block_sparse_conv2d_f32", (8 * 7 * 7 * 8, 1, 1), (128, 1, 1), 0)
    assert plan["lists"] == 8
    assert patches(plan)["rows"] == 8 * 56 * 56
    assert forward(rows=24)["grid"] == (8 * 7 * 7 * 6 * 2, 1, 1)
    strided = forward(stride=(2, 2))
    assert patches(strided)["rows"] == 8 * 28 * 28
    assert strided["grid"] == (8 * 28 * 28 // 64 * 8, 1, 1)


def test_tensor_cores_take_the_tiles_of_the_linear() -> None:
    plan = forward(arithmetic="bfloat16")
    assert launch(plan) == ("block_sparse_conv2d_bf16_256x64_by_16", (196, 1, 1), (256, 1, 1), 80 * 1024)
    for rows, strip in ((32, 32), (48, 16), (64, 64), (128, 64)):
        assert (
            forward(arithmetic="tf32", rows=rows)["kernel"] == f"block_sparse_conv2d_tf32_256x64_by_{strip}"
        )
    small = forward(arithmetic="float16", images=1, height=14, width=14)
    assert launch(small) == ("block_sparse_conv2d_f16_64x64_by_16", (4 * 2, 1, 1), (128, 1, 1), 40 * 1024)
    # As many as one: few positions have no kernel of their own.
    assert "64x64" in forward(arithmetic="float16", images=1, height=1, width=1)["kernel"]
    back = gradient(arithmetic="bfloat16")
    assert launch(back)[:2] == ("block_sparse_conv2d_input_gradient_bf16_256x64_by_16", (98, 1, 1))


def test_channels_of_a_group_that_are_no_whole_chunks_are_narrow() -> None:
    for channels, groups, arithmetic, narrow in (
        *((64, 1, "float16", False), (60, 1, "float16", True), (60, 1, "tf32", False), (62, 1, "tf32", True)),
        *((64, 4, "bfloat16", False), (64, 16, "bfloat16", True), (64, 16, "tf32", False)),
    ):
        plan = forward(in_channels=channels, out_channels=256, groups=groups, arithmetic=arithmetic)
        assert plan["kernel"].endswith("_64x64_by_16_narrow") is narrow, (channels, groups, arithmetic)
    assert forward(arithmetic="float16", aligned_input=False)["kernel"].endswith("narrow")
    # The gradient reads the output's channels.
    assert gradient(in_channels=60, arithmetic="float16")["kernel"].endswith("256x64_by_16")
    assert gradient(out_channels=60, arithmetic="float16")["kernel"].endswith("narrow")


@pytest.mark.parametrize(
    "unfit",
    [
        *({"rows": 24}, {"cols": 8}, {"rows": 144}, {"aligned": False}, {"arithmetic": "float32"}),
        # What offsets of 32 bits do not reach: weights, and the farthest tap.
        {"kept": 2**24 + 1},
        {"height": 2**15, "width": 2**15, "kernel_size": (2, 1), "dilation": (2**12, 1), "images": 1},
        {"padding": (2**20, 0, 1, 1), "images": 1},
    ],
    ids=str,
)
def test_what_tensor_cores_do_not_take(unfit: dict[str, Any]) -> None:
    plan = forward(**{"arithmetic": "float16", "out_channels": 144, **unfit})
    arithmetic = unfit.get("arithmetic", "float16")
    assert plan["kernel"] == f"block_sparse_conv2d_{'f32' if arithmetic == 'float32' else 'f16'}"


@pytest.mark.parametrize(
    "sizes",
    [
        {"images": INT32_MAX},
        {"images": 2**20, "height": 2**6, "width": 2**6, "kernel_size": (1, 1)},
        {"in_channels": 2**31},
        {"out_channels": 2**62},
        {"kept": -1},
        {"rows": 1, "cols": 1, "kernel_size": (2**10, 2**10), "out_channels": 2**12, "padding": (2**10,) * 4},
    ],
    ids=str,
)
def test_sizes_that_no_kernel_covers_are_named(sizes: dict[str, Any]) -> None:
    for plan in (forward, gradient):
        with pytest.raises(ValueError, match="no CUDA kernel or grid covers images="):
            plan(**sizes)


def test_bad_geometry_is_named() -> None:
    for bad in ({"stride": (0, 1)}, {"kernel_size": (60, 60)}, {"groups": 0}, {"padding": (1, 1)}):
        with pytest.raises(ValueError, match=r"`(input|stride|groups|padding)`"):
            forward(**bad)


@pytest.mark.parametrize("empty", [{"images": 0}, {"out_channels": 0}], ids=str)
@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
def test_an_empty_output_has_an_empty_grid(empty: dict[str, int], arithmetic: str) -> None:
    assert forward(arithmetic=arithmetic, **empty)["grid"][0] == 0
    mirrored = {"in_channels": 0} if "out_channels" in empty else empty
    assert gradient(arithmetic=arithmetic, **mirrored)["grid"][0] == 0


def test_division_by_multiplication_is_exact() -> None:
    generator = random.Random(0)
    divisors = [1, 2, 3, 5, 7, 56, 64, 641, 2**16 - 1, 2**16, 2**16 + 1, 2**28 + 1, 2**29]
    divisors += [generator.randrange(1, 2**29) for _ in range(50)]
    for width in divisors:
        one_row = {"kernel_size": (1, 1), "padding": (0, 0, 0, 0), "height": 1, "width": width, "images": 1}
        found = patches(forward(**one_row))["output_width"]
        divisor, multiplier, shift = (int(found[name]) for name in DIVISOR.names)
        assert divisor == width
        assert multiplier < 2**32
        numbers = [0, 1, width - 1, width, width + 1, INT32_MAX - 1, INT32_MAX, INT32_MAX // width * width]
        numbers += [INT32_MAX // width * width - 1, *(generator.randrange(2**31) for _ in range(200))]
        for number in numbers:
            if 0 <= number <= INT32_MAX:
                assert (2 * number * multiplier >> 32) >> shift == number // width, (number, width)


GEOMETRIES = [
    *itertools.product((1, 2, 3, 7), (1, 2, 3, 4, 6), (1, 2, 3, 4), (0, 1, 5)),
]


def test_phases_share_out_the_taps_and_the_inputs() -> None:
    for (kernel, stride, dilation, padding), width in itertools.product(GEOMETRIES, (1, 4, 9)):
        reach = dilation * (kernel - 1) + 1
        if width + 2 * padding < reach:
            continue
        options = {
            "kernel_size": (1, kernel), "stride": (1, stride), "dilation": (1, dilation),
            "padding": (0, 0, padding, padding), "height": 3, "width": width, "images": 2,
        }  # fmt: skip
        inputs, taps = [], []
        for phase in range(min(stride, width)):
            plan = gradient(0, phase, **options)
            input, output = patches(plan), positions(plan)
            images, height = 2, 3
            columns = int(input["rows"]) // (images * height)
            assert input["rows"] == images * height * columns
            inputs += [phase + stride * i for i in range(columns)]
            assert (output["first"], output["column_stride"]) == (phase * 64, stride * 64)
            count = int(input["list_end"] - input["list_begin"])
            taps += range(int(input["list_begin"]), int(input["list_end"]))
            reads = {int(input["first_column"] + k * input["column_spacing"]) for k in range(count)}
            # Outputs j of which j * stride + k * dilation - padding is the first input of the phase.
            wanted = {
                (phase + padding - k * dilation) // stride
                for k in range(kernel)
                if (phase + padding - k * dilation) % stride == 0
            }
            assert reads == wanted, (options, phase)
            assert count == len(wanted)
        assert sorted(inputs) == list(range(width))
        assert len(set(taps)) == len(taps)
        if width >= stride:
            assert sorted(taps) == list(range(kernel))


def test_outputs_of_a_group_are_padded_to_its_blocks() -> None:
    plan = gradient(in_channels=40, out_channels=64, groups=2)
    output = positions(plan)
    assert plan["lists"] == 4
    assert (output["cols"], output["group_cols"]["divisor"], output["group_channels"]) == (52, 32, 20)
    assert patches(plan)["lists_per_group"] == 2


def test_one_thread_block_for_each_list_and_tap() -> None:
    def structure(lists: int, kernel_size: tuple[int, int]) -> dict:
        return _C.plan_block_sparse_conv2d_structure_cuda(
            kernel_size=kernel_size, stride=(2, 3), dilation=(1, 3), lists=lists
        )

    plan = structure(6, (3, 5))
    assert launch(plan) == ("block_sparse_conv2d_structure", (90, 1, 1), (256, 1, 1), 0)
    assert list(np.frombuffer(plan["row_classes"], np.int32)) == [3, 2]
    assert list(np.frombuffer(plan["column_classes"], np.int32)) == [5, 1]
    assert structure(0, (3, 3))["grid"] == (0, 1, 1)
    with pytest.raises(ValueError, match="lists=2147483647"):
        structure(INT32_MAX, (1, 2))
