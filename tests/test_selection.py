"""select: adaptive thresholds, groups of layers and their targets, and which floors hold."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import fastprune as fp
from helpers import classification_batches, make_scores, mlp
from test_coupling import TIED, TiedNet, images

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastprune. nothing is left"),
]

SIZES = st.lists(st.sampled_from([1, 2, 15, 17, 129]), min_size=1, max_size=4)


def unit_scores(sizes, seed, values=7, pruned_share=0.0):
    """Scores of units with many ties, some of them pruned already."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"layer{index}": (torch.randint(-2, values, (size,), generator=generator).double(), (size, 3))
        for index, size in enumerate(sizes)
    }
    pruned = {
        name: torch.rand(len(layer), generator=generator) < pruned_share
        for name, (layer, _) in layers.items()
    }
    return make_scores(layers, fp.Unit(), pruned=pruned)


def live(scores, names):
    return torch.cat([scores[name][~scores.pruned[name]] for name in names])


@hypothesis.given(SIZES, st.integers(0, 99), st.floats(0, 1), st.sampled_from(["global", "layer"]))
def test_a_quantile_is_that_of_the_live_pieces_in_scope(sizes, seed, quantile, scope):
    scores = unit_scores(sizes, seed, pruned_share=0.3)
    masks = scores.select(threshold=fp.Threshold(quantile=quantile), scope=scope)
    for name in scores:
        among = live(scores, [name] if scope == "layer" else list(scores))
        expected = torch.zeros(len(scores[name]), dtype=torch.bool)
        if len(among):
            expected = (scores[name] >= torch.quantile(among, quantile)) & ~scores.pruned[name]
        assert torch.equal(masks[name], expected)


@hypothesis.given(SIZES, st.integers(0, 99), st.floats(-1, 3), st.sampled_from(["global", "layer"]))
def test_a_mean_minus_deviations_is_that_of_the_live_pieces_in_scope(sizes, seed, k, scope):
    scores = unit_scores(sizes, seed, pruned_share=0.3)
    masks = scores.select(threshold=fp.Threshold(mean_minus_std=k), scope=scope)
    for name in scores:
        among = live(scores, [name] if scope == "layer" else list(scores))
        expected = torch.zeros(len(scores[name]), dtype=torch.bool)
        if len(among):
            limit = float(among.mean() - k * among.std(correction=0))
            if bool(((scores[name] - limit).abs() < 1e-9).any()):
                continue  # a tie that rounding decides
            expected = (scores[name] >= limit) & ~scores.pruned[name]
        assert torch.equal(masks[name], expected)


def test_thresholds_by_hand():
    scores = make_scores({"a": ([1.0, 2, 3, 4], (4, 3)), "b": ([10.0, 20, 30, 60], (4, 3))}, fp.Unit())
    median = fp.Threshold(quantile=0.5)
    assert scores.select(threshold=median)["b"].tolist() == [True] * 4
    assert not scores.select(threshold=median)["a"].any()
    by_layer = scores.select(threshold=median, scope="layer")
    assert by_layer["a"].tolist() == by_layer["b"].tolist() == [False, False, True, True]
    # b: mean 30, standard deviation sqrt(350) = 18.7.
    assert scores.select(threshold=fp.Threshold(mean_minus_std=1.0), scope="layer")["b"].tolist() == [
        False, True, True, True,
    ]  # fmt: skip
    assert scores.select(threshold=fp.Threshold(mean_minus_std=1.1), scope="layer")["b"].all()


def test_equal_scores_and_single_pieces_stay_under_any_adaptive_threshold():
    scores = make_scores({"a": ([2.0] * 5, (5, 3)), "b": ([7.0], (1, 3))}, fp.Unit())
    for threshold in (fp.Threshold(quantile=0.9), fp.Threshold(mean_minus_std=0.0)):
        masks = scores.select(threshold=threshold, scope="layer")
        assert masks["a"].all()
        assert masks["b"].all()


def test_a_repeated_quantile_takes_the_same_share_of_what_is_left():
    scores = make_scores({"a": (list(range(64)), (64, 3))}, fp.Unit())
    kept = []
    for _ in range(3):
        masks = scores.select(threshold=fp.Threshold(quantile=0.5))
        kept.append(int(masks["a"].sum()))
        scores.pruned["a"] = ~masks["a"]
    assert kept == [32, 16, 8]


