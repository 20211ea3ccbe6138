"""prune_: one round is one selection, several score what is left, and an error gives the masks back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import FailsAtCall, Snapshot, classification_batches, masked_mlp, mlp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastprune. nothing is left"),
]


def same(first, second):
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Redundant(nn.Module):
    """Two hidden units of which either is enough, and one that matters a little."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 3, bias=False)
        self.hidden.weight.data.fill_(1.0)

    def forward(self, x):
        first, second, third = torch.relu(self.hidden(x)).unbind(1)
        logit = 5 * (first + second).clamp(max=1.0) + 0.1 * third
        return torch.stack([logit, torch.zeros_like(logit)], 1)


def test_rounds_see_what_matters_once_others_are_gone():
    loader = [(torch.rand(8, 1) + 1, torch.zeros(8, dtype=torch.long))]
    at_once, in_rounds = Redundant(), Redundant()
    options = {"granularity": fp.Unit(), "progress": False}
    masks = fp.prune_(at_once, loader, schedule=fp.OneShotSchedule(0.67), **options)
    assert masks["hidden"].tolist() == [False, False, True]
    masks = fp.prune_(in_rounds, loader, schedule=fp.LinearSchedule(0.67, end=2), **options)
    assert masks["hidden"].tolist() == [False, True, False]
    assert fp.evaluate(in_rounds, loader)["loss"] < 0.1 < fp.evaluate(at_once, loader)["loss"]


@pytest.mark.parametrize("granularity", [fp.Block(4, 4), fp.Unit(), fp.Element()], ids=str)
@pytest.mark.parametrize("cost", ["params", "flops", "bytes"])
def test_rounds_are_those_one_would_make_by_hand(granularity, cost):
    model, loader = mlp(17, 33, 5), classification_batches((15, 8, 1), (17,))
    by_hand = copy.deepcopy(model)
    schedule = fp.ExponentialSchedule(0.75, end=3)
    options = {"criterion": "taylor", "granularity": granularity, "progress": False}
    floor = fp.Floor(max_sparsity=0.9)
    masks = fp.prune_(model, loader, schedule=schedule, cost=cost, scope="layer", floor=floor, **options)
    for step in (1, 2, 3):
        scores = fp.score(by_hand, loader, **options)
        expected = scores.select(
            budget=fp.Budget(**{cost: 1 - schedule.at(step)}),
            scope="layer",
            floor=floor,
        )
        fp.apply_masks_(by_hand, expected)
    same(masks, expected)
    x = torch.randn(3, 17)
    assert torch.equal(model(x), by_hand(x))
    assert 0.6 < masks.sparsity() <= 0.75


def test_one_shot_is_one_selection_and_zero_leaves_all():
    model, loader = mlp(17, 33, 5), classification_batches((15,), (17,))
    expected = fp.score(model, loader, granularity=fp.Block(4, 4), progress=False).select(sparsity=0.5)
    options = {"granularity": fp.Block(4, 4), "progress": False}
    same(fp.prune_(copy.deepcopy(model), loader, schedule=fp.OneShotSchedule(0.5), **options), expected)
    masks = fp.prune_(copy.deepcopy(model), loader, schedule=fp.OneShotSchedule(0.0), **options)
    assert masks.sparsity() == 0.0
    late = fp.LinearSchedule(0.5, begin=3, end=9, every=6)
    same(fp.prune_(copy.deepcopy(model), loader, schedule=late, **options), expected)


@pytest.mark.parametrize("granularity", [fp.Unit(), fp.Block(4, 4)], ids=str)
@pytest.mark.parametrize("start", ["dense", "masked"])
def test_an_error_in_a_later_round_gives_the_masks_back(start, granularity):
    if start == "dense":
        model, loader = mlp(17, 33, 10), classification_batches((6,), (17,), 10)
    else:
        model, loader = masked_mlp(0.25)[0], classification_batches((6,), (17,), 10)
    snapshot = Snapshot(model)
    calls = []

    def count(output, targets):
        calls.append(0)
        return F.cross_entropy(output, targets)

    options = {"schedule": fp.LinearSchedule(0.6, end=2), "granularity": granularity, "progress": False}
    fp.prune_(copy.deepcopy(model), loader, loss_fn=count, **options)
    for calls_before in (1, len(calls) // 2, len(calls)):
        with pytest.raises(KeyboardInterrupt):
            fp.prune_(model, loader, loss_fn=FailsAtCall(calls_before, KeyboardInterrupt()), **options)
        snapshot.assert_unchanged()


def test_wrong_arguments_are_named_and_change_nothing():
    model, loader = mlp(), classification_batches()
    snapshot = Snapshot(model)
    once = fp.OneShotSchedule(0.5)
    for options, error, message in (
        ({"schedule": 0.5}, TypeError, "`schedule` must be a fastprune Schedule, got float"),
        ({"schedule": once, "cost": "latency"}, ValueError, "`cost` must be one of params, flops, bytes"),
        ({"schedule": once, "granularity": "auto"}, TypeError, "`granularity` must be"),
        ({"schedule": once, "criterion": "size"}, ValueError, "`criterion` must be one of"),
        ({"schedule": once, "floor": 1}, TypeError, "`floor` must be"),
        ({"schedule": once, "loader": None}, TypeError, "`loader` must be an iterable of batches"),
        ({"schedule": once, "loader": iter(loader)}, TypeError, "`loader` is iterated several times"),
        (
            {"schedule": once, "loader": None, "criterion": "magnitude", "cost": "flops"},
            TypeError,
            "`loader` must be an iterable of batches for criterion 'magnitude' and cost 'flops'",
        ),
    ):
        with pytest.raises(error, match=message):
            fp.prune_(model, **{"loader": loader, "progress": False, **options})
    with pytest.raises(TypeError, match="`model` must be"):
        fp.prune_(None, loader, schedule=once)
    snapshot.assert_unchanged()
