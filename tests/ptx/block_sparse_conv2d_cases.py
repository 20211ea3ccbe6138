"""Calls of block_sparse_conv2d in the simulator, and what is wrong with their results, against float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields

import numpy as np
import torch

from fastprune import reference

from . import harness
from . import harness_block_sparse_conv2d as conv2d
from .block_sparse_linear_cases import EPSILON, as_float64, cast, finished


@dataclass(frozen=True)
class Case:
    """One call; channels are those of all groups."""

    images: int = 2
    in_channels: int = 32
    height: int = 5
    width: int = 7
    out_channels: int = 32
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    rows: int = 16
    cols: int = 16
    density: float = 0.5
    bias: bool = True
    activation: str = "none"
    seed: int = 0
    arithmetic: str = "float32"
    input_gradient: bool = False
    multiprocessors: int = 10**6
    misalign_input: int = 0
    misalign_weight: int = 0

    def __str__(self) -> str:
        unusual = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in unusual) or "usual"

    @property
    def convolution(self) -> conv2d.Convolution:
        """The call without its tensors."""
        names = (field.name for field in fields(conv2d.Convolution))
        return conv2d.Convolution(**{name: getattr(self, name) for name in names})

    def arguments(self) -> dict:
        """Make random arguments; what the kernel must not read is NaN.

        With ``input_gradient`` the input is the gradient of the output; bias and activation are left out.
        """
        rng = np.random.default_rng([self.seed, *map(ord, repr(self))])
        taps = self.kernel_size[0] * self.kernel_size[1]
        channels = self.in_channels // self.groups
        channel_blocks = -(-channels // self.cols)
        block_rows = -(-self.out_channels // self.rows)
        mask = rng.random((block_rows, taps * channel_blocks)) < self.density
        if 0 < self.density < 1 and block_rows > 1:
            mask[rng.integers(block_rows)] = False  # an empty block row
        if 0 < self.density < 1 and channel_blocks > 1:
            # And an empty list of the input gradient.
            mask[:, rng.integers(channel_blocks) :: channel_blocks] = False
        kept = np.argwhere(mask)
        packed = cast(rng.standard_normal((len(kept), self.cols, self.rows)), self.arithmetic)
        for block, (block_row, column) in zip(packed, kept, strict=True):
            block[channels - column % channel_blocks * self.cols :] = harness.nan_of(packed.dtype)
            block[:, self.out_channels - block_row * self.rows :] = harness.nan_of(packed.dtype)
        size = (self.height, self.width, self.in_channels)
        if self.input_gradient:
            size = (*self.convolution.output_size(), self.out_channels)
        arguments = {
            "input": cast(rng.standard_normal((self.images, *size)), self.arithmetic),
            "packed_values": packed,
            "crow_indices": np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32),
            "col_indices": kept[:, 1].astype(np.int32),
        }
        if self.input_gradient:
            return arguments
        bias = cast(rng.standard_normal(self.out_channels), self.arithmetic) if self.bias else None
        return {**arguments, "bias": bias, "activation": self.activation}

    def output_shape(self) -> tuple[int, ...]:
        """Return the shape of what is computed, channels last."""
        if self.input_gradient:
            return (self.images, self.height, self.width, self.in_channels)
        return (self.images, *self.convolution.output_size(), self.out_channels)

    def run(self, arguments: dict, **options) -> tuple[np.ndarray, list[str]]:
        """Return the kernel's output and the simulator's findings."""
        if not self.input_gradient:
            return conv2d.block_sparse_conv2d(self.convolution, **arguments, **options)
        lists = expected_structure(self, arguments["crow_indices"], arguments["col_indices"])
        return conv2d.block_sparse_conv2d_input_gradient(
            self.convolution, arguments["input"], arguments["packed_values"], lists, **options
        )

    def kernels(self) -> set[str]:
        """Return the names of the kernels that serve the call."""
        kept = len(self.arguments()["packed_values"])
        return {plan["kernel"] for plan in self.convolution.plans(kept, self.input_gradient)}

    def kernel(self) -> str:
        """Return the name of the only kernel that serves the call."""
        (name,) = self.kernels()
        return name

    def expected(self, arguments: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return the output in float64, and the bound of a chain of float32 multiply-adds."""
        images = as_float64(arguments["input"], self.arithmetic).transpose(0, 3, 1, 2)
        # Padding never gets into the dense weight that the twin makes.
        values = as_float64(arguments["packed_values"], self.arithmetic)
        structure = [torch.from_numpy(arguments[name]) for name in ("crow_indices", "col_indices")]

        def convolve(images: np.ndarray, values: np.ndarray) -> np.ndarray:
            if self.in_channels == 0 or self.out_channels == 0:  # torch refuses such weights
                return np.zeros(self.output_shape())
            tensors = (torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(values), *structure)
            names = ("kernel_size", "stride", "padding", "dilation", "groups")
            geometry = {name: getattr(self, name) for name in names}
            if self.input_gradient:
                size = (self.images, self.in_channels, self.height, self.width)
                result = reference.block_sparse_conv2d_input_gradient(*tensors, input_size=size, **geometry)
            else:
                result = reference.block_sparse_conv2d(*tensors, out_channels=self.out_channels, **geometry)
            return result.numpy().transpose(0, 2, 3, 1)

        bias = arguments.get("bias")
        # What is added in float is not rounded to tf32.
        plain = "float32" if self.arithmetic == "tf32" else self.arithmetic
        bias = np.zeros(self.output_shape()[3]) if bias is None else as_float64(bias, plain)
        taps = self.kernel_size[0] * self.kernel_size[1]
        terms = taps * (self.out_channels if self.input_gradient else self.in_channels) // self.groups
        with np.errstate(invalid="ignore"):
            bound = (terms + 2) * EPSILON * (convolve(np.abs(images), np.abs(values)) + np.abs(bias))
            return finished(convolve(images, values) + bias, bound, self.activation, self.arithmetic)

    def check(self, **options) -> tuple[np.ndarray, list[str]]:
        """Return the output, and everything that is wrong with the run, compared with float64."""
        arguments, expected, bound = _problem(self)
        output, findings = self.run(arguments, **options)
        plain = "float32" if self.arithmetic == "tf32" else self.arithmetic
        wrong = np.argwhere(~(np.abs(as_float64(output, plain) - expected) <= bound))
        if len(wrong):
            findings = [*findings, f"{len(wrong)} wrong values, the first at {wrong[0]}"]
        return output, findings

    def faults(self, **options) -> list[str]:
        """Return everything that is wrong with the run."""
        return self.check(**options)[1]


