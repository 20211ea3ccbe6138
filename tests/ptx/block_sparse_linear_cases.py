"""Calls of block_sparse_linear in the simulator, and what is wrong with their results, against float64."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, fields, replace

import numpy as np

from . import harness
from . import harness_block_sparse_linear as linear

SCHEDULES = harness.SCHEDULES
EPSILON = float(np.finfo(np.float32).eps)
# Relative rounding of a stored result, and the smallest step of subnormal ones.
STORED = {"float32": (0.0, 0.0), "tf32": (0.0, 0.0), "float16": (2**-11, 2**-25), "bfloat16": (2**-8, 0.0)}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 values rounded to bfloat16, as uint16."""
    return harness._ptxsim().to_bf16(values)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    # To nearest, ties away from zero; infinities and NaN keep their upper bits.
    bits = values.view(np.uint32)
    rounded = np.where(np.isfinite(values), bits + np.uint32(0x1000), bits) & np.uint32(0xFFFFE000)
    return rounded.view(np.float32)


def as_float64(array: np.ndarray, arithmetic: str) -> np.ndarray:
    """Return what the kernels multiply."""
    if arithmetic == "bfloat16":
        return harness._ptxsim().from_bf16(array).astype(np.float64)
    return (_to_tf32(array) if arithmetic == "tf32" else array).astype(np.float64)


def cast(values: np.ndarray, arithmetic: str) -> np.ndarray:
    """Return float64 values in the type of an arithmetic."""
    values = values.astype(np.float32)
    if arithmetic == "bfloat16":
        return to_bfloat16(values)
    return values.astype(np.float16) if arithmetic == "float16" else values


