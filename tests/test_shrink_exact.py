"""shrink: what cannot be cut without a change of the outputs stays, and the call says why."""

from __future__ import annotations

import builtins
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import Snapshot, mlp
from networks import SharedLayer, SigmoidLinear, SmallResNet, TiedAutoencoder, spoil_norm
from shrink_cases import Mixed, assert_same, magnitude_masks, masked_twin, shrinks, tiny_bert, unit_masks

pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGES, VARIES = "cutting it would change the outputs", "no constant where 'second' reads it"
MIXES = {
    "rms norm": (lambda self, hidden, x: hidden * hidden.square().mean(-1, keepdim=True).rsqrt(), CHANGES),
    "number of channels": (lambda self, hidden, x: hidden / hidden.shape[-1], CHANGES),
    "softmax": (lambda self, hidden, x: hidden.softmax(-1), VARIES),
    "mean of channels": (lambda self, hidden, x: hidden - hidden.mean(-1, keepdim=True), VARIES),
    "layer norm": (lambda self, hidden, x: self.extra(hidden), "'extra', a LayerNorm"),
    "functional norm": (lambda self, hidden, x: F.layer_norm(hidden, (9,)), VARIES),
    "the input": (lambda self, hidden, x: hidden + x, VARIES),
    "a parameter": (lambda self, hidden, x: hidden + self.extra, "a parameter that belongs to no layer"),
    "turned around": (lambda self, hidden, x: hidden.flip(-1), VARIES),
    "matrix product": (lambda self, hidden, x: hidden @ torch.ones(9, 9).triu(), VARIES),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "x", [torch.randn(5, 9, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 9)]
)
def test_units_stay_where_what_lies_behind_them_needs_them(mix, x):
    function, why = MIXES[mix]
    extra = {"layer norm": nn.LayerNorm(9), "a parameter": nn.Parameter(torch.randn(9))}.get(mix)
    model = Mixed(function, extra).eval()
    masks = unit_masks(model, first=(1, 3))
    with pytest.warns(UserWarning, match=why):
        small = fp.shrink(model, masks, x)
    assert small.first.out_features == 9
    assert_same(small, masked_twin(model, masks), torch.randn(4, 9))


def test_a_unit_that_is_masked_in_one_of_two_summands_stays():
    model = SmallResNet()
    x = torch.randn(3, 3, 16, 16)
    masks = unit_masks(model, conv2=(0, 1, 2), shortcut=(2, 3))
    with pytest.warns(UserWarning, match="only a part of the layers"):
        small = shrinks(model, x, masks)
    assert small.conv2.out_channels == small.shortcut.out_channels == 5
    assert bool((small.conv2.weight[:2] == 0).all())


@pytest.mark.parametrize("x", [torch.zeros(2, 9), torch.randn(3, 9)])
def test_a_constant_goes_into_the_bias_of_what_reads_it(x):
    model = nn.Sequential(
        nn.Linear(9, 15), spoil_norm(nn.BatchNorm1d(15)), nn.Sigmoid(), nn.Linear(15, 12, bias=False),
        nn.Softplus(), nn.Linear(12, 5),
    )  # fmt: skip
    masks = unit_masks(model, _0=(0, 3, 14), _3=(1, 2))
    small = shrinks(model, x, masks, others=[torch.randn(7, 9)])
    assert [small[index].out_features for index in (0, 3)] == [12, 10]
    assert small[3].bias is not None  # it had none
    assert model[3].bias is None


@pytest.mark.parametrize(
    ("kernel", "padding", "cut"), [(3, 0, True), (1, 0, True), (3, 1, False), (1, 1, False)]
)
def test_a_constant_in_front_of_a_padded_convolution_stays(kernel, padding, cut):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sigmoid(),
        nn.Conv2d(8, 6, kernel, padding=padding),
        nn.Flatten(),
        nn.LazyLinear(5),
    )
    x = torch.randn(3, 3, 9, 9)
    model.eval()(x)
    masks = unit_masks(model, _0=(1, 5))
    if cut:
        small = shrinks(model, x, masks)
        assert small[0].out_channels == 6
    else:
        with pytest.warns(UserWarning, match="a constant is left of it, which the bias of '2'"):
            small = shrinks(model, x, masks)
        assert small[0].out_channels == 8


