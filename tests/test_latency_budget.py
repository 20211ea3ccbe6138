"""Latency budgets: tables that are made monotone, and the knapsack over layers, against brute force."""

from __future__ import annotations

import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune.importance.knapsack import Curve, allocate
from fastprune.latency import non_decreasing
from helpers import classification_batches, make_scores, mlp
from test_coupling import TIED, TiedNet, images

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastprune. nothing is left"),
]

TIMES = st.floats(0, 10, width=16)


def linear(seconds):
    """A layer whose time is its density's share."""
    return fp.LayerLatency(seconds, (0.0, 1.0), (0.0, seconds))


@hypothesis.given(st.lists(TIMES, min_size=1, max_size=8))
def test_the_monotone_fit_is_the_closest_one(values):
    fit = non_decreasing(values)
    assert all(low <= high for low, high in itertools.pairwise(fit))
    # The optimum of isotonic regression as a minimum of maxima of means (Barlow et al. 1972).
    for index, value in enumerate(fit):
        ends = range(index, len(values))
        means = [max(np.mean(values[begin : end + 1]) for begin in range(index + 1)) for end in ends]
        assert value == pytest.approx(min(means), abs=1e-12)


@hypothesis.given(TIMES, st.lists(TIMES, min_size=1, max_size=6), st.data())
def test_seconds_are_monotone_interpolated_and_never_above_the_dense_ones(dense, sparse, data):
    densities = sorted(data.draw(st.sets(st.floats(0, 1), min_size=len(sparse), max_size=len(sparse))))
    layer = fp.LayerLatency(dense, densities, sparse)
    grid = np.linspace(0, 1, 301)
    seconds = layer.seconds(grid)
    assert bool((np.diff(seconds) >= 0).all())
    assert bool((seconds <= dense).all())
    for density, fitted in zip(densities, non_decreasing(sparse), strict=True):
        assert float(layer.seconds(density)) == (fitted if fitted <= dense * 0.97 else dense)


def test_seconds_by_hand():
    layer = fp.LayerLatency(10.0, (0.25, 0.5, 1.0), (2.0, 6.0, 14.0))
    np.testing.assert_allclose(layer.seconds([0.0, 0.25, 0.375, 0.5, 0.75, 1.0]), [2, 2, 4, 6, 10, 10])
    assert layer.seconds(0.74) == pytest.approx(10.0)  # 9.84: sparsify_ would call that noise
    assert layer.seconds(0.73) == pytest.approx(9.68)
    assert fp.LayerLatency(3.0).seconds([0.0, 1.0]).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_seconds": -1.0}, "`dense_seconds` must be finite and at least 0, got -1.0"),
        ({"dense_seconds": float("nan")}, "`dense_seconds`"),
        ({"dense_seconds": "1"}, "`dense_seconds`"),
        ({"densities": (0.5,), "sparse_seconds": (float("inf"),)}, "`sparse_seconds`"),
        ({"densities": (0.5,), "sparse_seconds": ()}, "`sparse_seconds` must have one entry for each of 1"),
        ({"densities": (0.5, 0.5), "sparse_seconds": (1.0, 1.0)}, "`densities` must ascend"),
        ({"densities": (0.5, 1.5), "sparse_seconds": (1.0, 1.0)}, "`densities` must ascend"),
        ({"densities": (True,), "sparse_seconds": (1.0,)}, "`densities` must be finite"),
    ],
)
def test_a_latency_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        fp.LayerLatency(**{"dense_seconds": 1.0, **options})


def test_a_table_goes_through_json_and_prints():
    table = fp.LatencyTable({"a": linear(2e-6), "b": fp.LayerLatency(3e-6)}, fp.Block(4, 4))
    again = fp.LatencyTable.from_dict(json.loads(json.dumps(table.to_dict())), fp.Block(4, 4))
    assert dict(again) == dict(table)
    assert again.granularity == table.granularity
    assert "stays dense" in repr(table)
    assert "1: 2.0" in repr(table)
    with pytest.raises(TypeError, match=r"`layers` must hold fp\.LayerLatency, got 1.0 for layer 'a'"):
        fp.LatencyTable({"a": 1.0})
    for entry in ({"seconds": 1.0}, {}):
        with pytest.raises(ValueError, match=r"`layers` must hold dense_seconds, .* for layer 'a'"):
            fp.LatencyTable.from_dict({"a": entry})


def layers_with(scores):
    """Lists of layers: scores, dense time, sparse times."""
    times = st.lists(st.integers(0, 12), min_size=2, max_size=4)
    layer = st.tuples(st.lists(scores, min_size=1, max_size=4), st.integers(1, 9), times)
    return st.lists(layer, min_size=1, max_size=4)


