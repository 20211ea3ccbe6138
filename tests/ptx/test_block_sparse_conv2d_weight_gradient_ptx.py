"""The PTX of block_sparse_conv2d_weight_gradient.cu in the simulator: values, races, bounds, mutants."""

import functools
import itertools
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from . import harness
from .gradient_cases import EPSILON, OPERAND_ROUNDING, RESULT_ROUNDING, convert, random_structure
from .harness_conv2d_weight_gradient import Geometry, block_sparse_conv2d_weight_gradient
from .harness_weight_gradient import to_float

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP
SCHEDULES = harness.SCHEDULES
KINDS = ["bf16", "f16", "tf32"]


@dataclass(frozen=True)
class Case:
    """One call; its samples are the output positions of all images."""

    kind: str = "bf16"
    images: int = 2
    height: int = 5
    width: int = 4
    in_channels: int = 32
    out_channels: int = 48
    rows: int = 16
    cols: int = 16
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.6
    poisoned: bool = False  # every operand is NaN, and every gradient but its padding
    offset: int = 0  # of both operands, after a multiple of 16 bytes
    seed: int = 0

    def __str__(self) -> str:
        unusual = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in unusual) or "usual"

    @property
    def geometry(self) -> Geometry:
        """What the convolution is besides its weight."""
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    @property
    def channel_blocks(self) -> int:
        """Block columns of a tap."""
        return -(-(self.in_channels // self.groups) // self.cols)

    def operand(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        return convert(rng.standard_normal(shape) + (np.nan if self.poisoned else 0), self.kind)

    def arguments(self) -> dict:
        """Make random arguments, with an empty block row where some blocks are lost."""
        rng = np.random.default_rng([self.seed, *map(ord, repr(self))])
        outputs = self.geometry.output_size(self.height, self.width)
        taps = self.kernel_size[0] * self.kernel_size[1]
        grid = (-(-self.out_channels // self.rows), taps * self.channel_blocks)
        crow_indices, col_indices = random_structure(rng, grid, self.density)
        return {
            "grad_output": self.operand(rng, self.images, *outputs, self.out_channels),
            "input": self.operand(rng, self.images, self.height, self.width, self.in_channels),
            "crow_indices": crow_indices,
            "col_indices": col_indices,
            "blocksize": (self.rows, self.cols),
            "geometry": self.geometry,
            "allow_tf32": self.kind == "tf32",
            "offset": self.offset,
        }


def tap_inputs(input: np.ndarray, tap: int, geometry: Geometry) -> np.ndarray:
    """Return what a tap reads: ``[output positions, channels]``, zero outside of the images."""
    top, bottom, left, right = geometry.padding
    padded = np.pad(input, ((0, 0), (top, bottom), (left, right), (0, 0)))
    outputs = geometry.output_size(*input.shape[1:3])
    row, column = divmod(tap, geometry.kernel_size[1])
    first = (row * geometry.dilation[0], column * geometry.dilation[1])
    rows, columns = (
        slice(f, f + (count - 1) * step + 1, step)
        for f, count, step in zip(first, outputs, geometry.stride, strict=True)
    )
    return padded[:, rows, columns].reshape(-1, input.shape[3])


def kept_gradients(grad_output: np.ndarray, input: np.ndarray, arguments: dict) -> np.ndarray:
    """Return the kept blocks ``[kept, cols, rows]`` by one product for each, in float64."""
    crow, col, (rows, cols) = (arguments[name] for name in ("crow_indices", "col_indices", "blocksize"))
    geometry = arguments["geometry"]
    group_channels = input.shape[3] // geometry.groups
    channel_blocks = -(-group_channels // cols)
    rows_per_group = (len(crow) - 1) // geometry.groups
    grads = grad_output.reshape(-1, grad_output.shape[3])
    blocks = np.zeros((len(col), cols, rows))
    for block_row, (begin, end) in enumerate(itertools.pairwise(crow)):
        group = block_row // rows_per_group
        for k in range(begin, end):
            tap, channel_block = divmod(col[k], channel_blocks)
            inputs = tap_inputs(input, tap, geometry)[:, group * group_channels :][:, :group_channels]
            part = inputs[:, channel_block * cols :][:, :cols].T @ grads[:, block_row * rows :][:, :rows]
            blocks[k, : part.shape[0], : part.shape[1]] = part
    return blocks


# Schedules and mutants run the same problems again and again.
@functools.lru_cache(maxsize=512)
def problem(case: Case) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return arguments, the gradient in float64, and the bound of a chain of float32 multiply-adds."""
    arguments = case.arguments()
    grad_output, input = to_float(arguments["grad_output"]), to_float(arguments["input"])
    expected = kept_gradients(grad_output, input, arguments)
    magnitude = kept_gradients(np.abs(grad_output), np.abs(input), arguments)
    relative = (grad_output[..., 0].size + 2) * EPSILON + 2.001 * OPERAND_ROUNDING[case.kind]
    bound = relative * magnitude + RESULT_ROUNDING[case.kind] * (1 + relative) * np.abs(expected)
    return arguments, expected, bound


def run(case: Case, **options) -> tuple[np.ndarray, list[str], dict]:
    arguments, expected, bound = problem(case)
    output, findings, plan = block_sparse_conv2d_weight_gradient(**arguments, **options)
    values = to_float(output)
    wrong = np.argwhere(~(np.abs(values - expected) <= bound) & ~(np.isnan(values) & np.isnan(expected)))
    if len(wrong):
        findings = [*findings, f"{len(wrong)} wrong values, the first at {wrong[0]}"]
    return output, findings, plan


# Strides, paddings and dilations that differ in each direction; taps that read nothing but zeros.
GEOMETRIES: list[dict] = [
    {},
    {"stride": (2, 3), "padding": (0, 1, 2, 0), "height": 9, "width": 11},
    {"kernel_size": (3, 2), "dilation": (2, 3), "padding": (2, 1, 3, 0), "height": 6, "width": 7},
    {"kernel_size": (1, 5), "padding": (0, 0, 4, 4), "height": 1, "width": 3},
    {"kernel_size": (1, 1), "padding": (4, 3, 2, 4), "height": 2, "width": 1},
    {"kernel_size": (1, 1), "stride": (2, 2), "padding": (0, 0, 0, 0), "height": 7},
    {"kernel_size": (2, 2), "padding": (0, 0, 0, 0), "stride": (3, 1), "height": 8},
]


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
