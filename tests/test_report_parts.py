"""What the report is drawn with: means and ranks of the maps, ticks of the axes, numbers as text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprune.report.charts import ticks
from fastprune.report.heat_maps import cells, ranks
from fastprune.report.html import seconds, signed


def plain_means(matrix, sizes):
    rows, cols = sizes
    return np.array(
        [
            [
                np.nan
                if np.isnan(part := matrix[row : row + rows, col : col + cols]).all()
                else np.nanmean(part)
                for col in range(0, matrix.shape[1], cols)
            ]
            for row in range(0, matrix.shape[0], rows)
        ]
    )


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 151), (1, 1700), (15, 17), (129, 1), (151, 129), (1000, 30), (64, 64)]
)
def test_cells_are_means_of_neighbours_and_few(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    matrix[np.random.default_rng(1).random(shape) < 0.4] = np.nan
    small, sizes = cells(matrix)
    np.testing.assert_allclose(small, plain_means(matrix, sizes), rtol=1e-12)
    assert small.size <= 4096
    assert max(small.shape) <= 256
    if matrix.size <= 4096 and max(shape) <= 256:
        assert sizes == (1, 1)


def test_ranks_are_those_among_all_layers():
    scores = {"a": torch.tensor([[3.0, -1.0], [7.0, 3.0]]), "b": torch.tensor([5.0, 9.0, 3.0])}
    pruned = {"b": torch.tensor([False, True, False])}
    found = ranks(scores, pruned)
    # In order: -1, 3, 3, 3, 5, 7; the three equal ones share the places 1, 2 and 3.
    np.testing.assert_allclose(found["a"], [[2 / 5, 0.0], [1.0, 2 / 5]])
    np.testing.assert_allclose(found["b"], [4 / 5, math.nan, 2 / 5])
    assert ranks({"a": torch.tensor([2.0])}, {})["a"].tolist() == [0.0]
    assert np.isnan(ranks({"a": torch.tensor([2.0])}, {"a": torch.tensor([True])})["a"]).all()


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_around_the_values(low, span):
    high = low + span
    marks = ticks(low, high)
    steps = np.diff(marks)
    tolerance = 1e-6 * max(abs(low), abs(high), 1.0)
    assert marks[0] <= low + tolerance
    assert marks[-1] >= high - tolerance
    assert 2 <= len(marks) <= 7
    assert np.allclose(steps, steps[0], rtol=1e-3, atol=1e-9 * max(abs(low), 1.0))


def test_a_single_value_has_ticks_around_it():
    assert ticks(0.0, 0.0)[0] < 0.0 < ticks(0.0, 0.0)[-1]
    assert ticks(0.9, 0.9)[0] < 0.9 < ticks(0.9, 0.9)[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (4.51e-4, "451 µs"),
        (2e-6, "2.00 µs"),
        (123.4, "123 s"),
        (0.0, "0 µs"),
    ],
)
def test_times_are_shown_in_the_unit_that_suits_them(value, text):
    assert seconds(value) == text


def test_changes_have_a_sign_but_nothing_that_is_rounded_to_zero():
    assert [signed(value, ".2f") for value in (1.5, -1.5, 0.001, -0.001)] == [
        "+1.50",
        "\u22121.50",
        "±0",
        "±0",
    ]