# Schedules and mutants run the same problems again and again.
@functools.lru_cache(maxsize=512)
def _problem(case: Case) -> tuple[dict, np.ndarray, np.ndarray]:
    arguments = case.arguments()
    return arguments, *case.expected(arguments)


def expected_structure(
    case: Case, crow: np.ndarray, col: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lists of the input gradient: offsets, sources and blocks."""
    channel_blocks = -(-(case.in_channels // case.groups) // case.cols)
    rows_per_group = (len(crow) - 1) // case.groups
    ranks = _ranks(case)
    entries = []
    for row, (begin, end) in enumerate(itertools.pairwise(crow)):
        for k in range(begin, end):
            tap, block = divmod(int(col[k]), channel_blocks)
            place, within = ranks[tap]
            list_of_block = row // rows_per_group * channel_blocks + block
            source = within * rows_per_group + row % rows_per_group
            entries.append((list_of_block * len(ranks) + place, source, k))
    entries.sort()
    places = [place for place, _, _ in entries]
    counts = np.bincount(places, minlength=case.groups * channel_blocks * len(ranks))
    offsets = np.concatenate([[0], counts.cumsum()])
    sources, blocks = ([entry[i] for entry in entries] for i in (1, 2))
    return offsets.astype(np.int32), np.array(sources, np.int32), np.array(blocks, np.int32)


def _ranks(case: Case) -> list[tuple[int, int]]:
    """Return the place of each tap, and that within the taps that read inputs of the same phase."""
    height, width = case.kernel_size
    taps = list(itertools.product(range(height), range(width)))
    # The least tap that reads inputs of the same phase stands for all of them.
    firsts = [
        [
            next(k for k in range(tap + 1) if (tap - k) * case.dilation[d] % case.stride[d] == 0)
            for tap in range(case.kernel_size[d])
        ]
        for d in range(2)
    ]
    classes = [(firsts[0][y], firsts[1][x]) for y, x in taps]
    ordered = sorted(range(len(taps)), key=lambda tap: (classes[tap], tap))
    return [
        (
            ordered.index(tap),
            sum(classes[other] == classes[tap] and other < tap for other in range(len(taps))),
        )
        for tap in range(len(taps))
    ]


GEOMETRIES = [
    {"kernel_size": (3, 3)},
    {"kernel_size": (3, 3), "stride": (2, 2)},
    {"kernel_size": (2, 3), "stride": (2, 3), "padding": (3, 0, 1, 2), "dilation": (2, 1)},
    {"kernel_size": (1, 1), "stride": (2, 2), "padding": (0, 0, 0, 0)},
    {"kernel_size": (1, 1), "padding": (1, 0, 0, 2)},
    {"kernel_size": (5, 3), "padding": (2, 2, 2, 2), "dilation": (1, 2)},
    # Of the input of these, some pixels are read by no tap.
    {"kernel_size": (2, 2), "stride": (3, 3), "padding": (0, 1, 1, 0)},
    {"kernel_size": (3, 3), "stride": (4, 6), "padding": (0, 4, 3, 1), "dilation": (2, 4)},
    {"kernel_size": (1, 7), "stride": (1, 2), "padding": (0, 0, 3, 3)},
    {"kernel_size": (3, 3), "padding": (6, 0, 0, 6), "dilation": (3, 3)},
]


def fits(case: Case) -> bool:
    """Tell whether the padded images hold the kernel, and blocks lie within groups."""
    cut = case.groups > 1 and case.out_channels // case.groups % case.rows != 0
    return min(case.convolution.output_size()) > 0 and not cut


def sized(inputs: int, outputs: int, input_gradient: bool = False, **options) -> Case:
    """Return a call by the channels, and the sides of blocks, that its product reads and writes."""
    block = (options.pop("block_outputs", 16), options.pop("block_steps", 16))
    if input_gradient:
        inputs, outputs, block = outputs, inputs, block[::-1]
    return Case(
        in_channels=inputs, out_channels=outputs, rows=block[0], cols=block[1],
        input_gradient=input_gradient, **options,
    )  # fmt: skip


STRUCTURES = [
    *(Case(**geometry) for geometry in GEOMETRIES),
    Case(in_channels=15, out_channels=24, groups=3, rows=4, cols=2, stride=(2, 2)),
    Case(in_channels=6, out_channels=600, rows=2, cols=2, density=0.4),
    Case(in_channels=3, out_channels=513, rows=1, cols=1, stride=(1, 2), density=0.7),
    Case(in_channels=4, out_channels=1024, groups=2, rows=1, cols=2, kernel_size=(1, 2), density=1.0),
    Case(density=0.0),
    Case(density=1.0, stride=(3, 2), dilation=(2, 4), padding=(4, 4, 4, 4)),
]
