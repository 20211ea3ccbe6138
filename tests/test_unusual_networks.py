"""Networks that are built in ways of their own: what is scored and cut is what masked forwards give."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(model, name, x, y):
    """The change of the loss when each unit of a Linear or Conv2d gives zero, in float64."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        plain = F.cross_entropy(model(x.double()), y)
        deltas = []
        for unit in range(len(model.get_submodule(name).weight)):
            masked = copy.deepcopy(model)
            layer = masked.get_submodule(name)
            layer.weight[unit] = 0
            if layer.bias is not None:
                layer.bias[unit] = 0
            deltas.append(F.cross_entropy(masked(x.double()), y) - plain)
    return torch.stack(deltas)


@pytest.mark.parametrize("shape", [(1,), (6,), (5, 7), (3, 1)], ids=str)
@pytest.mark.parametrize("targets", ["labels", "predictions"])
def test_units_of_a_linear_on_more_dimensions(shape, targets):
    torch.manual_seed(0)
    pixels = torch.Size(shape).numel()
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * pixels, 3)).eval()
    x, y = torch.randn(20, *shape, 8), torch.randint(0, 3, (20,))
    criterion = fp.criteria.LossDelta(targets=targets)
    found = fp.score(
        model, [(x, y)], granularity=fp.Unit(), include="0", criterion=criterion, progress=False
    )["0"]
    expected = brute_force(
        model, "0", x, model(x).softmax(1).double().detach() if targets == "predictions" else y
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


class PreActivation(nn.Module):
    """A residual block whose first ReLU may overwrite what the sum reads."""

    def __init__(self, inplace):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.relu(x))


def residual(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        PreActivation(inplace),
        nn.ReLU(inplace),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()


@pytest.mark.parametrize("include", ["1", "2"])
def test_whole_layers_that_write_into_their_input(include):
    x, y = torch.randn(12, 3, 4, 4), torch.randint(0, 3, (12,))
    options = {"granularity": fp.Layer(), "include": include, "progress": False}
    found, expected = (fp.score(residual(inplace), [(x, y)], **options)[include] for inplace in (True, False))
    assert float(found) == float(expected) != 0.0


class ReadsAgain(nn.Module):
    """The input of a block is read once more after it."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(6, 6), nn.ReLU(inplace), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        y = self.block(x)
        return self.last(x * 2 + y)


def test_a_layer_that_is_not_there_leaves_its_input_to_later_readers():
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    model = ReadsAgain(True).eval()
    found = fp.score(model, [(x, y)], granularity=fp.Layer(), include="block", progress=False)["block"]
    without = copy.deepcopy(model)
    without.block = nn.Identity()
    expected = F.cross_entropy(without(x), y) - F.cross_entropy(model(x), y)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_that_writes_into_its_input_is_cut_out():
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    x, y = torch.randn(12, 3, 4, 4), torch.randint(0, 3, (12,))
    model = residual(True)
    scores = fp.score(model, [(x, y)], granularity=fp.Layer(), include="1", progress=False)
    masks = fp.Masks({"1": torch.tensor(False)}, fp.Layer(), scores.weight_shapes)
    small = fp.shrink(model, masks, x)
    assert type(small[1]) is nn.Identity
    torch.testing.assert_close(small(x), model[4](model[3](model[2](model[0](x)))))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(16, 3)

    def forward(self, x, mask):
        return self.head(self.encoder(x, mask=mask))


def test_a_mask_of_infinities_among_the_examples_keeps_nothing_from_being_cut():
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    model = Masked().eval()
    name = "encoder.layers.0.linear1"
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Unit(), include=name, progress=False)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    small = fp.shrink(model, scores.select(sparsity=0.5), (torch.randn(2, 5, 16), mask))
    assert small.get_submodule(name).out_features == 16


class SegNet(nn.Module):
    """Pooling that gives indices, unpooling that takes them."""

    def __init__(self, functional):
        super().__init__()
        torch.manual_seed(0)
        self.functional = functional
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.last = nn.Linear(6 * 16, 3)

    def forward(self, x):
        x = self.first(x)
        pooled, indices = F.max_pool2d(x, 2, return_indices=True) if self.functional else self.pool(x)
        return self.last(torch.flatten(self.second(self.unpool(pooled, indices)), 1))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2, return_indices=True)
        self.last = nn.Linear(6 * 4, 3)

    def forward(self, x):
        values, _ = self.pool(self.first(x))
        return self.last(torch.flatten(values, 1))


@pytest.mark.parametrize(
    "make", [lambda: SegNet(False), lambda: SegNet(True), Pooled], ids=["module", "function", "unused"]
)
@pytest.mark.parametrize("coupled", [False, True])
def test_pooling_that_gives_its_indices(make, coupled):
    model = make().eval()
    x, y = torch.randn(10, 3, 4, 4), torch.randint(0, 3, (10,))
    scores = fp.score(model, [(x, y)], granularity=fp.Unit(coupled=coupled), include="first", progress=False)
    torch.testing.assert_close(scores["first"], brute_force(model, "first", x, y), rtol=1e-3, atol=1e-6)
