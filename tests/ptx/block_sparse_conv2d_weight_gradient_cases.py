"""Random problems of the convolution's weight gradient: what the PTX is run on, and held against."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields

import numpy as np

from .gradient_cases import EPSILON, OPERAND_ROUNDING, RESULT_ROUNDING, convert, random_structure
from .harness_conv2d_weight_gradient import Geometry, block_sparse_conv2d_weight_gradient
from .harness_weight_gradient import to_float


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
