"""Loss deltas against the model's own predictions: the divergence of the masked model's from them."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import Snapshot, as_double, brute_force, call, classification_batches, mlp, plain_double
from loss_delta_cases import CASES, Case

pytestmark = pytest.mark.usefixtures("one_thread")

PREDICTIONS = fp.criteria.LossDelta(targets="predictions")


def soft(model, loader, pick):
    """The loader with what a float64 copy predicts as its targets."""
    dense, batches = plain_double(model), []
    for batch in as_double(list(loader)):
        if isinstance(batch, dict):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            batches.append({**inputs, "labels": pick(call(dense, as_double(inputs))).softmax(1).detach()})
        else:
            batches.append((batch[0], pick(call(dense, as_double(batch[0]))).softmax(1).detach()))
    return batches


def divergence_sums(logits, probabilities):
    total = F.kl_div(logits.log_softmax(1), probabilities, reduction="sum")
    return total, probabilities.numel() // probabilities.shape[1]


def score(model, loader, granularity, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fp.score(
            model, loader, criterion=PREDICTIONS, granularity=granularity, progress=False, **options
        )


def assert_divergences(scores, expected):
    """A divergence is of second order: logits that are off by e move it by twice e times its root."""
    measured = ~expected.isnan()
    scores, expected = scores.flatten()[measured], expected[measured].clamp(min=0)
    assert bool(((scores - expected).abs() <= 1e-4 * expected + 1e-6 * expected.sqrt() + 1e-11).all())
    assert float(expected.max()) > 1e-6


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.loss_fn is None and case.layers is None]
)
def test_deltas_are_divergences_of_masked_forwards_in_float64(name):
    case = CASES[name]
    for granularity in case.granularities:
        torch.manual_seed(0)
        model, loader = case.model(), case.loader()
        snapshot = Snapshot(model)
        scores = score(
            model, loader, granularity, output_transform=None if case.pick is Case.pick else case.pick
        )
        snapshot.assert_unchanged()
        for layer in scores:
            own = granularity.for_layer(layer, model.get_submodule(layer), model)
            norm = case.norms.get(layer) if granularity.masks_norms else None
            expected, _ = brute_force(
                model, soft(model, loader, case.pick), layer, own, divergence_sums, norm, case.pick
            )
            assert_divergences(scores[layer], expected)


def test_labels_play_no_part_and_shards_merge():
    model, batches = mlp(), classification_batches((15, 8))
    others = [(x, torch.randint(0, 5, y.shape)) for x, y in batches]
    scores, again = score(model, batches, fp.Unit()), score(model, others, fp.Unit())
    assert scores.criterion == "loss_delta(targets='predictions')"
    first, second = (score(model, [batch], fp.Unit()) for batch in batches)
    for name in scores:
        assert torch.equal(scores[name], again[name])
        torch.testing.assert_close(first.merge(second)[name], scores[name])


def test_labels_are_the_default():
    model, batches = mlp(), classification_batches()
    by_name = fp.score(model, batches, granularity=fp.Unit(), progress=False)
    by_class = fp.score(
        model, batches, criterion=fp.criteria.LossDelta(), granularity=fp.Unit(), progress=False
    )
    assert by_class.criterion == by_name.criterion == "loss_delta"
    assert all(torch.equal(by_class[name], by_name[name]) for name in by_name)


def test_compress_prunes_by_them_and_resumes(tmp_path):
    torch.manual_seed(0)
    model, batches = mlp(16, 32, 4), [(torch.randn(20, 16), torch.randint(0, 4, (20,)))]
    options = {"criterion": PREDICTIONS, "granularity": fp.Block(4, 4), "rounds": 2, "progress": False}
    first = fp.compress(model, batches, batches, sparsity=0.5, checkpoint_dir=tmp_path, **options)
    again = fp.compress(model, batches, batches, sparsity=0.5, checkpoint_dir=tmp_path, **options)
    assert again.history == first.history
    with pytest.raises(ValueError, match="criterion"):
        fp.compress(
            model,
            batches,
            batches,
            sparsity=0.5,
            checkpoint_dir=tmp_path,
            **{**options, "criterion": "loss_delta"},
        )


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(5)),
        nn.MultiMarginLoss(),
    ],
)
def test_other_losses_have_no_predictions(loss_fn):
    with pytest.raises(ValueError, match="`loss_fn` must be cross-entropy"):
        score(mlp(), classification_batches(), fp.Unit(), loss_fn=loss_fn)


def test_what_is_no_kind_of_target_is_refused():
    with pytest.raises(ValueError, match="`targets` must be 'labels' or 'predictions', got 'logits'"):
        fp.criteria.LossDelta(targets="logits")
    with pytest.raises(TypeError, match=r"fp\.score"):
        fp.criteria.LossDelta().means(None)
