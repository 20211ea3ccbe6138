"""block_sparse_conv2d_weight_gradient.cu broken on purpose, in the simulator."""

import functools
from dataclasses import replace

import pytest

from . import harness
from .block_sparse_conv2d_weight_gradient_cases import Case, run
from .gradient_cases import BF16_COLUMNS, SEARCH, TF32_COLUMNS, of_whole_chunks, unnoticed_mutants
from .harness_conv2d_weight_gradient import OP

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP


def mutant_cases(kind: str) -> list[Case]:
    """Meet every edge of a bound that a thread can be off by one at; the first find most."""
    rows, cols = (13, 5) if kind == "f32" else (16, 16)
    stage = 16 if kind == "tf32" else 32

    def only_plain(sizes: tuple) -> tuple:
        return sizes if kind == "f32" else ()

    # Channels come in whole chunks of 16 bytes, but for the plain kernel.
    chunk = {"f32": 1, "tf32": 4, "bf16": 8}[kind]
    one = Case(kind=kind, rows=rows, cols=cols, in_channels=cols, out_channels=rows, density=1.0)
    # Outputs smaller than the images: what a walk adds at the end of a row or an image is not 0.
    small = replace(one, padding=(0, 1, 0, 1), images=23, height=4, width=4)
    # The second of two taps reads all of one row; the positions are its pixels.
    row = replace(one, images=1, height=1, kernel_size=(2, 1), padding=(1, 0, 0, 0))
    # One tap, and two rows of positions of which the first reads zeros.
    tap = replace(row, kernel_size=(1, 1))
    ends = [stage * step + 1 for step in range(5)]
    ends += [stage * step + stage * eighth // 8 for step in range(5) for eighth in (1, 3, 5, 7)]
    edges = [
        (16 * blocks - lacking, 16 - other)
        for blocks in (2, 3)
        for lacking in range(chunk, 16, chunk)
        for other in range(chunk, 16, chunk)
    ]
    if kind == "f32":
        ends = list(range(1, 33))
        edges = [(21 + row, row) for row in range(1, 13)]
    return [
        replace(small, in_channels=3 * cols - chunk, out_channels=2 * rows - chunk, density=0.7),
        replace(
            small, images=3, width=16, height=5, in_channels=2 * cols - chunk, out_channels=2 * rows - chunk
        ),
        *(replace(small, height=height, width=width) for height, width in ((2, 3), (3, 2), (2, 4), (2, 6))),
        # Two slices; the second begins at the end of a row and an image.
        replace(small, images=205, height=2, width=4),
        *(replace(small, images=3, height=2, width=1 + outputs) for outputs in only_plain((7, 11, 13))),
        *(replace(row, width=width) for width in ends),
        *(
            replace(tap, width=width, in_channels=wide, out_channels=high, poisoned=True)
            for width in (2, 256)
            for wide, high in edges
        ),
        *(
            replace(tap, width=width, in_channels=blocks * cols)
            for width in (2, 256)
            for blocks in (2, 3, *only_plain((4, 5)))
        ),
        *(
            replace(tap, width=width, rows=high, out_channels=2 * high)
            for width in (2, 256)
            for high in only_plain((13, 14, 15, 12))
        ),
        replace(tap, width=2, in_channels=25 * cols + chunk, out_channels=2 * rows - chunk),
        replace(tap, width=2, in_channels=2 * cols, out_channels=35 * rows, density=0.5),
        replace(tap, images=0),
    ]


def faults(case: Case, **options) -> list[str]:
    return run(case, **options)[1]


def every_mutant_is_noticed(kernel: str, cases: list[Case], equivalent: dict) -> None:
    runs = [
        functools.partial(faults, case, order=order)
        for order, some in (("forward", cases), ("reverse", cases[:2]))
        for case in some
    ]
    assert unnoticed_mutants(f"{OP}_{kernel}", runs, equivalent) == ([], [])


# Mutants that compute the same, by what is done to which source line, and how many there are.
EXISTS = "return place_of(args, tile, column).channel < args.gradient.input.cols;"
# One step of zeros: where there are no positions, and after the last position.
STEPS = {
    (
        "no guard",
        "for (int begin = 0, parity = 0; begin < slice.samples; begin += kPlainStep, parity ^= 1) {",
    ): 1,
    (
        "bound + 1",
        "const bool exists = walk.is_inside(args.positions, (sample < samples) & (data != nullptr));",
    ): 1,
}


def test_every_mutant_on_tensor_cores_is_noticed():
    every_mutant_is_noticed(
        "bf16_16", mutant_cases("bf16"), {**SEARCH, **BF16_COLUMNS, **of_whole_chunks("bf16", EXISTS, 1)}
    )


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_every_mutant_of_tf32_is_noticed():
    every_mutant_is_noticed(
        "tf32_16", mutant_cases("tf32"), {**SEARCH, **TF32_COLUMNS, **of_whole_chunks("tf32", EXISTS, 1)}
    )


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_every_mutant_of_the_plain_kernel_is_noticed():
    every_mutant_is_noticed("plain_f32_16", mutant_cases("f32"), {**SEARCH, **STEPS})