def test_a_quantile_of_more_values_than_torch_takes():
    values = torch.arange(17_000_000, dtype=torch.float64)
    assert fp.Threshold(quantile=0.5).of(values) == (len(values) - 1) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of quantile, mean_minus_std"),
        ({"quantile": 0.5, "mean_minus_std": 1.0}, "exactly one of quantile, mean_minus_std"),
        ({"quantile": 1.1}, r"`quantile` must be a number in \[0, 1\], got 1.1"),
        ({"quantile": float("nan")}, "`quantile`"),
        ({"quantile": True}, "`quantile`"),
        ({"mean_minus_std": "1"}, "`mean_minus_std` must be a finite number"),
        ({"mean_minus_std": float("inf")}, "`mean_minus_std`"),
    ],
)
def test_a_threshold_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        fp.Threshold(**options)


def three_layers():
    return make_scores(
        {
            "enc.0": ([1.0, 2, 3, 4], (4, 10)),
            "enc.1": ([5.0, 6, 7, 8], (4, 10)),
            "head": ([0.1, 0.2, 9, 10], (4, 10)),
        },
        fp.Unit(),
    )


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_groups_lose_the_same_share_each():
    scores = three_layers()
    groups = scores.select(sparsity=0.5, scope=["enc.*", "head"])
    assert kept(groups) == {"enc.0": 0, "enc.1": 4, "head": 2}
    assert kept(scores.select(sparsity=0.5, scope=[["head", "enc.1"], "*"])) == {
        "enc.0": 2, "enc.1": 2, "head": 2,
    }  # fmt: skip
    assert kept(scores.select(sparsity=0.5)) == {"enc.0": 0, "enc.1": 4, "head": 2}
    together, apart = scores.select(sparsity=0.3, scope=["*"]), scores.select(sparsity=0.3)
    assert all(torch.equal(together[name], apart[name]) for name in scores)
    alone, layer = (scores.select(sparsity=0.3, scope=scope) for scope in (list(scores), "layer"))
    assert all(torch.equal(alone[name], layer[name]) for name in scores)


def test_a_target_for_each_layer_or_group():
    scores = three_layers()
    assert kept(scores.select(sparsity={"enc.0": 0.25, "enc.1": 0.75, "head": 0.0})) == {
        "enc.0": 3, "enc.1": 1, "head": 4,
    }  # fmt: skip
    assert kept(scores.select(sparsity={"head": 0.25, "*": 0.75})) == {"enc.0": 0, "enc.1": 2, "head": 3}
    assert kept(scores.select(sparsity={"head": 0.25, "*": 0.75}, scope="layer")) == {
        "enc.0": 1, "enc.1": 1, "head": 3,
    }  # fmt: skip


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_layers_without_a_target_keep_what_they_have(scope):
    scores = three_layers()
    scores.pruned = {"enc.1": torch.tensor([False, False, False, True])}
    masks = scores.select(sparsity={"head": 0.5}, scope=scope)
    assert masks["enc.0"].all()
    assert masks["enc.1"].tolist() == [True, True, True, False]
    assert masks["head"].tolist() == [False, False, True, True]


def test_groups_and_targets_serve_budgets_and_thresholds_too():
    scores = three_layers()
    assert kept(scores.select(budget=fp.Budget(params=0.5), scope=["enc.*", "head"])) == {
        "enc.0": 0, "enc.1": 4, "head": 2,
    }  # fmt: skip
    assert kept(scores.select(threshold=fp.Threshold(quantile=0.5), scope=["enc.*", "head"])) == {
        "enc.0": 0, "enc.1": 4, "head": 2,
    }  # fmt: skip


def test_coupled_layers_go_by_the_first_of_them():
    torch.manual_seed(1)
    scores = fp.score(TiedNet(), images(), granularity=fp.Unit(coupled=True), progress=False)
    first = TIED[0][0]
    masks = scores.select(sparsity={first: 0.5})
    for name, mask in masks.items():
        assert int((~mask).sum()) == (len(mask) // 2 if name in TIED[0] else 0), name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 0.5, "scope": "model"}, ValueError, "`scope` must be 'global' or 'layer'"),
        ({"sparsity": 0.5, "scope": 3}, ValueError, "`scope` must be 'global', 'layer' or a list of groups"),
        ({"sparsity": 0.5, "scope": ["enc.*"]}, ValueError, "`scope` leaves head in no group"),
        ({"sparsity": 0.5, "scope": ["dec.*", "*"]}, ValueError, r"`scope` has 'dec\.\*', which matches no"),
        ({"sparsity": 0.5, "scope": ["*", "head"]}, ValueError, "`scope` has 'head', which matches no layer"),
        ({"sparsity": 0.5, "scope": [["enc.*", 3], "*"]}, TypeError, "`scope` must hold name globs"),
        ({"sparsity": {"decoder": 0.5}}, ValueError, "`sparsity` has 'decoder', which matches no layer"),
        ({"sparsity": {"head": 1.0}}, ValueError, r"`sparsity\['head'\]` must be a number in \[0, 1\)"),
        ({"sparsity": {"head": 0.5}, "scope": ["*"]}, ValueError, "`scope` must be 'global' or 'layer'"),
        ({"threshold": "low"}, ValueError, "`threshold` must be a number or an fp.Threshold"),
        ({"sparsity": 0.5, "floor": 3}, TypeError, "`floor` must be an fp.Floor"),
        ({"sparsity": 0.5, "floor": {"*": 0.5}}, TypeError, "`floor` must be an fp.Floor"),
        (
            {"sparsity": 0.5, "floor": {"tail": fp.Floor(units=1)}},
            ValueError,
            "`floor` has 'tail', which matches no",
        ),
        ({"sparsity": 0.5, "floor": fp.Floor(blocks_per_row=1)}, ValueError, "needs fp.Block pieces"),
    ],
)
def test_select_names_what_is_wrong_with_groups_and_floors(options, error, message):
    with pytest.raises(error, match=message):
        three_layers().select(**options)


