"""Penalties: their formulas and gradients piece by piece, on dense, masked and block-sparse layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastprune as fp
from helpers import Snapshot, mlp
from networks import SmallConvNet
from regularization_cases import GRANULARITIES, KINDS, by_pieces, layers_of, networks, pieces, weights_of

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")


def test_the_networks_are_of_their_kind():
    for kind in KINDS:
        layers = layers_of(networks(kind)[0])
        types = {type(layer) for layer in layers.values()}
        assert (fp.BlockSparseLinear in types) == kind.startswith("block_sparse")
        assert (fp.BlockSparseConv2d in types) == (kind == "block_sparse_conv")
        assert any(bool((layer.weight == 0).any()) for layer in layers.values()) == (kind != "dense")


def gradients(model, penalty):
    """The gradient of the penalty for each layer's weight, as a dense tensor."""
    for parameter in model.parameters():
        parameter.grad = None
    penalty.backward()
    result = {}
    for name, layer in layers_of(model).items():
        if isinstance(layer, (fp.BlockSparseLinear, fp.BlockSparseConv2d)):
            with_gradients = copy.deepcopy(layer)
            with torch.no_grad():
                with_gradients.packed_values.copy_(layer.packed_values.grad)
            result[name] = with_gradients.weight.detach()
        elif hasattr(layer, "parametrizations"):
            result[name] = layer.parametrizations.weight.original.grad
        else:
            result[name] = layer.weight.grad
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_group_lasso_is_the_sum_of_the_norms_times_the_root_of_their_sizes(kind, granularity):
    model, _ = networks(kind)
    expected, expected_gradients = 0.0, {}
    weights = weights_of(model)
    for name, layer in layers_of(model).items():
        expected += sum(
            float(weights[name][piece].norm()) * int(piece.sum()) ** 0.5
            for piece in pieces(granularity, layer)
        )
        expected_gradients[name] = by_pieces(
            granularity, layer, lambda w: w / w.norm().clamp(min=1e-300) * w.numel() ** 0.5
        )
    penalty = fp.group_lasso_penalty(model, granularity)
    assert penalty.shape == ()
    assert penalty.dtype == torch.float32
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    found = gradients(model, penalty)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_l1_penalty_is_the_sum_of_absolute_weights(kind):
    model, _ = networks(kind)
    expected = sum(float(weight.abs().sum()) for weight in weights_of(model).values())
    signs = {name: weight.sign() for name, weight in weights_of(model).items()}
    for granularity in (fp.Element(), fp.Block(4, 4), fp.Unit()):
        penalty = fp.l1_penalty(model, granularity)
        assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
        found = gradients(model, penalty)
        for name, sign in signs.items():
            assert torch.equal(found[name].double(), sign), name


def test_a_piece_of_zeros_has_no_gradient_and_one_of_tiny_weights_a_finite_one():
    model = mlp(4, 4, 4)
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.fill_(1e-18)
    fp.group_lasso_penalty(model, fp.Unit()).backward()
    assert torch.equal(model[0].weight.grad, torch.zeros(4, 4))
    torch.testing.assert_close(model[2].weight.grad, torch.ones(4, 4))


def test_all_parameters_and_those_of_batch_norms_alone():
    model = SmallConvNet()
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    assert float(fp.l1_penalty(model, fp.ParameterTensor()).detach()) == pytest.approx(total, rel=1e-5)
    norms = sum(float(norm.weight.detach().double().abs().sum()) for norm in (model.norm1, model.norm2))
    slimming = fp.l1_penalty(model, fp.ParameterTensor(), include=nn.BatchNorm2d, exclude="*.bias")
    assert float(slimming) == pytest.approx(norms, rel=1e-5)
    expected = sum(float(p.detach().double().norm()) * p.numel() ** 0.5 for p in model.parameters())
    found = fp.group_lasso_penalty(model, fp.ParameterTensor())
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_heads_of_dense_and_of_block_sparse_projections():
    layer = nn.TransformerEncoderLayer(12, 3, 15, batch_first=True)
    weight = layer.self_attn.out_proj.weight.detach().double()
    expected = sum(float(weight[:, head * 4 : head * 4 + 4].norm()) for head in range(3)) * (4 * 12) ** 0.5
    assert float(fp.group_lasso_penalty(layer, fp.Head()).detach()) == pytest.approx(expected, rel=1e-5)
    model = nn.Sequential(fp.BlockSparseLinear.from_dense(nn.Linear(12, 9), (4, 4)))
    expected = (
        sum(float(model[0].weight.detach().double()[:, h * 4 : h * 4 + 4].norm()) for h in range(3))
        * (4 * 9) ** 0.5
    )
    assert float(fp.group_lasso_penalty(model, fp.Head(3), include="0")) == pytest.approx(expected, rel=1e-5)


def test_layers_are_chosen_and_tied_weights_count_once():
    model = mlp(9, 9, 9)
    for include, names in (("0", [0]), (nn.Linear, [0, 2]), (lambda name, module: name == "2", [2])):
        expected = sum(float(model[name].weight.detach().abs().sum()) for name in names)
        assert float(fp.l1_penalty(model, include=include)) == pytest.approx(expected, rel=1e-6)
    expected = float(model[0].weight.detach().abs().sum())
    assert float(fp.l1_penalty(model, exclude="2")) == pytest.approx(expected, rel=1e-6)
    model[2].weight = model[0].weight
    assert float(fp.l1_penalty(model)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_penalties_in_float32(dtype):
    model = mlp(151, 129, 17).to(dtype)
    expected = sum(float(weight.abs().sum()) for weight in weights_of(model).values())
    penalty = fp.l1_penalty(model)
    assert penalty.dtype == torch.float32
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty = fp.group_lasso_penalty(model, fp.Unit())
    expected = sum(
        float(weight.norm(dim=1).sum()) * weight.shape[1] ** 0.5 for weight in weights_of(model).values()
    )
    assert penalty.dtype == torch.float32
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert bool(model[0].weight.grad.isfinite().all())


def test_a_weight_that_is_no_parameter_is_refused():
    pruned = mlp()
    prune.l1_unstructured(pruned[0], "weight", 3)
    with pytest.raises(ValueError, match="layer '0' has a weight that is no parameter"):
        fp.l1_penalty(pruned)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fp.l1_penalty(None), TypeError, "`model` must be"),
        (lambda m: fp.l1_penalty(m, "block"), TypeError, "`granularity` must be"),
        (lambda m: fp.group_lasso_penalty(m, include="x*"), ValueError, "`model` has no layer"),
        (lambda m: fp.group_lasso_penalty(nn.ReLU()), ValueError, "`model` has no layer"),
        (lambda m: fp.group_lasso_penalty(m, include=3), TypeError, "`include` must be"),
        (
            lambda m: fp.group_lasso_penalty(m, fp.Unit(coupled=True)),
            ValueError,
            "`granularity` must cut each",
        ),
        (
            lambda m: fp.group_lasso_penalty(m, fp.Head()),
            ValueError,
            "`model` has no layer with pieces of Head",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    model = mlp()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    snapshot.assert_unchanged()
