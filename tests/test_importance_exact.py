"""score(criterion="loss_delta") against masked forwards in float64, for every kind of network."""

from __future__ import annotations

import copy
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import (
    Snapshot,
    assert_exact,
    brute_force,
    classification_batches,
    masked_mlp,
    mlp,
)
from loss_delta_cases import CASES, GRANULARITIES, Case, tokens
from networks import (
    DataDependent,
    ResidualInPlace,
    TextClassifier,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _check(case, model, loader, granularity):
    granularities = {
        name: granularity.for_layer(name, module, model)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (case.layers is None or name in case.layers)
    }
    layers = [name for name, own in granularities.items() if own is not None]
    pick_logits = None if case.pick is Case.pick else case.pick
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = fp.score(
            model,
            loader,
            granularity=granularity,
            include=layers if case.layers else None,
            loss_fn=case.loss_fn,
            output_transform=pick_logits,
            progress=False,
        )
    own = [
        str(w.message) for w in caught if "fastprune" in str(w.message) and "batch norm" not in str(w.message)
    ]
    assert len(own) == (0 if case.traced else 1), own
    norms = case.norms if granularity.masks_norms else {}
    assert scores.norms == norms
    assert scores.keys() == set(layers)
    for layer in layers:
        expected, loss = brute_force(
            model, loader, layer, granularities[layer], case.sums, norms.get(layer), case.pick
        )
        assert scores.loss == pytest.approx(loss, rel=1e-5)
        assert_exact(scores[layer], expected, loss)


@pytest.mark.parametrize("name", CASES)
def test_loss_deltas_are_those_of_masked_forwards_in_float64(name):
    case = CASES[name]
    for granularity in case.granularities:
        torch.manual_seed(0)
        model, loader = case.model(), case.loader()
        snapshot = Snapshot(model)
        batches = copy.deepcopy(loader)
        _check(case, model, loader, granularity)
        snapshot.assert_unchanged()
        torch.testing.assert_close(loader, batches, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("relu", fp.Block(4, 3)),
        ("convolutions", fp.Unit()),
        ("residual network", fp.Block(4, 2)),
        ("residual network", fp.InputUnit()),
        ("depthwise and grouped convolutions", fp.Block(4, 2)),
        ("depthwise and grouped convolutions", fp.Unit()),
        ("attention over embeddings", fp.Block(4, 3)),
        ("attention over embeddings, dicts with a mask", fp.InputUnit()),
        ("residual, += on an alias", fp.Unit()),
    ],
    ids=str,
)
def test_the_whole_model_runs_only_to_check_the_trace(name, granularity):
    case = CASES[name]
    model = case.model()
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    fp.score(model, case.loader(), granularity=granularity, progress=False)
    # To count the uses of weights, to see that a batch may be split, and for each trace: torch.export makes
    # one for each shape, and runs the model for it.
    assert len(calls) <= 16


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    widths=st.lists(st.integers(1, 17), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    activation=st.sampled_from([nn.ReLU, nn.Sigmoid, nn.ELU, nn.Hardswish, nn.PReLU]),
    granularity=st.one_of(
        st.builds(fp.Block, st.integers(1, 20), st.integers(1, 20)), st.just(fp.Unit()), st.just(fp.Element())
    ),
    bias=st.booleans(),
)
def test_loss_deltas_are_exact_for_any_mlp(widths, sizes, activation, granularity, bias):
    torch.manual_seed(len(widths))
    layers = []
    for features, outputs in zip(widths, [*widths[1:], 5], strict=True):
        layers += [nn.Linear(features, outputs, bias=bias), activation()]
    model = nn.Sequential(*layers[:-1])
    loader = classification_batches(sizes, (widths[0],))
    scores = fp.score(model, loader, granularity=granularity, progress=False)
    for layer in scores:
        expected, loss = brute_force(model, loader, layer, granularity, max_pieces=12)
        error = (scores[layer].flatten() - expected).abs()[~expected.isnan()]
        allowed = (1e-4 * expected.abs() + 1e-6 * loss)[~expected.isnan()]
        assert bool((error <= allowed).all())


