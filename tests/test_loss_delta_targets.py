"""LossDelta(targets="predictions") against masked forwards in float64, in each of the three exact ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.importance import fused, loss_delta
from helpers import Snapshot, as_double, brute_force, call, classification_batches, mlp, plain_double
from loss_delta_cases import CASES
from networks import SmallResNet

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fastprune")]

PREDICTIONS = fp.criteria.LossDelta(targets="predictions")
NAMES = (
    "relu",
    "gelu",
    "sigmoid, which is not 0 at 0",
    "softplus, widths 1 and 151",
    "three layers without bias",
    "a single layer",
    "batch norm between layer and activation",
    "residual, functional relu in place",
    "convolutions",
    "convolutions, by other pieces",
    "residual network",
    "attention over embeddings, dicts with a mask",
    "encoder layer, attention, steps with ignore_index",
    "layer used twice",
    "data-dependent control flow",
    "masked by units",
    "an output that is transformed",
    "ignore_index",
    "class weights",
    "label smoothing with weights and ignore_index",
    "functional cross-entropy",
    "probabilities as targets",
    "a model in double",
)


def with_predictions(case, model, loader):
    """The loader with the model's own probabilities as targets, zero where a label is left out."""
    dense, ignore_index = plain_double(model), getattr(case.loss_fn, "ignore_index", -100)
    batches = []
    with torch.no_grad():
        for batch in as_double(loader):
            inputs, labels = (
                ({key: batch[key] for key in batch if key != "labels"}, batch["labels"])
                if isinstance(batch, dict)
                else batch
            )
            probabilities = case.pick(call(dense, inputs)).softmax(1)
            if not labels.is_floating_point():
                probabilities = probabilities * (labels != ignore_index).unsqueeze(1)
            batches.append((inputs, probabilities))
    return batches


def sums(output, probabilities):
    return F.cross_entropy(output, probabilities, reduction="sum"), float(probabilities.sum())


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_divergences_of_masked_forwards_in_float64(name):
    case = CASES[name]
    for granularity in case.granularities[:3]:
        torch.manual_seed(0)
        model, loader = case.model(), case.loader()
        snapshot = Snapshot(model)
        scores = fp.score(
            model,
            loader,
            criterion=PREDICTIONS,
            granularity=granularity,
            include=case.layers,
            loss_fn=case.loss_fn,
            output_transform=None if case.pick is type(case).pick else case.pick,
            progress=False,
        )
        snapshot.assert_unchanged()
        targets = with_predictions(case, model, loader)
        norms = case.norms if granularity.masks_norms else {}
        for layer in scores:
            own = granularity.for_layer(layer, model.get_submodule(layer), model)
            expected, entropy = brute_force(model, targets, layer, own, sums, norms.get(layer), case.pick)
            measured = ~expected.isnan()
            error = (scores[layer].flatten() - expected).abs()[measured]
            # Divergences are of second order, small beside the loss: its share would hide all errors.
            assert bool((error <= 1e-3 * expected[measured] + 1e-8 * entropy).all()), layer
            assert bool((expected[measured] > 1e-6 * entropy).any())
            assert bool((scores[layer] >= -1e-12).all())


def test_units_that_go_together_and_whole_layers():
    model = SmallResNet()
    loader = classification_batches((6, 4, 1), (3, 9, 8))
    for granularity in (fp.Unit(coupled=True), fp.Layer()):
        options = {"granularity": granularity, "progress": False}
        scores = fp.score(model, loader, criterion=PREDICTIONS, **options)
        soft = [(inputs, model.eval()(inputs).detach().softmax(1)) for inputs, _ in loader]
        expected = fp.score(model, soft, **options)
        for name in scores:
            torch.testing.assert_close(scores[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("granularity", [fp.Block(4, 3), fp.Unit(), fp.InputUnit()], ids=str)
@pytest.mark.parametrize("classes", [1, 2, fused.MOST_CLASSES, fused.MOST_CLASSES + 1])
def test_kernels_serve_few_classes_and_the_suffix_many(classes, granularity, monkeypatch):
    model, loader = mlp(7, 17, classes), classification_batches((15, 1), classes=classes)
    calls = []
    monkeypatch.setattr(
        loss_delta, "fused_deltas", lambda *args: calls.append(1) or fused.fused_deltas(*args)
    )
    options = {"criterion": PREDICTIONS, "granularity": granularity, "progress": False}
    scores = fp.score(model, loader, **options)
    assert bool(calls) == (classes <= fused.MOST_CLASSES)
    monkeypatch.setattr(loss_delta, "MOST_CLASSES", 0)
    by_suffix = fp.score(model, loader, **options)
    for name in scores:
        torch.testing.assert_close(scores[name], by_suffix[name], rtol=1e-3, atol=1e-9)


def test_labels_count_for_the_reported_loss_alone():
    model, loader = mlp(), classification_batches()
    others = [(inputs, (targets + 1) % 5) for inputs, targets in loader]
    first, second = (
        fp.score(model, batches, criterion=PREDICTIONS, progress=False) for batches in (loader, others)
    )
    assert first.loss != second.loss
    assert first.loss == fp.score(model, loader, progress=False).loss
    for name in first:
        assert torch.equal(first[name], second[name])


def test_the_name_says_the_target_and_labels_are_the_default():
    model, loader = mlp(), classification_batches()
    by_name, by_object, others = (
        fp.score(model, loader, criterion=criterion, progress=False)
        for criterion in ("loss_delta", fp.criteria.LossDelta(), PREDICTIONS)
    )
    assert by_name.criterion == by_object.criterion == "loss_delta"
    assert others.criterion == "loss_delta(targets='predictions')"
    for name in by_name:
        assert torch.equal(by_name[name], by_object[name])
    with pytest.raises(ValueError, match="same criterion"):
        by_name.merge(others)


def test_a_wrong_target_or_another_loss_is_refused():
    with pytest.raises(ValueError, match="`targets` must be 'labels' or 'predictions', got 'teacher'"):
        fp.criteria.LossDelta(targets="teacher")
    with pytest.raises(ValueError, match="`loss_fn` must be cross-entropy"):
        fp.score(mlp(), classification_batches(), criterion=PREDICTIONS, loss_fn=nn.MSELoss())
