"""The PTX of loss_panels.cu, run in the simulator: values, races, bounds, and mutants of each kernel."""

import functools

import numpy as np
import pytest

from . import harness, harness_loss
from .loss_cases import SCHEDULES, with_gaps
from .mutants import Run, Runs, mutants_of, unnoticed

pytestmark = pytest.mark.skipif(
    harness.unavailable_reason() is not None, reason=harness.unavailable_reason() or ""
)
# One edge in each quarter of a tile of 32 x 32, which is another copy of the code.
SHAPES = [(1, 1), (1, 33), (31, 32), (32, 31), (33, 1), (33, 65), (127, 3), (128, 4), (129, 5), (257, 2)]
SHAPES += [(10, 9), (18, 17), (26, 25)]
NUM_PIECES = [1, 127, 128, 129]


def transpose(rows: int, cols: int, multiple: int, row_gap: int = 0, **options) -> list[str]:
    matrix = np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(np.float32)
    panel, findings = harness_loss.transpose_to_panel(with_gaps(matrix, row_gap), multiple, **options)
    wanted = np.zeros_like(panel)
    wanted[:, :rows] = matrix.T
    return findings if np.array_equal(panel, wanted) else [*findings, "wrong values"]


def softmax(logits: np.ndarray, **options) -> list[str]:
    probability, log_sum_exp, findings = harness_loss.softmax_panel(logits, **options)
    samples = len(logits)
    exact = logits.astype(np.float64)
    largest = exact.max(1, keepdims=True)
    wanted = np.exp(exact - largest)
    total = wanted.sum(1, keepdims=True)
    wrong = []
    if probability[:, samples:].any():
        wrong.append("padded samples are not 0")
    # To a few units in the last place, however far the classes are apart; below e^-87 it is 0.
    near = exact - largest > -86
    if not np.allclose(probability[:, :samples].T[near], (wanted / total)[near], rtol=4e-7, atol=0):
        wrong.append("wrong probabilities")
    if probability[:, :samples].T[exact - largest < -88].any():
        wrong.append("probabilities that should be 0")
    if not np.allclose(log_sum_exp, (largest + np.log(total))[:, 0], rtol=1e-6, atol=1e-7):
        wrong.append("wrong log-sum-exp")
    return findings + wrong


def logits_of(samples: int, classes: int, scale: float = 30.0, row_gap: int = 0) -> np.ndarray:
    rng = np.random.default_rng(samples * classes)
    return with_gaps(scale * rng.standard_normal((samples, classes)).astype(np.float32), row_gap)


def logits_of_one_class(classes: int) -> np.ndarray:
    logits = np.full((3, classes), -np.inf, np.float32)
    logits[:, classes // 2] = 1.5
    return logits


def softmax_of_equal_logits(classes: int, **options) -> list[str]:
    """The sum of exponentials is a whole number, so that its logarithm must be exact in float64."""
    logits = np.full((2, classes), 0.5, np.float32)
    _, log_sum_exp, findings = harness_loss.softmax_panel(logits, **options)
    exact = np.allclose(log_sum_exp, 0.5 + np.log(classes), rtol=1e-15, atol=0)
    return findings if exact else [*findings, "wrong log-sum-exp"]


def sums(spans: int, num_pieces: int, **options) -> list[str]:
    partial_sums = np.random.default_rng(spans).standard_normal((spans, num_pieces)) * 10.0 ** np.arange(
        num_pieces
    ).clip(0, 12)
    delta_sum, findings = harness_loss.sum_spans(partial_sums, **options)
    wanted = np.zeros(num_pieces)
    for row in partial_sums:  # in the same order, so that the bits agree
        wanted = wanted + row
    return findings if np.array_equal(delta_sum, wanted) else [*findings, "wrong values"]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("multiple", [harness_loss.QUAD, harness_loss.WARP_SAMPLES])
def test_transposes_on_every_schedule(rows, cols, multiple):
    for order, seed in SCHEDULES:
        assert transpose(rows, cols, multiple, row_gap=rows % 2, order=order, seed=seed) == []


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 128, 129])
@pytest.mark.parametrize("classes", [1, 2, 31, 32, 33, 97, 151])
def test_softmax_on_every_schedule(samples, classes):
    for order, seed in SCHEDULES:
        assert softmax(logits_of(samples, classes, row_gap=samples % 2), order=order, seed=seed) == []