class Case:
    """Curves of some layers, a fifth of their pieces pruned already and a fifth protected."""

    def __init__(self, layers, fraction, seed):
        generator = torch.Generator().manual_seed(seed)
        self.curves = {}
        for index, (scores, dense, sparse) in enumerate(layers):
            latency = fp.LayerLatency(dense, tuple(np.linspace(0, 1, len(sparse))), tuple(sparse))
            values = torch.tensor(scores, dtype=torch.float64)
            values[torch.rand(len(values), generator=generator) < 0.2] = -torch.inf
            protected = torch.rand(len(values), generator=generator) < 0.2
            self.curves[str(index)] = Curve.of(values, protected, [latency])
        self.allowed = fraction * sum(dense for _, dense, _ in layers)
        counts = (range(curve.already, len(curve.losses)) for curve in self.curves.values())
        self.everything = [(*self.cost(each), each) for each in itertools.product(*counts)]

    def cost(self, counts):
        pairs = list(zip(self.curves.values(), counts, strict=True))
        seconds = sum(float(curve.seconds[count]) for curve, count in pairs)
        return seconds, sum(float(curve.losses[count]) for curve, count in pairs)


@hypothesis.given(layers_with(st.integers(-3, 9)), st.floats(0.05, 1.0), st.integers(0, 99))
def test_a_budget_is_met_where_it_can_be(layers, fraction, seed):
    case = Case(layers, fraction, seed)
    taken, remaining = allocate(case.curves, case.allowed)
    assert remaining == pytest.approx(case.cost(taken.values())[0])
    start = tuple(curve.already for curve in case.curves.values())
    assert all(count >= already for count, already in zip(taken.values(), start, strict=True))
    fastest = min(seconds for seconds, _, _ in case.everything)
    assert remaining <= max(case.allowed * (1 + 1e-8), fastest + 1e-9)
    if case.cost(start)[0] <= case.allowed:
        assert tuple(taken.values()) == start


@hypothesis.settings(max_examples=200)
@hypothesis.given(layers_with(st.integers(0, 9)), st.floats(0.05, 1.0), st.integers(0, 99))
def test_the_loss_exceeds_the_least_there_is_by_less_than_a_step_and_not_at_a_corner(layers, fraction, seed):
    case = Case(layers, fraction, seed)
    feasible = [loss for seconds, loss, _ in case.everything if seconds <= case.allowed * (1 + 1e-9)]
    hypothesis.assume(feasible)
    taken, _ = allocate(case.curves, case.allowed)
    _, loss = case.cost(taken.values())
    steps = [
        (curve.losses[end] - curve.losses[begin])
        for curve in case.curves.values()
        for begin, end in itertools.pairwise(curve.steps())
    ]
    assert loss <= min(feasible) + max([0.0, *steps]) + 1e-9
    # The same selection is the best one for a budget of just the seconds that it takes, where that is a
    # corner of every hull.
    if all(count in curve.steps() for curve, count in zip(case.curves.values(), taken.values(), strict=True)):
        seconds = case.cost(taken.values())[0]
        assert loss <= min(loss for other, loss, _ in case.everything if other <= seconds + 1e-9) + 1e-9


def test_the_cheapest_microseconds_go_first():
    # Block by block the same loss; in b it buys three times as many seconds, in c none.
    layers = {name: ([1.0, 2, 3, 4], (4, 10)) for name in "abc"}
    costs = fp.LatencyTable({"a": linear(4.0), "b": linear(12.0), "c": fp.LayerLatency(4.0)})
    scores = make_scores(layers, fp.Unit())
    # Loss per second: b 1/3 2/3 1 4/3, a 1 2 3 4; ties go to the earlier layer.
    for fraction, expected in (
        (1.0, {"a": 4, "b": 4, "c": 4}),
        (17.0 / 20, {"a": 4, "b": 3, "c": 4}),
        (14.0 / 20, {"a": 4, "b": 2, "c": 4}),
        (13.0 / 20, {"a": 3, "b": 2, "c": 4}),
        (10.0 / 20, {"a": 3, "b": 1, "c": 4}),
        (4.0 / 20, {"a": 0, "b": 0, "c": 4}),
    ):
        masks = scores.select(budget=fp.Budget(latency=fraction, costs=costs))
        assert {name: int(mask.sum()) for name, mask in masks.items()} == expected, fraction
        for mask in masks.values():
            assert mask.tolist() == sorted(mask.tolist())  # the lowest go


