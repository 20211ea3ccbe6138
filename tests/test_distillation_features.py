"""distill with hidden features: their part of the loss, projections, and what is left behind: nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler

import fastprune as fp
from distillation_steps import assert_same_weights, reference_steps, sgd
from helpers import Snapshot, classification_batches, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def test_features_of_equal_widths_add_their_weighted_error_to_the_loss():
    student, teacher, batches = mlp(), mlp(), classification_batches((6, 5, 4))
    double = copy.deepcopy(teacher).double()
    inputs = [batch[0].double() for batch in batches]
    steps = iter(inputs)

    def total(model, loss):
        x = next(steps)
        return loss + 3.0 * (model[:2](x) - double[:2](x).detach()).square().mean()

    expected = reference_steps(student, teacher, [[batch] for batch in batches], total)
    options = {"features": {"1": "1"}, "feature_weight": 3.0, "optimizer": sgd}
    fp.distill(student, teacher, batches, epochs=1, progress=False, **options)
    assert_same_weights(student, expected)


def test_labels_alone_with_features_run_the_teacher_for_its_features():
    teacher, student = mlp(7, 33), mlp(7, 9)
    loader = [(torch.randn(64, 7), torch.full((64,), -100)) for _ in range(4)]
    history = fp.distill(
        student,
        teacher,
        loader,
        epochs=20,
        hard_label_weight=1.0,
        features=[("1", "1")],
        optimizer=lambda p: torch.optim.Adam(p, 0.02),
        progress=False,
    )
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


@pytest.mark.parametrize("make", ["function", "optimizer", "named"])
def test_projections_train_in_the_optimizer_and_leave_it_and_the_models_at_the_end(make, monkeypatch):
    student, teacher, batches = mlp(7, 9), mlp(7, 33), classification_batches((6, 5))
    parameters = student.named_parameters() if make == "named" else student.parameters()
    optimizer = torch.optim.Adam([{"params": list(parameters)}], 0.01, weight_decay=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    structure = [[name for name, _ in model.named_modules()] for model in (student, teacher)]
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    projections = []
    make_projections = fp.FeatureLoss.make_projections

    def watched(self, *args):
        made = make_projections(self, *args)
        projections.extend((parameter, parameter.detach().clone()) for parameter in made)
        return made

    monkeypatch.setattr(fp.FeatureLoss, "make_projections", watched)
    fp.distill(
        student,
        teacher,
        batches,
        epochs=2,
        features={"1": "1"},
        optimizer=(lambda p: optimizer) if make == "function" else optimizer,
        scheduler=scheduler,
        progress=False,
    )
    assert [list(parameter.shape) for parameter, _ in projections] == [[33, 9], [33]]
    assert all(bool((parameter != before).all()) for parameter, before in projections)
    assert structure == [[name for name, _ in model.named_modules()] for model in (student, teacher)]
    assert len(optimizer.param_groups) == len(groups)
    for found, before in zip(optimizer.param_groups, groups, strict=True):
        assert [id(p) for p in found["params"]] == [id(p) for p in before["params"]]
        assert found.get("param_names") == before.get("param_names")
    assert set(optimizer.state) == set(student.parameters())
    optimizer.load_state_dict(optimizer.state_dict())


def test_the_projections_of_a_feature_loss_stay_there_and_go_on():
    student, teacher, batches = mlp(7, 9), mlp(7, 33), classification_batches((6, 5))
    loss = fp.FeatureLoss({"1": "1"})
    weights = []
    for _ in range(2):
        fp.distill(student, teacher, batches, epochs=1, features=loss, optimizer=sgd, progress=False)
        weights.append([parameter.detach().clone() for parameter in loss.parameters()])
    assert [list(weight.shape) for weight in weights[0]] == [[33, 9], [33]]
    assert all(bool((first != second).any()) for first, second in zip(*weights, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_interrupt_hooks_flags_gradients_wanted_and_the_optimizer_are_as_they_were(error):
    def loader():
        yield classification_batches((4,))[0]
        raise error

    student, teacher = mlp(7, 9).eval(), mlp(7, 33).train()
    teacher[2].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    snapshot = Snapshot(teacher)
    facts = Snapshot(student).facts
    with pytest.raises(error):
        fp.distill(
            student,
            teacher,
            loader(),
            epochs=1,
            features={"1": "1"},
            optimizer=optimizer,
            autocast_dtype=torch.bfloat16,
            progress=False,
        )
    snapshot.assert_unchanged()
    found = Snapshot(student).facts
    for key in ("modules", "hooks", "attributes"):
        assert found[key] == facts[key]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in student.parameters()]
    assert set(optimizer.state) == set(student.parameters())
    assert not torch.is_autocast_enabled("cpu")
