"""What counts as classes, and which of them are right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")


def accuracy(outputs, targets, loss_fn=None):
    """The accuracy of a model that gives these outputs, in batches."""
    model = nn.Linear(1, 1)
    model.forward = lambda index: outputs[int(index[0]) : int(index[0]) + len(index)]
    size = max(1, len(targets) // 3)
    loader = [
        (torch.arange(start, min(start + size, len(targets))), targets[start : start + size])
        for start in range(0, len(targets), size)
    ]
    return fp.evaluate(model, loader, loss_fn=loss_fn)["accuracy"]


def bce(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs.flatten(), targets.flatten().float())


@pytest.mark.parametrize("logit_shape", [(60,), (60, 1)])
@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool])
def test_a_single_logit_is_right_by_its_sign(logit_shape, dtype):
    torch.manual_seed(0)
    targets = torch.rand(60) < 0.4
    logits = torch.where(targets, 1.0, -1.0) * torch.rand(60)
    logits[:6] *= -1
    assert accuracy(logits.view(logit_shape), targets.to(dtype), bce) == pytest.approx(0.9)
    if len(logit_shape) == 2:
        assert accuracy(logits.view(logit_shape), targets.to(dtype).view(60, 1), bce) == pytest.approx(0.9)


def test_targets_of_a_regression_are_no_classes_even_where_a_batch_looks_like_some():
    outputs, targets = torch.rand(9, 1), torch.rand(9, 1) * 5
    targets[6:] = torch.tensor([[0.0], [1.0], [1.0]])  # the last batch
    assert math.isnan(accuracy(outputs, targets, F.mse_loss))
    assert math.isnan(accuracy(outputs.flatten(), targets.flatten(), F.mse_loss))
    loader = [(outputs[:6], targets[:6]), (outputs[6:], targets[6:])]
    with pytest.raises(ValueError, match="needs an accuracy"):
        fp.compress(
            nn.Linear(1, 1),
            loader,
            loader,
            sparsity=0.5,
            loss_fn=F.mse_loss,
            max_accuracy_drop=0.1,
            granularity=fp.Element(),
            criterion="magnitude",
            progress=False,
        )


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def test_classes_may_be_last_under_a_loss_of_ones_own():
    torch.manual_seed(0)
    outputs, targets = torch.randn(30, 5, 3), torch.randint(0, 3, (30, 5))
    expected = float((outputs.argmax(-1) == targets).double().mean())
    assert accuracy(outputs, targets, token_loss) == pytest.approx(expected)
    targets[:, 1] = -100
    expected = float((outputs.argmax(-1) == targets)[targets != -100].double().mean())
    assert accuracy(outputs, targets, token_loss) == pytest.approx(expected)
    square, targets = torch.randn(30, 4, 4), torch.randint(0, 4, (30, 4))
    assert math.isnan(accuracy(square, targets, token_loss))  # nothing says where the classes are
    expected = float((square.argmax(1) == targets).double().mean())
    assert accuracy(square, targets) == pytest.approx(expected)  # cross-entropy takes the second dimension


def test_images_of_classes_and_probabilities():
    torch.manual_seed(0)
    outputs, targets = torch.randn(12, 3, 4, 5), torch.randint(0, 3, (12, 4, 5))
    assert accuracy(outputs, targets) == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))
    logits, shares = torch.randn(12, 3), torch.rand(12, 3).softmax(1)
    expected = float((logits.argmax(1) == shares.argmax(1)).double().mean())
    assert accuracy(logits, shares) == pytest.approx(expected)


def test_distillation_counts_alike():
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    y = (x[:, 0] > 0).long()
    model, teacher = nn.Linear(6, 1), nn.Linear(6, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 50.0
        model.bias.zero_()
    history = fp.distill(
        model,
        teacher,
        [(x, y)],
        epochs=1,
        hard_label_weight=1.0,
        loss_fn=bce,
        optimizer=lambda p: torch.optim.SGD(p, 1e-6),
        progress=False,
    )
    assert history[0]["accuracy"] == 1.0


def test_example_inputs_may_hold_what_is_no_tensor():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, scale=None, inputs=None):
            return self.layer(inputs)

    x, y = torch.randn(8, 6), torch.randint(0, 2, (8,))
    loader = [{"scale": None, "inputs": x, "labels": y}]
    comparison = fp.compare(Keyword(), Keyword(), loader, example_inputs={"scale": None, "inputs": x[:5]})
    assert comparison.to_dict()["batch_size"] == 5
