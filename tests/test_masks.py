"""Masks: exactly zero under any optimiser, safe to copy, to replace and to take off."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import fastprune as fp
from fastprune.importance.selection import lowest_within
from fastprune.masks import check_sparsity, piece_mask_of
from helpers import Snapshot, masked_mlp, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

GRANULARITIES = (fp.Block(3, 2), fp.Unit(), fp.Element())


def _masks(model, granularity, sparsity=0.5, **options):
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, **options)
    return scores.select(sparsity=sparsity)


def _unit_masks(model, keep, layer="0", norm="1"):
    return fp.Masks({layer: keep}, fp.Unit(), {layer: model[0].weight.shape}, norms={layer: norm})


def _normed(kind=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(7, 9), kind(9), nn.ReLU(), nn.Linear(9, 5))


OPTIMIZERS = {
    "SGD with momentum and weight decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, 0.05),
    "AdamW with weight decay": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.5, fused=True),
    "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masked_weights_are_exactly_zero_under_any_optimizer(kind, granularity):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())  # made before: its moments know the dense weights

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 7)), torch.randint(0, 5, (6,))).backward()
        optimizer.step()

    for _ in range(3):
        step()
    masks = _masks(model, granularity)
    fp.apply_masks_(model, masks)
    kept_before = model[0].weight.detach().clone()
    for _ in range(4):
        step()
        for name, mask in masks.items():
            layer = model.get_submodule(name)
            keep = granularity.expand(mask, layer.weight.shape)
            assert bool((layer.weight[~keep] == 0).all())
            if granularity.masks_whole_units:
                assert bool((layer.bias[~mask] == 0).all())
    keep = granularity.expand(masks["0"], kept_before.shape)
    assert bool((model[0].weight[keep] != kept_before[keep]).any())


def test_a_masked_weight_gets_no_gradient_even_where_it_is_nan():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = torch.nan
    keep = torch.tensor([True, False, True])
    masks = fp.Masks({"0": keep}, fp.Unit(), {"0": model[0].weight.shape})
    fp.apply_masks_(model, masks)
    output = model(torch.randn(2, 4))
    assert bool((output[:, 1] == 0).all())
    output.sum().backward()
    gradient = model[0].parametrizations.weight.original.grad
    assert bool((gradient[1] == 0).all())
    assert bool((gradient[0] != 0).all())


def test_units_take_bias_and_norm_channel_along():
    model = _normed()
    nn.init.normal_(model[1].bias)
    keep = torch.arange(9) % 2 == 0
    fp.apply_masks_(model, _unit_masks(model, keep))
    hidden = model[1](model[0](torch.randn(6, 7)))
    assert bool((hidden[:, ~keep] == 0).all())
    assert bool((hidden[:, keep] != 0).all())
    for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
        assert bool((tensor[~keep] == 0).all())


def test_a_layer_without_bias_and_a_norm_without_channels_are_masked_by_what_they_have():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
    masks = _unit_masks(model, torch.arange(6) > 2)
    fp.apply_masks_(model, masks)
    assert bool((model.eval()(torch.randn(2, 3, 5, 5))[:, :3] == 0).all())


def test_conv_blocks_lie_within_one_kernel_tap():
    model = nn.Sequential(nn.Conv2d(5, 4, 3))
    mask = torch.ones(fp.Block(4, 2).shape(model[0].weight.shape), dtype=torch.bool)
    mask[0, 3 * 4 + 1] = False  # tap 4 is the centre; its second block of input channels is 2 and 3
    fp.apply_masks_(model, fp.Masks({"0": mask}, fp.Block(4, 2), {"0": model[0].weight.shape}))
    zero = model[0].weight == 0
    assert bool(zero[:, 2:4, 1, 1].all())
    assert int(zero.sum()) == 8


def test_values_under_a_mask_come_back_when_other_masks_replace_it():
    model = mlp()
    dense = model[0].weight.detach().clone()
    shape = {"0": dense.shape}
    left = torch.zeros(3, 4, dtype=torch.bool)
    left[:, :2] = True
    fp.apply_masks_(model, fp.Masks({"0": left}, fp.Block(3, 2), shape))
    assert bool((model[0].weight[:, 4:] == 0).all())
    fp.apply_masks_(model, fp.Masks({"0": ~left}, fp.Block(3, 2), shape))
    assert bool((model[0].weight[:, :4] == 0).all())
    assert torch.equal(model[0].weight[:, 4:], dense[:, 4:])
    assert len(model[0].parametrizations.weight) == 1


def test_applying_masks_keeps_flags_parameters_and_requires_grad():
    model = mlp().eval()
    model[0].weight.requires_grad_(False)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert fp.apply_masks_(model, _masks(model, fp.Unit())) is model
    assert not any(module.training for module in model.modules())
    assert {id(parameter) for parameter in model.parameters()} == parameters  # an optimiser's stay its own
    assert not model[0].parametrizations.weight.original.requires_grad


def test_applied_masks_do_not_change_with_the_tensors_they_came_from():
    model = mlp()
    masks = _masks(model, fp.Element())
    fp.apply_masks_(model, masks)
    before = model[0].weight.detach().clone()
    masks["0"].fill_(False)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("model_dtype", [torch.float64, torch.bfloat16])
def test_masks_keep_the_dtype_of_the_weights(model_dtype):
    model = mlp().to(model_dtype)
    fp.apply_masks_(model, _masks(model, fp.Block(3, 2)))
    assert model[0].weight.dtype == model_dtype
    assert model(torch.randn(2, 7, dtype=model_dtype)).dtype == model_dtype


def test_masked_convolutions_keep_their_memory_format():
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (3, 1), groups=8)).to(memory_format=layout)
        strides = [layer.weight.stride() for layer in model]
        for granularity in (fp.Block(4, 2), fp.Unit(), fp.Element()):
            fp.apply_masks_(model, _masks(model, granularity))
            assert [layer.weight.stride() for layer in model] == strides
            assert [piece_mask_of(layer).stride() for layer in model] == strides


CHANGES = {
    "remove_masks_": fp.remove_masks_,
    "other masks": lambda model: fp.apply_masks_(model, _masks(model, fp.Block(4, 4), 0.75)),
    "masks of units": lambda model: fp.apply_masks_(model, _masks(model, fp.Unit())),
    "sparsify_": lambda model: fp.sparsify_(
        model, example_inputs=torch.randn(2, 17), blocksize=(4, 4), policy="always"
    ),
    "training": lambda model: [parameter.data.add_(1) for parameter in model.parameters()],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_deep_copy_and_its_original_do_not_change_with_each_other(kind):
    for changed_is_copy in (True, False):
        model, x = masked_mlp(0.5)
        expected = model(x)
        duplicate = copy.deepcopy(model)
        changed, kept = (duplicate, model) if changed_is_copy else (model, duplicate)
        CHANGES[kind](changed)
        changed(x)
        assert torch.equal(kept(x), expected)
        assert torch.equal(copy.deepcopy(kept)(x), expected)
        fp.remove_masks_(kept)
        assert torch.equal(kept(x), expected)


def test_removed_masks_leave_plain_parameters_with_plain_zeros():
    model, x = masked_mlp(0.5)
    bare = {name: type(module) for name, module in mlp(17, 33, 10).named_modules()}
    names = list(mlp(17, 33, 10).state_dict())
    expected, weight = model(x), model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    assert fp.remove_masks_(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == bare
    assert sorted(model.state_dict()) == sorted(names)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    optimizer.step()  # the optimiser still holds the parameters
    assert not torch.equal(model[0].weight, weight)


def test_removing_masks_leaves_other_parametrizations_and_unmasked_models_alone():
    model = mlp()
    nn.utils.parametrizations.spectral_norm(model[0])
    snapshot = Snapshot(model.eval())
    fp.remove_masks_(model)
    snapshot.assert_unchanged()


BAD_MASKS = {
    "another layer name": lambda: _masks(nn.ModuleDict({"x": nn.Linear(7, 9)}), fp.Unit()),
    "another shape": lambda: _masks(mlp(8, 9, 5), fp.Block(3, 2)),
    "another norm": lambda: _unit_masks(mlp(), torch.ones(9, dtype=torch.bool), norm="7"),
    "a norm that is none": lambda: _unit_masks(mlp(), torch.ones(9, dtype=torch.bool), norm="1"),
    "a layer without a weight": lambda: fp.Masks(
        {"1": torch.ones(9, dtype=torch.bool)}, fp.Unit(), {"1": torch.Size([9, 7])}
    ),
    "one layer that fits, one that does not": lambda: fp.Masks(
        {"0": torch.ones(9, dtype=torch.bool), "2": torch.ones(6, dtype=torch.bool)},
        fp.Unit(),
        {"0": torch.Size([9, 7]), "2": torch.Size([6, 9])},
    ),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_of_another_model_are_refused_and_nothing_is_masked(kind):
    model = mlp()
    masks = BAD_MASKS[kind]()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="`masks` are of another model"):
        fp.apply_masks_(model, masks)
    snapshot.assert_unchanged()


def test_a_weight_that_torch_prunes_is_refused_and_nothing_is_masked():
    model = mlp()
    masks = _masks(model, fp.Unit())
    prune.l1_unstructured(model[2], "weight", 0.5)
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="`model` has a Linear whose weight is no parameter"):
        fp.apply_masks_(model, masks)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("masks", [None, {}, {"0": torch.ones(9, dtype=torch.bool)}])
def test_what_is_no_masks_is_refused(masks):
    with pytest.raises(TypeError, match="`masks` must be fastprune Masks"):
        fp.apply_masks_(mlp(), masks)


@pytest.mark.parametrize("call", [fp.remove_masks_, lambda model: fp.apply_masks_(model, None)])
def test_a_model_that_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got NoneType"):
        call(None)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(9), ValueError),
        (torch.ones(8, dtype=torch.bool), ValueError),
        (torch.ones(9, 1, dtype=torch.bool), ValueError),
        ([True] * 9, TypeError),
    ],
)
def test_a_mask_of_the_wrong_shape_or_dtype_names_its_layer(mask, error):
    with pytest.raises(error, match="mask of layer '0' must be"):
        fp.Masks({"0": mask}, fp.Unit(), {"0": torch.Size([9, 7])})
    with pytest.raises(ValueError, match="`weight_shapes` must name"):
        fp.Masks({"0": torch.ones(9, dtype=torch.bool)}, fp.Unit(), {})


def test_masks_report_the_pruned_share_of_real_weights():
    keep = torch.tensor([[True, False, True], [True, True, False]])
    masks = fp.Masks({"a": keep}, fp.Block(16, 16), {"a": torch.Size([17, 33])})
    assert masks.sparsity("a") == pytest.approx((256 + 1) / (17 * 33))
    assert masks.sparsity() == masks.sparsity("a")
    assert "a: 45.8% pruned" in repr(masks)
    assert list(masks) == ["a"]
    assert len(masks) == 1
    assert masks["a"] is keep


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_piece_mask_of_finds_fastprune_masks_and_no_others(parameter):
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    assert piece_mask_of(model[0], parameter) is None
    fp.apply_masks_(model, _masks(model, fp.Unit(), include="0"))
    assert piece_mask_of(model[0], parameter).dtype == torch.bool
    assert parametrize.is_parametrized(model[0], parameter)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.5", None, True])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must be a number in \[0, 1\)"):
        check_sparsity(sparsity)


@pytest.mark.parametrize("values", [{}, {"flops": 0.5, "params": 0.5}])
def test_a_budget_needs_exactly_one_cost(values):
    with pytest.raises(ValueError, match="Budget needs exactly one of flops, params, bytes"):
        fp.Budget(**values)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, float("nan"), "0.5", True])
@pytest.mark.parametrize("cost", ["flops", "params", "bytes"])
def test_a_budget_must_be_a_fraction(cost, value):
    with pytest.raises(ValueError, match=f"Budget `{cost}` must be a fraction"):
        fp.Budget(**{cost: value})


def test_the_lowest_within_an_allowance_stops_at_the_first_that_does_not_fit():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
    costs = torch.tensor([1.0, 2.0, 5.0, 1.0])
    assert lowest_within(scores, costs, 3.0).tolist() == [False, True, False, True]
    assert lowest_within(scores, costs, 2.9).tolist() == [False, True, False, False]
    assert lowest_within(scores, costs, 1.0).tolist() == [False] * 4
    assert lowest_within(scores, costs, 0.3 * 30).tolist() == [True] * 4
