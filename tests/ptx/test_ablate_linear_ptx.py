"""The PTX of ablate_linear.cu, run in the simulator: values, races, bounds, and mutants of it."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from . import harness, harness_loss
from .loss_cases import SCHEDULES, describe, generator, pieces_of, with_gaps
from .mutants import Runs, mutants_of, sample_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP
EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """One call; the kernel's tile is 64 samples x 64 outputs, and its step is 16 columns."""

    samples: int = 5
    in_features: int = 9
    out_features: int = 8
    pieces: str = "corners"
    row_gap: int = 0
    misalign: int = 0  # bytes that the result lies past a multiple of 16

    def arguments(self) -> dict:
        rng = generator(self)
        shapes = {
            "output": (self.samples, self.out_features),
            "input": (self.samples, self.in_features),
            "weight": (self.out_features, self.in_features),
        }
        matrices = {
            name: with_gaps(rng.standard_normal(shape).astype(np.float32), self.row_gap)
            for name, shape in shapes.items()
        }
        return {**matrices, "pieces": pieces_of(self.pieces, self.out_features, self.in_features)}


def wrong_values(arguments: dict, masked: np.ndarray) -> list[str]:
    """Compare with float64; the bound is that of a chain of float32 multiply-adds, and 0 outside the rows."""
    output, input, weight = (arguments[name].astype(np.float64) for name in ("output", "input", "weight"))
    wrong = []
    for index, (row, row_end, col, col_end) in enumerate(arguments["pieces"]):
        rows, cols = slice(row, row_end), slice(col, col_end)
        expected, bound = output.copy(), np.zeros_like(output)
        expected[:, rows] -= input[:, cols] @ weight[rows, cols].T
        magnitude = np.abs(input[:, cols]) @ np.abs(weight[rows, cols]).T + np.abs(output[:, rows])
        bound[:, rows] = (col_end - col + 2) * EPSILON * magnitude
        if not (np.abs(masked[index] - expected) <= bound).all():
            wrong.append(f"wrong values for piece {index}")
    return wrong


def run(case: Case, **options) -> tuple[np.ndarray, list[str]]:
    arguments = case.arguments()
    masked, findings = harness_loss.ablate_linear(**arguments, misalign=case.misalign, **options)
    return masked, findings + wrong_values(arguments, masked)


SAMPLES = [1, 3, 4, 5, 63, 64, 65, 129]
OUT_FEATURES = [1, 2, 3, 4, 5, 7, 60, 63, 64, 65, 68, 128, 129]
IN_FEATURES = [1, 2, 15, 16, 17, 31, 32, 33, 151]
KINDS = ["columns", "rows", "whole", "empty", "corners", "none"]
EDGES = [
    *(Case(samples=samples) for samples in SAMPLES),
    *(Case(out_features=out_features) for out_features in OUT_FEATURES),
    *(Case(in_features=in_features) for in_features in IN_FEATURES),
    *(Case(pieces=pieces, samples=66, out_features=70, in_features=18) for pieces in KINDS),
    *(Case(row_gap=gap, samples=65, out_features=68) for gap in (1, 3, 4)),
    *(Case(misalign=misalign, out_features=64) for misalign in (4, 8, 12)),
]
if FULL_SWEEP:
    EDGES += [
        Case(samples=samples, in_features=in_features, out_features=out_features, pieces=pieces, row_gap=1)
        for samples, in_features, out_features, pieces in itertools.product(
            (1, 63, 65), (1, 16, 33), (1, 4, 63, 68), ("rows", "whole", "corners")
        )
    ]


@pytest.mark.parametrize("case", EDGES, ids=describe)
def test_clean_and_right_on_every_schedule(case):
    outputs = []
    for order, seed in SCHEDULES:
        masked, findings = run(case, order=order, seed=seed)
        assert findings == []
        outputs.append(masked.tobytes())
    assert len(set(outputs)) == 1, "the bits depend on the schedule"


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_hopper_ptx_is_clean_too():
    assert run(Case(samples=65, out_features=68, in_features=33), arch="compute_90")[1] == []


