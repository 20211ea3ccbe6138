"""The PTX of the tensor-core kernels of block_sparse_linear, run in the simulator, and mutants of it."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from . import harness
from . import harness_block_sparse_linear as linear
from .block_sparse_linear_cases import SCHEDULES, Case, with_blocks
from .mutants import Mutant, Runs, mutants_of, sample_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP

# Multiprocessors that make the plan take, from 129 samples on, tiles of 256 x 64, or of 64 x 64.
LARGE, SMALL = 1, 10**6
# One below, at and above the rows of a fragment, of a warp and of a tile. Blocks of 16 outputs have the
# kernel of few samples up to 128, those of 64 up to 32.
SAMPLES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129]
LARGE_SAMPLES = [129, 143, 144, 145, 159, 160, 161, 191, 192, 193, 223, 224, 225, 255, 256, 257]
SIDES = [16, 32, 48, 64, 80, 96, 112, 128]
ARITHMETICS = ["float16", "bfloat16", "tf32"]
TILES = ["few_samples", "few_samples_narrow", "64x64_by_16", "64x64_by_16_narrow"]
TILES += [f"256x64_by_{strip}" for strip in (16, 32, 64)]


def sized(inputs: int, outputs: int, input_gradient: bool = False, **options) -> Case:
    """Return a call by the features that its product reads and writes; rows of 8 inputs are aligned."""
    in_features, out_features = (outputs, inputs) if input_gradient else (inputs, outputs)
    return Case(in_features=in_features, out_features=out_features, input_gradient=input_gradient, **options)


def kernel_cases(**options) -> list[Case]:
    """Calls that go to each tile, with edges of every kind."""
    return [
        *(sized(inputs, 91, samples=16, rows=32, cols=48, **options) for inputs in (151, 152)),
        *(
            sized(inputs, 131, samples=133, rows=32, cols=16, multiprocessors=SMALL, **options)
            for inputs in (127, 136)
        ),
        sized(72, 129, samples=129, **options),
        sized(88, 150, samples=161, rows=32, cols=32, density=0.4, **options),
        sized(192, 129, samples=145, rows=64, cols=64, density=0.6, **options),
        sized(136, 257, samples=257, rows=128, cols=128, density=0.7, **options),
    ]


EDGES = [
    *(
        case
        for arithmetic, input_gradient in itertools.product(ARITHMETICS, (False, True))
        for case in kernel_cases(arithmetic=arithmetic, input_gradient=input_gradient)
    ),
    *(
        Case(samples=samples, rows=rows, arithmetic="bfloat16", multiprocessors=SMALL)
        for samples in SAMPLES
        for rows in (16, 64)
    ),
    *(Case(samples=samples, arithmetic="float16", out_features=129) for samples in LARGE_SAMPLES),
    *(
        replace(case, arithmetic="bfloat16", samples=130, input_gradient=input_gradient)
        for side, input_gradient in itertools.product(SIDES, (False, True))
        for case in with_blocks(side, 144 - side)
    ),
    *(
        Case(arithmetic="tf32", samples=samples, activation=activation, bias=bias, out_features=200)
        for samples in (9, 140)
        for activation in harness.ACTIVATIONS
        for bias in (False, True)
    ),
    *(
        Case(arithmetic="bfloat16", samples=samples, in_features=features, out_features=features + 1)
        for samples, all_features in (
            (20, (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 24, 31, 33, 40)),
            (130, (8, 24, 32, 40, 56)),
        )
        for features in all_features
    ),
    # Rows of the input that are and are not aligned to 16 bytes.
    *(
        Case(arithmetic=arithmetic, samples=samples, row_gap=row_gap, in_features=40)
        for arithmetic, samples, row_gap in itertools.product(("float16", "tf32"), (5, 70, 140), (1, 2, 8))
    ),
    *(
        Case(arithmetic=arithmetic, samples=samples, density=density, input_gradient=input_gradient)
        for arithmetic, samples, density, input_gradient in itertools.product(
            ("float16", "tf32"), (5, 40, 140), (0.0, 1.0), (False, True)
        )
    ),
]
if FULL_SWEEP:
    EDGES += [
        replace(case, arithmetic=arithmetic, input_gradient=input_gradient, activation=activation, bias=bias)
        for arithmetic, input_gradient, samples, rows, cols in itertools.product(
            ARITHMETICS, (False, True), (3, 65), SIDES, (16, 80)
        )
        for case, activation, bias in zip(
            with_blocks(rows, cols, samples=samples), ("none", "relu"), (False, True), strict=True
        )
        if not input_gradient or activation == "none"
    ]


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
    name = "block_sparse_linear_input_gradient" if input_gradient else "block_sparse_linear"
    for arithmetic, type in (("float16", "f16"), ("bfloat16", "bf16"), ("tf32", "tf32")):
        cases = kernel_cases(arithmetic=arithmetic, input_gradient=input_gradient)
        assert {case.kernel() for case in cases} == {f"{name}_{type}_{tile}" for tile in TILES}


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_hopper_ptx_is_clean_too(arithmetic, input_gradient):
    for case in kernel_cases(arithmetic=arithmetic, input_gradient=input_gradient):
        assert case.check(arch="compute_90")[1] == [], case


@pytest.mark.parametrize("samples", [5, 70])
@pytest.mark.parametrize(("arithmetic", "misalign"), [("bfloat16", 2), ("float16", 8), ("tf32", 4)])
def test_an_input_that_begins_anywhere(samples, arithmetic, misalign):
    assert Case(samples=samples, arithmetic=arithmetic).check(misalign_input=misalign)[1] == []


@pytest.mark.parametrize(("arithmetic", "misalign"), [("bfloat16", 2), ("float16", 8), ("float32", 4)])
def test_weights_that_begin_anywhere(arithmetic, misalign):
    for input_gradient in (False, True):
        case = Case(samples=20, arithmetic=arithmetic, input_gradient=input_gradient)
        assert case.check(misalign_weight=misalign, allow_tf32=True)[1] == []


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bits_depend_neither_on_the_tile_nor_on_the_other_samples(arithmetic, input_gradient):
    case = Case(
        samples=140, rows=64, cols=64, in_features=256, out_features=256, arithmetic=arithmetic,
        input_gradient=input_gradient,
    )  # fmt: skip
    arguments = case.arguments()
    large, _ = case.run(arguments)
    small, _ = case.run(arguments, multiprocessors=SMALL)
    assert large.tobytes() == small.tobytes()
    part = {**arguments, "input": arguments["input"][100:137]}
    assert case.run(part)[0].tobytes() == large[100:137].tobytes()
    few = [
        case.run({**arguments, "input": arguments["input"][i:j]})[0] for i, j in ((0, 32), (3, 4), (11, 30))
    ]
    assert few[1].tobytes() == few[0][3:4].tobytes()
    assert few[2].tobytes() == few[0][11:30].tobytes()


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_output(samples, value):
    case = Case(samples=samples, arithmetic="float16", activation="relu", density=1.0)
    arguments = case.arguments()
    arguments["input"][1, 5] = value
    output, findings = case.run(arguments)
    assert findings == []
    expected, _ = case.expected(arguments)
    np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(output), np.isinf(expected))


def test_shared_memory_is_read_without_bank_conflicts():
    for arithmetic, input_gradient in itertools.product(ARITHMETICS, (False, True)):
        case = Case(
            samples=256, rows=64, cols=64, in_features=128, out_features=128, density=1.0,
            arithmetic=arithmetic, input_gradient=input_gradient,
        )  # fmt: skip
        for multiprocessors in (LARGE, SMALL):
            assert case.run(case.arguments(), multiprocessors=multiprocessors)[1] == []
            assert harness.last_stats()["ldmatrix_bank_conflicts"] == 0
            assert harness.last_stats()["smem_bank_conflicts"] == 0


# Broken on purpose: one instantiation of each kernel template.
MUTATED = [
    ("bfloat16", False, "64x64_by_16"),
    ("tf32", True, "64x64_by_16"),
    ("bfloat16", True, "64x64_by_16_narrow"),
    ("tf32", False, "few_samples"),
    ("float16", True, "few_samples"),
    ("float16", False, "few_samples_narrow"),
]


def mutant_cases(arithmetic: str, input_gradient: bool, tile: str) -> list[Case]:
    def call(inputs: int, outputs: int, activation: str = "none", **options) -> Case:
        options |= {"arithmetic": arithmetic, "multiprocessors": SMALL, "input_gradient": input_gradient}
        return sized(inputs, outputs, activation="none" if input_gradient else activation, **options)

    odd = 1 if tile.endswith("narrow") else 0
    # A last chunk of any length, aligned or not, that the code before the loop copies, or that in the loop,
    # first or second of a stage; the other kernels have whole chunks alone.
    chunk = 1 if odd else 4 if arithmetic == "tf32" else 8
    ring = 256 if arithmetic == "tf32" else 640  # columns, of all warps for few samples
    lasts = [(129, 32), (129, 256), (9, 16), (9, ring + 16)]
    cases = [
        *(
            case
            for samples, width in ((134, 232), (27, 704))
            for case in (
                call(width + odd, 72, samples=samples, activation="relu"),
                call(width - 8 - odd, 62, samples=samples - 5, rows=32, cols=48, bias=False),
                call(40 + odd, 41, samples=samples, row_gap=3 * odd),
                call(48 + odd, 48, samples=samples, density=0.0),
                call(48 + odd, 60, samples=samples, density=1.0, activation="relu6"),
                call(48 + odd, 61, samples=samples, density=1.0, activation="gelu"),
                call(48 + odd, 63, samples=samples, density=1.0, activation="gelu_tanh"),
                call(48 + odd, 64, samples=samples, density=1.0, activation="silu"),
                call(width + odd, 224, samples=samples, cols=32, rows=32),
                call(96 + odd, 96, samples=samples, rows=48, cols=48, density=0.6),
            )
        ),
        # Blocks that begin in any slot of a stage, and strips that end before their neighbours.
        *(
            call(6 * steps + odd, 64, samples=samples, cols=cols, rows=rows, density=0.4, seed=seed)
            for steps in (16, 32, 48, 64, 80)
            for rows, cols in [(steps, 16) if input_gradient else (16, steps)]
            for seed, samples in ((0, 129), (1, 129), (2, 129), (3, 20))
        ),
        # More slots than the rings of all warps hold, also of blocks whose slots do not divide eight.
        call(1600 + odd, 16, samples=15, density=1.0),
        call(1600 + odd, 48, samples=15, rows=48, cols=48, density=1.0),
        *(
            call(width, 64, samples=samples, row_gap=gap, density=1.0)
            for samples, last in lasts
            for width in range(last - (32 if samples > 16 else 16) + chunk, last + 1, chunk)
            for gap in ((-width % 16 + 1, -width % 16 + 8) if odd else (0, 8))
        ),
    ]
    return [case for case in cases if case.kernel().endswith(tile)]


# Mutants that compute the same, by what is done to which source line.
EQUIVALENT = {
    ("bound + 1", "return max(0, min(end, kChunkElements<T>));"): "where both are equal either is right",
    ("no guard", "if (together) {"): "where rows of the output are aligned, all four outputs exist",
}

# The same of input gradients, which have no activation.
EQUIVALENT_WITHOUT_ACTIVATION = EQUIVALENT | dict.fromkeys(
    [
        ("no guard", "if (activation == Activation::kRelu) return positive;"),
        ("no guard", "if (activation == Activation::kRelu6) return positive > 6.0f ? 6.0f : positive;"),
        ("no guard", "if (activation == Activation::kGelu) {"),
        ("no guard", "if (activation == Activation::kGeluTanh) {"),
    ],
    "the guard before it returns first",
)


def equivalent_in(cases: list[Case]) -> dict[tuple[str, str], str]:
    return EQUIVALENT_WITHOUT_ACTIVATION if cases[0].input_gradient else EQUIVALENT


def unnoticed_in(cases: list[Case], mutants: list[Mutant]) -> list[tuple[str, str]]:
    runs = Runs(
        mutants,
        [functools.partial(case.faults, order=order) for case in cases for order in ("forward", "reverse")],
    )
    changes = [(mutant.kind, mutant.where) for mutant in mutants]
    missed = unnoticed(mutants, runs, [change for change in changes if change in equivalent_in(cases)])
    assert runs.faults == []
    return missed


@pytest.mark.parametrize(("arithmetic", "input_gradient", "tile"), MUTATED)
def test_every_barrier_and_every_wait_is_needed(arithmetic, input_gradient, tile):
    cases = mutant_cases(arithmetic, input_gradient, tile)
    assert len(cases) >= 3
    kernel = cases[0].kernel()
    mutants = [m for m in mutants_of(linear.source_of(kernel), kernel) if m.kind in ("no barrier", "no wait")]
    assert {mutant.kind for mutant in mutants} == {"no barrier", "no wait"}
    assert unnoticed_in(cases, mutants) == []


@pytest.mark.parametrize(
    ("arithmetic", "input_gradient", "tile"),
    [
        ("bfloat16", False, "64x64_by_16"),
        ("bfloat16", False, "64x64_by_16_narrow"),
        ("bfloat16", True, "64x64_by_16_narrow"),
        ("tf32", False, "few_samples"),
    ],
)
def test_every_mutant_is_noticed(arithmetic, input_gradient, tile):
    cases = mutant_cases(arithmetic, input_gradient, tile)
    kernel = cases[0].kernel()
    mutants = mutants_of(linear.source_of(kernel), kernel)
    assert {"no barrier", "no wait", "bound + 1", "no guard"} <= {m.kind for m in mutants}
    chosen = mutants if FULL_SWEEP else sample_of(mutants, 16, equivalent_in(cases))
    assert unnoticed_in(cases, chosen) == []