def test_a_budget_that_rounding_puts_just_below_a_sum_is_met_by_it():
    # One after the other, 0.2 three times from 1.2 leaves 0.6000000000000001.
    costs = fp.LatencyTable({name: linear(0.2) for name in "abcdef"})
    scores = make_scores({name: ([1.0], (1, 10)) for name in costs}, fp.Unit())
    masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))
    assert [bool(mask.all()) for mask in masks.values()] == [False, False, False, True, True, True]


def test_a_layer_that_gains_only_below_a_density_is_taken_that_far_or_not_at_all():
    # Dense down to a density of 1/2, then a cliff.
    cliff = fp.LayerLatency(10.0, (0.0, 0.5, 0.75, 1.0), (1.0, 2.0, 20.0, 30.0))
    costs = fp.LatencyTable({"cliff": cliff, "slope": linear(10.0)})
    scores = make_scores({name: ([1.0] * 8, (8, 10)) for name in costs}, fp.Unit())
    masks = scores.select(budget=fp.Budget(latency=0.7, costs=costs))
    assert int(masks["cliff"].sum()) == 4
    assert int(masks["slope"].sum()) == 8
    scores = make_scores({"cliff": ([5.0] * 8, (8, 10)), "slope": ([1.0] * 8, (8, 10))}, fp.Unit())
    masks = scores.select(budget=fp.Budget(latency=0.7, costs=costs))
    assert int(masks["cliff"].sum()) == 8
    assert int(masks["slope"].sum()) == 3


def test_a_layer_that_saves_more_and_more_is_weighed_as_a_whole():
    # The first of four pieces saves 0.5 s, all of them 10 s: 2 a second at first, 0.4 altogether.
    late = fp.LayerLatency(10.0, (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 4.0, 8.0, 9.5, 10.0))
    costs = fp.LatencyTable({"steady": linear(10.0), "late": late})
    layers = {"steady": ([1.2] * 4, (4, 10)), "late": ([1.0] * 4, (4, 10))}  # 0.48 a second, all along
    masks = make_scores(layers, fp.Unit()).select(budget=fp.Budget(latency=0.5, costs=costs))
    assert masks["steady"].all()
    assert not masks["late"].any()
    # Where less is asked for, no more goes than it takes.
    masks = make_scores(layers, fp.Unit()).select(budget=fp.Budget(latency=0.9, costs=costs))
    assert masks["steady"].all()
    assert masks["late"].tolist() == [False, False, True, True]


def test_of_the_counts_of_a_step_that_are_fast_enough_the_one_with_the_least_loss_goes():
    # One piece saves 1 s, two 1.5 s: the step of both has the better ratio, and its second score is below 0.
    latency = fp.LayerLatency(10.0, (0.0, 1 / 3, 2 / 3, 1.0), (0.0, 8.5, 9.0, 10.0))
    costs = fp.LatencyTable({"a": latency})
    scores = make_scores({"a": ([-2.0, -2.0, 50.0], (3, 10))}, fp.Unit())
    assert Curve.of(scores["a"], torch.zeros(3, dtype=torch.bool), [latency]).steps() == [0, 2, 3]
    masks = scores.select(budget=fp.Budget(latency=0.95, costs=costs))
    assert masks["a"].tolist() == [False, False, True]
    positive = make_scores({"a": ([2.0, 2.0, 50.0], (3, 10))}, fp.Unit())
    assert positive.select(budget=fp.Budget(latency=0.95, costs=costs))["a"].tolist() == [False, True, True]


@hypothesis.given(layers_with(st.integers(-3, 9)), st.integers(0, 99))
def test_steps_are_the_corners_of_the_hull_of_what_saves_time(layers, seed):
    for curve in Case(layers, 1.0, seed).curves.values():
        saved = curve.seconds[curve.already] - curve.seconds
        points = [
            count
            for count in range(curve.already, len(saved))
            if all(saved[count] > saved[other] for other in range(curve.already, count))
        ]
        steps = curve.steps()
        assert set(steps) <= set(points)
        assert steps[0] == points[0]
        assert steps[-1] == points[-1]
        for first, middle, last in itertools.combinations(points, 3):
            share = (saved[middle] - saved[first]) / (saved[last] - saved[first])
            line = curve.losses[first] + share * (curve.losses[last] - curve.losses[first])
            if curve.losses[middle] > line + 1e-9:
                assert middle not in steps
        for middle in set(points) - set(steps):
            assert any(
                curve.losses[middle]
                >= curve.losses[first]
                + (saved[middle] - saved[first])
                / (saved[last] - saved[first])
                * (curve.losses[last] - curve.losses[first])
                - 1e-9
                for first in points
                for last in points
                if first < middle < last
            )


