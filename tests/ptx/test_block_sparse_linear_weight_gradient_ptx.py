"""The PTX of block_sparse_linear_weight_gradient.cu in the simulator: values, races, bounds, mutants."""

import functools
import itertools
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from . import harness
from .gradient_cases import (
    BF16_COLUMNS,
    EPSILON,
    OPERAND_ROUNDING,
    RESULT_ROUNDING,
    SEARCH,
    TF32_COLUMNS,
    convert,
    of_whole_chunks,
    random_structure,
    unnoticed_mutants,
)
from .harness_weight_gradient import OP, block_sparse_linear_weight_gradient, to_float

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP
SCHEDULES = harness.SCHEDULES


@dataclass(frozen=True)
class Case:
    """One call; a thread block's tile is 128 kept columns of a block row."""

    kind: str = "bf16"
    samples: int = 40
    in_features: int = 80
    out_features: int = 48
    rows: int = 16
    cols: int = 16
    density: float = 0.6
    row_gap: int = 0  # elements between the rows of both operands
    poisoned: bool = False  # every operand is NaN, and every gradient but its padding
    offset: int = 0  # of both operands, after a multiple of 16 bytes
    seed: int = 0

    def __str__(self) -> str:
        unusual = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in unusual) or "usual"

    def operand(self, rng: np.random.Generator, features: int) -> np.ndarray:
        dense = rng.standard_normal((self.samples, features + self.row_gap)) + (
            np.nan if self.poisoned else 0
        )
        return convert(dense, self.kind)[:, :features]

    def arguments(self) -> dict:
        """Make random arguments, with an empty block row where some blocks are lost."""
        rng = np.random.default_rng([self.seed, *map(ord, repr(self))])
        grid = (-(-self.out_features // self.rows), -(-self.in_features // self.cols))
        crow_indices, col_indices = random_structure(rng, grid, self.density)
        return {
            "grad_output": self.operand(rng, self.out_features),
            "input": self.operand(rng, self.in_features),
            "crow_indices": crow_indices,
            "col_indices": col_indices,
            "blocksize": (self.rows, self.cols),
            "allow_tf32": self.kind == "tf32",
            "offset": self.offset,
        }


def kept_blocks(dense: np.ndarray, arguments: dict) -> np.ndarray:
    """Return the kept blocks ``[kept, cols, rows]`` of a matrix ``[in_features, out_features]``."""
    crow, col, (rows, cols) = (arguments[name] for name in ("crow_indices", "col_indices", "blocksize"))
    blocks = np.zeros((len(col), cols, rows))
    for block_row, (begin, end) in enumerate(itertools.pairwise(crow)):
        for k in range(begin, end):
            part = dense[col[k] * cols :, block_row * rows :][:cols, :rows]
            blocks[k, : part.shape[0], : part.shape[1]] = part
    return blocks


# Schedules and mutants run the same problems again and again.
@functools.lru_cache(maxsize=512)
def problem(case: Case) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return arguments, the gradient in float64, and the bound of a chain of float32 multiply-adds."""
    arguments = case.arguments()
    grad_output, input = to_float(arguments["grad_output"]), to_float(arguments["input"])
    expected = kept_blocks(input.T @ grad_output, arguments)
    magnitude = kept_blocks(np.abs(input).T @ np.abs(grad_output), arguments)
    relative = (len(input) + 2) * EPSILON + 2.001 * OPERAND_ROUNDING[case.kind]
    bound = relative * magnitude + RESULT_ROUNDING[case.kind] * (1 + relative) * np.abs(expected)
    return arguments, expected, bound


def run(case: Case, **options) -> tuple[np.ndarray, list[str], dict]:
    arguments, expected, bound = problem(case)
    output, findings, plan = block_sparse_linear_weight_gradient(**arguments, **options)
    values = to_float(output)
    wrong = np.argwhere(~(np.abs(values - expected) <= bound) & ~(np.isnan(values) & np.isnan(expected)))
    if len(wrong):
        findings = [*findings, f"{len(wrong)} wrong values, the first at {wrong[0]}"]
    return output, findings, plan


def with_blocks(kind: str, rows: int, cols: int, **sizes: int) -> list[Case]:
    """Two block rows, three block columns: whole, ragged, which is narrow too, and ragged in whole chunks."""
    whole = Case(kind=kind, rows=rows, cols=cols, out_features=2 * rows, in_features=3 * cols, **sizes)
    ragged = {"out_features": 2 * rows - rows // 2 - 1, "in_features": 3 * cols - cols // 2 - cols % 2}
    chunks = {name: size + -size % 8 for name, size in ragged.items()}
    return [whole, replace(whole, **ragged), replace(whole, **chunks, row_gap=8)]


# One below, at and above a fragment, a stage (16 of float32, 32 of 16 bits), the stages that are
# under way (3 and 4), and the samples from which there are two and three slices.
SAMPLES = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 161]
SLICES = [255, 256, 257, 511, 512, 513, 767, 768, 769]
TENSOR_CORE_BLOCKS = [16, 32, 48, 64, 80, 96, 112, 128]
PLAIN_BLOCKS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128]
KINDS = ["bf16", "f16", "tf32"]

EDGES = [
    *(case for kind in KINDS for size in (16, 32, 64, 128) for case in with_blocks(kind, size, size)),
    *(case for kind in ("f32", "bf16") for sizes in ((5, 3), (40, 7)) for case in with_blocks(kind, *sizes)),
    *(Case(kind=kind, samples=samples) for kind in ("bf16", "tf32", "f32") for samples in (1, 17, 33, 129)),
    *(Case(kind=kind, samples=513, in_features=30, out_features=16) for kind in ("bf16", "f32")),
    Case(density=0.0),
    Case(density=1.0, in_features=272, row_gap=8),
    Case(kind="f16", offset=1),
    Case(kind="tf32", offset=3),
    # More block rows than a warp looks at in one step.
    Case(kind="f32", rows=1, cols=2, out_features=70, in_features=20),
]
if FULL_SWEEP:
    EDGES += [
        *(Case(kind=kind, samples=samples) for kind in (*KINDS, "f32") for samples in SAMPLES),
        *(
            Case(kind=kind, samples=samples, in_features=30, out_features=16)
            for kind in (*KINDS, "f32", "f16")
            for samples in SLICES
        ),
        *(
            case
            for rows, cols in itertools.product(TENSOR_CORE_BLOCKS, TENSOR_CORE_BLOCKS)
            for case in with_blocks(KINDS[(rows + cols) // 16 % 3], rows, cols)
        ),
        *(
            case
            for size in PLAIN_BLOCKS
            for other in (1, 5, 16, 33)
            for case in with_blocks("f32", size, other) + with_blocks("f16", other, size)
        ),
        # The tiles of a block row end below, at and above its columns, and begin anywhere.
        *(
            Case(kind=kind, samples=5, rows=16, cols=16, in_features=features, density=density)
            for kind in ("bf16", "f32")
            for features in (1, 15, 17, 112, 127, 128, 129, 144, 256, 257, 272)
            for density in (0.5, 1.0)
        ),
        *(Case(kind=kind, row_gap=gap) for kind in (*KINDS, "f32") for gap in (1, 2, 4, 7, 8)),
        *(Case(kind=kind, offset=offset) for kind in KINDS for offset in range(1, 9)),
        *(
            Case(kind="f32", samples=2, rows=1, cols=1, out_features=block_rows, in_features=2)
            for block_rows in (1, 2, 31, 32, 33, 34, 63, 64, 65, 1023, 1024, 1025, 1026)
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
    for case in with_blocks(kind, 16, 32):
        assert run(case, arch="compute_90")[1] == []


def test_each_type_takes_the_kernel_that_it_should():
    kernels = {
        run(case)[2]["product"]["kernel"].removeprefix(f"{OP}_")
        for kind in (*KINDS, "f32")
        for rows in (16, 8)
        for case in (Case(kind=kind, rows=rows, out_features=2 * rows),)
    }
    assert kernels == {"bf16_16", "f16_16", "tf32_16"} | {
        f"plain_{name}_16" for name in ("bf16", "f16", "f32")
    }
    assert run(Case(row_gap=1))[2]["product"]["kernel"] == f"{OP}_bf16_16_narrow"


@pytest.mark.parametrize("kind", [*KINDS, "f32"])
def test_no_samples_give_zeros_and_no_blocks_launch_nothing(kind):
    output, findings, _ = run(Case(kind=kind, samples=0))
    assert findings == []
    assert output.size > 0
    assert not output.any()
    assert run(Case(kind=kind, density=0.0))[2]["product"]["grid"][0] == 0


@pytest.mark.parametrize("kind", [*KINDS, "f32"])
def test_infinity_and_nan_stay_in_their_row_or_column_and_out_of_the_padding(kind):
    case = Case(kind=kind, in_features=75, out_features=43, density=1.0)
    arguments = case.arguments()
    clean = to_float(block_sparse_linear_weight_gradient(**arguments)[0])
    arguments["grad_output"][3, 40] = convert(np.array(np.inf), kind)
    arguments["input"][5, 70] = convert(np.array(np.nan), kind)
    output, findings, _ = block_sparse_linear_weight_gradient(**arguments)
    assert findings == []
    touched = np.zeros((75, 43))
    touched[:, 40] = touched[70] = 1
    touched = kept_blocks(touched, arguments) != 0
    np.testing.assert_array_equal(~np.isfinite(to_float(output)), touched)
    np.testing.assert_array_equal(to_float(output)[~touched], clean[~touched])


@pytest.mark.parametrize("kind", ["bf16", "tf32", "f32"])
def test_bits_depend_neither_on_the_other_blocks_nor_on_the_alignment(kind):
    arguments = Case(kind=kind, density=1.0, samples=70, in_features=144).arguments()
    together = block_sparse_linear_weight_gradient(**arguments)[0].reshape(3, 9, 16, 16)
    for block in (0, 7, 8):
        crow, col = np.array([0, 0, 1, 1], np.int32), np.array([block], np.int32)
        alone = {**arguments, "crow_indices": crow, "col_indices": col, "offset": block % 4}
        assert block_sparse_linear_weight_gradient(**alone)[0].tobytes() == together[1, block].tobytes()


def mutant_cases(kind: str) -> list[Case]:
    """Meet every edge of a bound that a thread can be off by one at; the first find most."""
    rows, cols = (13, 5) if kind == "f32" else (16, 16)
    stage = 32 if kind in ("bf16", "f16") else 16
    one = Case(kind=kind, rows=rows, cols=cols, out_features=rows, in_features=cols, density=1.0)
    # On tensor cores rows end with a whole chunk of 16 bytes; others take the narrow kernels.
    chunk = {"f32": 1, "tf32": 4}.get(kind, 8)
    ends = [stage * step + stage * eighth // 8 for step in range(5) for eighth in (1, 3, 5, 7)]
    edges = [(35, 6), (41, 7), (52, 14), (62, 15), (35, 12), (35, 13)]
    if kind == "f32":
        ends = list(range(1, 33))
        edges = [(21 + row, row) for row in range(1, 13)]
    cases = [
        replace(one, samples=4 * stage + 1, in_features=9 * cols - 1, out_features=2 * rows - 1, density=0.7),
        replace(one, samples=513, in_features=2 * cols - 7 % cols, out_features=2 * rows - 2),
        *(replace(one, samples=samples) for samples in (0, *ends)),
        *(
            replace(one, samples=samples, in_features=wide, out_features=high, poisoned=True)
            for samples in (3, 512)
            for wide, high in edges
        ),
        *(
            replace(one, samples=samples, in_features=blocks * cols)
            for samples in (3, 512)
            for blocks in ((2, 3, 4, 5) if kind == "f32" else (2, 3))
        ),
        *(
            replace(one, samples=samples, rows=high, out_features=2 * high)
            for samples in (3, 512)
            for high in ((13, 14, 15, 12) if kind == "f32" else ())
        ),
        replace(one, samples=3, in_features=25 * cols + 3, out_features=2 * rows - 5),
        replace(one, samples=3, in_features=2 * cols, out_features=35 * rows, density=0.5),
    ]
    return [
        replace(
            case,
            in_features=case.in_features + -case.in_features % chunk,
            out_features=case.out_features + -case.out_features % chunk,
        )
        for case in cases
    ]


EXISTS = "return input_column(args.gradient, tile, column) < args.gradient.input.cols;"
# Stages of zeros after the last, which nobody reads.
STAGES = {("bound + 1", "if (step < steps) {"): 3}
# One step of zeros: where there are no samples, and after the last sample.
STEPS = {
    (
        "no guard",
        "for (int begin = 0, parity = 0; begin < slice.samples; begin += kPlainStep, parity ^= 1) {",
    ): 1,
    ("bound + 1", "const bool exists = input && sample < samples;"): 1,  # the loop's own end
}


def faults(case: Case, **options) -> list[str]:
    return run(case, **options)[1]


def every_mutant_is_noticed(kernel: str, cases: list[Case], equivalent: dict, step: str = "product") -> None:
    runs = [
        functools.partial(faults, case, order=order, transformed=step)
        for order, some in (("forward", cases), ("reverse", cases[:2]))
        for case in some
    ]
    assert unnoticed_mutants(f"{OP}_{kernel}", runs, equivalent) == ([], [])


def test_every_mutant_on_tensor_cores_is_noticed():
    every_mutant_is_noticed(
        "bf16_16",
        mutant_cases("bf16"),
        {**SEARCH, **STAGES, **BF16_COLUMNS, **of_whole_chunks("bf16", EXISTS, 2)},
    )


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_every_mutant_of_tf32_is_noticed():
    every_mutant_is_noticed(
        "tf32_16",
        mutant_cases("tf32"),
        {**SEARCH, **STAGES, **TF32_COLUMNS, **of_whole_chunks("tf32", EXISTS, 2)},
    )


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_every_mutant_of_the_plain_kernel_is_noticed():
    every_mutant_is_noticed("plain_f32_16", mutant_cases("f32"), {**SEARCH, **STEPS})


def test_every_mutant_of_the_sum_of_slices_is_noticed():
    block = Case(out_features=16, in_features=16, density=1.0)
    cases = [replace(block, samples=256 * slices) for slices in range(2, 11)]
    cases.append(replace(block, samples=512, rows=5, cols=3))  # not a whole number of thread blocks
    # There are two slices or more.
    slices = "for (int64_t s = 1; s < args.slices; ++s) sum += args.partial_sums[s * args.size + i];"
    every_mutant_is_noticed("sum_bf16", cases, {("no guard", slices): 1}, "sum")