def test_what_the_model_returns_stays():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(9, 8), nn.Linear(8, 5)

        def forward(self, x):
            hidden = F.relu(self.first(x))
            return self.second(hidden), {"hidden": [hidden]}

    model = Features()
    with pytest.warns(UserWarning, match="'first'.*'second'"):
        small = shrinks(model, torch.randn(4, 9), unit_masks(model, first=(1,), second=(0, 2)))
    assert (small.first.out_features, small.second.out_features) == (8, 5)


@pytest.mark.parametrize(
    ("make", "why"), [(SharedLayer, "it is called 2 times"), (TiedAutoencoder, "masked units stay")]
)
def test_layers_that_are_used_twice_stay(make, why):
    model = make()
    layer = "layer" if make is SharedLayer else "encoder"
    with pytest.warns(UserWarning, match=why):
        small = shrinks(model, torch.randn(4, 7), unit_masks(model, **{layer: (1, 2)}))
    assert small.get_submodule(layer).weight.shape == model.get_submodule(layer).weight.shape


def test_layers_with_hooks_stay():
    model = mlp(9, 8, 5)
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match="it has forward hooks"):
        small = shrinks(model, torch.randn(4, 9), unit_masks(model, _0=(1,)))
    assert small[0].out_features == 8


def test_a_layer_with_a_forward_of_its_own_is_cut_if_that_is_exact():
    model = nn.Sequential(SigmoidLinear(9, 8), nn.Linear(8, 5))
    small = shrinks(model, torch.randn(4, 9), unit_masks(model, _0=(1, 2)))
    assert small[0].out_features == 6


def test_only_what_would_change_the_outputs_stays():
    # The first part of the model can be cut, the second cannot: the one is not kept for the other.
    model = nn.Sequential(mlp(9, 16, 9), Mixed(lambda self, hidden, x: hidden.softmax(-1)), mlp(5, 16, 9))
    masks = unit_masks(model, _0__0=(0, 1, 2), _1__first=(3, 4), _2__0=(5,))
    with pytest.warns(UserWarning, match="2 of '1.first'"):
        small = shrinks(model, torch.randn(4, 9), masks)
    assert (small[0][0].out_features, small[1].first.out_features, small[2][0].out_features) == (13, 9, 15)


def test_channels_of_the_residual_stream_of_bert_stay():
    model, tokens = tiny_bert()
    masks = magnitude_masks(model, tokens, fp.Unit(coupled=True), include="*dense", exclude="*pooler*")
    with pytest.warns(UserWarning, match="LayerNorm"):
        small = shrinks(model, tokens, masks)
    layer = small.bert.encoder.layer[0]
    assert layer.output.dense.out_features == layer.attention.output.dense.out_features == 32
    assert layer.intermediate.dense.out_features == 19