@hypothesis.given(
    SIZES,
    st.integers(0, 99),
    st.sampled_from([1, 3, 16]),
    st.sampled_from(
        [{"sparsity": 0.97}, {"threshold": 5.0}, {"threshold": 99.0}, {"budget": fp.Budget(params=0.05)}]
    ),
    st.sampled_from(["global", "layer"]),
)
@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_the_highest_units_of_each_layer_stay(sizes, seed, least, options, scope):
    scores = unit_scores(sizes, seed, pruned_share=0.4)
    masks = scores.select(**options, scope=scope, floor=fp.Floor(units=least))
    for name, mask in masks.items():
        assert int(mask.sum()) >= min(least, len(mask))
        # The floor takes the highest, live ones first; what else stays scores no lower than what went.
        ranked = torch.where(scores.pruned[name], -torch.inf, scores[name])
        gone, stay = ranked[~mask], ranked[mask]
        if len(gone) and len(stay):
            assert float(gone.max()) <= float(stay.min())


def test_units_of_a_floor_count_single_units():
    layers = {"a": ([3.0, 1.0, 2.0], (10, 3))}  # groups of 4, 4 and 2 units
    scores = make_scores(layers, fp.Unit(group_size=4))
    for least, expected in ((1, [True, False, False]), (5, [True, False, True]), (7, [True] * 3)):
        masks = scores.select(threshold=99.0, floor=fp.Floor(units=least))
        assert masks["a"].tolist() == expected
    inputs = make_scores({"a": ([3.0, 1.0, 2.0], (10, 3))}, fp.InputUnit())
    masks = inputs.select(threshold=99.0, floor=fp.Floor(units=2))
    assert masks["a"].tolist() == [True, False, True]


