"""The PTX of block_sparse_conv2d_weight_gradient.cu in the simulator: values, races, bounds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from . import harness
from .block_sparse_conv2d_weight_gradient_cases import GEOMETRIES, Case, run
from .gradient_cases import convert
from .harness_conv2d_weight_gradient import OP, block_sparse_conv2d_weight_gradient
from .harness_weight_gradient import to_float

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP
SCHEDULES = harness.SCHEDULES
KINDS = ["bf16", "f16", "tf32"]


def with_blocks(kind: str, rows: int, cols: int, **sizes: object) -> list[Case]:
    """Channels in whole blocks and in ragged ones, which is narrow too."""
    whole = Case(kind=kind, rows=rows, cols=cols, out_channels=2 * rows, in_channels=2 * cols, **sizes)
    channels = 2 * cols - cols // 2 - cols % 2
    ragged = replace(whole, out_channels=2 * rows - rows // 2 - 1, in_channels=channels)
    aligned = replace(whole, out_channels=2 * rows - 8, in_channels=2 * cols - 8)
    return [whole, ragged, *([aligned] if rows % 16 == cols % 16 == 0 else [])]


def walks(kind: str, widths: list[int], heights: list[int]) -> list[Case]:
    """Rows and images that end where a walk of 1, 4 or 8 positions may be."""
    return [
        Case(kind=kind, width=width, height=height, images=5, in_channels=16, out_channels=16)
        for width, height in itertools.product(widths, heights)
    ]


EDGES = [
    *(
        case
        for i, kind in enumerate(KINDS)
        for j, size in enumerate((16, 32, 64, 128))
        for case in with_blocks(kind, size, size, **GEOMETRIES[(3 * i + j) % len(GEOMETRIES)])
    ),
    *(
        case
        for i, kind in enumerate(("f32", "bf16"))
        for j, sizes in enumerate(((5, 3), (40, 7)))
        for case in with_blocks(kind, *sizes, **GEOMETRIES[2 * i + j])
    ),
    *(Case(kind=kind, **geometry) for geometry in GEOMETRIES for kind in ("bf16", "f32")),
    *(Case(kind=kind, groups=3, in_channels=48, out_channels=96) for kind in ("bf16", "tf32", "f32")),
    # A chunk of 16 bytes that ends with its group; each group's channels begin anywhere.
    Case(groups=2, in_channels=40, out_channels=64),
    Case(kind="f32", groups=3, in_channels=15, out_channels=30, rows=5, cols=4),
    *walks("bf16", [1, 9], [1, 2]),
    *walks("tf32", [3, 4], [1, 3]),
    *walks("f32", [1, 2], [1, 2]),
    *(Case(kind=kind, images=3, height=18, width=14, in_channels=16) for kind in ("bf16", "f32")),  # slices
    Case(density=0.0),
    Case(density=1.0, in_channels=48),
    Case(kind="f16", offset=1),
    Case(kind="tf32", offset=3),
    Case(kernel_size=(1, 1), padding=(0, 0, 0, 0)),  # the linear layer's kernel
]
if FULL_SWEEP:
    EDGES += [
        *(
            case
            for size, geometry in itertools.product((16, 48, 80, 128), GEOMETRIES)
            for kind in KINDS
            for case in with_blocks(kind, size, size % 128 + 16, **geometry)
        ),
        *(
            case
            for i, size in enumerate((1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65, 127, 128))
            for other in (1, 5, 16, 33)
            for case in with_blocks("f32", size, other, **GEOMETRIES[i % len(GEOMETRIES)])
            + with_blocks("f16", other, size, **GEOMETRIES[(i + 3) % len(GEOMETRIES)])
        ),
        *walks("bf16", [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17], [1, 2, 3, 7, 8, 9]),
        *walks("tf32", [1, 2, 3, 4, 5, 7, 8, 9], [1, 2, 3, 4, 5]),
        *walks("f32", [1, 2, 3, 9], [1, 2, 3]),
        *(
            Case(
                kind=kind,
                kernel_size=kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                height=9,
                width=8,
            )
            for kind, kernel, stride, padding, dilation in itertools.product(
                ("bf16", "f32"),
                ((1, 1), (2, 3), (5, 1)),
                ((1, 1), (1, 2), (3, 2)),
                ((0, 0, 0, 0), (1, 2, 0, 3)),
                ((1, 1), (2, 1)),
            )
        ),
        *(
            Case(kind=kind, groups=groups, in_channels=groups * channels, out_channels=groups * 32)
            for kind in (*KINDS, "f32")
            for groups, channels in ((2, 16), (4, 8), (3, 24), (2, 20), (5, 3))
        ),
        *(Case(kind=kind, offset=offset) for kind in KINDS for offset in range(1, 9)),
        *(
            Case(kind=kind, images=images, height=17, width=15, in_channels=19, out_channels=16, density=0.3)
            for kind in (*KINDS, "f32")
            for images in (1, 2, 3)
        ),
    ]


@pytest.mark.parametrize("case", dict.fromkeys(EDGES), ids=str)
def test_clean_and_right_on_every_schedule(case):
    outputs = []
    for order, seed in SCHEDULES:
        output, findings, _ = run(case, order=order, seed=seed)
        assert findings == []
        outputs.append(output.tobytes())
    assert len(set(outputs)) == 1, "the bits depend on the schedule"


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
@pytest.mark.parametrize("kind", ["bf16", "tf32", "f32"])
def test_the_ptx_of_hopper_is_clean_and_right(kind):
    for geometry in GEOMETRIES:
        for case in with_blocks(kind, 16, 32, **geometry):
            assert run(case, arch="compute_90")[1] == []


def test_each_type_takes_the_kernel_that_it_should():
    kernels = {
        run(case)[2]["product"]["kernel"].removeprefix(f"{OP}_")
        for kind in (*KINDS, "f32")
        for rows in (16, 8)
        for case in (Case(kind=kind, rows=rows, out_channels=2 * rows),)
    }
    assert kernels == {"bf16_16", "f16_16", "tf32_16"} | {
        f"plain_{name}_16" for name in ("bf16", "f16", "f32")
    }
    for narrow in (
        Case(in_channels=20),
        Case(out_channels=20),
        Case(groups=2, in_channels=24, out_channels=32),
    ):
        assert run(narrow)[2]["product"]["kernel"] == f"{OP}_bf16_16_narrow"
    pointwise = Case(kernel_size=(1, 1), padding=(0, 0, 0, 0))
    assert run(pointwise)[2]["product"]["kernel"] == "block_sparse_linear_weight_gradient_bf16_16"


@pytest.mark.parametrize("kind", [*KINDS, "f32"])
def test_no_images_give_zeros_and_no_blocks_launch_nothing(kind):
    output, findings, _ = run(Case(kind=kind, images=0))
    assert findings == []
    assert output.size > 0
    assert not output.any()
    assert run(Case(kind=kind, density=0.0))[2]["product"]["grid"][0] == 0


@pytest.mark.parametrize("kind", [*KINDS, "f32"])
def test_infinity_and_nan_stay_in_their_taps_channels_and_rows_and_out_of_the_padding(kind):
    case = Case(kind=kind, in_channels=43, out_channels=43, groups=1, density=1.0)
    arguments = case.arguments()
    clean = to_float(block_sparse_conv2d_weight_gradient(**arguments)[0])
    # The first pixel is read by the taps that lie below and right of the centre, or on it.
    arguments["input"][1, 0, 0, 40] = convert(np.array(np.nan), kind)
    arguments["grad_output"][0, 2, 1, 42] = convert(np.array(np.inf), kind)
    output, findings, _ = block_sparse_conv2d_weight_gradient(**arguments)
    assert findings == []
    touched = np.zeros((3, 3, 48, 48), bool)
    touched[:2, :2, 40, :43] = True
    touched[:, :, :43, 42] = True
    touched = touched.reshape(27, 16, 3, 16).transpose(2, 0, 1, 3).reshape(81, 16, 16)
    np.testing.assert_array_equal(~np.isfinite(to_float(output)), touched)
    np.testing.assert_array_equal(to_float(output)[~touched], clean[~touched])


@pytest.mark.parametrize("kind", ["bf16", "tf32", "f32"])
def test_bits_depend_neither_on_the_other_blocks_nor_on_the_alignment(kind):
    arguments = Case(kind=kind, density=1.0, in_channels=48).arguments()
    together = block_sparse_conv2d_weight_gradient(**arguments)[0].reshape(3, 27, 16, 16)
    for block in (0, 13, 26):
        crow, col = np.array([0, 0, 1, 1], np.int32), np.array([block], np.int32)
        alone = {**arguments, "crow_indices": crow, "col_indices": col, "offset": block % 4}
        assert block_sparse_conv2d_weight_gradient(**alone)[0].tobytes() == together[1, block].tobytes()