def test_a_model_that_runs_in_one_dtype_alone_is_compared_in_it():
    class Float32(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(9, 12, 5)

        def forward(self, x):
            if self.net[0].weight.dtype != torch.float32:
                raise TypeError("float32 only")
            return self.net(x)

    model = Float32()
    small = shrinks(model, torch.randn(4, 9), unit_masks(model, net__0=(1, 2, 3)))
    assert small.net[0].out_features == 9


def test_model_masks_and_generators_are_left_alone():
    model = SmallResNet().train()
    model.conv1.weight.requires_grad_(False)
    x = torch.randn(2, 3, 16, 16)
    masks = magnitude_masks(model, x, fp.Unit(coupled=True), exclude="head")
    fp.apply_masks_(model, masks)
    before, kept, inputs = Snapshot(model), {name: mask.clone() for name, mask in masks.items()}, x.clone()
    state = torch.get_rng_state()
    small = fp.shrink(model, masks, x)
    assert torch.equal(torch.get_rng_state(), state)
    before.assert_unchanged()
    assert torch.equal(x, inputs)
    assert all(torch.equal(mask, kept[name]) for name, mask in masks.items())
    assert all(module.training for module in small.modules())
    assert not small.conv1.weight.requires_grad
    assert small.conv2.weight.requires_grad
    assert all(a is not b for a in small.parameters() for b in model.parameters())


def test_masks_that_the_model_carries_are_cut_out_and_those_of_what_stays_go_along():
    model = mlp(9, 16, 5)
    x = torch.randn(4, 9)
    units = unit_masks(model, _0=(0, 1, 2, 3))
    keep = torch.tensor([[True, False, True, True], [True, True, False, True]])
    blocks = fp.Masks({"2": keep}, fp.Block(4, 4), {"2": model[2].weight.shape})
    fp.apply_masks_(fp.apply_masks_(model, units), blocks)
    small = fp.shrink(model, None, x)
    assert small[0].out_features == 12
    assert type(small[0]) is nn.Linear  # no mask is left where all that was masked went
    mask = small[2].parametrizations.weight[0].mask
    assert mask.shape == (5, 12)
    assert torch.equal(mask, model[2].parametrizations.weight[0].mask[:, 4:])
    assert_same(small, model, x)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1.0)
    small(x).sum().backward()
    optimizer.step()
    assert bool((small[2].weight[~mask] == 0).all())


def test_a_shrunk_model_can_be_shrunk_again():
    model = mlp(9, 16, 5)
    x = torch.randn(4, 9)
    once = shrinks(model, x, unit_masks(model, _0=(0, 1)))
    twice = shrinks(once, x, unit_masks(once, _0=(0, 13)))
    assert twice[0].out_features == 12


def test_memory_formats_and_dtypes_stay():
    model = SmallResNet().to(memory_format=torch.channels_last).double()
    x = torch.randn(2, 3, 16, 16).double()
    small = shrinks(model, x, magnitude_masks(model, x, fp.Unit(), include="conv1"))
    assert small.conv1.weight.dtype == torch.float64
    assert small.conv1.weight.shape == (3, 4, 3, 3)
    for layer in (small.conv1, small.conv2):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_wrong_arguments_are_refused():
    model = mlp(9, 8, 5)
    x = torch.randn(4, 9)
    masks = unit_masks(model, _0=(1,))
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got str"):
        fp.shrink("model", masks, x)
    with pytest.raises(TypeError, match="`masks` must be fastprune Masks, got str"):
        fp.shrink(model, ["0"], x)
    with pytest.raises(TypeError, match="`example_inputs` must be"):
        fp.shrink(model, masks, 7)
    with pytest.raises(ValueError, match="`masks` are of another model"):
        fp.shrink(mlp(9, 7, 5), masks, x)
    with pytest.raises(RuntimeError, match="shapes"):
        fp.shrink(model, masks, torch.randn(4, 8))
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"layer '2' has a parametrization of 'weight' that is no fastprune"):
        fp.shrink(model, masks, x)
    sparse = fp.sparsify_(
        fp.apply_masks_(mlp(9, 8, 5), masks), example_inputs=x, policy="always", blocksize=(1, 1)
    )
    with pytest.raises(ValueError, match="shrink first"):
        fp.shrink(sparse, None, x)


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch_pruning"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'fastprune\[structured\]'"):
        fp.shrink(mlp(), None, torch.randn(2, 7))


def test_no_unverified_model_leaves_the_call(monkeypatch):
    # What if the plan were wrong: of any part of it that changes the outputs nothing is cut.
    monkeypatch.setattr(
        importlib.import_module("fastprune.shrinking.removal"), "why_kept", lambda *arguments: None
    )
    model = Mixed(lambda self, hidden, x: hidden + x)
    masks = unit_masks(model, first=(1,))
    with pytest.warns(UserWarning, match=CHANGES):
        small = fp.shrink(model, masks, torch.randn(4, 9))
    assert small.first.out_features == 9
