"""Batches: every form that a loader may yield, and losses as sums over samples."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fastprune.batches import (
    Accuracy,
    Batch,
    Loss,
    count_batches,
    iterate_batches,
    keep_generators,
    model_device,
    read_batch,
    read_logits,
)

CPU = torch.device("cpu")
X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("raw", "args", "kwargs"),
    [
        ((X, Y), (X,), {}),
        ([X, Y], (X,), {}),
        (((X, 2 * X), Y), (X, 2 * X), {}),
        (([X, None, "text"], Y), (X, None, "text"), {}),
        (({"x": X, "flag": True}, Y), (), {"x": X, "flag": True}),
        ({"x": X, "labels": Y}, (), {"x": X}),
        (collections.UserDict({"x": X, "labels": Y}), (), {"x": X}),
    ],
)
def test_a_batch_is_read_from_every_form(raw, args, kwargs):
    batch = read_batch(raw)
    assert len(batch.args) == len(args)
    assert batch.kwargs.keys() == kwargs.keys()
    for got, expected in zip([*batch.args, *batch.kwargs.values()], [*args, *kwargs.values()], strict=True):
        assert got is expected if not isinstance(expected, torch.Tensor) else torch.equal(got, expected)
    assert batch.targets is Y
    assert batch.size == 4
    received = batch.call(lambda *args, **kwargs: (args, kwargs))
    assert received[1].keys() == kwargs.keys()


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (X, "a Tensor"),
        ((X,), "a tuple of length 1"),
        ((X, Y, Y), "a tuple of length 3"),
        ({"x": X}, r"a dict with the keys \['x'\]"),
        (None, "a NoneType"),
        (7, "a int"),
    ],
)
def test_what_is_no_batch_is_described(raw, found):
    with pytest.raises(TypeError, match=f"`loader` must yield .* got {found}"):
        read_batch(raw)


def test_head_cuts_every_tensor_that_has_samples_and_no_other():
    weight = torch.ones(7)
    batch = Batch((X, weight), {"mask": X > 3, "scale": torch.tensor(2.0)}, {"labels": Y, "text": "a"}, 4)
    cut = batch.head(3)
    assert cut.size == 3
    assert torch.equal(cut.args[0], X[:3])
    assert torch.equal(cut.args[1], weight)
    assert torch.equal(cut.kwargs["mask"], X[:3] > 3)
    assert cut.kwargs["scale"].dim() == 0
    assert torch.equal(cut.targets["labels"], Y[:3])
    assert cut.targets["text"] == "a"
    assert batch.head(4) is batch


def test_fresh_inputs_can_be_written_into_without_changing_the_batch():
    batch = Batch((X.clone(), 3), {"x": X.clone()}, Y, 4)
    copied = batch.fresh()
    copied.args[0].zero_()
    copied.kwargs["x"].zero_()
    assert torch.equal(batch.args[0], X)
    assert torch.equal(batch.kwargs["x"], X)
    assert copied.args[1] == 3
    assert copied.targets is Y


@pytest.mark.parametrize("max_samples", [0, -1, 2.0, "4"])
def test_max_samples_must_be_a_positive_integer(max_samples):
    with pytest.raises(ValueError, match="`max_samples` must be an integer of at least 1"):
        list(iterate_batches([(X, Y)], CPU, max_samples))


def test_batches_are_cut_at_max_samples_and_empty_ones_are_skipped():
    loader = [(X[:0], Y[:0]), (X, Y), (X, Y), (X, Y)]
    assert [batch.size for batch in iterate_batches(loader, CPU)] == [4, 4, 4]
    assert [batch.size for batch in iterate_batches(loader, CPU, 6)] == [4, 2]
    assert [batch.size for batch in iterate_batches(loader, CPU, 8)] == [4, 4]


def test_a_loader_may_not_know_its_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(X)

    assert count_batches([1, 2]) == 2
    assert count_batches(DataLoader(X, 3)) == 2
    assert count_batches(DataLoader(Stream(), 3)) is None
    assert count_batches(iter([1])) is None


def test_keep_generators_gives_them_back_also_after_an_error():
    before = torch.get_rng_state()

    def draw():
        with keep_generators():
            torch.rand(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_device_is_that_of_the_first_parameter_or_buffer():
    assert model_device(nn.Linear(2, 2, device="meta")).type == "meta"
    assert model_device(nn.BatchNorm1d(2, affine=False)).type == "cpu"
    assert model_device(nn.ReLU()).type == "cpu"


def test_logits_are_read_from_tensors_dicts_and_objects():
    output = collections.namedtuple("Output", "loss logits")(None, X)
    assert read_logits(X, None) is X
    assert read_logits({"logits": X}, None) is X
    assert read_logits(output, None) is X
    assert read_logits((X, Y), lambda pair: pair[1]) is Y
    for bad in ((X, Y), {"scores": X}, None, {"logits": 3}):
        with pytest.raises(TypeError, match="`output_transform`"):
            read_logits(bad, None)


def _mean(loss, batches):
    totals = [loss(logits, targets, len(logits)) for logits, targets in batches]
    return float(sum(values.sum() for values, _ in totals)) / sum(weight for _, weight in totals)


CLASS_WEIGHT = torch.tensor([0.1, 2.0, 1.0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 1},
        {"weight": CLASS_WEIGHT},
        {"label_smoothing": 0.3},
        {"weight": CLASS_WEIGHT, "label_smoothing": 0.1, "ignore_index": 2},
        {"reduction": "none"},
    ],
)
@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 5), (9, 3, 2, 2)], ids=["[N,C]", "[N,C,L]", "[N,C,H,W]"])
def test_cross_entropy_over_ragged_batches_is_that_of_the_whole(options, shape):
    logits, targets = torch.randn(shape), torch.randint(0, 3, (shape[0], *shape[2:]))
    targets[6:] = 1
    loss_fn = nn.CrossEntropyLoss(**options)
    whole = float(nn.CrossEntropyLoss(**{**options, "reduction": "mean"})(logits, targets))
    sizes = [6, 2, 1]
    batches = list(zip(logits.split(sizes), targets.split(sizes), strict=True))
    assert _mean(Loss(loss_fn), batches) == pytest.approx(whole, rel=1e-5)


def test_probabilities_as_targets_are_averaged_over_samples_and_positions():
    for shape in ((9, 3), (9, 3, 5)):
        logits, targets = torch.randn(shape), torch.rand(shape).softmax(1)
        batches = list(zip(logits.split([8, 1]), targets.split([8, 1]), strict=True))
        whole = float(F.cross_entropy(logits, targets))
        assert _mean(Loss(), batches) == pytest.approx(whole, rel=1e-5)


def test_a_mean_is_weighted_by_the_samples_of_its_batch():
    logits, targets = torch.randn(9, 2), torch.randn(9, 2)
    batches = list(zip(logits.split([8, 1]), targets.split([8, 1]), strict=True))
    whole = float(F.mse_loss(logits, targets))
    assert _mean(Loss(nn.MSELoss()), batches) == pytest.approx(whole, rel=1e-5)

    def per_sample(output, target):
        return F.mse_loss(output, target, reduction="none").mean(1)

    assert _mean(Loss(per_sample), batches) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (None, torch.tensor([0, -100, 2, 4])),
        (None, torch.tensor([1, 2, 3, 4], dtype=torch.int32)),
        (None, torch.full((4, 5), 0.2)),
        (nn.CrossEntropyLoss(ignore_index=2, weight=torch.arange(1.0, 6.0)), torch.tensor([0, 1, 2, 4])),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, -100, -100, -100])),
        (nn.MultiMarginLoss(), torch.tensor([0, 1, 2, 4])),
        (nn.MSELoss(), torch.randn(4, 5)),
        (lambda logits, targets: logits.mean(), torch.tensor([0, -100, -100, 4])),
    ],
)
def test_the_weight_of_a_batch_is_known_from_its_targets(loss_fn, targets):
    loss = Loss(loss_fn)
    _, weight = loss(torch.randn(4, 5), targets, 4)
    assert loss.weight(targets, 4) == weight > 0


def test_torch_cross_entropy_is_recognised_and_a_subclass_is_called():
    class Zero(nn.CrossEntropyLoss):
        def forward(self, input, target):
            return input.sum() * 0

    assert Loss(F.cross_entropy).is_plain_cross_entropy
    assert Loss(nn.CrossEntropyLoss()).is_plain_cross_entropy
    assert not Loss(nn.CrossEntropyLoss(label_smoothing=0.1)).is_plain_cross_entropy
    assert not Loss(Zero()).is_plain_cross_entropy
    values, _ = Loss(Zero())(torch.randn(4, 3), Y, 4)
    assert float(values.sum()) == 0.0


@pytest.mark.parametrize(
    "loss_fn",
    ["mse", 3, nn.CrossEntropyLoss, nn.CrossEntropyLoss(reduction="sum"), lambda output, targets: None],
)
def test_a_loss_that_cannot_be_used_is_refused(loss_fn):
    with pytest.raises((TypeError, ValueError), match="`loss_fn`"):
        Loss(loss_fn)(X, Y, 4)


@pytest.mark.parametrize(
    ("logits", "targets", "loss_fn", "expected"),
    [
        (torch.eye(4, 3), torch.tensor([0, 1, 0, 2]), None, (2, 4)),
        (torch.eye(4, 3), torch.tensor([0, 1, -100, -100]), None, (2, 2)),
        (torch.eye(4, 3), torch.tensor([0, 7, 7, 0]), nn.CrossEntropyLoss(ignore_index=7), (2, 2)),
        (torch.eye(3)[None].repeat(2, 1, 1), torch.tensor([[0, 1, 2], [0, 0, 0]]), None, (4, 6)),
        (-torch.eye(2, 3) * 5, torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]), None, (1, 2)),
        (torch.tensor([1.0, -1, 2]), torch.tensor([1.0, 0, 0]), nn.BCEWithLogitsLoss(), (2, 3)),
        (torch.tensor([[1.0, -1], [2, 3]]), torch.tensor([[1.0, 1], [1, 1]]), nn.BCEWithLogitsLoss(), (3, 4)),
        (torch.randn(3, 2), torch.randn(3, 2), nn.MSELoss(), (0, 0)),
        (torch.randn(3, 2), torch.randn(3), nn.MSELoss(), (0, 0)),
        (torch.randn(3, 2), {"labels": Y}, None, (0, 0)),
    ],
)
def test_accuracy_counts_classes_and_nothing_else(logits, targets, loss_fn, expected):
    accuracy = Accuracy()
    accuracy.add(logits, targets, Loss(loss_fn))
    assert (accuracy.correct, accuracy.counted) == expected
