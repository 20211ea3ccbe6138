"""What is scored, and what a criterion may be: selections, a user's own callables, and their mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.layers import select_modules, select_parameters, select_scored
from helpers import Snapshot, classification_batches, masked_mlp, mlp
from networks import SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread")


class _Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_layers_may_be_modules_of_any_kind():
    model = _Blocks()
    assert list(select_modules(model, "blocks.?")) == ["blocks.0", "blocks.1"]
    assert list(select_modules(model, "*", "*.?.?")) == ["blocks.0", "blocks.1", "head"]
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Layer(), include="blocks.?")
    weights = [*model.blocks[0].parameters()]
    expected = torch.cat([weight.detach().double().flatten() for weight in weights]).norm()
    torch.testing.assert_close(scores["blocks.0"], expected)
    assert scores.weight_shapes["blocks.0"] == (56,)
    with pytest.raises(ValueError, match="`include` and `exclude`"):
        select_modules(model, nn.Conv2d)


def test_parameters_are_named_as_without_masks_and_tied_ones_count_once():
    model, _ = masked_mlp()
    model.append(nn.LayerNorm(10))
    model.append(nn.Linear(10, 10))
    model[4].bias = model[3].bias
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    names = list(select_parameters(model))
    assert names == ["scale", "0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight"]
    assert list(select_parameters(model, nn.LayerNorm)) == ["3.weight", "3.bias"]
    assert list(select_parameters(model, "*.weight", "3.*")) == ["0.weight", "2.weight", "4.weight"]
    with pytest.warns(UserWarning, match=r"'3\.bias' is left out: it is tied to \['4\.bias'\]"):
        scores = fp.score(model, None, criterion="magnitude", granularity=fp.ParameterTensor())
    assert list(scores) == [name for name in names if name != "3.bias"]
    torch.testing.assert_close(scores["0.weight"], model[0].weight.detach().double().norm())
    assert scores["3.weight"].shape == ()
    masks = scores.select(sparsity=0.5)
    with pytest.raises(ValueError, match="`include` and `exclude`"):
        select_parameters(model, "nothing")
    assert masks["0.weight"].shape == ()


def test_granularities_are_those_of_each_layer():
    model = SmallConvNet()
    layers, granularities = select_scored(model, fp.InputUnit())
    assert list(layers) == list(granularities)
    assert granularities["conv2"] == fp.InputUnit(2)
    loader = classification_batches((4,), (3, 7, 5))
    scores = fp.score(model, loader, criterion="magnitude", granularity=fp.InputUnit())
    assert scores["conv2"].shape == (6,)
    masks = scores.select(budget=fp.Budget(flops=0.5), scope="layer")
    assert masks.granularity_of("conv2") == fp.InputUnit(2)
    fp.apply_masks_(model, masks)
    assert 0 < masks.sparsity() <= 0.6


def test_heads_are_found_and_their_absence_is_reported():
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    scores = fp.score(encoder, None, criterion="magnitude", granularity=fp.Head())
    assert list(scores) == ["self_attn.out_proj"]
    weight = encoder.self_attn.out_proj.weight.detach().double()
    expected = torch.stack([weight[:, :4].norm(), weight[:, 4:].norm()])
    torch.testing.assert_close(scores["self_attn.out_proj"], expected)
    with pytest.raises(ValueError, match="`granularity`"):
        fp.score(mlp(), None, criterion="magnitude", granularity=fp.Head())


def test_flops_of_modules_and_parameters_are_those_of_the_layers_in_them():
    model, loader = _Blocks(), classification_batches((4,))
    options = {"criterion": "magnitude", "progress": False}
    whole = fp.score(model, loader, granularity=fp.Layer(), include="blocks.?", **options)
    assert whole.weight_uses == {"blocks.0": 49 / 56, "blocks.1": 49 / 56}
    single = fp.score(model, loader, granularity=fp.ParameterTensor(), include="head.*", **options)
    assert single.weight_uses == {"head.weight": 1.0, "head.bias": 0.0}


def _mean_gradient(calibration):
    scores = calibration.zeros()
    for batch in calibration.batches():
        gradients, _ = calibration.gradients(batch)
        for name in scores:
            for part, gradient in zip(calibration.parts(name), gradients[name], strict=True):
                scores[name] += part.sum(gradient.double())
    return calibration.mean(scores)


def test_a_criterion_of_ones_own_is_a_callable():
    model, loader = mlp().train(), classification_batches()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].requires_grad_(False)
    snapshot = Snapshot(model)
    scores = fp.score(model, loader, criterion=_mean_gradient, granularity=fp.Unit(), progress=False)
    snapshot.assert_unchanged()
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert scores.criterion == "_mean_gradient"
    assert scores.num_samples == 24
    double = mlp().double()
    double.load_state_dict(model.state_dict())
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    loss = nn.functional.cross_entropy(double(inputs.double()), targets)
    loss.backward()
    assert scores.loss == pytest.approx(float(loss), rel=1e-6)
    for name in ("0", "2"):
        layer = double.get_submodule(name)
        expected = layer.weight.grad.sum(1) + layer.bias.grad
        torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-7)


def _like(calibration, change):
    scores = {name: torch.zeros(calibration.pieces(name)) for name in calibration.layers}
    change(scores)
    return scores


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (lambda calibration: None, TypeError, "must return a dict"),
        (lambda calibration: _like(calibration, lambda s: s.pop("0")), ValueError, r"missing \['0'\]"),
        (lambda calibration: _like(calibration, lambda s: s.update(x=1)), ValueError, r"unexpected \['x'\]"),
        (lambda calibration: _like(calibration, lambda s: s.update({"0": 1.0})), TypeError, "tensors, got a"),
        (
            lambda calibration: _like(calibration, lambda s: s.update({"2": torch.zeros(3)})),
            ValueError,
            r"shape \[5\] for layer '2'",
        ),
        (
            lambda calibration: _like(calibration, lambda s: s["2"].fill_(torch.nan)),
            ValueError,
            "NaN or inf for layer '2'",
        ),
        (fp.criteria.Magnitude, ValueError, "`criterion`"),
        (3, ValueError, "`criterion`"),
    ],
)
def test_what_a_criterion_returns_is_checked(criterion, error, message):
    with pytest.raises(error, match=message):
        fp.score(mlp(), None, criterion=criterion, granularity=fp.Unit())


def test_batches_are_read_again_only_where_they_can_be():
    model, batches = mlp(), classification_batches()

    def twice(calibration):
        sizes = [[batch.size for batch in calibration.batches()] for _ in range(2)]
        assert sizes[0] == sizes[1] == [15, 8, 1]
        return calibration.zeros()

    fp.score(model, batches, criterion=twice, granularity=fp.Unit(), progress=False)
    with pytest.raises(TypeError, match="`loader`"):
        fp.score(model, iter(batches), criterion=twice, granularity=fp.Unit(), progress=False)
    with pytest.raises(TypeError, match="`loader`"):
        fp.score(model, None, criterion=twice, granularity=fp.Unit(), progress=False)


def test_a_loss_without_a_gradient_or_that_is_not_finite_is_reported():
    model, loader = mlp(), classification_batches((4,))
    options = {"criterion": _mean_gradient, "granularity": fp.Unit(), "progress": False}
    with pytest.raises(ValueError, match="no gradient"):
        fp.score(model, loader, output_transform=lambda output: output.detach(), **options)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '2' has such weights"):
        fp.score(model, loader, **options)
    with pytest.raises(ValueError, match="ignore_index"):
        fp.score(mlp(), [(torch.randn(4, 7), torch.full((4,), -100))], **options)


def test_a_backward_of_ones_own_criterion_adds_to_no_gradient():
    model = mlp()
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept

    def backward(calibration):
        for batch in calibration.batches():
            calibration.loss(batch)[0].backward()
        return calibration.zeros()

    fp.score(model, classification_batches(), criterion=backward, granularity=fp.Unit(), progress=False)
    assert model[0].weight.grad is kept
    assert bool((kept == 1).all())
    assert model[2].weight.grad is None
