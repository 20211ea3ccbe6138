"""block_sparse_conv2d_weight_gradient.cu broken on purpose, in the simulator."""

import functools
from dataclasses import replace

import pytest

from . import gradient_cases, harness
from .block_sparse_conv2d_weight_gradient_cases import Case, run
from .gradient_cases import BF16_COLUMNS, SEARCH, STAGES, TF32_COLUMNS
from .harness_conv2d_weight_gradient import OP

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP


def mutant_cases(kind: str) -> list[Case]:
    """Meet every edge of a bound that a thread can be off by one at; the first find most."""
    rows, cols = (13, 5) if kind == "f32" else (16, 16)
    stage = 16 if kind == "tf32" else 32
    # One row of positions, which the second of two taps reads.
    row = Case(
        kind=kind,
        images=1,
        height=1,
        kernel_size=(2, 1),
        padding=(1, 0, 0, 0),
        rows=rows,
        cols=cols,
        in_channels=cols,
        out_channels=rows,
        density=1.0,
    )
    ends = [stage * step + stage * eighth // 8 for step in range(5) for eighth in (1, 3, 5, 7)]
    if kind == "f32":
        ends = list(range(1, 33))
    images = replace(row, height=5, kernel_size=(3, 3), padding=(1, 1, 1, 1), images=7)
    return [
        replace(images, in_channels=3 * cols - 1, out_channels=2 * rows - 1, width=6, density=0.7),
        replace(images, in_channels=2 * cols - 2, out_channels=2 * rows - 2, width=15, density=0.2),
        *(replace(row, width=width) for width in ends),
    ]


def faults(case: Case, **options) -> list[str]:
    return run(case, **options)[1]


def every_mutant_is_noticed(kernel: str, cases: list[Case], equivalent: dict) -> None:
    runs = [
        functools.partial(faults, case, order=order)
        for order, some in (("forward", cases), ("reverse", cases[:2]))
        for case in some
    ]
    gradient_cases.every_mutant_is_noticed(f"{OP}_{kernel}", runs, equivalent)


def test_every_mutant_on_tensor_cores_is_noticed():
    every_mutant_is_noticed("bf16_16", mutant_cases("bf16"), {**SEARCH, **STAGES, **BF16_COLUMNS})


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_every_mutant_of_tf32_is_noticed():
    every_mutant_is_noticed("tf32_16", mutant_cases("tf32"), {**SEARCH, **STAGES, **TF32_COLUMNS})


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_every_mutant_of_the_plain_kernel_is_noticed():
    every_mutant_is_noticed("plain_f32_16", mutant_cases("f32"), {**SEARCH})