def test_empty_results_are_not_launched():
    for empty in ({"samples": 0}, {"out_features": 0}, {"pieces": "none"}):
        assert run(Case(**empty))[1] == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_and_inputs_outside_the_piece_do_not_matter(value):
    arguments = Case(samples=6).arguments()
    arguments["pieces"] = np.array([[2, 5, 3, 6]], np.int32)
    clean, _ = harness_loss.ablate_linear(**arguments)
    for name, rows, cols in (("weight", [1, 5], slice(None)), ("input", slice(None), [2, 6])):
        arguments[name][rows, cols] = value
    arguments["weight"][:, [2, 6]] = value
    masked, findings = harness_loss.ablate_linear(**arguments)
    assert findings == []
    assert np.array_equal(masked, clean)


def test_nan_in_the_output_and_the_piece_is_passed_on():
    arguments = Case(pieces="whole").arguments()
    arguments["output"][1, 2] = np.nan
    arguments["input"][3, 4] = np.inf
    masked, findings = harness_loss.ablate_linear(**arguments)
    assert findings == []
    broken = ~np.isfinite(masked[0])
    assert broken[1, 2]
    assert broken[3].all()
    assert broken.sum() == 1 + masked.shape[2]


BAD_PIECES = [[-1, 2, 0, 1], [2, 1, 0, 1], [0, 9, 0, 1], [0, 1, -1, 1], [0, 1, 2, 1], [0, 1, 0, 10]]


def unlike_nan(piece: list[int], **options) -> list[str]:
    arguments = Case().arguments()
    clean, _ = harness_loss.ablate_linear(**arguments)
    arguments["pieces"][1] = piece
    masked, findings = harness_loss.ablate_linear(**arguments, **options)
    right = np.isnan(masked[1]).all() and np.array_equal(np.delete(masked, 1, 0), np.delete(clean, 1, 0))
    return findings if right else [*findings, "wrong values"]


@pytest.mark.parametrize("piece", BAD_PIECES, ids=str)
def test_a_piece_out_of_range_gives_nan(piece):
    assert unlike_nan(piece) == []


MUTANT_CASES = [
    Case(),
    Case(samples=65, out_features=68, in_features=33, row_gap=1),
    Case(samples=67, out_features=7, in_features=17),
    Case(samples=2, out_features=65, in_features=16, pieces="whole"),
    Case(samples=3, out_features=66, in_features=5, pieces="rows"),
    Case(samples=18, out_features=50, in_features=3),
    Case(samples=36, out_features=34, in_features=4),
    Case(samples=52, out_features=19, in_features=2),
    Case(pieces="empty", misalign=4),
]
# Each of a thread's four samples is the last one where each of its four outputs is.
MUTANT_CASES += [Case(samples=samples, out_features=outputs, in_features=2) for samples in (1, 2, 3, 4)
                 for outputs in (5, 6, 7)]  # fmt: skip
MUTANT_CASES += [Case(samples=4, out_features=9, in_features=2, pieces="rows")]
STEPS = "for (int begin = col_begin; begin < col_end; begin += kAblateColumns) {"
COLUMNS = "for (int c = 0; c < columns; ++c) {"
ROWS = "if (row_begin < first_output + kAblateTile && row_end > first_output) {"
EQUIVALENT = [
    *[("bound + 1", ROWS)] * 2,  # a tile whose sums nobody takes
    *[("bound + 1", STEPS)] * 2,  # one empty step more
    *[(kind, COLUMNS) for kind in ("bound + 1", "bound + 1", "no guard", "no guard", "no guard")],
    # No step is empty, and columns past the end are 0 in the tiles.
    *[("no guard", "if (aligned && output < outputs) {")] * 4,  # single stores serve aligned rows too
]


def faults(case: Case, **options) -> list[str]:
    return run(case, **options)[1]


MUTANT_RUNS = [
    *(
        functools.partial(faults, case, order=order)
        for case in MUTANT_CASES
        for order in ("forward", "reverse")
    ),
    *(functools.partial(unlike_nan, piece) for piece in BAD_PIECES),
]


def test_every_mutant_is_noticed():
    mutants = mutants_of("ablate_linear", "ablate_linear_f32")
    kinds = [mutant.kind for mutant in mutants]
    assert kinds.count("no barrier") == 2
    assert min(kinds.count("bound + 1"), kinds.count("no guard")) > 5
    # One in eight tells whether the test still notices anything.
    chosen = mutants if FULL_SWEEP else sample_of(mutants, 8, EQUIVALENT)
    runs = Runs(chosen, MUTANT_RUNS)
    assert unnoticed(chosen, runs, EQUIVALENT) == []
    assert runs.faults == []
