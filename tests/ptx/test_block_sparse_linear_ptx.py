"""The PTX of block_sparse_linear.cu, run in the simulator: values, races, bounds, and mutants of it."""

import itertools
import os
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from . import harness
from .mutants import mutants_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
# All combinations of edges, some minutes (`make cuda-check`); else each edge is met alone.
FULL_SWEEP = os.environ.get("FASTPRUNE_PTX_SWEEP") == "full"
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """One call; the kernel's tile is 64 samples x 16 rows, and its step is 32 columns."""

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

    def __str__(self) -> str:
        unusual = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in unusual) or "usual"

    def arguments(self) -> dict:
        """Make random arguments; what the kernel must not read is NaN."""
        rng = np.random.default_rng([self.seed, *map(ord, repr(self))])
        block_rows, block_cols = -(-self.out_features // self.rows), -(-self.in_features // self.cols)
        mask = rng.random((block_rows, block_cols)) < self.density
        if 0 < self.density < 1 and block_rows > 1:
            mask[rng.integers(block_rows)] = False  # an empty block row
        kept = np.argwhere(mask)
        packed = rng.standard_normal((len(kept), self.cols, self.rows)).astype(np.float32)
        for block, (block_row, block_col) in zip(packed, kept, strict=True):
            block[self.in_features - block_col * self.cols :] = np.nan
            block[:, self.out_features - block_row * self.rows :] = np.nan
        memory = np.full((self.samples, self.in_features + self.row_gap), np.nan, np.float32)
        input = memory[:, : self.in_features]
        input[...] = rng.standard_normal(input.shape)
        return {
            "input": input,
            "packed_values": packed,
            "crow_indices": np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32),
            "col_indices": kept[:, 1].astype(np.int32),
            "bias": rng.standard_normal(self.out_features).astype(np.float32) if self.bias else None,
            "out_features": self.out_features,
            "activation": self.activation,
        }


