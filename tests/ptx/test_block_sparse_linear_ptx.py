"""The PTX of block_sparse_linear.cu, run in the simulator: values, races, bounds, and mutants of it."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from . import harness
from .block_sparse_linear_cases import SCHEDULES, Case, with_blocks
from .mutants import Runs, mutants_of, sample_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP

# The kernel's tile is 64 samples x 16 outputs, and its step is 32 columns.
# One below, at and above the steps of each size: 4 warps, 8 and 16 threads, tiles of 64 samples,
# 16 rows and 32 columns.
SAMPLES = [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129]
ROWS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128]
COLS = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128]


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
    *(Case(activation=activation) for activation in ("relu6", "gelu", "gelu_tanh", "silu")),
    # The input gradient, and 16-bit types with blocks that the tensor cores do not take.
    *(
        replace(case, input_gradient=True)
        for sides in ((16, 16), (17, 33), (1, 8), (128, 5))
        for case in with_blocks(*sides, samples=65)
    ),
    *(
        Case(arithmetic=arithmetic, rows=rows, cols=cols, out_features=40, in_features=60, **options)
        for arithmetic in ("float16", "bfloat16", "float32")
        for rows, cols in ((8, 16), (16, 24), (17, 31))
        for options in ({"activation": "gelu", "samples": 65}, {"input_gradient": True, "row_gap": 3})
    ),
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
        output, findings = case.check(order=order, seed=seed)
        assert findings == []
        outputs.append(output.tobytes())
    assert len(set(outputs)) == 1, "the bits depend on the schedule"


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
@pytest.mark.parametrize("case", [Case(samples=65, rows=17, cols=33), Case(density=0.0)], ids=str)
def test_hopper_ptx_is_clean_too(case):
    assert case.check(arch="compute_90")[1] == []


def test_empty_output_is_not_launched():
    assert Case(samples=0).check()[1] == []
    assert Case(out_features=0).check()[1] == []


def test_bits_do_not_depend_on_the_other_samples():
    case = Case(samples=70, in_features=80, density=1.0)
    arguments = case.arguments()
    together, _ = case.run(arguments)
    for sample in (0, 15, 63, 64, 69):
        alone = {**arguments, "input": arguments["input"][sample : sample + 1]}
        assert case.run(alone)[0].tobytes() == together[sample].tobytes()


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_the_output(activation, value):
    case = Case(samples=3, activation=activation, density=1.0)
    arguments = case.arguments()
    arguments["input"][1, 5] = value
    output, findings = case.run(arguments)
    assert findings == []
    expected, _ = case.expected(arguments)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


# Broken on purpose: these meet every edge of a bound that a thread can be off by one at, with and
# without the bias, for which the compiler makes two copies of the store.
MUTANT_CASES = [
    replace(case, bias=bias, activation=activation)
    for case in (
        Case(),
        Case(samples=65, rows=17, cols=33, in_features=60, out_features=40),
        Case(samples=63, rows=15, cols=20, in_features=33, out_features=31),
        Case(samples=9, rows=14, cols=16, in_features=16, out_features=14, density=1.0),
        Case(samples=25, rows=14, cols=32, in_features=32, out_features=14, density=1.0),
        Case(samples=40, rows=15, cols=16, in_features=16, out_features=15, density=1.0),
        Case(samples=57, rows=15, cols=32, in_features=32, out_features=15, density=1.0),
        Case(samples=130, rows=3, cols=1, in_features=3, out_features=7, density=1.0),
        Case(samples=17, rows=32, cols=4, in_features=70, out_features=64, density=1.0),
        Case(samples=4, density=0.0),
    )
    for bias, activation in (
        *((False, "none"), (True, "relu"), (True, "gelu"), (False, "gelu_tanh"), (True, "silu")),
    )
]
MUTANT_CASES += [
    replace(case, input_gradient=True) for case in MUTANT_CASES if not case.bias and case.activation == "none"
]
MUTANT_CASES += [
    Case(samples=65, rows=17, cols=33, in_features=60, out_features=40, bias=bias, activation="relu6")
    for bias in (False, True)
]
# Whole blocks of every part of the weights' tile, whose last one ends where the memory does.
MUTANT_CASES += [
    Case(rows=15, cols=cols, out_features=30, in_features=3 * cols, density=1.0, bias=False)
    for cols in (4, 12, 20, 28)
]
MUTANT_CASES += [
    Case(rows=20, cols=cols, out_features=40, in_features=3 * cols, density=1.0, input_gradient=True)
    for cols in (3, 4, 8, 12, 16)
]
# Mutants that compute the same, by what is done to which source line; each stands for one.
EQUIVALENT = {
    (
        "no guard",
        "for (int begin = 0; begin < block_steps; begin += kTileSteps) {",
    ): "no block is empty",
    ("no guard", "for (int s = 0; s < tile_steps; ++s) {"): "no step is empty",
    (
        "bound + 1",
        "for (int begin = 0; begin < block_steps; begin += kTileSteps) {",
    ): "one empty step more",
    (
        "no guard",
        "for (int i = 0; i < kTileSteps * kLinearTileOutputs / kLinearThreads; ++i) {",
    ): "either order of copying is right",
}


def test_every_mutant_is_noticed():
    mutants = mutants_of("block_sparse_linear", "block_sparse_linear_f32")
    kinds = [mutant.kind for mutant in mutants]
    assert kinds.count("no barrier") == 2
    assert min(kinds.count("bound + 1"), kinds.count("no guard"), kinds.count("tile - 1")) > 2
    chosen = mutants if FULL_SWEEP else sample_of(mutants, 6, EQUIVALENT)
    runs = Runs(
        chosen,
        [
            functools.partial(case.faults, order=order)
            for case in MUTANT_CASES
            for order in ("forward", "reverse")
        ],
    )
    assert unnoticed(chosen, runs, EQUIVALENT) == []
    assert runs.faults == []