def test_a_budget_that_cannot_be_met_takes_what_helps_and_says_so():
    costs = fp.LatencyTable({"a": linear(1.0), "b": fp.LayerLatency(3.0)})
    scores = make_scores({name: ([1.0, 2.0], (2, 10)) for name in "ab"}, fp.Unit())
    with pytest.warns(UserWarning, match=r"a latency of 75\.0% remains where 50\.0% was asked for"):
        masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))
    assert masks["b"].all()
    assert not masks["a"].any()
    with pytest.warns(UserWarning, match=r"a latency of 87\.5% remains"):
        masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs), floor=fp.Floor(units=1))
    assert masks["a"].tolist() == [False, True]


def test_pruned_pieces_stay_pruned_and_cost_no_loss():
    costs = fp.LatencyTable({"a": linear(4.0), "b": linear(4.0)})
    pruned = {"a": torch.tensor([False, False, False, True])}
    layers = {"a": ([1.0, 2, 3, 9], (4, 10)), "b": ([1.5, 2, 3, 4], (4, 10))}
    scores = make_scores(layers, fp.Unit(), pruned=pruned)
    for fraction, a, b in (
        (1.0, [True, True, True, False], [True] * 4),
        (6 / 8, [False, True, True, False], [True] * 4),
        (5 / 8, [False, True, True, False], [False, True, True, True]),
    ):
        masks = scores.select(budget=fp.Budget(latency=fraction, costs=costs))
        assert masks["a"].tolist() == a
        assert masks["b"].tolist() == b


def test_coupled_layers_cost_what_all_of_them_take():
    torch.manual_seed(1)
    scores = fp.score(TiedNet(), images(), granularity=fp.Unit(coupled=True), progress=False)
    costs = fp.LatencyTable({name: linear(1.0 if name in TIED[0] else 0.0) for name in scores})
    masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))
    for name, mask in masks.items():
        assert int(mask.sum()) == (3 if name in TIED[0] else len(mask)), name


def test_every_granularity_takes_a_table_of_its_own():
    model, loader = mlp(17, 33, 5), classification_batches(shape=(17,))
    for granularity in (fp.Block(4, 3), fp.Unit(), fp.Element()):
        scores = fp.score(model, loader, criterion="magnitude", granularity=granularity)
        costs = fp.LatencyTable({name: linear(1.0) for name in scores}, granularity)
        masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))
        kept = sum(float(mask.double().mean()) for mask in masks.values())
        assert 0.8 < kept <= 1.0 + 1e-9


def test_the_same_table_gives_the_same_masks():
    scores = fp.score(mlp(17, 33, 5), None, criterion="random", granularity=fp.Element())
    costs = fp.LatencyTable({"0": linear(3.0), "2": fp.LayerLatency(2.0, (0.1, 0.6), (0.3, 1.4))})
    first, second = (scores.select(budget=fp.Budget(latency=0.4, costs=costs)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_latency_budget_names_what_is_wrong():
    scores = make_scores({name: ([1.0, 2.0], (2, 10)) for name in "ab"}, fp.Unit())
    costs = fp.LatencyTable({name: linear(1.0) for name in "ab"})
    for options, error, message in (
        ({"flops": 0.5, "costs": costs}, ValueError, "`costs` are for `latency`, got costs with flops=0.5"),
        ({"latency": 0.5, "costs": {"a": linear(1.0)}}, TypeError, r"`costs` must be an fp\.LatencyTable"),
        ({"latency": 0.0, "costs": costs}, ValueError, "`latency` must be a fraction"),
    ):
        with pytest.raises(error, match=message):
            fp.Budget(**options)
    with pytest.raises(ValueError, match=r"`latency` needs `costs` here, which fp\.measure_latency"):
        scores.select(budget=fp.Budget(latency=0.5))
    for scope in ("layer", ["a", "b"]):
        with pytest.raises(ValueError, match="`scope` must be 'global' for a latency budget"):
            scores.select(budget=fp.Budget(latency=0.5, costs=costs), scope=scope)
    other = fp.LatencyTable(dict(costs), fp.Block(4, 4))
    with pytest.raises(ValueError, match=r"`costs` must be those of Unit\(.*, got those of Block\("):
        scores.select(budget=fp.Budget(latency=0.5, costs=other))
    with pytest.raises(ValueError, match="`costs` must have every layer of the scores, b is missing"):
        scores.select(budget=fp.Budget(latency=0.5, costs=fp.LatencyTable({"a": linear(1.0)})))
