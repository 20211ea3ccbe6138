"""shrink: layers that are masked whole give their input, or zeros, and are gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp
from helpers import Snapshot
from networks import SmallResNet
from shrink_cases import assert_same, count, masked_twin, tiny_bert, unit_masks

pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_masks(**keep):
    """Masks of whole layers, True = keep, names with __ for dots."""
    masks = {name.replace("__", ".").lstrip("_"): torch.tensor(value) for name, value in keep.items()}
    return fp.Masks(masks, fp.Layer(), dict.fromkeys(masks, torch.Size([])))


class Residual(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(size, 15), nn.ReLU(), nn.Linear(15, size))

    def forward(self, x):
        return x + self.branch(x)


def without(model, **replacements):
    twin = masked_twin(model)
    for name, module in replacements.items():
        twin.set_submodule(name.replace("__", ".").lstrip("_"), module)
    return twin


class Zero(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out)


def test_a_layer_that_is_masked_whole_gives_its_input():
    model = nn.Sequential(nn.Linear(6, 6), Residual(), Residual(), nn.Linear(6, 5)).train()
    before = Snapshot(model)
    x = torch.randn(4, 6)
    small = fp.shrink(model, layer_masks(_0=True, _1=False, _2__branch=False), x)
    before.assert_unchanged()
    assert type(small[1]) is type(small[2].branch) is nn.Identity
    assert count(small) == 6 * 7 + 7 * 5
    assert all(module.training for module in small.modules())
    small.eval()
    assert_same(small, without(model, _1=nn.Identity(), _2__branch=nn.Identity()), x, torch.randn(1, 6))


def test_where_shapes_differ_it_gives_zeros():
    model = nn.Sequential(nn.Linear(7, 6), Residual(), nn.Linear(6, 5))
    x = torch.randn(4, 3, 7)
    small = fp.shrink(model, layer_masks(_0=False), x).eval()
    assert_same(small, without(model, _0=Zero(6)), x, torch.randn(1, 3, 7))
    assert not list(small[0].parameters())
    with pytest.raises(ValueError, match=r"samples of shape \[3, 7\].*got \[2, 7\]"):
        small(torch.randn(4, 2, 7))


def test_layers_and_units_are_cut_in_one_call():
    model = nn.Sequential(nn.Linear(7, 6), Residual(), Residual(), nn.Linear(6, 5)).eval()
    x = torch.randn(4, 7)
    units = unit_masks(model, _1__branch__0=(0, 1, 2), _2__branch__0=(3,))
    small = fp.shrink(model, [units, layer_masks(_1=False, _1__branch=False)], x)
    assert type(small[1]) is nn.Identity
    assert small[2].branch[0].out_features == 14
    twin = masked_twin(model, units)
    twin[1] = nn.Identity()
    assert_same(small, twin, x)


def test_what_is_scored_as_a_layer_is_what_goes():
    model = SmallResNet().eval()
    batches = [(torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,)))]
    scores = fp.score(model, batches, granularity=fp.Layer(), include=["conv2", "norm2"], progress=False)
    for name in scores:
        small = fp.shrink(model, layer_masks(**{name: False}), batches[0][0])
        loss = nn.functional.cross_entropy(small(batches[0][0]).double(), batches[0][1])
        assert float(loss.detach()) - scores.loss == pytest.approx(float(scores[name]), rel=1e-4, abs=1e-6)


def test_a_layer_of_bert_is_left_out_though_it_is_called_with_more():
    model, tokens = tiny_bert()
    masks = layer_masks(bert__encoder__layer__1=False)
    small = fp.shrink(model, masks, tokens)
    twin = masked_twin(model)
    del twin.bert.encoder.layer[1]
    assert_same(small, twin, tokens)


@pytest.mark.parametrize(
    ("masks", "problem"),
    [
        (layer_masks(_9=False), "`masks` are of another model: it has no layer '9'"),
        (layer_masks(_2=False), r"layers \['2'\] are masked whole, but `example_inputs` never reach them"),
        (layer_masks(_1=False), "layer '1' is masked whole and cannot be cut out: .* Tensor and tuple"),
    ],
)
def test_layers_that_cannot_be_left_out_are_refused(masks, problem):
    class Model(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))[0]

    model = Model(nn.Linear(7, 7), nn.LSTM(7, 7), nn.Linear(7, 7))
    before = Snapshot(model)
    with pytest.raises(ValueError, match=problem):
        fp.shrink(model, masks, torch.randn(4, 3, 7))
    before.assert_unchanged()
