"""The cheap criteria against plain float64 computations: a backward for each sample, loops over pieces."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from criteria_nets import GRANULARITIES, NETS
from fastprune.importance.sample_gradients import SampleGradients
from helpers import (
    FailsAtCall,
    Snapshot,
    as_double,
    classification_batches,
    mlp,
    pieces_of,
    plain_double,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _sample_gradients(model, loader):
    """Gradients of each sample's loss by itself: a list of {parameter: gradient}, in float64."""
    dense = plain_double(model)
    found = []
    for inputs, targets in as_double([tuple(batch) for batch in loader]):
        for sample in range(len(inputs)):
            loss = F.cross_entropy(dense(inputs[sample : sample + 1]), targets[sample : sample + 1])
            grads = torch.autograd.grad(loss, list(dense.parameters()), allow_unused=True)
            names = [name for name, _ in dense.named_parameters()]
            found.append(dict(zip(names, grads, strict=True)))
    return dense, found


def _pieces(dense, name, granularity, norm):
    """For each piece, the (parameter, mask) pairs it is made of."""
    shape = dense.get_parameter(f"{name}.weight").shape
    for index, piece in enumerate(pieces_of(granularity, shape)):
        tensors = [(f"{name}.weight", piece)]
        if isinstance(granularity, fp.Unit):
            others = [f"{name}.bias"] + ([f"{norm}.weight", f"{norm}.bias"] if norm else [])
            held = dict(dense.named_parameters())
            tensors += [(other, index) for other in others if other in held]
        yield tensors


def _expected(criterion, dense, samples, tensors):
    def values(gradients):
        return torch.cat([gradients[name][where].flatten() for name, where in tensors])

    weight = values(dict(dense.named_parameters())).detach()
    rows = torch.stack([values(gradients) for gradients in samples])
    if criterion == "gradient":
        return ((weight != 0) * rows.mean(0)).norm()
    if criterion == "taylor":
        return (rows.mean(0) @ weight).abs()
    if criterion == "taylor per sample":
        return (rows @ weight).abs().mean()
    return 0.5 * (rows.square().mean(0) * weight.square()).sum()


OBJECTS = {
    "gradient": fp.criteria.Gradient(),
    "taylor": fp.criteria.Taylor(),
    "taylor per sample": fp.criteria.Taylor(per_sample=True),
    "fisher": fp.criteria.Fisher(),
}


@pytest.mark.filterwarnings("ignore:fastprune")
@pytest.mark.parametrize(
    ("criterion", "net"),
    # What the untraced net computes for a sample depends on the others in its batch.
    [(criterion, net) for criterion in OBJECTS for net in NETS if net != "untraced" or criterion == "fisher"],
)
def test_gradient_criteria_are_those_of_a_backward_for_each_sample(criterion, net):
    make, shape, norms = NETS[net]
    model = make()
    loader = classification_batches((15, 8, 1), shape)
    dense, samples = _sample_gradients(model, loader)
    for granularity in GRANULARITIES:
        snapshot = Snapshot(model)
        scores = fp.score(
            model, loader, criterion=OBJECTS[criterion], granularity=granularity, progress=False
        )
        snapshot.assert_unchanged()
        assert scores.norms == (norms if isinstance(granularity, fp.Unit) else {})
        for name, layer in scores.items():
            pieces = list(_pieces(dense, name, granularity, norms.get(name)))
            expected = [_expected(criterion, dense, samples, tensors) for tensors in pieces]
            expected = torch.stack(expected)
            assert float(expected.max()) > 0
            floor = 1e-4 * float(expected.max())
            torch.testing.assert_close(layer.flatten(), expected, rtol=2e-4, atol=floor)


@pytest.mark.parametrize(
    ("net", "one_by_one"),
    [
        *((net, False) for net in ("mlp", "norms", "conv", "convolutions", "sequences", "masked", "shared")),
        ("in place", False),
        ("steps first", True),
        ("tied", True),
    ],
)
def test_one_backward_serves_all_samples_where_it_can(net, one_by_one, monkeypatch):
    engines = []
    init = SampleGradients.__init__
    monkeypatch.setattr(SampleGradients, "__init__", lambda self, c: (engines.append(self), init(self, c))[0])
    make, shape, _ = NETS[net]
    fp.score(
        make(),
        classification_batches((15, 8, 1), shape),
        criterion="fisher",
        granularity=fp.Unit(),
        progress=False,
    )
    assert [engine.one_by_one for engine in engines] == [one_by_one]


