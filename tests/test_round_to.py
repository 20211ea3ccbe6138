"""select(round_to=...): what remains of a layer is a multiple, and the scores decide which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastprune as fp
from helpers import make_scores

SIZES = (1, 15, 17, 32, 129, 151)


@pytest.mark.parametrize("round_to", [1, 2, 8, 16])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_what_remains_is_a_multiple_and_the_highest(round_to, scope, sparsity):
    scores = make_scores({str(size): (torch.rand(size), (size, 7)) for size in SIZES}, fp.Unit())
    masks = scores.select(sparsity=sparsity, scope=scope, round_to=round_to, floor=fp.Floor(units=1))
    for name, mask in masks.items():
        kept = int(mask.sum())
        assert kept % round_to == 0 or kept == len(mask)
        if 0 < kept < len(mask):
            assert float(scores[name][mask].min()) >= float(scores[name][~mask].max())
    if scope == "global" and sparsity <= 0.5:  # beyond, floors keep a whole lot of each layer
        assert sparsity - 2 * round_to * 7 / (sum(SIZES) * 7) - 0.01 < masks.sparsity() <= sparsity


def test_lots_compete_by_their_mean():
    # Each lot of two of the first layer is lower in the mean than that of the second, though one unit is not.
    layers = {"a": ([1.0, 8.0, 20.0, 21.0], (4, 3)), "b": ([2.0, 9.0, 30.0, 31.0], (4, 3))}
    masks = make_scores(layers, fp.Unit()).select(sparsity=0.26, round_to=2)
    assert masks["a"].tolist() == [False, False, True, True]
    assert masks["b"].tolist() == [True] * 4


def test_the_first_lot_leaves_a_multiple():
    masks = make_scores({"a": (torch.arange(11.0), (11, 3))}, fp.Unit()).select(sparsity=0.3, round_to=4)
    assert masks["a"].tolist() == [False] * 3 + [True] * 8


def test_pruned_units_stay_pruned_where_lots_allow_it():
    pruned = {"a": torch.tensor([False] * 4 + [True] * 4)}
    scores = make_scores({"a": (torch.arange(8.0), (8, 3))}, fp.Unit(), pruned=pruned)
    assert scores.select(sparsity=0.5, round_to=4)["a"].tolist() == [True] * 4 + [False] * 4
    assert scores.select(sparsity=0.75, round_to=2)["a"].tolist() == [False] * 2 + [True] * 2 + [False] * 4


def test_coupled_layers_thresholds_and_floors():
    scores = make_scores({name: (torch.arange(16.0), (16, 3)) for name in "ab"}, fp.Unit())
    scores.coupled = (("a", "b"),)
    masks = scores.select(threshold=5.5, round_to=4)
    assert torch.equal(masks["a"], masks["b"])
    assert int(masks["a"].sum()) == 12
    masks = scores.select(sparsity=0.9, round_to=4, floor=fp.Floor(units=5))
    assert int(masks["a"].sum()) == 8


@pytest.mark.parametrize(("granularity", "kept"), [(fp.InputUnit(), 16), (fp.Head(16), 12)])
def test_input_units_are_rounded_and_heads_are_not(granularity, kept):
    masks = make_scores({"a": (torch.arange(16.0), (3, 16))}, granularity).select(sparsity=0.3, round_to=8)
    assert int(masks["a"].sum()) == kept


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    st.integers(1, 9),
    st.floats(0, 0.95),
)
def test_never_more_goes_than_is_asked_for(values, round_to, sparsity):
    scores = make_scores({"a": (values, (len(values), 2))}, fp.Unit())
    masks = scores.select(sparsity=sparsity, round_to=round_to, floor=fp.Floor(units=1))
    assert masks.sparsity() <= sparsity + 1e-9
    assert int(masks["a"].sum()) % round_to == 0 or bool(masks["a"].all())


@pytest.mark.parametrize("granularity", [fp.Block(4, 4), fp.Element(), fp.Unit(group_size=2)])
def test_pieces_that_are_no_single_units_are_refused(granularity):
    shape = granularity.shape(torch.Size((8, 8)))
    scores = make_scores({"a": (torch.rand(shape), (8, 8))}, granularity)
    scores.select(sparsity=0.5)
    with pytest.raises(ValueError, match=r"`round_to` needs pieces of fp.Unit\(\).*for layer 'a'"):
        scores.select(sparsity=0.5, round_to=2)


@pytest.mark.parametrize("round_to", [0, -1, 2.0, True])
def test_round_to_must_be_a_count(round_to):
    scores = make_scores({"a": (torch.rand(8), (8, 8))}, fp.Unit())
    with pytest.raises(ValueError, match="`round_to` must be an integer of at least 1"):
        scores.select(sparsity=0.5, round_to=round_to)
