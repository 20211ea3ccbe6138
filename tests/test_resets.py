"""reset_pieces_: what a removed piece is overwritten with, and what an optimiser then remembers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fastprune as fp
from helpers import Snapshot, masked_mlp, mlp
from networks import SmallConvNet, spoil_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def masks_for(model, granularity, sparsity=0.4, **options):
    scores = fp.score(model, None, criterion="random", granularity=granularity, **options)
    return scores.select(sparsity=sparsity, scope="layer")


def expanded(masks, name):
    return masks.granularity_of(name).expand(masks[name], masks.weight_shapes[name]).bool()


def neighbours(granularity, index, shape):
    """Indices of a weight's counterparts one piece away, by plain arithmetic; index is (row, input, *tap)."""
    row, col, *tap = index
    if isinstance(granularity, fp.Block):
        rows, cols = granularity.rows, granularity.cols
    elif isinstance(granularity, fp.Element):
        rows, cols = 1, 1
    else:
        rows, cols = (granularity.group_size, 0) if isinstance(granularity, fp.Unit) else (0, 1)
    steps = {(rows, 0), (-rows, 0), (0, cols), (0, -cols)} - {(0, 0)}
    for down, right in steps:
        other = (row + down, col + right)
        if 0 <= other[0] < shape[0] and 0 <= other[1] < shape[1]:
            yield (*other, *tap)


@pytest.mark.parametrize(
    "granularity",
    [fp.Block(4, 3), fp.Block(4, 16), fp.Unit(), fp.Unit(4), fp.InputUnit(), fp.Element()],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda: mlp(17, 15, 5), SmallConvNet], ids=["mlp", "conv"])
def test_the_mean_is_over_the_neighbours_that_stay(make, granularity):
    model = make()
    masks = masks_for(model, granularity, exclude="depthwise")
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    assert fp.reset_pieces_(model, masks, values="mean") is model
    changed = 0
    for name, old in before.items():
        keep, new = expanded(masks, name), model.get_submodule(name).weight.detach()
        assert torch.equal(new[keep], old[keep])
        for index in itertools.islice(map(tuple, (~keep).nonzero().tolist()), 0, None, 7):
            own = masks.granularity_of(name)
            values = [float(old[other]) for other in neighbours(own, index, old.shape) if keep[other]]
            expected = sum(values) / len(values) if values else 0.0
            assert float(new[index]) == pytest.approx(expected, rel=1e-6, abs=1e-8)
            changed += bool(values)
    assert changed


def test_heads_take_the_mean_of_the_heads_beside_them():
    model = nn.Sequential(nn.Linear(12, 5))
    scores = fp.score(model, None, criterion="random", granularity=fp.Head(4), include="0")
    keep = torch.tensor([True, False, True, False])
    masks = fp.Masks({"0": keep}, fp.Head(4), scores.weight_shapes)
    old = model[0].weight.detach().clone()
    fp.reset_pieces_(model, masks, values="mean")
    torch.testing.assert_close(model[0].weight[:, 3:6], (old[:, 0:3] + old[:, 6:9]) / 2)
    torch.testing.assert_close(model[0].weight[:, 9:12], old[:, 6:9])


def test_units_take_their_bias_and_batch_norm_along():
    model = nn.Sequential(nn.Linear(7, 5), spoil_norm(nn.BatchNorm1d(5)), nn.ReLU(), nn.Linear(5, 3))
    keep = torch.tensor([True, False, True, True, False])
    masks = fp.Masks({"0": keep}, fp.Unit(), {"0": torch.Size((5, 7))}, norms={"0": "1"})
    old = [tensor.detach().clone() for tensor in (model[0].bias, model[1].weight, model[1].bias)]
    fp.reset_pieces_(model, masks, values="mean")
    for before, after in zip(old, (model[0].bias, model[1].weight, model[1].bias), strict=True):
        assert torch.equal(after[keep], before[keep])
        torch.testing.assert_close(after[1], (before[0] + before[2]) / 2)
        torch.testing.assert_close(after[4], before[3])
    fp.reset_pieces_(model, masks, values="random")
    assert model[1].weight[~keep].tolist() == [1.0, 1.0]
    assert model[1].bias[~keep].tolist() == [0.0, 0.0]
    fp.reset_pieces_(model, masks, values="zero")
    for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
        assert not tensor[~keep].any()
        assert tensor[keep].all()


@pytest.mark.parametrize("granularity", [fp.Block(4, 3), fp.Unit(), fp.Element()], ids=str)
def test_random_weights_are_those_of_a_fresh_layer_and_follow_the_seed(granularity):
    torch.manual_seed(1)
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model = mlp(129, 151, 5)
        masks = masks_for(model, granularity)
        old = model[0].weight.detach().clone()
        state = torch.get_rng_state()
        fp.reset_pieces_(model, masks, values="random", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        keep, new = expanded(masks, "0"), model[0].weight.detach()
        assert torch.equal(new[keep], old[keep])
        weights.append(new[~keep])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    bound = 129**-0.5
    assert float(weights[0].abs().max()) <= bound
    assert float(weights[0].std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert float(weights[0].mean()) == pytest.approx(0.0, abs=0.05 * bound)


@pytest.mark.parametrize("values", ["zero", "random", "mean"])
def test_an_optimiser_forgets_what_it_knew_of_the_pieces(values):
    model = mlp(17, 15, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 17)).sum().backward()
    optimizer.step()
    masks = masks_for(model, fp.Block(4, 3))
    before = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    fp.reset_pieces_(model, masks, values=values, optimizer=optimizer)
    keep, state = expanded(masks, "0"), optimizer.state[model[0].weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert not state[key][~keep].any()
        assert torch.equal(state[key][keep], before[key][keep])
    assert torch.equal(state["step"], before["step"])


def test_weights_under_a_mask_are_overwritten_and_the_mask_stays():
    model, x = masked_mlp(0.5)
    dropped = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4)).select(sparsity={})
    expected = model(x)
    original = model[0].parametrizations.weight.original.detach().clone()
    fp.reset_pieces_(model, dropped, values="random")
    assert torch.equal(model(x), expected)
    assert not torch.equal(model[0].parametrizations.weight.original, original)


def test_wrong_arguments_change_nothing():
    model = mlp()
    masks = masks_for(model, fp.Unit())
    layer = fp.score(model, None, criterion="random", granularity=fp.ParameterTensor()).select(sparsity=0.0)
    snapshot = Snapshot(model)
    for given, options, error, message in (
        (
            masks,
            {"values": "median"},
            ValueError,
            "`values` must be 'zero', 'random' or 'mean', got 'median'",
        ),
        (layer, {"values": "mean"}, ValueError, "`values` must be 'zero' or 'random' for ParameterTensor"),
        (None, {}, TypeError, "`masks` must be fastprune Masks"),
        (masks_for(mlp(8, 9, 5), fp.Unit()), {}, ValueError, "`masks` are of another model"),
    ):
        with pytest.raises(error, match=message):
            fp.reset_pieces_(model, given, **options)
    snapshot.assert_unchanged()