@pytest.mark.parametrize("classes", [1, 3, 5, 7, 151])
def test_log_sum_exp_is_as_exact_as_float64(classes):
    assert softmax_of_equal_logits(classes) == []


def test_the_rounding_of_a_difference_of_logits_is_added_back():
    # In float32 a difference of logits of 70 is rounded by up to 4e-6, and so would be its exponential.
    rng = np.random.default_rng(0)
    assert softmax((rng.random((50, 2)) * 10 + [60, -10]).astype(np.float32)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_sample(value):
    logits = logits_of(9, 40, scale=1.0)
    poisoned = logits.copy()
    poisoned[4, 7] = value
    probability, log_sum_exp, findings = harness_loss.softmax_panel(poisoned)
    assert findings == []
    plain, _, _ = harness_loss.softmax_panel(logits)
    others = np.arange(9) != 4
    assert np.array_equal(probability[:, :9][:, others], plain[:, :9][:, others])
    if value == -np.inf:
        assert probability[7, 4] == 0.0
        assert np.isfinite(probability).all()
        assert np.isfinite(log_sum_exp).all()
    else:
        assert np.isnan(probability[:, 4]).all()


@pytest.mark.parametrize("num_pieces", NUM_PIECES)
@pytest.mark.parametrize("spans", [1, 2, 17])
def test_sums_on_every_schedule(spans, num_pieces):
    for order, seed in SCHEDULES:
        assert sums(spans, num_pieces, order=order, seed=seed) == []


def test_empty_panels_are_not_launched():
    assert transpose(0, 5, 4) == []
    assert transpose(5, 0, 4) == []
    assert harness_loss.softmax_panel(np.zeros((0, 3), np.float32))[2] == []
    assert harness_loss.sum_spans(np.zeros((3, 0)))[1] == []


MUTANT_RUNS: dict[str, list[Run]] = {
    "transpose_to_panel_f32": [
        functools.partial(transpose, rows, cols, multiple, 1)
        for rows, cols in SHAPES
        for multiple in (4, 128)
    ],
    "softmax_panel_f32": [
        *(
            functools.partial(softmax, logits_of(samples, classes, row_gap=1))
            for samples, classes in ((9, 1), (1, 33), (129, 2), (3, 64), (2, 95), (3, 96), (2, 127), (9, 300))
        ),
        *(functools.partial(softmax, logits_of_one_class(classes)) for classes in (3, 300)),
        *(functools.partial(softmax_of_equal_logits, classes) for classes in (3, 7, 96, 128)),
    ],
    "sum_spans_f64": [
        functools.partial(sums, spans, num_pieces)
        for spans in (1, 2, 3, 4, 5, 6, 7, 8, 17)
        for num_pieces in (1, 128, 129)
    ],
}
LOG = "if (lane == 0) args.log_sum_exp[sample] = largest + log(sum);"
# Mutants that compute the same; each stands for one.
EQUIVALENT: dict[str, list[tuple[str, str]]] = {
    "transpose_to_panel_f32": [],
    "softmax_panel_f32": [
        ("no guard", LOG),  # all lanes write the same
        ("bound + 1", LOG),  # CUDA's log: where subnormal numbers begin; the sum is 1 or more
        ("no guard", LOG),  # and what it does for them
        ("bound + 1", LOG),  # of infinity, which no sum reaches
        ("bound + 1", LOG),  # between two ranges of the mantissa, where both are as good
    ],
    # The kernel is not launched without a span.
    "sum_spans_f64": [("no guard", "for (int64_t span = 0; span < args.spans; ++span) {")],
}


@pytest.mark.parametrize("kernel", MUTANT_RUNS)
def test_every_mutant_is_noticed(kernel):
    mutants = mutants_of("loss_panels", kernel)
    assert len(mutants) > 2
    runs = Runs(
        mutants,
        [
            functools.partial(run, order=order)
            for order in ("forward", "reverse")
            for run in MUTANT_RUNS[kernel]
        ],
    )
    assert unnoticed(mutants, runs, EQUIVALENT[kernel]) == []
    assert runs.faults == []
