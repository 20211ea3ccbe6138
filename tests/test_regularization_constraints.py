"""Constraints: what they make of each piece of dense, masked and block-sparse layers, and of nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastprune as fp
from helpers import Snapshot, masked_mlp, mlp
from networks import SmallConvNet
from regularization_cases import GRANULARITIES, KINDS, by_pieces, layers_of, networks, pieces, weights_of

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_max_norm_scales_what_is_longer_and_nothing_else(kind, granularity):
    model, _ = networks(kind)
    weights = weights_of(model)
    norms = torch.stack(
        [
            weights[name][p].norm()
            for name, layer in layers_of(model).items()
            for p in pieces(granularity, layer)
        ]
    )
    limit = float(norms[norms > 0].median()) * 0.999
    expected = {
        name: by_pieces(granularity, layer, lambda w: w * min(1.0, limit / max(float(w.norm()), 1e-300)))
        for name, layer in layers_of(model).items()
    }
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    assert fp.max_norm_(model, limit, granularity) is model
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
    for name, bias in biases.items():
        assert torch.equal(model.get_parameter(name), bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_soft_threshold_shrinks_norms_and_makes_short_ones_exactly_zero(kind, granularity):
    model, _ = networks(kind)
    weights = weights_of(model)
    ratios = torch.stack(
        [
            weights[name][p].norm() / int(p.sum()) ** 0.5
            for name, layer in layers_of(model).items()
            for p in pieces(granularity, layer)
        ]
    )
    amount = float(ratios[ratios > 0].median()) * 0.999
    expected = {
        name: by_pieces(
            granularity,
            layer,
            lambda w: w * max(0.0, 1.0 - amount * w.numel() ** 0.5 / max(float(w.norm()), 1e-300)),
        )
        for name, layer in layers_of(model).items()
    }
    assert fp.soft_threshold_(model, amount, granularity) is model
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(weight == 0, expected[name] == 0)


def test_the_soft_threshold_is_the_proximal_operator_of_the_group_lasso():
    model = mlp(9, 7, 5).double()
    before = copy.deepcopy(model)
    fp.soft_threshold_(model, 0.06, fp.Block(4, 4))

    @torch.no_grad()
    def objective(candidate):
        distance = sum(
            (ours - theirs).square().sum() / 2
            for ours, theirs in zip(candidate.parameters(), before.parameters(), strict=True)
        )
        return float(distance + 0.06 * fp.group_lasso_penalty(candidate, fp.Block(4, 4)))

    assert fp.group_lasso_penalty(model, fp.Block(4, 4)).dtype == torch.float64
    least = objective(model)
    assert least < objective(before)
    for _ in range(50):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        assert objective(other) > least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [(-0.05, 0.08), (0.02, 0.1), (-float("inf"), 0.0)])
def test_clamped_weights_lie_in_the_range_and_masked_ones_stay_zero(kind, bounds):
    model, _ = networks(kind)
    before = weights_of(model)
    assert fp.clamp_weights_(model, *bounds) is model
    for name, weight in weights_of(model).items():
        dense = kind == "dense" or name == "depthwise"
        expected = before[name].clamp(*bounds)
        torch.testing.assert_close(weight, expected if dense else expected.where(before[name] != 0, 0.0))


def test_the_scales_of_batch_norms_alone_are_clamped():
    model = SmallConvNet()
    bias = model.norm1.bias.detach().clone()
    fp.clamp_weights_(model, 0.7, 0.8, granularity=fp.ParameterTensor(), include="norm?.weight")
    assert 0.6999 <= float(model.norm1.weight.min()) <= float(model.norm1.weight.max()) <= 0.8001
    assert torch.equal(model.norm1.bias, bias)


@pytest.mark.parametrize(
    "layer",
    [
        fp.BlockSparseLinear.from_dense(nn.Linear(17, 33), (4, 4)),
        fp.BlockSparseConv2d.from_dense(nn.Conv2d(3, 6, 3), (4, 4)),
    ],
    ids=["linear", "conv"],
)
def test_the_padding_of_ragged_blocks_is_no_weight_and_stays_zero(layer):
    model = nn.Sequential(copy.deepcopy(layer))
    packed = model[0].packed_values
    padding = packed.numel() - layer.weight.numel()
    assert padding > 0
    for granularity in (fp.Element(), fp.ParameterTensor()):
        fp.clamp_weights_(model, 0.3, 0.4, granularity=granularity, exclude="*bias")
        assert int((packed == 0).sum()) == padding
    root_sizes = layer.weight.numel() ** 0.5
    for granularity in (fp.Layer(), fp.ParameterTensor()):
        penalty = fp.group_lasso_penalty(model, granularity, exclude="*bias")
        expected = float(model[0].weight.detach().norm()) * root_sizes
        assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)


def test_values_under_a_mask_are_kept():
    model, _ = masked_mlp(0.5)
    original = model[0].parametrizations.weight.original
    mask = model[0].parametrizations.weight[0].mask
    before = original.detach().clone()
    fp.clamp_weights_(model, 0.001, 0.002)
    fp.max_norm_(model, 0.01)
    fp.soft_threshold_(model, 0.01, fp.Element())
    assert torch.equal(original[~mask], before[~mask])
    assert bool((original[mask] != before[mask]).all())


@pytest.mark.parametrize("kind", ["masked", "block_sparse", "masked_conv", "block_sparse_conv"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
def test_in_a_loop_of_ones_own_masked_weights_stay_exactly_zero(kind, optimizer):
    model, x = networks(kind)
    zeros = {name: weight == 0 for name, weight in weights_of(model).items()}
    assert all(bool(mask.any()) for name, mask in zeros.items() if name != "depthwise")
    chosen = optimizer(model.parameters())
    accumulator = fp.GradientAccumulator(chosen, 2, max_grad_norm=1.0)
    threshold = fp.GradientThreshold(chosen, local=1e-4)
    targets = torch.randint(0, 5, (len(x),))
    before = weights_of(model)
    for _ in range(6):
        loss = F.cross_entropy(model(x), targets) + 1e-3 * fp.l1_penalty(model)
        updated = accumulator.backward(loss + 1e-3 * fp.group_lasso_penalty(model, fp.Block(4, 4)))
        if updated:
            fp.clamp_weights_(model, -0.5, 0.5)
            fp.max_norm_(model, 1.0)
        for name, weight in weights_of(model).items():
            assert bool((weight[zeros[name]] == 0).all()), name
            assert bool(weight.isfinite().all())
            assert float(weight.abs().max()) <= 0.5 or not updated
    threshold.remove()
    for name, weight in weights_of(model).items():
        assert not torch.equal(weight, before[name])


def test_frozen_weights_are_left_alone_by_constraints():
    for kind in ("dense", "block_sparse"):
        model, _ = networks(kind)
        model[0].requires_grad_(False)
        before = weights_of(model)
        fp.clamp_weights_(model, -1e-3, 1e-3)
        fp.max_norm_(model, 1e-4)
        fp.soft_threshold_(model, 1e-7, fp.Unit())
        after = weights_of(model)
        assert torch.equal(after["0"], before["0"])
        assert not torch.equal(after["2"], before["2"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_scaled_in_float32(dtype):
    model = mlp(151, 129, 17).to(dtype)
    fp.max_norm_(model, 0.1)
    assert model[0].weight.dtype == dtype
    assert float(model[0].weight.detach().double().norm(dim=1).max()) == pytest.approx(0.1, rel=1e-2)


def test_the_weight_stays_the_same_parameter_in_its_memory_format():
    model = SmallConvNet().to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    pointers = [parameter.data_ptr() for parameter in parameters]
    fp.max_norm_(model, 0.1, fp.Block(2, 3))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [p.data_ptr() for p in parameters] == pointers
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_that_cannot_be_set_are_refused_and_no_other_is_changed():
    normed = mlp()
    parametrizations.weight_norm(normed[2])
    snapshot = Snapshot(normed)
    assert float(fp.l1_penalty(normed)) > 0
    for constrain in (
        lambda: fp.max_norm_(normed, 1e-3),
        lambda: fp.clamp_weights_(normed, 0.0, 0.0),
        lambda: fp.soft_threshold_(normed, 1.0),
    ):
        with pytest.raises(ValueError, match="layer '2' has a weight with parametrizations other than masks"):
            constrain()
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fp.max_norm_(m, 0.0), ValueError, "`max_norm` must be"),
        (lambda m: fp.max_norm_(m, float("nan")), ValueError, "`max_norm` must be"),
        (lambda m: fp.soft_threshold_(m, -1.0), ValueError, "`amount` must be"),
        (lambda m: fp.clamp_weights_(m, 0.2, 0.1), ValueError, "`minimum` must not be above"),
        (lambda m: fp.clamp_weights_(m, float("nan"), 0.1), ValueError, "`minimum` must be a number"),
        (lambda m: fp.clamp_weights_(m, 0.0, "1"), ValueError, "`maximum` must be a number"),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    model = mlp()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    snapshot.assert_unchanged()
