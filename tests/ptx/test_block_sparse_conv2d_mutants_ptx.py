"""Mutants of the kernels of block_sparse_conv2d, each of which a run in the simulator must notice."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from . import harness
from . import harness_block_sparse_conv2d as conv2d
from .block_sparse_conv2d_cases import GEOMETRIES, STRUCTURES, Case, expected_structure, fits, sized
from .mutants import Mutant, Runs, mutants_of, sample_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP

PLAIN_CASES = [
    *(Case(height=6, width=6, **geometry) for geometry in GEOMETRIES[:6]),
    Case(rows=17, cols=33, in_channels=60, out_channels=40, height=5, width=13),
    Case(rows=15, cols=20, in_channels=33, out_channels=31, images=1, height=9, width=7, density=1.0),
    Case(rows=14, cols=16, in_channels=16, out_channels=14, images=1, height=3, width=3, density=1.0),
    Case(rows=14, cols=32, in_channels=32, out_channels=14, images=1, height=5, width=5, density=1.0),
    Case(rows=15, cols=16, in_channels=16, out_channels=15, images=2, height=4, width=5, density=1.0),
    Case(rows=15, cols=32, in_channels=32, out_channels=15, images=3, height=1, width=19, density=1.0),
    Case(rows=3, cols=1, in_channels=3, out_channels=7, images=2, height=5, width=13, density=1.0),
    Case(rows=32, cols=4, in_channels=70, out_channels=64, images=1, height=17, width=1, density=1.0),
    Case(rows=8, cols=16, in_channels=40, out_channels=48, groups=2, images=1),
    Case(density=0.0, images=1, height=2, width=2),
    # Whole blocks of every part of the weights' tile, whose last one ends where the memory does.
    *(
        Case(rows=15, cols=cols, out_channels=30, in_channels=3 * cols, density=1.0)
        for cols in (4, 12, 20, 28)
    ),
]
PLAIN_CASES = [
    *PLAIN_CASES,
    # Tiles that end with any of a thread's samples; with and without the bias, for which the compiler makes
    # two copies of the store.
    *(
        Case(
            in_channels=16,
            out_channels=15,
            rows=15,
            images=1,
            height=1,
            width=positions,
            kernel_size=(1, 1),
            padding=(0, 0, 0, 0),
            density=1.0,
            bias=bias,
            activation=activation,
        )
        for positions, bias, activation in itertools.product(
            (9, 25, 41, 57), (False, True), harness.ACTIVATIONS
        )
        if positions == 57 or activation in ("none", "relu", "gelu")
    ),
    *(replace(case, input_gradient=True, bias=False) for case in PLAIN_CASES),
    *(
        Case(rows=20, cols=cols, out_channels=40, in_channels=3 * cols, density=1.0, input_gradient=True)
        for cols in (3, 4, 8, 12, 16)
    ),
]


def tile_cases(arithmetic: str, input_gradient: bool, tile: str) -> list[Case]:
    def call(inputs: int, outputs: int, activation: str = "none", **options) -> Case:
        options = {"arithmetic": arithmetic, "height": 5, "width": 6, "images": 1, **options}
        return sized(
            inputs, outputs, input_gradient, activation="none" if input_gradient else activation, **options
        )

    odd = 1 if tile.endswith("narrow") else 0
    # A last chunk of any length, aligned or not, that the code before the loop copies, or that in the loop,
    # first or second of a stage; the other kernels have whole chunks alone.
    chunk = 1 if odd else 4 if arithmetic == "tf32" else 8
    one_pixel = {"kernel_size": (1, 1), "padding": (0, 0, 1, 0), "density": 1.0, "height": 3, "width": 8}
    cases = [
        *(call(40 + odd, 48, **geometry) for geometry in GEOMETRIES),
        call(56 + odd, 72, activation="relu", images=3),
        call(56 - odd, 62, block_outputs=32, block_steps=48, bias=False, width=13),
        call(48 + odd, 48, density=0.0),
        call(48 + odd, 60, density=1.0, activation="relu6"),
        call(48 + odd, 61, density=1.0, activation="gelu"),
        call(48 + odd, 63, density=1.0, activation="gelu_tanh"),
        call(48 + odd, 64, density=1.0, activation="silu"),
        call(48 + odd, 64, density=1.0, activation="relu", bias=False),
        call(64 + odd, 224, block_outputs=32, block_steps=32),
        call(96 + odd, 96, block_outputs=48, block_steps=48, density=0.6),
        # Steps, then outputs, of a group that end within a block; the last tile ends within a group.
        *(call(2 * (24 + odd), 2 * outputs, groups=2, images=3) for outputs in (16, 48)),
        *(call(2 * 32, 2 * outputs, groups=2, images=2) for outputs in (20, 21, 22, 23, 24)),
        call(3 * 16, 3 * 16, groups=3, kernel_size=(1, 3)),
        # Outputs that end in either half of a tile, where a store past them would be seen.
        *(call(48 + odd, outputs) for outputs in (16, 29, 30, 31)),
        # Blocks that begin in any slot of a stage, and strips that end before their neighbours.
        *(
            call(2 * steps + odd, 64, block_steps=steps, seed=seed, **one_pixel | {"density": 0.4})
            for steps in (16, 32, 48, 64, 80)
            for seed in range(3)
        ),
        *(
            call(width, 64, **one_pixel)
            for last in (32, 256)
            for width in range(last - 32 + chunk, last + 1, chunk)
        ),
    ]
    return [case for case in cases if fits(case) and all(name.endswith(tile) for name in case.kernels())]


# Mutants that compute the same, by what is done to which source line.
EQUIVALENT_LISTS = {
    ("no guard", "if (lane == 0) warp_counts[warp] = before;"): "all lanes have the same sum",
    ("no guard", "if (thread == 0) {"): "all threads have the same sum",
    ("no guard", "if (blockIdx.x == 0) {"): "all thread blocks read the same number of blocks",
    ("no guard", "if (lane == 0) warp_counts[warp] = __popc(kept_lanes);"): "all lanes have the same count",
    **{
        (kind, "for (int32_t first = 0; first < args.rows_per_group; first += kStructureThreads) {"): why
        for kind, why in (
            ("bound + 1", "one part more without a block row"),
            ("no guard", "no group is without block rows"),
        )
    },
}
EQUIVALENT = {
    ("bound + 1", "return max(0, min(end, kChunkElements<T>));"): "where both are equal either is right",
    ("no guard", "if (together) {"): "where fours are aligned, all four of them exist",
}
# The same of the plain kernel.
EQUIVALENT_PLAIN = {
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
    (
        "bound + 1",
        "const int64_t left = output < geometry.cols ? channels - within : 0;",
    ): "no tile begins past the last group",
    **{
        (kind, "if (threadIdx.x < kLinearTileSamples && sample < args.input.rows) {"): (
            "the pixel of a sample that does not exist is never read"
        )
        for kind in ("bound + 1", "no guard")
    },
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


def unnoticed_in(runs: list, mutants: list[Mutant], equivalent: dict) -> list[tuple[str, str]]:
    watched = Runs(
        mutants, [functools.partial(run, order=order) for run in runs for order in ("forward", "reverse")]
    )
    changes = [(mutant.kind, mutant.where) for mutant in mutants]
    missed = unnoticed(mutants, watched, [change for change in changes if change in equivalent])
    assert watched.faults == []
    return missed


def chosen(mutants: list[Mutant], every: int, equivalent: dict) -> list[Mutant]:
    assert {"no barrier", "bound + 1", "no guard"} <= {mutant.kind for mutant in mutants}
    return mutants if FULL_SWEEP else sample_of(mutants, every, equivalent)


def test_every_mutant_of_the_plain_kernel_is_noticed():
    mutants = chosen(mutants_of("block_sparse_conv2d", "block_sparse_conv2d_f32"), 8, EQUIVALENT_PLAIN)
    assert unnoticed_in([case.faults for case in PLAIN_CASES], mutants, EQUIVALENT_PLAIN) == []


@pytest.mark.parametrize(
    ("arithmetic", "input_gradient", "tile"),
    [
        ("bfloat16", False, "64x64_by_16"),
        ("tf32", True, "64x64_by_16"),
        ("bfloat16", True, "64x64_by_16_narrow"),
    ],
)
def test_every_mutant_of_a_tile_is_noticed(arithmetic, input_gradient, tile):
    cases = tile_cases(arithmetic, input_gradient, tile)
    (kernel,) = {kernel for case in cases for kernel in case.kernels()}
    mutants = mutants_of(conv2d.source_of(kernel), kernel)
    assert "no wait" in {mutant.kind for mutant in mutants}
    equivalent = EQUIVALENT_WITHOUT_ACTIVATION if input_gradient else EQUIVALENT
    mutants = chosen(mutants, 16, equivalent)
    assert unnoticed_in([case.faults for case in cases], mutants, equivalent) == []


def structure_faults(case: Case, **options) -> list[str]:
    arguments = case.arguments()
    structure = arguments["crow_indices"], arguments["col_indices"]
    lists, findings = conv2d.structure(case.convolution, *structure, **options)
    wanted = expected_structure(case, *structure)
    wrong = [not np.array_equal(*pair) for pair in zip(lists, wanted, strict=True)]
    return findings + ["wrong lists"] * any(wrong)


def test_every_mutant_of_the_lists_is_noticed():
    kernel = "block_sparse_conv2d_structure"
    mutants = chosen(mutants_of(kernel, kernel), 4, EQUIVALENT_LISTS)
    runs = [functools.partial(structure_faults, case) for case in STRUCTURES]
    assert unnoticed_in(runs, mutants, EQUIVALENT_LISTS) == []