@dataclass(frozen=True)
class Case:
    """One call."""

    samples: int = 5
    in_features: int = 48
    out_features: int = 48
    rows: int = 16
    cols: int = 16
    density: float = 0.5
    bias: bool = True
    activation: str = "none"
    row_gap: int = 0  # elements between the rows of the input
    seed: int = 0
    arithmetic: str = "float32"
    input_gradient: bool = False
    multiprocessors: int = 1

    def __str__(self) -> str:
        unusual = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in unusual) or "usual"

    def cast(self, values: np.ndarray) -> np.ndarray:
        """Return float64 values in the type that the kernel takes."""
        return cast(values, self.arithmetic)

    def arguments(self) -> dict:
        """Make random arguments; what the kernel must not read is NaN.

        With ``input_gradient`` the input is the gradient of the output; bias and activation are left out.
        """
        rng = np.random.default_rng([self.seed, *map(ord, repr(self))])
        block_rows, block_cols = -(-self.out_features // self.rows), -(-self.in_features // self.cols)
        mask = rng.random((block_rows, block_cols)) < self.density
        if 0 < self.density < 1 and block_rows > 1:
            mask[rng.integers(block_rows)] = False  # an empty block row
        if 0 < self.density < 1 and block_cols > 1:
            mask[:, rng.integers(block_cols)] = False
        kept = np.argwhere(mask)
        packed = self.cast(rng.standard_normal((len(kept), self.cols, self.rows)))
        for block, (block_row, block_col) in zip(packed, kept, strict=True):
            block[self.in_features - block_col * self.cols :] = harness.nan_of(packed.dtype)
            block[:, self.out_features - block_row * self.rows :] = harness.nan_of(packed.dtype)
        features = self.out_features if self.input_gradient else self.in_features
        memory = self.cast(np.full((self.samples, features + self.row_gap), np.nan))
        input = memory[:, :features]
        input[...] = self.cast(rng.standard_normal(input.shape))
        structure = {
            "input": input,
            "packed_values": packed,
            "crow_indices": np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32),
            "col_indices": kept[:, 1].astype(np.int32),
        }
        if self.input_gradient:
            return structure
        return {
            **structure,
            "bias": self.cast(rng.standard_normal(self.out_features)) if self.bias else None,
            "out_features": self.out_features,
            "activation": self.activation,
        }

    def run(self, arguments: dict, **options) -> tuple[np.ndarray, list[str]]:
        """Return the kernel's output and the simulator's findings."""
        if self.arithmetic == "tf32":
            options["allow_tf32"] = True
        options = {"multiprocessors": self.multiprocessors, **options}
        if not self.input_gradient:
            return linear.block_sparse_linear(**arguments, **options)
        lists = transposed(
            arguments["crow_indices"], arguments["col_indices"], -(-self.in_features // self.cols)
        )
        return linear.block_sparse_linear_input_gradient(
            arguments["input"], arguments["packed_values"], lists, self.in_features, **options
        )

    def kernel(self) -> str:
        """Return the name of the kernel that serves the call."""
        arguments = self.arguments()
        features = self.in_features if self.input_gradient else self.out_features
        allow_tf32 = self.arithmetic == "tf32"
        return linear.plan_of(
            *(arguments["input"], arguments["packed_values"], features, allow_tf32),
            *(self.input_gradient, self.multiprocessors),
        )["kernel"]

    def dense_weight(self, arguments: dict) -> np.ndarray:
        """Return the weight in float64."""
        packed = as_float64(arguments["packed_values"], self.arithmetic)
        crow, col = arguments["crow_indices"], arguments["col_indices"]
        _, cols, rows = packed.shape
        dense = np.zeros(((len(crow) - 1) * rows, -(-self.in_features // cols) * cols))
        for block_row, (begin, end) in enumerate(itertools.pairwise(crow)):
            for k in range(begin, end):
                row, column = block_row * rows, col[k] * cols
                dense[row : row + rows, column : column + cols] = packed[k].T
        return dense[: self.out_features, : self.in_features]

    def expected(self, arguments: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return the output in float64, and the bound of a chain of float32 multiply-adds."""
        input, weight = as_float64(arguments["input"], self.arithmetic), self.dense_weight(arguments)
        weight = weight if self.input_gradient else weight.T
        bias = arguments.get("bias")
        # What is added in float is not rounded to tf32.
        plain = "float32" if self.arithmetic == "tf32" else self.arithmetic
        bias = np.zeros(weight.shape[1]) if bias is None else as_float64(bias, plain)
        with np.errstate(invalid="ignore"):
            expected = input @ weight + bias
            bound = (input.shape[1] + 2) * EPSILON * (np.abs(input) @ np.abs(weight) + np.abs(bias))
            return finished(expected, bound, self.activation, self.arithmetic)

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


def finished(
    expected: np.ndarray, bound: np.ndarray, activation: str, arithmetic: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values after an activation and the rounding of what is stored, and their bounds."""
    if activation == "relu":
        expected = np.where(expected < 0, 0, expected)
    elif activation == "relu6":
        expected = np.clip(expected, 0, 6)
    elif activation != "none":
        # Slopes stay below 1.13; the kernels' erfc and exp add some 1e-7 of the magnitude.
        bound = 1.13 * bound + 5e-7 * np.abs(expected)
        expected = _CURVED[activation](expected)
    relative, absolute = STORED[arithmetic]
    return expected, bound + relative * np.abs(expected) + absolute


_erf = np.vectorize(math.erf)
_CURVED = {
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def transposed(
    crow: np.ndarray, col: np.ndarray, block_cols: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return offsets, sources and blocks of the block columns."""
    block_row = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    blocks = np.lexsort((block_row, col))
    offsets = np.concatenate([[0], np.bincount(col, minlength=block_cols).cumsum()])
    return offsets.astype(np.int32), block_row[blocks].astype(np.int32), blocks.astype(np.int32)


def with_blocks(rows: int, cols: int, **options) -> list[Case]:
    """Three blocks in each direction, once whole and once ragged."""
    out_features, in_features = 3 * rows, 3 * cols
    whole = Case(rows=rows, cols=cols, out_features=out_features, in_features=in_features, **options)
    return [whole, replace(whole, out_features=out_features - rows // 2, in_features=in_features - cols // 2)]
