"""ImportanceScores: magnitudes, and the selection of masks from any scores."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import fastprune as fp
from helpers import classification_batches, make_scores, masked_mlp, mlp, pieces_of
from networks import SmallConvNet, spoil_norm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("granularity", [fp.Block(4, 3), fp.Unit(), fp.Element()])
def test_magnitude_is_the_norm_of_each_piece(granularity):
    model = SmallConvNet()
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity)
    assert list(scores) == ["conv1", "conv2", "depthwise", "skip", "head"]
    for name, layer in scores.items():
        weight = model.get_submodule(name).weight.detach().double()
        expected = torch.stack([weight[piece].norm() for piece in pieces_of(granularity, weight.shape)])
        assert layer.dtype == torch.float64
        assert layer.shape == granularity.shape(weight.shape)
        torch.testing.assert_close(layer.flatten(), expected)


def test_magnitude_sees_masks_and_reads_the_loader_only_for_flops():
    model, _ = masked_mlp(0.5)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4))
    assert bool((scores["0"] == 0).any())
    assert scores.loss is None
    with pytest.raises(ValueError, match=r"Budget\(flops=...\) needs scores that were made with a loader"):
        scores.select(budget=fp.Budget(flops=0.5))
    read = fp.score(
        model,
        classification_batches(shape=(17,), classes=10),
        criterion="magnitude",
        granularity=fp.Block(4, 4),
    )
    assert torch.equal(read["0"], scores["0"])
    read.select(budget=fp.Budget(flops=0.5))


def test_scores_are_a_mapping_and_print_as_a_table():
    scores = fp.score(mlp(), classification_batches(), granularity=fp.Block(4, 3), progress=False)
    assert set(scores) == {"0", "2"}
    assert len(scores) == 2
    assert scores["0"].shape == (3, 3)
    assert scores.num_samples == 24
    assert scores.criterion == "loss_delta"
    assert "criterion='loss_delta'" in repr(scores)
    assert "samples=24" in repr(scores)
    with pytest.raises(KeyError):
        scores["1"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_name_their_layer(value):
    with pytest.raises(ValueError, match="gave NaN or inf for layer 'a'"):
        make_scores({"a": ([1.0, value], (2, 3))}, fp.Unit())


SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3)


@hypothesis.given(
    SHAPES,
    st.builds(fp.Block, st.integers(1, 17), st.integers(1, 17)),
    st.floats(0, 0.999),
    st.sampled_from(["global", "layer"]),
    st.integers(0, 9),
)
def test_a_selection_never_exceeds_the_sparsity_and_stops_only_at_a_piece_that_does_not_fit(
    shapes, block, sparsity, scope, seed
):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        str(index): (torch.randint(0, 5, block.shape(torch.Size(shape)), generator=generator), shape)
        for index, shape in enumerate(shapes)
    }
    masks = make_scores(layers, block).select(sparsity=sparsity, scope=scope)
    groups = [[name] for name in layers] if scope == "layer" else [list(layers)]
    for group in groups:
        pieces = [
            (float(score), int(size), bool(keep))
            for name in group
            for score, size, keep in zip(
                layers[name][0].flatten(),
                block.sizes(torch.Size(layers[name][1])).flatten(),
                masks[name].flatten(),
                strict=True,
            )
        ]
        total = sum(size for _, size, _ in pieces)
        removed = sum(size for _, size, keep in pieces if not keep)
        assert removed <= sparsity * total + 1e-6
        ranked = sorted(range(len(pieces)), key=lambda index: (pieces[index][0], index))
        kept = [pieces[index][2] for index in ranked]
        assert kept == sorted(kept)  # lowest scores first, ties by index
        if any(kept):
            following = pieces[ranked[kept.index(True)]][1]
            assert removed + following > sparsity * total - 1e-6


def test_ties_are_broken_by_index():
    scores = make_scores({"a": ([1.0] * 4, (4, 5)), "b": ([1.0] * 4, (4, 5))}, fp.Unit())
    masks = scores.select(sparsity=0.75)
    assert masks["a"].tolist() == [False] * 4
    assert masks["b"].tolist() == [False, False, True, True]


def test_a_ragged_block_weighs_less():
    scores = make_scores({"a": ([[3.0, 1.0, 2.0]], (16, 33))}, fp.Block(16, 16))
    # The second block holds 256 of 528 weights, the third 16.
    assert scores.select(sparsity=272 / 528)["a"].tolist() == [[True, False, False]]
    assert scores.select(sparsity=271 / 528)["a"].tolist() == [[True, False, True]]
    assert scores.select(sparsity=255 / 528)["a"].tolist() == [[True, True, True]]


def test_a_threshold_prunes_what_lies_below_it():
    scores = make_scores({"a": ([-1.0, 0.0, 0.5, 2.0], (4, 3))}, fp.Unit())
    assert scores.select(threshold=0.5)["a"].tolist() == [False, False, True, True]
    assert scores.select(threshold=0)["a"].tolist() == [False, True, True, True]
    assert scores.select(threshold=float("-inf"))["a"].all()
    assert not scores.select(threshold=float("inf"))["a"].any()


def test_layer_scope_prunes_the_same_share_of_each_layer():
    layers = {"low": ([1.0, 2, 3, 4], (4, 10)), "high": ([10.0, 20, 30, 40], (4, 100))}
    scores = make_scores(layers, fp.Unit())
    by_layer = scores.select(sparsity=0.5, scope="layer")
    assert by_layer["low"].tolist() == by_layer["high"].tolist() == [False, False, True, True]
    together = scores.select(sparsity=0.5)
    assert not together["low"].any()
    assert together["high"].tolist() == [False, True, True, True]


def test_budgets_count_weights_multiplications_or_bytes():
    layers = {"a": ([1.0, 2, 3, 4], (4, 10)), "b": ([5.0, 6, 7, 8], (4, 10))}
    scores = make_scores(layers, fp.Unit(), weight_uses={"a": 1.0, "b": 9.0})
    assert scores.select(budget=fp.Budget(params=0.5)).sparsity() == 0.5
    flops = scores.select(budget=fp.Budget(flops=0.5))
    # All of a is 4 of 40; of b one 9 fits into what is left of 20.
    assert not flops["a"].any()
    assert flops["b"].tolist() == [False, True, True, True]
    scores.element_sizes["b"] = 8
    assert scores.select(budget=fp.Budget(bytes=0.5))["b"].tolist() == [False, True, True, True]
    assert scores.select(budget=fp.Budget(params=1.0)).sparsity() == 0.0


def test_what_costs_nothing_is_not_pruned_for_a_budget():
    layers = {"called": ([3.0, 4.0], (2, 10)), "never": ([1.0, 2.0], (2, 10))}
    uses = {"called": 1.0, "never": 0.0}
    scores = make_scores(layers, fp.Unit(), weight_uses=uses)
    masks = scores.select(budget=fp.Budget(flops=0.5))
    assert masks["never"].tolist() == [True, True]
    assert masks["called"].tolist() == [False, True]
    pruned = {"never": torch.tensor([False, True])}
    again = make_scores(layers, fp.Unit(), weight_uses=uses, pruned=pruned)
    assert again.select(budget=fp.Budget(flops=0.5))["never"].tolist() == [True, False]


def test_flops_count_how_often_a_layer_multiplies():
    model = SmallConvNet()
    loader = classification_batches((4,), (3, 7, 5))
    scores = fp.score(model, loader, criterion="magnitude", granularity=fp.Unit())
    assert scores.weight_uses == {"conv1": 35.0, "conv2": 12.0, "depthwise": 12.0, "skip": 12.0, "head": 1.0}


def test_pruned_pieces_stay_pruned_whatever_they_score():
    pruned = {"a": torch.tensor([False, True, False, False])}
    scores = make_scores({"a": ([1.0, 9.0, 2.0, 3.0], (4, 5))}, fp.Unit(), pruned=pruned)
    assert scores.select(sparsity=0.25)["a"].tolist() == [True, False, True, True]
    assert scores.select(sparsity=0.5)["a"].tolist() == [False, False, True, True]
    assert scores.select(threshold=2.0)["a"].tolist() == [False, False, True, True]
    assert scores.select(sparsity=0.5, scope="layer")["a"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("granularity", [fp.Block(4, 3), fp.Unit(), fp.Element()])
def test_rounds_of_pruning_only_ever_remove(granularity):
    model, loader = mlp(17, 33, 5), classification_batches(shape=(17,))
    before = None
    for sparsity in (0.2, 0.5, 0.8):
        scores = fp.score(model, loader, granularity=granularity, criterion="magnitude")
        masks = scores.select(sparsity=sparsity)
        fp.apply_masks_(model, masks)
        assert sparsity - 0.1 < masks.sparsity() <= sparsity
        if before is not None:
            assert all(not bool((masks[name] & ~before[name]).any()) for name in masks)
        before = masks


def test_a_norm_that_goes_with_units_goes_into_the_masks():
    model = nn.Sequential(nn.Linear(7, 9), spoil_norm(nn.BatchNorm1d(9)), nn.ReLU(), nn.Linear(9, 5))
    scores = fp.score(model, classification_batches(), granularity=fp.Unit(), progress=False)
    masks = scores.select(sparsity=0.5, scope="layer")
    fp.apply_masks_(model.eval(), masks)
    hidden = model[1](model[0](torch.randn(3, 7)))
    assert bool((hidden[:, ~masks["0"]] == 0).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"sparsity": 0.5, "threshold": 0.1}, {"sparsity": 0.5, "budget": fp.Budget(params=0.5)}],
)
def test_select_needs_exactly_one_criterion(options):
    scores = make_scores({"a": ([1.0, 2.0], (2, 3))}, fp.Unit())
    with pytest.raises(ValueError, match="exactly one of `sparsity`, `threshold`, `budget`"):
        scores.select(**options)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("sparsity", 1.0, ValueError),
        ("sparsity", -0.1, ValueError),
        ("sparsity", "half", ValueError),
        ("threshold", float("nan"), ValueError),
        ("threshold", "low", ValueError),
        ("threshold", True, ValueError),
        ("budget", 0.5, TypeError),
        ("budget", {"flops": 0.5}, TypeError),
        ("scope", "model", ValueError),
    ],
)
def test_select_names_the_argument_that_is_wrong(argument, value, error):
    scores = make_scores({"a": ([1.0, 2.0], (2, 3))}, fp.Unit())
    options = {"sparsity": 0.5, argument: value} if argument == "scope" else {argument: value}
    with pytest.raises(error, match=f"`{argument}`"):
        scores.select(**options)
