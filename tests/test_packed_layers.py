"""Scoring by packed weights: which layers take part, and that deltas stay exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune import ops
from fastprune.batches import Batch
from fastprune.graph import TracedModel
from fastprune.importance.packed_layers import PackedLayers
from helpers import Snapshot, assert_exact, brute_force

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Linear layers over four steps, three of them large; torch.fx or torch.export traces it."""

    def __init__(self, branches=False):
        super().__init__()
        self.first, self.second = nn.Linear(129, 151), nn.Linear(151, 130, bias=False)
        self.third, self.head = nn.Linear(130, 129), nn.Linear(129, 5)
        self.branches = branches

    def forward(self, x):
        if self.branches and x.shape[0] > 10_000:
            raise ValueError("too many")
        x = torch.tanh(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x)).mean(1))


def loader(sizes=(20, 16, 3)):
    return [(torch.randn(size, 4, 129), torch.randint(0, 5, (size,))) for size in sizes]


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the block-sparse kernel was called with."""
    seen = []
    kernel = ops.block_sparse_linear

    def spy(input, packed, *args, **kwargs):
        seen.append((input.shape, len(packed)))
        return kernel(input, packed, *args, **kwargs)

    monkeypatch.setattr(ops, "block_sparse_linear", spy)
    return seen


@pytest.mark.parametrize("branches", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("granularity", [fp.Unit(group_size=16), fp.Block(64, 64), fp.InputUnit()], ids=str)
def test_deltas_by_packed_weights_are_exact(branches, granularity, calls):
    torch.manual_seed(0)
    model, batches = Net(branches), loader()
    before = Snapshot(model)
    scores = fp.score(model, batches, granularity=granularity, progress=False)
    assert calls
    before.assert_unchanged()
    for layer in ("first", "third"):
        expected, loss = brute_force(model, batches, layer, granularity, max_pieces=6)
        assert_exact(scores[layer], expected, loss)


@pytest.mark.parametrize("branches", [False, True], ids=["fx", "export"])
def test_emptied_blocks_are_not_multiplied(branches, calls):
    torch.manual_seed(1)
    model, batches = Net(branches), loader((20,))
    masks = fp.score(model, None, criterion="magnitude", exclude="head").select(sparsity=0.75, scope="layer")
    fp.apply_masks_(model, masks)
    scores = fp.score(model, batches, granularity=fp.Unit(group_size=16), progress=False)
    kept = {int(mask.sum()) for mask in masks.values()}
    assert {blocks for _, blocks in calls} <= kept
    expected, loss = brute_force(model, batches, "first", fp.Unit(group_size=16))
    assert_exact(scores["first"], expected, loss)


def test_few_samples_small_layers_and_doubles_take_torchs_product(calls):
    model = Net()
    fp.score(model, loader((15,)), granularity=fp.Unit(group_size=64), progress=False)
    small = nn.Sequential(nn.Linear(129, 126), nn.ReLU(), nn.Linear(126, 40), nn.Tanh(), nn.Linear(40, 5))
    rows = [(torch.randn(80, 129), torch.randint(0, 5, (80,)))]
    fp.score(small, rows, granularity=fp.Unit(group_size=64), progress=False)
    double = [(inputs.double(), targets) for inputs, targets in loader((20,))]
    fp.score(Net().double(), double, granularity=fp.Unit(group_size=64), progress=False)
    assert calls == []


def test_a_small_budget_packs_what_fits():
    model = Net().eval()
    batch = Batch((torch.randn(20, 4, 129),), {}, None, 20)
    sizes = [4 * model.first.weight.numel(), 4 * model.second.weight.numel(), 4 * model.third.weight.numel()]
    for count in range(4):
        traced = TracedModel.trace(model)
        PackedLayers(10 * sum(sizes[:count]) + 40).speed_up(traced)
        assert len(traced.replacements) == count
    with torch.no_grad():
        output = traced.run(batch)[traced.output_node]
        torch.testing.assert_close(output, model(batch.args[0]))


def test_weights_that_the_model_computes_are_not_packed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(130, 129))

        def forward(self, x):
            return F.linear(x, self.weight * x.mean()) + F.linear(x, 2 * self.weight)

    model = Scaled().eval()
    traced = TracedModel.trace(model)
    PackedLayers(1 << 30).speed_up(traced)
    assert len(traced.replacements) == 1  # twice the weight is as constant as the weight
    x = torch.randn(80, 129)
    with torch.no_grad():
        output = traced.run(Batch((x,), {}, None, 80))[traced.output_node]
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


def test_weights_that_change_between_scores_are_packed_anew():
    torch.manual_seed(2)
    model, batches = Net(), loader((20,))
    fp.score(model, batches, granularity=fp.Unit(group_size=64), progress=False)
    with torch.no_grad():
        model.third.weight.mul_(-1)
    scores = fp.score(model, batches, granularity=fp.Unit(group_size=64), progress=False)
    expected, loss = brute_force(model, batches, "first", fp.Unit(group_size=64))
    assert_exact(scores["first"], expected, loss)


class ConvNet(nn.Module):
    """Convolutions with strides, "same" padding, dilation and groups, three of them large."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 33, 3, padding=1)
        self.second, self.third = nn.Conv2d(33, 66, 3, 2, 1), nn.Conv2d(66, 65, 3, padding="same", dilation=2)
        self.fourth, self.grouped = nn.Conv2d(65, 256, 1, bias=False), nn.Conv2d(256, 256, 3, groups=2)
        self.head = nn.Linear(256, 5)
        with torch.no_grad():  # enough for deltas to be measured where three quarters of the blocks are gone
            for layer in (self.first, self.second, self.third, self.fourth, self.grouped):
                layer.weight.mul_(3)

    def forward(self, x):
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.head(torch.relu(self.grouped(self.fourth(x))).mean((2, 3)))


def images(size=6):
    return [(torch.randn(size, 3, 9, 7), torch.randint(0, 5, (size,)))]


@pytest.mark.parametrize("granularity", [fp.Unit(group_size=16), fp.Block(32, 32)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_deltas_by_packed_convolutions_are_exact(granularity, sparsity, monkeypatch):
    torch.manual_seed(3)
    model, batches = ConvNet(), images()
    kernel_calls, layouts = [], []
    kernel, dense = ops.block_sparse_conv2d, F.conv2d
    monkeypatch.setattr(
        ops, "block_sparse_conv2d", lambda *args, **kwargs: kernel_calls.append(1) or kernel(*args, **kwargs)
    )

    def spy(input, weight, *args):
        last = weight.is_contiguous(memory_format=torch.channels_last)
        layouts.append(last and not weight.is_contiguous())
        return dense(input, weight, *args)

    monkeypatch.setattr(F, "conv2d", spy)
    if sparsity > 0:
        large = ("second", "third", "fourth")
        scores = fp.score(model, None, criterion="magnitude", include=large, progress=False)
        fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))
    layouts.clear()
    before = Snapshot(model)
    scores = fp.score(model, batches, granularity=granularity, include="first", progress=False)
    before.assert_unchanged()
    assert bool(kernel_calls) == (sparsity > 0)
    assert any(layouts) == (sparsity == 0)
    expected, loss = brute_force(model, batches, "first", granularity)
    assert_exact(scores["first"], expected, loss)


def test_small_grouped_and_double_convolutions_are_not_packed():
    for model, large in ((ConvNet(), ["second", "third", "fourth"]), (ConvNet().double(), [])):
        traced = TracedModel.trace(model.eval())
        PackedLayers(1 << 30).speed_up(traced)
        assert [node.target for node in traced.replacements] == large
