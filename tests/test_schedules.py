"""Schedules: formulas, steps with updates, and what they refuse."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

import fastprune as fp

KINDS = (fp.CubicSchedule, fp.LinearSchedule, fp.ExponentialSchedule)


def formula(kind, initial, final, progress):
    if kind is fp.CubicSchedule:
        return final + (initial - final) * (1 - progress) ** 3
    if kind is fp.LinearSchedule:
        return initial + (final - initial) * progress
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** progress


@hypothesis.given(
    st.sampled_from(KINDS),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(0, 50),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_a_schedule_follows_its_formula_and_never_falls(kind, first, second, begin, every, updates):
    initial, final = sorted((first, second))
    end = begin + every * updates
    schedule = kind(final, begin=begin, end=end, every=every, initial=initial)
    steps = range(end + 3)
    assert [step for step in steps if schedule.is_update(step)] == list(range(begin, end + 1, every))
    values = [schedule.at(step) for step in steps]
    for step, value in zip(steps, values, strict=True):
        progress = (step - begin) / (end - begin)
        if step < begin:
            assert value == 0.0
        elif step >= end:
            assert value == final
        else:
            assert value == pytest.approx(formula(kind, initial, final, progress), abs=1e-12)
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))
    assert values[begin] == initial


def test_schedules_by_hand():
    cubic = fp.CubicSchedule(0.8, begin=100, end=200, every=10)
    assert [round(cubic.at(step), 6) for step in (99, 100, 150, 190, 200, 300)] == [
        0.0, 0.0, 0.7, 0.7992, 0.8, 0.8,
    ]  # fmt: skip
    assert fp.LinearSchedule(0.8, end=1000, every=100).at(500) == pytest.approx(0.4)
    assert fp.ExponentialSchedule(0.75, end=2).at(1) == pytest.approx(0.5)
    once = fp.OneShotSchedule(0.75, begin=10)
    assert [step for step in range(30) if once.is_update(step)] == [10]
    assert [once.at(step) for step in (0, 9, 10, 11)] == [0.0, 0.0, 0.75, 0.75]
    assert fp.OneShotSchedule(0.5).is_update(0)


def test_exponential_rounds_are_those_of_compress():
    from fastprune.compression_run import Goal

    schedule = fp.ExponentialSchedule(0.9, end=5)
    for index in range(5):
        assert schedule.at(index + 1) == pytest.approx(Goal(0.9).after(5, index).sparsity, abs=1e-12)


def test_a_schedule_of_ones_own_needs_only_what_lies_between():
    @dataclasses.dataclass(frozen=True)
    class Half(fp.Schedule):
        def between(self, progress):
            return self.sparsity / 2

    schedule = Half(0.8, end=3)
    assert [schedule.at(step) for step in range(5)] == [0.0, 0.4, 0.4, 0.8, 0.8]
    assert schedule == Half(0.8, end=3)
    with pytest.raises(TypeError, match="abstract"):
        fp.Schedule(0.8, end=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` must be a number in \[0, 1\)"),
        ({"initial": -0.1}, r"`initial` must be a number in \[0, 1\)"),
        ({"initial": 0.6}, "`initial` must be at most the sparsity of 0.5"),
        ({"begin": -1}, "`begin` must be an integer of at least 0"),
        ({"begin": 11}, "`end` must be an integer of at least 11, got 10"),
        ({"end": 10.0}, "`end` must be an integer"),
        ({"every": 0}, "`every` must be an integer of at least 1"),
        ({"every": True}, "`every` must be an integer"),
        ({"every": 3}, "`every` must divide the 10 steps from begin to end, got 3"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_names_what_is_wrong(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"sparsity": 0.5, "end": 10, **options})


def test_one_shot_has_one_step():
    with pytest.raises(ValueError, match="`end` must be the same step as `begin`, 3, got 5"):
        fp.OneShotSchedule(0.5, begin=3, end=5)
    with pytest.raises(ValueError, match=r"`sparsity` must be"):
        fp.OneShotSchedule(1.5)