@hypothesis.given(
    st.tuples(st.sampled_from([1, 15, 17, 33]), st.sampled_from([1, 15, 17, 33])),
    st.builds(fp.Block, st.integers(1, 17), st.integers(1, 17)),
    st.integers(1, 3),
    st.integers(0, 9),
)
@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_every_block_row_keeps_its_highest_blocks(shape, block, least, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = block.shape(torch.Size(shape))
    layer = torch.randint(0, 4, grid, generator=generator)
    pruned = {"a": torch.rand(grid, generator=generator) < 0.3}
    scores = make_scores({"a": (layer, shape)}, block, pruned=pruned)
    masks = scores.select(sparsity=0.99, floor=fp.Floor(blocks_per_row=least))
    for row, ranked in zip(masks["a"], torch.where(pruned["a"], -torch.inf, scores["a"]), strict=True):
        assert int(row.sum()) >= min(least, len(row))
        if not row.all():
            assert float(ranked[~row].max()) <= float(ranked[row].min())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_no_layer_loses_more_than_the_largest_share(share):
    scores = fp.score(mlp(17, 33, 5), None, criterion="magnitude", granularity=fp.Block(4, 3))
    masks = scores.select(threshold=1e9, floor=fp.Floor(max_sparsity=share))
    for name in masks:
        sizes = fp.Block(4, 3).sizes(scores.weight_shapes[name])
        assert masks.sparsity(name) <= share + 1e-12
        # One more of the pieces that stay, the lowest, would exceed it.
        if masks[name].any():
            lowest = torch.where(masks[name], scores[name], torch.inf).flatten().argmin()
            assert masks.sparsity(name) + int(sizes.flatten()[lowest]) / int(sizes.sum()) > share


@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_a_largest_share_that_rounding_puts_above_a_whole_number_is_that_number():
    assert (1 - 0.7) * 10 > 3
    scores = make_scores({"a": (list(range(10)), (10, 1))}, fp.Unit())
    assert kept(scores.select(threshold=99.0, floor=fp.Floor(max_sparsity=0.7))) == {"a": 3}


def test_a_sparsity_that_rounding_puts_below_a_whole_number_is_that_number():
    assert 0.29 * 100 < 29
    scores = make_scores({"a": (list(range(100)), (100, 1))}, fp.Unit())
    assert kept(scores.select(sparsity=0.29)) == {"a": 71}


@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_a_floor_of_units_counts_heads():
    scores = make_scores({"a": ([3.0, 1.0, 2.0, 0.0], (5, 12))}, fp.Head(4))
    masks = scores.select(threshold=99.0, floor=fp.Floor(units=2))
    assert masks["a"].tolist() == [True, False, True, False]


def test_coupled_units_are_gone_where_they_are_pruned_in_each_of_their_layers():
    torch.manual_seed(1)
    scores = fp.score(TiedNet(), images(), granularity=fp.Unit(coupled=True), progress=False)
    units = torch.arange(len(scores[TIED[0][0]]))
    scores.pruned = {name: units < 1 + index for index, name in enumerate(TIED[0])}
    masks = scores.select(sparsity={})
    for name in TIED[0]:
        assert torch.equal(masks[name], units > 0)


@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_several_floors_all_hold_and_globs_choose_among_them():
    scores = three_layers()
    both = scores.select(threshold=99.0, floor=fp.Floor(units=1, max_sparsity=0.5))
    assert kept(both) == {"enc.0": 2, "enc.1": 2, "head": 2}
    floors = {"enc.1": fp.Floor(units=3), "enc.*": fp.Floor(units=1)}
    assert kept(scores.select(threshold=99.0, floor=floors)) == {"enc.0": 1, "enc.1": 3, "head": 0}


def test_a_floor_brings_pruned_pieces_back_where_too_few_are_left():
    scores = make_scores(
        {"a": ([5.0, 1.0, 2.0, 3.0], (4, 3))},
        fp.Unit(),
        pruned={"a": torch.tensor([True, False, True, True])},
    )
    assert scores.select(sparsity=0.75, floor=fp.Floor(units=1))["a"].tolist() == [False, True, False, False]
    with pytest.warns(UserWarning, match="floors keep a above what was asked for"):
        masks = scores.select(sparsity=0.75, floor=fp.Floor(units=2))
    assert int(masks["a"].sum()) == 2
    assert masks["a"][1]


@pytest.mark.filterwarnings("error:fastprune")
def test_only_a_floor_that_stands_in_the_way_warns():
    scores = three_layers()
    scores.select(sparsity=0.5, floor=fp.Floor(units=1))
    scores.select(sparsity=0.74, scope="layer", floor=fp.Floor(units=2, max_sparsity=0.5))
    with pytest.raises(UserWarning, match=r"floors keep enc\.0, enc\.1, head above"):
        scores.select(sparsity=0.9, floor=fp.Floor(units=2))
    with pytest.warns(UserWarning, match=r"nothing is left of enc\.0: .* a floor"):
        scores.select(threshold=4.5)


@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_a_floor_of_one_coupled_layer_holds_for_all():
    torch.manual_seed(1)
    scores = fp.score(TiedNet(), images(), granularity=fp.Unit(coupled=True), progress=False)
    floors = {TIED[0][0]: fp.Floor(units=1), TIED[0][-1]: fp.Floor(units=2)}
    masks = scores.select(threshold=1e9, floor=floors)
    for name, mask in masks.items():
        assert int(mask.sum()) == (2 if name in TIED[0] else 0), name
    assert len({tuple(masks[name].tolist()) for name in TIED[0]}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one of units, blocks_per_row, max_sparsity"),
        ({"units": 0}, "`units` must be an integer of at least 1"),
        ({"blocks_per_row": 1.5}, "`blocks_per_row` must be an integer"),
        ({"max_sparsity": 1.5}, r"`max_sparsity` must be a number in \[0, 1\]"),
        ({"max_sparsity": True}, "`max_sparsity`"),
    ],
)
def test_a_floor_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        fp.Floor(**options)


@pytest.mark.parametrize("granularity", [fp.Block(4, 3), fp.Element()])
def test_a_floor_of_units_needs_units(granularity):
    scores = fp.score(mlp(), None, criterion="magnitude", granularity=granularity)
    with pytest.raises(ValueError, match=r"needs fp\.Unit, fp\.InputUnit or fp\.Head pieces"):
        scores.select(sparsity=0.5, floor=fp.Floor(units=1))


@pytest.mark.filterwarnings("ignore:fastprune. floors")
def test_floors_that_hold_keep_every_output_of_a_model_alive():
    model, loader = mlp(17, 33, 5), classification_batches(shape=(17,))
    scores = fp.score(model, loader, granularity=fp.Block(4, 4), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=0.99, floor=fp.Floor(blocks_per_row=1)))
    for layer in (model[0], model[2]):
        assert bool((layer.weight != 0).any(1).all())