def test_taylor_is_the_derivative_of_the_loss_along_a_piece():
    model, loader = mlp(activation=nn.Tanh), classification_batches()
    scores = fp.score(model, loader, criterion="taylor", granularity=fp.Unit(), progress=False)
    inputs, targets = (torch.cat(parts) for parts in zip(*as_double(loader), strict=True))
    for name in scores:
        for unit in range(len(scores[name])):
            losses = []
            for scale in (1 - 1e-5, 1 + 1e-5):
                dense = copy.deepcopy(model).double()
                with torch.no_grad():
                    dense.get_submodule(name).weight[unit] *= scale
                    dense.get_submodule(name).bias[unit] *= scale
                losses.append(float(F.cross_entropy(dense(inputs), targets)))
            slope = (losses[1] - losses[0]) / 2e-5
            assert float(scores[name][unit]) == pytest.approx(abs(slope), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("criterion", ["gradient", "taylor", "fisher"])
def test_whole_layers_and_parameters_are_scored_by_their_gradients(criterion):
    model = nn.Sequential(nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    nn.init.normal_(model[1].bias)
    loader = classification_batches()
    dense, samples = _sample_gradients(model, loader)
    options = {"criterion": criterion, "progress": False}
    single = fp.score(model, loader, granularity=fp.ParameterTensor(), **options)
    whole = fp.score(model, loader, granularity=fp.Layer(), include="*", **options)
    assert len(single) == 6
    for name in single:
        expected = _expected(criterion, dense, samples, [(name, ...)])
        torch.testing.assert_close(single[name], expected, rtol=1e-4, atol=1e-7)
    for name in whole:
        tensors = [(f"{name}.weight", ...), (f"{name}.bias", ...)]
        torch.testing.assert_close(
            whole[name], _expected(criterion, dense, samples, tensors), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("net", ["mlp", "masked", "norms", "conv"])
def test_gradient_change_is_the_gradient_of_the_masked_model_minus_that_of_the_model(net):
    make, shape, norms = NETS[net]
    model, loader = make(), classification_batches((5, 2), shape)
    inputs, targets = (torch.cat(parts) for parts in zip(*as_double(loader), strict=True))
    for granularity in (fp.Unit(), fp.Block(4, 3)):
        snapshot = Snapshot(model)
        scores = fp.score(model, loader, criterion="gradient_change", granularity=granularity, progress=False)
        snapshot.assert_unchanged()
        masks_now = {name: model.get_submodule(name).weight != 0 for name in scores}
        dense = plain_double(model)
        parts = {
            parameter
            for name in scores
            for pieces in _pieces(dense, name, granularity, norms.get(name))
            for parameter, _ in pieces
        }

        def gradient(network, removed, parts=parts, masks_now=masks_now):
            held = {name: network.get_parameter(name) for name in sorted(parts)}
            grads = dict(
                zip(
                    held,
                    torch.autograd.grad(F.cross_entropy(network(inputs), targets), list(held.values())),
                    strict=True,
                )
            )
            for name, mask in masks_now.items():
                grads[f"{name}.weight"] = grads[f"{name}.weight"] * mask
            for name, where in removed:
                grads[name][where] = 0
            return torch.cat([grad.flatten() for grad in grads.values()])

        original = gradient(dense, [])
        for name in list(scores)[:2]:
            expected = []
            for tensors in _pieces(dense, name, granularity, norms.get(name)):
                masked = copy.deepcopy(dense)
                with torch.no_grad():
                    for parameter, where in tensors:
                        masked.get_parameter(parameter)[where] = 0
                expected.append((gradient(masked, tensors) - original).norm())
            torch.testing.assert_close(scores[name].flatten(), torch.stack(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fastprune")
def test_attention_is_scored_by_fisher_and_taylor():
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.3)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 5))
    loader = classification_batches((4, 3), (3, 8))
    dense, samples = _sample_gradients(model, loader)
    name = "0.self_attn.out_proj"
    for criterion in ("fisher", "taylor"):
        scores = fp.score(model, loader, criterion=criterion, granularity=fp.Head(), progress=False)
        weight = dense.get_parameter(f"{name}.weight")
        for head, columns in enumerate((slice(0, 4), slice(4, 8))):
            piece = torch.zeros(weight.shape, dtype=torch.bool)
            piece[:, columns] = True
            expected = _expected(criterion, dense, samples, [(f"{name}.weight", piece)])
            torch.testing.assert_close(scores[name][head], expected, rtol=1e-3, atol=1e-8)


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(7, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def test_parameters_of_recurrent_layers_have_gradients_but_no_masks():
    model, loader = _Recurrent(), classification_batches((4, 3), (3, 7))
    dense, samples = _sample_gradients(model, loader)
    for criterion in ("fisher", "taylor"):
        scores = fp.score(
            model, loader, criterion=criterion, granularity=fp.ParameterTensor(), progress=False
        )
        for name, score in scores.items():
            expected = _expected(criterion, dense, samples, [(name, ...)])
            torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-8)
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"'cells.weight_ih_l0' belongs to a LSTM"):
        fp.score(model, loader, criterion="gradient_change", granularity=fp.ParameterTensor(), progress=False)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
@pytest.mark.parametrize("criterion", sorted(fp.criteria.CRITERIA))
@pytest.mark.filterwarnings("ignore:fastprune")
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(criterion, error):
    kind = error if isinstance(error, type) else type(error)
    for net in ("norms", "masked", "tied"):
        model = NETS[net][0]()
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(False)
        kept = torch.ones_like(next(model.parameters()))
        next(model.parameters()).grad = kept
        for module in list(model.modules())[::2]:
            module.train(not module.training)
        batches = classification_batches((4, 2, 2))
        snapshot, generator = Snapshot(model), torch.get_rng_state()
        options = {"criterion": criterion, "granularity": fp.Unit(), "progress": False}

        def broken(after, batches=batches):
            yield from batches[:after]
            raise error

        if fp.criteria.CRITERIA[criterion].needs_data:
            for after in (0, 1, 2):
                with pytest.raises(kind):
                    fp.score(model, broken(after), **options)
                snapshot.assert_unchanged()
        if criterion in ("gradient", "taylor", "fisher", "gradient_change"):
            for calls in (1, 2, 3, *([4, 9] if criterion == "gradient_change" else [])):
                with pytest.raises(kind):
                    fp.score(model, batches, loss_fn=FailsAtCall(calls, error), **options)
                snapshot.assert_unchanged()
        fp.score(model, batches, **options)
        snapshot.assert_unchanged()
        assert next(model.parameters()).grad is kept
        assert bool((kept == 1).all())
        assert torch.equal(torch.get_rng_state(), generator)
