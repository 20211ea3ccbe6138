"""The PTX of block_sparse_conv2d and its input gradient, run in the simulator: values, races, bounds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from . import harness
from . import harness_block_sparse_conv2d as conv2d
from .block_sparse_conv2d_cases import GEOMETRIES, STRUCTURES, Case, expected_structure, fits, sized
from .block_sparse_linear_cases import SCHEDULES

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP

# Multiprocessors that make the plan take, from 129 positions on, tiles of 256 x 64.
LARGE = 1
ARITHMETICS = ["float16", "bfloat16", "tf32"]
TILES = ["64x64_by_16", "64x64_by_16_narrow", "256x64_by_16", "256x64_by_32", "256x64_by_64"]
# One pixel, one row, fewer and more than a warp's positions, a whole tile of 64, and more.
IMAGES = [(1, 1), (1, 7), (5, 3), (8, 8), (9, 9)]


def kernel_cases(**options) -> list[Case]:
    """Calls that go to each tile, with edges of every kind."""
    large = {"multiprocessors": LARGE, "height": 9, "width": 9, **options}
    return [
        sized(40, 67, block_outputs=32, height=6, width=6, **options),
        sized(39, 67, block_outputs=32, block_steps=48, height=6, width=6, **options),
        sized(24, 129, images=2, **large),
        sized(40, 150, images=2, block_outputs=32, block_steps=32, density=0.4, **large),
        sized(72, 129, images=2, block_outputs=64, block_steps=64, density=0.6, **large),
        sized(32, 257, images=4, block_outputs=128, density=0.7, kernel_size=(2, 1), **large),
        # Strips of one tile that are of different groups.
        sized(64, 64, groups=4, images=2, **large),
        sized(160, 192, groups=2, images=2, density=0.3, **large),
    ]


EDGES = [
    # The plain kernel: blocks of any size, whose tiles are 64 positions x 16 outputs x 32 steps.
    *(
        Case(height=height, width=width, input_gradient=input_gradient, activation=activation, **geometry)
        for (height, width), geometry in itertools.product(IMAGES, GEOMETRIES)
        for input_gradient, activation in ((False, "relu"), (True, "none"))
    ),
    *(
        Case(
            in_channels=19, out_channels=23, height=4, width=6, rows=rows, cols=cols, arithmetic=arithmetic,
            input_gradient=input_gradient, density=density,
        )
        for rows, cols in ((1, 1), (8, 1), (1, 8), (5, 3), (17, 33), (128, 128))
        for arithmetic, density in (("float32", 0.4), ("float32", 1.0), ("float16", 0.5), ("bfloat16", 0.0))
        for input_gradient in (False, True)
    ),
    *(
        Case(in_channels=15, out_channels=24, groups=3, rows=rows, cols=cols, input_gradient=input_gradient)
        for rows, cols in ((8, 4), (4, 5), (2, 8))
        for input_gradient in (False, True)
    ),
    # The tensor-core kernels.
    *(
        case
        for arithmetic, input_gradient in itertools.product(ARITHMETICS, (False, True))
        for case in kernel_cases(arithmetic=arithmetic, input_gradient=input_gradient)
    ),
    *(
        Case(height=height, width=width, arithmetic=arithmetic, input_gradient=input_gradient, **geometry)
        for i, ((height, width), geometry) in enumerate(itertools.product(IMAGES, GEOMETRIES))
        for arithmetic, input_gradient in ((ARITHMETICS[i % 3], False), (ARITHMETICS[(i + 1) % 3], True))
    ),
    *(
        Case(arithmetic=arithmetic, activation=activation, bias=bias, out_channels=60)
        for arithmetic in ("float16", "tf32")
        for activation in harness.ACTIVATIONS
        for bias in (False, True)
    ),
    # The last block of a tap may reach past the channels of a group, which lie before another's.
    *(
        Case(
            in_channels=groups * channels, out_channels=groups * outputs, groups=groups, cols=cols,
            arithmetic=arithmetic, input_gradient=input_gradient, height=3, width=4,
        )
        for groups, channels, outputs, cols in (
            (2, 20, 16, 16), (2, 24, 32, 32), (3, 8, 16, 16), (3, 1, 16, 16), (5, 48, 16, 32), (2, 7, 48, 16),
        )
        for arithmetic in ("bfloat16", "tf32")
        for input_gradient in (False, True)
    ),
    *(
        Case(arithmetic=arithmetic, density=density, input_gradient=input_gradient, stride=(2, 1))
        for arithmetic, density, input_gradient in itertools.product(
            ("float16", "tf32"), (0.0, 1.0), (False, True)
        )
    ),
    # Images, and weights, that begin anywhere.
    *(
        Case(arithmetic=arithmetic, misalign_input=misalign, in_channels=40, input_gradient=input_gradient)
        for arithmetic, misalign in (("bfloat16", 2), ("float16", 8), ("tf32", 4))
        for input_gradient in (False, True)
    ),
    *(
        Case(arithmetic=arithmetic, misalign_weight=misalign, input_gradient=input_gradient)
        for arithmetic, misalign in (("bfloat16", 2), ("float16", 8))
        for input_gradient in (False, True)
    ),
    *(
        sized(channels, channels + 1, arithmetic="bfloat16", height=4, width=3)
        for channels in (1, 3, 4, 7, 8, 9, 15, 17, 24, 31, 33)
    ),
]  # fmt: skip
EDGES = [case for case in EDGES if fits(case)]
if FULL_SWEEP:
    EDGES += [
        case
        for arithmetic, input_gradient, geometry in itertools.product(ARITHMETICS, (False, True), GEOMETRIES)
        for images, size, groups in ((3, (7, 9), 1), (2, (13, 4), 2))
        if fits(
            case := sized(
                groups * 24, groups * 80, groups=groups, images=images, height=size[0], width=size[1],
                arithmetic=arithmetic, input_gradient=input_gradient, multiprocessors=LARGE, **geometry,
            )
        )
    ]  # fmt: skip


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_clean_and_right_on_every_schedule(case):
    outputs = []
    for order, seed in SCHEDULES:
        output, findings = case.check(order=order, seed=seed)
        assert findings == []
        outputs.append(output.tobytes())
    assert len(set(outputs)) == 1, "the bits depend on the schedule"


@pytest.mark.parametrize("input_gradient", [False, True])
def test_every_kernel_is_met(input_gradient):
    name = "block_sparse_conv2d_input_gradient" if input_gradient else "block_sparse_conv2d"
    for arithmetic, type in (("float16", "f16"), ("bfloat16", "bf16"), ("tf32", "tf32")):
        cases = kernel_cases(arithmetic=arithmetic, input_gradient=input_gradient)
        assert {case.kernel() for case in cases} == {f"{name}_{type}_{tile}" for tile in TILES}
    assert set(conv2d.PLAIN) <= {kernel for case in EDGES for kernel in case.kernels()}


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("arithmetic", [*ARITHMETICS, "float32"])
def test_hopper_ptx_is_clean_too(arithmetic, input_gradient):
    for case in kernel_cases(arithmetic=arithmetic, input_gradient=input_gradient):
        assert case.check(arch="compute_90")[1] == [], case


def test_empty_outputs_are_not_launched():
    for input_gradient in (False, True):
        assert Case(images=0, input_gradient=input_gradient).check()[1] == []
    assert Case(out_channels=0).check()[1] == []
    assert Case(in_channels=0, input_gradient=True).check()[1] == []


def test_no_channels_leave_the_bias():
    for arithmetic in ("float32", "float16"):
        assert Case(in_channels=0, arithmetic=arithmetic).check()[1] == []
        assert Case(out_channels=0, arithmetic=arithmetic, input_gradient=True).check()[1] == []


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bits_depend_neither_on_the_tile_nor_on_the_other_images(arithmetic, input_gradient):
    case = sized(
        64, 128, input_gradient, block_outputs=64, block_steps=64, images=4, height=7, width=8,
        arithmetic=arithmetic, multiprocessors=LARGE,
    )  # fmt: skip
    arguments = case.arguments()
    large, _ = case.run(arguments)
    small_case = replace(case, multiprocessors=10**6)
    assert small_case.kernel() != case.kernel()
    assert small_case.run(arguments)[0].tobytes() == large.tobytes()
    for image in (0, 3):
        part = {**arguments, "input": arguments["input"][image : image + 1]}
        assert replace(small_case, images=1).run(part)[0].tobytes() == large[image].tobytes()


@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_outputs_that_read_them(arithmetic, value):
    case = Case(
        in_channels=64, out_channels=64, groups=2, arithmetic=arithmetic, activation="relu", density=1.0
    )
    arguments = case.arguments()
    arguments["input"][1, 2, 6, 40] = value
    output, findings = case.run(arguments)
    assert findings == []
    expected, _ = case.expected(arguments)
    assert 0 < np.isnan(expected).sum() + np.isinf(expected).sum() <= 6 * 32
    np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(output), np.isinf(expected))


def test_shared_memory_is_read_without_bank_conflicts():
    for arithmetic, input_gradient in itertools.product(ARITHMETICS, (False, True)):
        for multiprocessors in (LARGE, 10**6):
            case = sized(
                64, 128, input_gradient, block_outputs=64, block_steps=64, images=4, height=8, width=8,
                density=1.0, arithmetic=arithmetic, multiprocessors=multiprocessors,
            )  # fmt: skip
            assert case.run(case.arguments())[1] == []
            assert harness.last_stats()["ldmatrix_bank_conflicts"] == 0
            assert harness.last_stats()["smem_bank_conflicts"] == 0


@pytest.mark.parametrize("case", STRUCTURES, ids=str)
def test_lists_of_the_input_gradient(case):
    arguments = case.arguments()
    structure = arguments["crow_indices"], arguments["col_indices"]
    for order, seed in SCHEDULES:
        lists, findings = conv2d.structure(case.convolution, *structure, order=order, seed=seed)
        assert findings == []
        for found, wanted in zip(lists, expected_structure(case, *structure), strict=True):
            np.testing.assert_array_equal(found, wanted)