def test_the_loss_is_the_mean_over_samples_and_not_over_batches():
    model = mlp()
    whole = classification_batches((24,))
    (inputs, targets), sizes = whole[0], [20, 3, 1]
    ragged = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    with torch.no_grad():
        by_batch = [float(F.cross_entropy(model(x), y)) for x, y in ragged]
    for granularity in GRANULARITIES:
        one = fp.score(model, whole, granularity=granularity, progress=False)
        cut = fp.score(model, ragged, granularity=granularity, progress=False)
        assert cut.loss == pytest.approx(one.loss, rel=1e-6)
        assert cut.loss != pytest.approx(sum(by_batch) / 3, rel=1e-3)
        for layer in one:
            torch.testing.assert_close(cut[layer], one[layer], rtol=1e-4, atol=1e-6 * one.loss)


def test_a_pruned_piece_has_a_delta_of_zero():
    model, _ = masked_mlp(0.5, block=(2, 3), sizes=(7, 9, 5))
    scores = fp.score(model, classification_batches(), granularity=fp.Block(2, 3), progress=False)
    for layer, pruned in scores.pruned.items():
        assert bool(pruned.any())
        assert bool((scores[layer][pruned] == 0).all())
        assert bool((scores[layer][~pruned] != 0).any())


def test_scores_of_a_layer_do_not_depend_on_which_other_layers_are_scored():
    model, loader = ResidualInPlace("module"), classification_batches()
    together = fp.score(model, loader, granularity=fp.Block(4, 3), progress=False)
    alone = fp.score(model, loader, granularity=fp.Block(4, 3), include="second", progress=False)
    assert list(alone) == ["second"]
    assert torch.equal(alone["second"], together["second"])


def test_a_trained_model_whose_deltas_are_a_millionth_of_the_loss_keeps_their_digits():
    model = mlp(7, 129)
    with torch.no_grad():
        model[2].weight[:, 64:] *= 1e-5
    loader = classification_batches()
    scores = fp.score(model, loader, granularity=fp.Unit(), include="0", progress=False)["0"]
    expected, _ = brute_force(model, loader, "0", fp.Unit(), max_pieces=129)
    tiny = expected[64:]
    assert float(tiny.abs().max()) < 1e-5
    error = (scores[64:] - tiny).abs()
    assert float(error.max()) < 1e-3 * float(tiny.abs().max())


@pytest.mark.parametrize("make", [mlp, TextClassifier, DataDependent], ids=lambda make: make.__name__)
def test_a_parameter_scores_what_zeros_in_its_place_cost(make):
    torch.manual_seed(0)
    model = make()
    loader = tokens() if make is TextClassifier else classification_batches()
    scores = fp.score(model, loader, granularity=fp.ParameterTensor(), progress=False)
    assert scores.keys() == dict(model.named_parameters()).keys()
    double = copy.deepcopy(model).double().eval()
    base = _mean_loss(double, loader)
    for name, parameter in double.named_parameters():
        before = parameter.detach().clone()
        parameter.data.zero_()
        expected = _mean_loss(double, loader) - base
        parameter.data.copy_(before)
        assert float(scores[name]) == pytest.approx(expected, rel=1e-4, abs=1e-6 * base)


def test_a_layer_scores_what_its_input_or_zeros_in_place_of_its_output_cost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    loader = classification_batches()
    scores = fp.score(model, loader, granularity=fp.Layer(), progress=False)
    blocks = fp.score(model, loader, granularity=fp.Layer(), include=[nn.ReLU, nn.Tanh], progress=False)
    double = copy.deepcopy(model).double().eval()
    base = _mean_loss(double, loader)
    for index in range(5):
        without = list(double)
        without[index] = nn.Identity() if index in (0, 1, 3) else _Zeros(double[index].out_features)
        expected = _mean_loss(nn.Sequential(*without), loader) - base
        found = (scores if str(index) in scores else blocks)[str(index)]
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6 * base)
        assert abs(expected) > 1e-4 * base


class _Zeros(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return x.new_zeros(len(x), self.features)


@torch.no_grad()
def _mean_loss(double, loader):
    inputs = [x.double() if x.is_floating_point() else x for x, _ in loader]
    losses = [
        F.cross_entropy(double(x), y, reduction="sum") for x, (_, y) in zip(inputs, loader, strict=True)
    ]
    return float(sum(losses)) / sum(len(y) for _, y in loader)
