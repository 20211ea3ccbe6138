"""Magnitude, wanda, activations and random scores against plain float64 computations, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from criteria_nets import GRANULARITIES, NETS, Sequences
from helpers import as_double, classification_batches, mlp, pieces_of, plain_double
from networks import DataDependent, SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_magnitude_takes_any_of_three_norms(p, granularity):
    model = SmallConvNet()
    scores = fp.score(model, None, criterion=fp.criteria.Magnitude(p=p), granularity=granularity)
    for name, layer in scores.items():
        weight = model.get_submodule(name).weight.detach().double()
        expected = [weight[piece].norm(p) for piece in pieces_of(granularity, weight.shape)]
        torch.testing.assert_close(layer.flatten(), torch.stack(expected))


def _inputs_of(model, loader, name):
    """All inputs and outputs of a layer, in float64."""
    seen = []
    dense = plain_double(model)
    dense.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for inputs, _ in as_double(loader):
            dense(inputs)
    return dense.get_submodule(name), [torch.cat(parts) for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize("net", ["mlp", "masked", "conv", "convolutions", "sequences", "untraced"])
@pytest.mark.filterwarnings("ignore:fastprune")
def test_wanda_is_each_weight_times_the_norm_of_its_input(net):
    make, shape, _ = NETS[net]
    model, loader = make(), classification_batches((15, 8, 1), shape)
    for granularity in GRANULARITIES:
        scores = fp.score(model, loader, criterion="wanda", granularity=granularity, progress=False)
        for name, layer in scores.items():
            module, (inputs, _) = _inputs_of(model, loader, name)
            weight = module.weight.detach().clone()
            norms = torch.zeros_like(weight)
            if isinstance(module, nn.Conv2d):
                # With one weight at 1 and the others at 0, the output is what that weight sees.
                for index in range(weight[0].numel()):
                    with torch.no_grad():
                        module.weight.zero_()
                        module.weight.view(len(weight), -1)[:, index] = 1
                        if module.bias is not None:
                            module.bias.zero_()
                        seen = module(inputs)
                    norms.view(len(weight), -1)[:, index] = seen.square().sum((0, 2, 3)).sqrt()
            else:
                norms += inputs.flatten(0, -2).norm(dim=0)
            each = weight.abs() * norms / len(inputs) ** 0.5
            expected = [each[piece].sum() for piece in pieces_of(granularity, weight.shape)]
            torch.testing.assert_close(layer.flatten(), torch.stack(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("statistic", ["mean", "max", "zeros"])
def test_activations_are_read_behind_batch_norm_and_activation_function(statistic):
    model, loader = SmallConvNet(), classification_batches((15, 8, 1), (3, 7, 5))
    criterion = fp.criteria.Activation(statistic)
    units = fp.score(model, loader, criterion=criterion, granularity=fp.Unit(), progress=False)
    groups = fp.score(model, loader, criterion=criterion, granularity=fp.Unit(4), progress=False)
    layers = fp.score(model, loader, criterion=criterion, granularity=fp.Layer(), progress=False)
    dense = plain_double(model)
    for name in units:
        _, (_, output) = _inputs_of(model, loader, name)
        if name == "conv1":
            output = F.relu(dense.norm1(output))
        elif name == "conv2":
            output = F.silu(dense.norm2(output))
        rows = output.detach().abs().movedim(1, 0).flatten(1)
        rows = (rows != 0).double() if statistic == "zeros" else rows
        reduce = torch.max if statistic == "max" else torch.mean
        expected = torch.stack([reduce(row) for row in rows])
        torch.testing.assert_close(units[name], expected, rtol=1e-4, atol=1e-6)
        expected = torch.stack([reduce(part) for part in rows.split(4)])
        torch.testing.assert_close(groups[name], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layers[name], reduce(rows), rtol=1e-4, atol=1e-6)
    assert statistic != "zeros" or bool(((units["conv1"] > 0) & (units["conv1"] < 1)).any())


def test_activations_of_sequences_and_untraced_models_are_those_of_the_layer():
    for model, shape in ((Sequences(), (6, 7)), (DataDependent(), (7,))):
        loader = classification_batches((5, 2), shape)
        scores = fp.score(model, loader, criterion="activation", granularity=fp.Unit(), progress=False)
        name = "head" if isinstance(model, Sequences) else next(iter(scores))
        _, (_, output) = _inputs_of(model, loader, name)
        torch.testing.assert_close(scores[name], output.flatten(0, -2).abs().mean(0), rtol=1e-5, atol=1e-7)


def test_random_scores_follow_the_seed_alone():
    torch.manual_seed(1)
    first = fp.score(mlp(), None, criterion="random")
    torch.manual_seed(2)
    again = fp.score(mlp(), None, criterion=fp.criteria.Random(0))
    other = fp.score(mlp(), None, criterion=fp.criteria.Random(1), granularity=fp.Element())
    assert torch.equal(first["0"], again["0"])
    assert other.criterion == "random(seed=1)"
    assert 0 <= float(other["0"].min()) < 0.2 < 0.8 < float(other["0"].max()) < 1
    assert not torch.equal(other["0"].flatten()[:5], other["2"].flatten()[:5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.criteria.Magnitude(p=3), "`p`"),
        (lambda: fp.criteria.Magnitude(p=True), "`p`"),
        (lambda: fp.criteria.Random(seed=0.5), "`seed`"),
        (lambda: fp.criteria.Activation("median"), "`statistic`"),
    ],
)
def test_an_option_out_of_range_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("criterion", "granularity"),
    [
        ("activation", fp.Block(4, 4)),
        ("activation", fp.Element()),
        ("activation", fp.ParameterTensor()),
        ("wanda", fp.ParameterTensor()),
        ("gradient_change", fp.Layer()),
    ],
)
def test_pieces_without_a_score_are_refused(criterion, granularity):
    with pytest.raises(ValueError, match=f"criterion '{criterion}' .*`granularity`"):
        fp.score(mlp(), classification_batches(), criterion=criterion, granularity=granularity)


def test_layers_that_are_never_called_are_named():
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 5))
    loader = classification_batches((4,), (3, 8))
    for criterion in ("wanda", "activation"):
        with pytest.raises(ValueError, match=r"layer '0\.self_attn\.out_proj' was never called"):
            fp.score(model, loader, criterion=criterion, granularity=fp.Unit(), progress=False)