def dense_weight(arguments: dict) -> np.ndarray:
    packed, crow, col = (arguments[name] for name in ("packed_values", "crow_indices", "col_indices"))
    _, cols, rows = packed.shape
    in_features, out_features = arguments["input"].shape[1], arguments["out_features"]
    dense = np.zeros(((len(crow) - 1) * rows, -(-in_features // cols) * cols))
    for block_row, (begin, end) in enumerate(itertools.pairwise(crow)):
        for k in range(begin, end):
            row, column = block_row * rows, col[k] * cols
            dense[row : row + rows, column : column + cols] = packed[k].T
    return dense[:out_features, :in_features]


def wrong_values(arguments: dict, output: np.ndarray) -> list[str]:
    """Compare with float64; the bound is that of a chain of float32 multiply-adds."""
    input, weight = arguments["input"].astype(np.float64), dense_weight(arguments)
    bias = np.zeros(arguments["out_features"]) if arguments["bias"] is None else arguments["bias"]
    expected = input @ weight.T + bias
    magnitude = np.abs(input) @ np.abs(weight).T + np.abs(bias)
    if arguments["activation"] == "relu":
        expected = np.where(expected < 0, 0, expected)
    bound = (input.shape[1] + 2) * EPSILON * magnitude
    wrong = np.argwhere(~(np.abs(output - expected) <= bound))
    return [f"{len(wrong)} wrong values, the first at {wrong[0]}"] if len(wrong) else []


def run(case: Case, **options) -> tuple[np.ndarray, list[str]]:
    arguments = case.arguments()
    output, findings = harness.block_sparse_linear(**arguments, **options)
    return output, findings + wrong_values(arguments, output)


# One below, at and above the steps of each size: 4 warps, 8 and 16 threads, tiles of 64 samples,
# 16 rows and 32 columns.
SAMPLES = [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129]
ROWS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128]
COLS = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128]


def with_blocks(rows: int, cols: int, **sizes: int) -> list[Case]:
    """Three blocks in each direction, once whole and once ragged."""
    out_features, in_features = 3 * rows, 3 * cols
    whole = Case(rows=rows, cols=cols, out_features=out_features, in_features=in_features, **sizes)
    return [whole, replace(whole, out_features=out_features - rows // 2, in_features=in_features - cols // 2)]


EDGES = [
    *(Case(samples=samples) for samples in SAMPLES),
    *(case for rows in ROWS for case in with_blocks(rows, 16)),
    *(case for cols in COLS for case in with_blocks(16, cols)),
    *(Case(out_features=out_features) for out_features in (1, 15, 17, 31, 33)),
    *(Case(in_features=in_features) for in_features in (1, 15, 17, 31, 33)),
    *(Case(density=density, bias=bias) for density in (0.0, 1.0) for bias in (True, False)),
    *(Case(activation=act, bias=bias) for act in ("none", "relu") for bias in (True, False)),
    *(Case(samples=samples, row_gap=7) for samples in (1, 5, 65)),
    Case(samples=70, rows=128, cols=128, out_features=200, in_features=200, density=1.0, activation="relu"),
]
if FULL_SWEEP:
    EDGES += [
        replace(case, activation=activation, bias=bias)
        for samples, rows, cols in itertools.product((1, 65), ROWS, COLS)
        for case, activation, bias in zip(
            with_blocks(rows, cols, samples=samples), ("none", "relu"), (False, True), strict=True
        )
    ]


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_clean_and_right_on_every_schedule(case):
    outputs = []
    for order, seed in SCHEDULES:
        output, findings = run(case, order=order, seed=seed)
        assert findings == []
        outputs.append(output.tobytes())
    assert len(set(outputs)) == 1, "the bits depend on the schedule"


@pytest.mark.parametrize("case", [Case(samples=65, rows=17, cols=33), Case(density=0.0)], ids=str)
def test_hopper_ptx_is_clean_too(case):
    assert run(case, arch="compute_90")[1] == []


def test_empty_output_is_not_launched():
    assert run(Case(samples=0))[1] == []
    assert run(Case(out_features=0))[1] == []


def test_bits_do_not_depend_on_the_other_samples():
    arguments = Case(samples=70, in_features=80, density=1.0).arguments()
    together, _ = harness.block_sparse_linear(**arguments)
    for sample in (0, 15, 63, 64, 69):
        alone = {**arguments, "input": arguments["input"][sample : sample + 1]}
        assert harness.block_sparse_linear(**alone)[0].tobytes() == together[sample].tobytes()


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_the_output(activation, value):
    arguments = Case(samples=3, activation=activation, density=1.0).arguments()
    arguments["input"][1, 5] = value
    output, findings = harness.block_sparse_linear(**arguments)
    assert findings == []
    with np.errstate(invalid="ignore"):
        expected = arguments["input"].astype(np.float64) @ dense_weight(arguments).T + arguments["bias"]
    if activation == "relu":
        expected = np.where(expected < 0, 0, expected)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


# Broken on purpose: these meet every edge of a bound that a thread can be off by one at, with and
# without the bias, for which the compiler makes two copies of the store.
MUTANT_CASES = [
    replace(case, bias=bias)
    for case in (
        Case(),
        Case(samples=65, rows=17, cols=33, in_features=60, out_features=40, activation="relu"),
        Case(samples=63, rows=15, cols=20, in_features=33, out_features=31),
        Case(samples=9, rows=14, cols=16, in_features=16, out_features=14, density=1.0),
        Case(samples=25, rows=14, cols=32, in_features=32, out_features=14, density=1.0),
        Case(samples=40, rows=15, cols=16, in_features=16, out_features=15, density=1.0),
        Case(samples=57, rows=15, cols=32, in_features=32, out_features=15, density=1.0),
        Case(samples=130, rows=3, cols=1, in_features=3, out_features=7, density=1.0),
        Case(samples=17, rows=32, cols=4, in_features=70, out_features=64, density=1.0),
        Case(samples=4, density=0.0),
    )
    for bias in (True, False)
]
# Mutants that compute the same, by what is done to which source line; each stands for one.
EQUIVALENT = {
    ("no guard", "for (int begin = 0; begin < columns; begin += kTileColumns) {"): "no block is empty",
    ("no guard", "for (int c = 0; c < tile_columns; ++c) {"): "no step is empty",
    ("bound + 1", "for (int begin = 0; begin < columns; begin += kTileColumns) {"): "one empty step more",
}


def notices(ptx_transform) -> bool:
    for case in MUTANT_CASES:
        for order in ("forward", "reverse"):
            if run(case, order=order, ptx_transform=ptx_transform, max_instructions=10**6)[1]:
                return True
    return False


def test_every_mutant_is_noticed():
    for case in MUTANT_CASES:
        assert run(case)[1] == [], case
    mutants = mutants_of("block_sparse_linear", "block_sparse_linear_f32")
    kinds = [mutant.kind for mutant in mutants]
    assert kinds.count("no barrier") == 2
    assert min(kinds.count("bound + 1"), kinds.count("no guard"), kinds.count("tile - 1")) > 2
    assert unnoticed(mutants, notices, EQUIVALENT) == []
