"""The PTX of ablated_mlp_cross_entropy.cu, run in the simulator: values, races, bounds, and mutants of it."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastprune import reference

from . import harness, harness_loss
from .loss_cases import (
    SCHEDULES,
    describe,
    generator,
    make_sample_weight,
    make_targets,
    pieces_of,
    wanted_deltas,
    with_gaps,
    wrong_deltas,
)
from .mutants import Runs, mutants_of, sample_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
FULL_SWEEP = harness.FULL_SWEEP
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Case:
    """One call; a warp takes 128 samples, keeps 32 units or 16 units and 16 classes, four at a time."""

    samples: int = 9
    in_features: int = 5
    hidden: int = 7
    classes: int = 5
    pieces: str = "corners"
    activation: str | None = "relu"
    scale: float = 1.0  # of both weights
    margin: float = 0.0  # by which the labels' logits lie above the others: a trained network
    targets: str = "random"
    sample_weight: str = "none"
    row_gap: int = 0

    def arguments(self) -> dict:
        rng = generator(self)
        input = rng.standard_normal((self.samples, self.in_features)).astype(np.float32)
        first = self.scale * rng.standard_normal((self.hidden, self.in_features)).astype(np.float32)
        second = self.scale * rng.standard_normal((self.classes, self.hidden)).astype(np.float32)
        before = (input @ first.T + rng.standard_normal(self.hidden)).astype(np.float32)
        function = reference.ACTIVATIONS.get(self.activation, torch.clone)
        logits = function(torch.from_numpy(before)).numpy() @ second.T
        targets = make_targets(self.targets, logits, rng)
        logits[np.arange(self.samples), targets] += np.float32(self.margin)
        matrices = {
            "logits": logits,
            "input": input,
            "pre_activation": before,
            "first_weight": first,
            "second_weight": second,
        }
        return {
            **{name: with_gaps(matrix, self.row_gap) for name, matrix in matrices.items()},
            "targets": targets,
            "pieces": pieces_of(self.pieces, self.hidden, self.in_features),
            "activation": self.activation,
            "sample_weight": make_sample_weight(self.sample_weight, self.samples, rng),
        }


def wanted(arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    return wanted_deltas(reference.ablated_mlp_cross_entropy, arguments)


# Schedules and mutants run the same problems again and again.
@functools.lru_cache(maxsize=512)
def problem(case: Case) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    arguments = case.arguments()
    return arguments, wanted(arguments)


def run(case: Case, **options) -> tuple[np.ndarray, list[str]]:
    arguments, expected = problem(case)
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments, **options)
    return deltas, findings + wrong_deltas(deltas, *expected)


# One below, at and above a lane's samples, a warp's samples, quads, the units that stay in shared
# memory, and the chunks and classes of pieces that do not.
SAMPLES = [1, 3, 4, 5, 127, 128, 129]
# From 51 on, "corners" has a piece of more than 32 units that begins between two quads.
HIDDEN = [1, 3, 4, 5, 15, 17, 31, 32, 33, 47, 48, 49, 51, 56, 59]
CLASSES = [1, 2, 3, 4, 5, 15, 16, 17, 33]
KINDS = ["columns", "rows", "whole", "none", "empty", "corners"]
EDGES = [
    *(Case(samples=samples) for samples in SAMPLES),
    *(Case(hidden=hidden, activation=activation)
      for hidden in HIDDEN for activation in ("relu", "gelu")),
    *(Case(classes=classes, hidden=hidden, targets="wrong") for classes in CLASSES for hidden in (8, 33)),
    *(Case(in_features=in_features) for in_features in (1, 2, 15, 17, 33)),
    *(Case(pieces=pieces, hidden=hidden) for pieces in KINDS for hidden in (6, 34)),
    *(Case(activation=activation, scale=scale, hidden=34, pieces="corners", samples=20)
      for activation in ACTIVATIONS for scale in (1e-3, 0.1, 10.0)),
    *(Case(activation=activation, scale=0.3, margin=margin, pieces="columns", samples=20)
      for activation in ACTIVATIONS for margin in (5.0, 15.0)),
    *(Case(sample_weight=kind, samples=samples) for kind in ("some", "zero") for samples in (5, 130)),
    *(Case(row_gap=gap, samples=5) for gap in (1, 7)),
]  # fmt: skip
if FULL_SWEEP:
    EDGES += [
        Case(samples=samples, hidden=hidden, classes=classes, pieces=pieces, activation=activation)
        for (samples, hidden, classes, pieces), activation in itertools.product(
            itertools.product((1, 129), (4, 17, 33, 49), (2, 16, 17), ("columns", "corners")), ACTIVATIONS
        )
    ]


@pytest.mark.parametrize("case", EDGES, ids=describe)
def test_clean_and_right_on_every_schedule(case):
    outputs = []
    for order, seed in SCHEDULES:
        deltas, findings = run(case, order=order, seed=seed)
        assert findings == []
        outputs.append(deltas.tobytes())
    assert len(set(outputs)) == 1, "the bits depend on the schedule"


@pytest.mark.skipif(not FULL_SWEEP, reason="FASTPRUNE_PTX_SWEEP=full runs it")
def test_hopper_ptx_is_clean_too():
    assert run(Case(samples=129, hidden=33, classes=17), arch="compute_90")[1] == []


@pytest.mark.parametrize("hidden", [6, 40])
def test_a_change_far_below_the_units_keeps_its_digits(hidden):
    # f(z) - f(z - u) of plain float32 values would be 0 here.
    arguments = Case(activation="gelu", samples=40, hidden=hidden, pieces="whole").arguments()
    arguments["first_weight"] *= np.float32(1e-8)
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments)
    assert findings == []
    assert (deltas != 0).all()
    doubled = {**arguments, "first_weight": arguments["first_weight"] * np.float32(2)}
    twice, _ = harness_loss.ablated_mlp_cross_entropy(**doubled)
    np.testing.assert_allclose(twice, 2 * deltas, rtol=1e-4)


@pytest.mark.parametrize("hidden", [6, 34])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("poisoned", ["logits", "input", "pre_activation"])
def test_nan_is_not_swallowed(poisoned, activation, hidden):
    arguments = Case(activation=activation, hidden=hidden, pieces="whole").arguments()
    arguments[poisoned][5, 2] = np.nan
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments)
    assert findings == []
    assert np.isnan(deltas).all()


def unlike_nan(name: str, index: int, value, **options) -> list[str]:
    arguments = Case().arguments()
    arguments[name][index] = value
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments, **options)
    broken = np.isnan(deltas)
    right = broken.all() if name == "targets" else broken.sum() == 1 and broken[index]
    return findings if right else [*findings, "wrong values"]


OUT_OF_RANGE = [
    *(("targets", index, target) for index in range(4, 8) for target in (-1, 5)),
    *(("pieces", 1, piece) for piece in ([-1, 2, 0, 1], [2, 1, 0, 1], [0, 8, 0, 1])),
    *(("pieces", 1, piece) for piece in ([0, 1, -1, 1], [0, 1, 2, 1], [0, 1, 0, 6])),
]


@pytest.mark.parametrize(("name", "index", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_gives_nan(name, index, value):
    assert unlike_nan(name, index, value) == []


def left_out(sample: int, hidden: int, **options) -> list[str]:
    """A sample of weight 0 that holds NaN, or a target out of range."""
    arguments = Case(sample_weight="some", hidden=hidden, pieces="whole").arguments()
    arguments["sample_weight"][sample] = 0
    clean, _ = harness_loss.ablated_mlp_cross_entropy(**arguments)
    arguments["logits"][sample] = np.nan
    arguments["input"][sample] = np.inf
    arguments["targets"][sample] = 77
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments, **options)
    return findings if np.array_equal(deltas, clean) else [*findings, "wrong values"]


@pytest.mark.parametrize("hidden", [7, 34])
@pytest.mark.parametrize("sample", range(9))
def test_samples_of_weight_zero_stay_out_whatever_they_hold(sample, hidden):
    assert left_out(sample, hidden) == []


def with_classes_at_minus_infinity(first: int, classes: int, hidden: int, **options) -> list[str]:
    """Classes before ``first`` that the network rules out, and exponents that need the plain formula."""
    case = Case(8, 4, hidden, classes=classes, scale=30.0, pieces="columns", targets="wrong")
    arguments = case.arguments()
    arguments["logits"][:, :first] = -np.inf
    arguments["targets"][:] = first + np.arange(8) % (classes - first)
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments, **options)
    return findings + wrong_deltas(deltas, *wanted(arguments))


# Each place in a quad of classes, in loops of which a turn takes one, two or four.
RULED_OUT = [*((first, 6) for first in range(1, 6)), (1, 7), (6, 7)]


@pytest.mark.parametrize("hidden", [7, 34])
@pytest.mark.parametrize(("first", "classes"), RULED_OUT)
def test_classes_at_minus_infinity_stay_out(first, classes, hidden):
    assert with_classes_at_minus_infinity(first, classes, hidden) == []


def units_alone(begin: int, end: int, scale: float, **options) -> list[str]:
    """The same piece for both warps of a thread block."""
    arguments = Case(samples=5, in_features=3, hidden=end + 2, scale=scale, targets="wrong").arguments()
    arguments["pieces"] = np.array([[begin, end, 0, 3]] * 2, np.int32)
    deltas, findings = harness_loss.ablated_mlp_cross_entropy(**arguments, **options)
    return findings + wrong_deltas(deltas, *wanted(arguments))


# As many units as stay in shared memory, and whole chunks, that begin and end anywhere in a quad.
UNITS_ALONE = [
    *((begin, begin + 32, 0.3) for begin in range(4)),
    *((begin, begin + 37, scale) for begin in range(4) for scale in (0.3, 30.0)),
]


@pytest.mark.parametrize(("begin", "end", "scale"), UNITS_ALONE)
def test_units_that_begin_and_end_within_a_quad(begin, end, scale):
    assert units_alone(begin, end, scale) == []


# Pieces whose units stay in shared memory, and (from 33 on) those that go through it in chunks.
MUTANT_CASES = [
    Case(),
    Case(samples=129, classes=9, in_features=6, sample_weight="some", row_gap=3),
    Case(samples=130, classes=4, pieces="columns", targets="right", margin=3.0),
    Case(samples=6, classes=7, in_features=3, pieces="rows", targets="first"),
    Case(hidden=34, classes=17, pieces="whole"),
    Case(hidden=51, samples=5),
    Case(hidden=48, classes=33, in_features=3, pieces="columns"),
    *(Case(hidden=hidden, samples=6, classes=16, in_features=3) for hidden in (56, 57)),
    Case(hidden=36, samples=3, in_features=2, pieces="whole"),  # a last chunk of four units
    Case(hidden=32, in_features=2, samples=3, pieces="columns"),
    Case(hidden=33, in_features=2, samples=3, pieces="columns"),
    *(
        Case(samples=samples, hidden=hidden, scale=30.0, classes=classes, targets="wrong", pieces="columns")
        for samples, classes in ((7, 5), (8, 6), (8, 7), (3, 8))
        for hidden in (7, 34)
    ),
    Case(pieces="empty"),
]
NOT_EMPTY = "if (known && piece.row_begin < piece.row_end && piece.col_begin < piece.col_end) {"
TILES = "for (int64_t first = span * call.span; first < end; first += kWarpSamples) {"
UNIT_QUADS = "for (int quad = begin / kQuad * kQuad; quad < end; quad += kQuad) {"
LAST_UNIT = "if (quad + i >= begin && quad + i < end) {"
UNITS = "for (int unit = begin; unit < end; ++unit) {"
STEPS = "for (int step = 0; step < steps; ++step) {"
TARGETS = "masked[s] = targets[s] >= class_begin && targets[s] < class_end;"
CLASS_QUADS = "for (int quad = class_begin / kQuad * kQuad; quad < class_end; quad += kQuad) {"
LAST_CLASS = "if (quad + i >= class_begin && quad + i < class_end) use(quad + i, losses[i]);"
CHUNKS = "for (int begin = unit_begin; begin < unit_end; begin += kMlpChunkUnits) {"
PANELS = "for (int first = 0; first < class_end; first += kMlpPanelClasses) {"
PANEL_END = "const int last = min(first + kMlpPanelClasses, class_end);"
PANEL_QUADS = "for (int quad = first; quad < last; quad += kQuad) {"
PANEL_CLASSES = "for (int c = first; c < last; ++c) {"
OTHER_CLASSES = "if (c >= losses.class_begin && c < losses.class_end) continue;"
EQUIVALENT = [
    ("bound + 1", NOT_EMPTY),  # an empty piece takes nothing from any logit
    ("no guard", "if (piece.row_end - piece.row_begin <= kMlpSlots) {"),  # chunks serve small pieces too
    *[(kind, TILES) for kind in ("bound + 1", "no guard")],  # no span is empty
    *[("no guard", line) for line, count in ((UNIT_QUADS, 4), (UNITS, 3)) for _ in range(count)],
    *[("bound + 1", line) for line in (UNIT_QUADS, UNITS, PANEL_END) for _ in range(3)],
    *[("no guard", STEPS)] * 10,  # nor any piece without columns or units
    *[("bound + 1", LAST_UNIT)] * 4,  # the first of a quad is before the end: the loop says so
    # What a chunk for the targets leaves in the panel, nobody reads.
    *[("bound + 1", LAST_UNIT)] * 3,
    ("no guard", LAST_UNIT),
    *[("bound + 1", CHUNKS)] * 3,  # one empty chunk more
    *[("bound + 1", PANELS)] * 2,  # one empty panel more
    *[("bound + 1", LAST_CLASS), ("no guard", LAST_CLASS)] * 2,
    *[("bound + 1", "")] * 8,  # the loops' own checks before their first turn
    *[("bound + 1", TARGETS)] * 8,  # every target is a class, and every class is masked
    *[("bound + 1", OTHER_CLASSES), ("no guard", "if (value == -INFINITY) return;")] * 2,
    *[("no guard", line) for line in (CLASS_QUADS, PANELS, PANEL_QUADS, PANEL_CLASSES) for _ in range(2)],
    *[("no guard", "for (int c = 0; c < classes; ++c) {")] * 4,
    # The plain formula serves every sample.
    *[("no guard", "const bool safe = largest[s] < kLargestExponent && sum[s] > kSmallestSum;")] * 3,
    ("no guard", "if (!__any_sync(kAllLanes, any)) return;"),  # votes save work alone
    *[("no guard", "if (__any_sync(kAllLanes, masked_target)) {")] * 2,
    *[("no guard", "if (!__any_sync(kAllLanes, needed)) continue;")] * 2,
    *[("bound + 1", "for (int s = 0; s < kLaneSamples; ++s) {")] * 2,  # a fifth sample never needs it
]
# Branches inside CUDA's own functions, for ranges of their arguments.
CUDA_FUNCTIONS = ("log1pf(", "exp(-fabs(", "log(sum)", "expm1f(")


def faults(case: Case, **options) -> list[str]:
    return run(case, **options)[1]


MUTANT_RUNS = [
    *(functools.partial(faults, case) for case in MUTANT_CASES),
    *(functools.partial(unlike_nan, *place) for place in OUT_OF_RANGE),
    *(functools.partial(left_out, sample, hidden) for sample in range(4, 8) for hidden in (7, 34)),
    *(
        functools.partial(with_classes_at_minus_infinity, first, classes, hidden)
        for (first, classes), hidden in itertools.product(RULED_OUT, (7, 34))
    ),
    *(functools.partial(units_alone, *units) for units in UNITS_ALONE),
    *(functools.partial(faults, Case(samples=300, hidden=hidden), tiles_per_span=2) for hidden in (7, 34)),
]


def test_every_mutant_is_noticed():
    mutants = [
        mutant
        for mutant in mutants_of("ablated_mlp_cross_entropy", "ablated_mlp_cross_entropy_relu_f32")
        if not any(name in mutant.where for name in CUDA_FUNCTIONS)
    ]
    kinds = [mutant.kind for mutant in mutants]
    assert min(kinds.count("bound + 1"), kinds.count("no guard")) > 20
    # One in sixteen tells whether the test still notices anything.
    chosen = mutants if FULL_SWEEP else sample_of(mutants, 16, EQUIVALENT)
    runs = Runs(chosen, MUTANT_RUNS)
    assert unnoticed(chosen, runs, EQUIVALENT) == []
    assert runs.faults == []
