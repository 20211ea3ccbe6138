"""The PTX of ablated_cross_entropy.cu, run in the simulator: values, races, bounds, and mutants of it."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest

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


@dataclass(frozen=True)
class Case:
    """One call; a warp takes 128 samples, four in each lane, and four classes at a time."""

    samples: int = 9
    features: int = 6
    classes: int = 5
    pieces: str = "corners"
    scale: float = 1.0  # of the weights
    margin: float = 0.0  # by which the labels' logits lie above the others: a trained network
    targets: str = "random"
    sample_weight: str = "none"
    row_gap: int = 0

    def arguments(self) -> dict:
        rng = generator(self)
        hidden = np.maximum(rng.standard_normal((self.samples, self.features)), 0).astype(np.float32)
        weight = (self.scale * rng.standard_normal((self.classes, self.features))).astype(np.float32)
        logits = (hidden @ weight.T + rng.standard_normal(self.classes)).astype(np.float32)
        targets = make_targets(self.targets, logits, rng)
        if self.samples:
            logits[np.arange(self.samples), targets] += np.float32(self.margin)
        return {
            "logits": with_gaps(logits, self.row_gap),
            "hidden": with_gaps(hidden, self.row_gap),
            "weight": with_gaps(weight, self.row_gap),
            "targets": targets,
            "pieces": pieces_of(self.pieces, self.classes, self.features),
            "sample_weight": make_sample_weight(self.sample_weight, self.samples, rng),
        }


def wanted(arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    return wanted_deltas(reference.ablated_cross_entropy, arguments)


# Schedules and mutants run the same problems again and again.
@functools.lru_cache(maxsize=512)
def problem(case: Case) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    arguments = case.arguments()
    return arguments, wanted(arguments)


def run(case: Case, **options) -> tuple[np.ndarray, list[str]]:
    arguments, expected = problem(case)
    deltas, findings = harness_loss.ablated_cross_entropy(**arguments, **options)
    return deltas, findings + wrong_deltas(deltas, *expected)


# One below, at and above a lane's samples, a warp's samples, quads of classes, and warps of pieces.
SAMPLES = [1, 3, 4, 5, 127, 128, 129, 255, 257]
CLASSES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33]
FEATURES = [1, 2, 3, 4, 5, 15, 17, 64, 65]
KINDS = ["columns", "rows", "whole", "none", "empty", "corners"]
EDGES = [
    *(Case(samples=samples, targets="right") for samples in SAMPLES),
    *(Case(classes=classes, targets=targets) for classes in CLASSES for targets in ("random", "wrong")),
    *(Case(features=features) for features in FEATURES),
    *(Case(pieces=pieces, samples=130, features=7, classes=6) for pieces in KINDS),
    # 1 to 9 pieces: warps without one.
    *(Case(pieces="columns", features=features, targets="right") for features in range(1, 10)),
    # From deltas of a millionth of the logits to those of which exp overflows.
    *(Case(scale=scale, pieces="columns", targets=targets, samples=40)
      for scale in (1e-3, 0.1, 30.0, 1000.0) for targets in ("random", "right", "wrong")),
    *(Case(margin=margin, scale=0.1, pieces=pieces, samples=40)
      for margin in (5.0, 15.0, 30.0) for pieces in ("columns", "corners")),
    *(Case(sample_weight=kind, samples=samples) for kind in ("some", "zero") for samples in (5, 130)),
    *(Case(row_gap=gap, samples=samples) for gap in (1, 7) for samples in (1, 130)),
    Case(samples=20, features=151, classes=151, pieces="corners"),
    Case(samples=20, features=3, classes=1000, pieces="columns"),
]  # fmt: skip
if FULL_SWEEP:
    EDGES += [
        Case(samples, features, classes, pieces, scale, sample_weight="some")
        for samples, classes, features, pieces, scale in itertools.product(
            (1, 5, 127, 129), (1, 3, 4, 5, 9, 17), (1, 4, 17), ("columns", "whole", "corners"), (1.0, 100.0)
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
@pytest.mark.parametrize("case", [Case(samples=129, classes=9), Case(scale=1000.0)], ids=describe)
def test_hopper_ptx_is_clean_too(case):
    assert run(case, arch="compute_90")[1] == []


def test_no_samples_and_no_pieces_are_not_launched():
    deltas, findings = harness_loss.ablated_cross_entropy(**Case(samples=0).arguments())
    assert findings == []
    assert np.array_equal(deltas, np.zeros(5))
    assert run(Case(pieces="none"))[1] == []


@pytest.mark.parametrize("tiles", [2, 3, 4])
def test_spans_of_several_tiles(tiles):
    case = Case(samples=300, features=3, classes=3, sample_weight="some")
    for order, seed in SCHEDULES:
        assert run(case, order=order, seed=seed, tiles_per_span=tiles)[1] == []


@pytest.mark.parametrize("poisoned", ["logits", "hidden", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_swallowed(poisoned, value):
    arguments = Case(samples=10, features=4, classes=6, pieces="columns").arguments()
    if poisoned == "logits" and value == -np.inf:
        arguments["targets"][:] = 0  # the loss of the poisoned class itself is infinite
    arguments[poisoned][5, 2] = value
    deltas, findings = harness_loss.ablated_cross_entropy(**arguments)
    assert findings == []
    if poisoned == "logits" and value == -np.inf:
        assert wrong_deltas(deltas, *wanted(arguments)) == []
    else:
        assert not np.isfinite(deltas[2])
        assert np.isfinite(deltas).any() == (poisoned != "logits")


def unlike_nan(name: str, index: int, value, **options) -> list[str]:
    arguments = Case().arguments()
    clean, _ = harness_loss.ablated_cross_entropy(**arguments)
    arguments[name][index] = value
    deltas, findings = harness_loss.ablated_cross_entropy(**arguments, **options)
    broken = np.isnan(deltas)
    if name == "targets":
        right = broken.all()
    else:
        right = broken[index] and np.array_equal(np.delete(deltas, index), np.delete(clean, index))
    return findings if right else [*findings, "wrong values"]


# Targets of each of a lane's four samples; rectangles past each edge, and reversed.
OUT_OF_RANGE = [
    *(("targets", index, target) for index in range(4, 8) for target in (-1, 5)),
    *(("targets", 8, target) for target in (-100, 2**40)),
    *(("pieces", 1, piece) for piece in ([-1, 2, 0, 1], [2, 1, 0, 1], [0, 6, 0, 1], [9, 9, 0, 1])),
    *(("pieces", 1, piece) for piece in ([0, 1, -1, 1], [0, 1, 2, 1], [0, 1, 0, 7])),
]


@pytest.mark.parametrize(("name", "index", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_gives_nan(name, index, value):
    assert unlike_nan(name, index, value) == []


def left_out(sample: int, **options) -> list[str]:
    """A sample of weight 0 that holds NaN, or a target out of range."""
    arguments = Case(sample_weight="some").arguments()
    arguments["sample_weight"][sample] = 0
    clean, _ = harness_loss.ablated_cross_entropy(**arguments)
    arguments["logits"][sample] = np.nan
    arguments["hidden"][sample] = np.inf
    arguments["targets"][sample] = 77
    deltas, findings = harness_loss.ablated_cross_entropy(**arguments, **options)
    return findings if np.array_equal(deltas, clean) else [*findings, "wrong values"]


@pytest.mark.parametrize("sample", range(9))
def test_samples_of_weight_zero_stay_out_whatever_they_hold(sample):
    assert left_out(sample) == []


def with_classes_at_minus_infinity(index: int, pieces: str, **options) -> list[str]:
    """Two classes that the network rules out, and exponents so large that the plain formula is taken."""
    arguments = Case(samples=8, classes=6, scale=500.0, pieces=pieces, targets="wrong").arguments()
    arguments["logits"][:, [index, (index + 1) % 6]] = -np.inf
    arguments["targets"][:] = (index + 2 + np.arange(8) % 4) % 6
    deltas, findings = harness_loss.ablated_cross_entropy(**arguments, **options)
    return findings + wrong_deltas(deltas, *wanted(arguments))


@pytest.mark.parametrize("pieces", ["columns", "rows"])
@pytest.mark.parametrize("index", range(6))
def test_classes_at_minus_infinity_stay_out(index, pieces):
    assert with_classes_at_minus_infinity(index, pieces) == []


MUTANT_CASES = [
    Case(),
    Case(samples=129, classes=9, features=5, sample_weight="some", row_gap=3),
    Case(samples=130, classes=4, pieces="columns", targets="right", margin=3.0),
    Case(samples=6, classes=7, features=9, pieces="rows", targets="first"),
    Case(samples=7, scale=1000.0, targets="wrong"),
    Case(samples=8, scale=1000.0, classes=6, targets="wrong", pieces="whole"),
    Case(samples=8, scale=1000.0, classes=7, targets="wrong"),
    Case(samples=3, scale=60.0, classes=8, pieces="columns"),
    Case(pieces="empty"),
]
QUADS = "for (int quad = class_begin / kQuad * kQuad; quad < class_end; quad += kQuad) {"
LAST = "if (quad + i >= class_begin && quad + i < class_end) use(quad + i, losses[i]);"
STEPS = "for (int step = 0; step < steps; ++step) {"
NOT_EMPTY = "if (known && piece.row_begin < piece.row_end && piece.col_begin < piece.col_end) {"
TILES = "for (int64_t first = span * call.span; first < end; first += kWarpSamples) {"
EQUIVALENT = [
    *[("bound + 1", NOT_EMPTY)] * 2,  # an empty piece takes nothing from any logit
    *[(kind, TILES) for kind in ("bound + 1", "no guard")],  # no span is empty
    *[("no guard", "if (!__any_sync(kAllLanes, any)) return;")],  # votes save work alone
    ("no guard", "if (__any_sync(kAllLanes, masked_target)) {"),
    ("no guard", "if (!__any_sync(kAllLanes, needed)) continue;"),
    *[("no guard", STEPS)] * 3,  # no piece is without columns here
    *[("no guard", QUADS)] * 2,  # nor without classes
    *[("bound + 1", LAST)] * 2,  # the first of a quad is before the end: the loop says so
    *[("bound + 1", "")] * 2,  # the loop's own check before its first turn
    *[("no guard", "for (int c = 0; c < classes; ++c) {"), ("bound + 1", QUADS)],  # there are classes
    ("bound + 1", "for (int s = 0; s < kLaneSamples; ++s) {"),  # a fifth sample never needs it
]
# Branches inside CUDA's own functions, for ranges of their arguments.
CUDA_FUNCTIONS = ("log1pf(", "exp(-fabs(", "log(sum)", "expm1f(")


def faults(case: Case, **options) -> list[str]:
    return run(case, **options)[1]


MUTANT_RUNS = [
    *(functools.partial(faults, case) for case in MUTANT_CASES),
    *(functools.partial(unlike_nan, *place) for place in OUT_OF_RANGE),
    *(functools.partial(left_out, sample) for sample in range(4, 8)),
    *(
        functools.partial(with_classes_at_minus_infinity, index, pieces)
        for index, pieces in itertools.product(range(6), ("columns", "rows"))
    ),
    functools.partial(faults, Case(samples=300), tiles_per_span=2),
]


def test_every_mutant_is_noticed():
    mutants = [
        mutant
        for mutant in mutants_of("ablated_cross_entropy", "ablated_cross_entropy_f32")
        if not any(name in mutant.where for name in CUDA_FUNCTIONS)
    ]
    kinds = [mutant.kind for mutant in mutants]
    assert min(kinds.count("bound + 1"), kinds.count("no guard")) > 10
    # One in eight tells whether the test still notices anything.
    chosen = mutants if FULL_SWEEP else sample_of(mutants, 8, EQUIVALENT)
    runs = Runs(chosen, MUTANT_RUNS)
    assert unnoticed(chosen, runs, EQUIVALENT) == []
    assert runs.faults == []
