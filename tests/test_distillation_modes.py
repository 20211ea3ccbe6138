"""distill with mode "mutual" and "self": who learns what from whom, and what is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from distillation_steps import assert_same_weights, divergence, sgd
from helpers import Snapshot, classification_batches, masked_mlp, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def test_in_mutual_mode_each_learns_from_the_predictions_that_the_other_made_before_the_step():
    student, teacher, batches = mlp(), mlp(7, 15), classification_batches((6, 3, 1))
    models = [copy.deepcopy(model).double() for model in (student, teacher)]
    optimizers = [
        torch.optim.SGD(models[0].parameters(), 0.1),
        torch.optim.Adam(models[1].parameters(), 0.01),
    ]
    sums = [0.0, 0.0]
    for x, y in batches:
        logits = [model(x.double()) for model in models]
        for index in (0, 1):
            own, other = logits[index], logits[1 - index]
            loss = 0.3 * F.cross_entropy(own, y) + 0.7 * divergence(own, other, 3.0)
            sums[index] += float(loss.detach()) * len(x)
            optimizers[index].zero_grad()
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    history = fp.distill(
        student,
        teacher,
        batches,
        epochs=1,
        mode="mutual",
        temperature=3.0,
        hard_label_weight=0.3,
        optimizer=sgd,
        teacher_optimizer=torch.optim.Adam(teacher.parameters(), 0.01),
        progress=False,
    )
    assert_same_weights(student, models[0])
    assert_same_weights(teacher, models[1])
    assert set(history[0]) == {"loss", "accuracy", "teacher_loss", "teacher_accuracy", "seconds"}
    assert history[0]["loss"] == pytest.approx(sums[0] / 10, rel=1e-5)
    assert history[0]["teacher_loss"] == pytest.approx(sums[1] / 10, rel=1e-5)


def test_both_accuracies_are_of_the_model_they_name():
    x = torch.randn(32, 7)
    student, teacher = mlp(), mlp()
    targets = teacher(x).argmax(1)
    history = fp.distill(
        student, teacher, [(x, targets)], epochs=1, mode="mutual", progress=False, optimizer=sgd
    )
    assert history[0]["teacher_accuracy"] == 1.0
    assert history[0]["accuracy"] < 1.0


def test_in_mutual_mode_both_train_in_train_mode_and_their_flags_come_back():
    models = [nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)).eval() for _ in range(2)]
    modes = []
    for model in models:
        model[2].train()
        model[1].register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    fp.distill(*models, classification_batches((9, 4)), epochs=1, mode="mutual", progress=False)
    assert modes == [True] * 4
    for model in models:
        assert [module.training for module in model] == [False, False, True]


@pytest.mark.parametrize("sparse", [False, True])
def test_in_mutual_mode_masked_weights_of_both_stay_zero(sparse):
    models = []
    for _ in range(2):
        model, x = masked_mlp(0.5)
        models.append(model)
    zeros = [model[0].weight == 0 for model in models]
    assert all(0.4 < float(mask.float().mean()) < 0.6 for mask in zeros)
    if sparse:
        fp.sparsify_(models[1], example_inputs=x, blocksize=(4, 4), policy="always")
        assert isinstance(models[1][0], fp.BlockSparseLinear)
    before = [model[0].weight.detach().clone() for model in models]
    loader = classification_batches((9, 4, 1), (17,), 10)
    fp.distill(*models, loader, epochs=2, mode="mutual", features={"1": "1"}, progress=False)
    for model, mask, old in zip(models, zeros, before, strict=True):
        assert bool((model[0].weight[mask] == 0).all())
        assert bool((model[0].weight[~mask] != old[~mask]).all())


def test_in_mutual_mode_features_pull_both_models():
    student, teacher, batches = mlp(7, 9), mlp(7, 9), classification_batches((6, 3))
    models = [copy.deepcopy(model).double() for model in (student, teacher)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for x, y in batches:
        hidden = [model[:2](x.double()) for model in models]
        for index, model in enumerate(models):
            loss = F.cross_entropy(model[2](hidden[index]), y)
            loss = loss + 0.5 * (hidden[index] - hidden[1 - index].detach()).square().mean()
            optimizers[index].zero_grad()
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    options = {"features": {"1": "1"}, "feature_weight": 0.5, "hard_label_weight": 1.0, "optimizer": sgd}
    fp.distill(student, teacher, batches, epochs=1, mode="mutual", progress=False, **options)
    assert_same_weights(student, models[0])
    assert_same_weights(teacher, models[1])


@pytest.mark.parametrize("mode", ["mutual", "self"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_flags_and_hooks_come_back_after_an_interrupt(mode, error):
    def loader():
        yield classification_batches((4,))[0]
        raise error

    student, teacher = mlp().eval(), mlp(7, 15).train()
    teacher[0].eval()
    frozen = Snapshot(teacher)
    for model in (student, teacher):
        model[0].weight.requires_grad_(False)
    snapshots = [Snapshot(model) for model in (student, teacher)]
    with pytest.raises(error):
        fp.distill(student, teacher, loader(), epochs=1, mode=mode, features={"1": "1"}, progress=False)
    for snapshot in snapshots:
        found, expected = snapshot._facts(), snapshot.facts
        for key in ("modules", "hooks", "attributes"):
            assert found[key] == expected[key]
        assert [row[:3] for row in found["tensors"]] == [row[:3] for row in expected["tensors"]]
    if mode == "self":
        assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in frozen.state.items())


def test_in_self_mode_the_student_of_a_round_is_the_teacher_of_the_next():
    student, batches = mlp(), classification_batches((6, 3, 1))
    expected = copy.deepcopy(student).double()
    for _ in range(3):
        teacher = copy.deepcopy(expected)
        optimizer = torch.optim.Adam(expected.parameters(), 0.01)
        for _ in range(2):
            for x, y in batches:
                logits = expected(x.double())
                loss = F.cross_entropy(logits, y) / 2 + divergence(logits, teacher(x.double()), 2.0) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    history = fp.distill(
        student,
        None,
        batches,
        epochs=2,
        rounds=3,
        mode="self",
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        progress=False,
    )
    assert_same_weights(student, expected)
    assert [entry["round"] for entry in history] == [0, 0, 1, 1, 2, 2]
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_in_self_mode_a_given_teacher_teaches_the_first_round_alone():
    student, teacher, batches = mlp(), mlp(7, 15), classification_batches((6, 3))
    calls = []
    teacher[0].register_forward_hook(lambda module, inputs, output: calls.append(module.training))
    snapshot = Snapshot(teacher)
    first = copy.deepcopy(student)
    fp.distill(first, teacher, batches, epochs=1, optimizer=sgd, progress=False)
    fp.distill(first, copy.deepcopy(first), batches, epochs=1, optimizer=sgd, progress=False)
    assert calls == [False] * 2
    fp.distill(student, teacher, batches, epochs=1, rounds=2, mode="self", optimizer=sgd, progress=False)
    assert calls == [False] * 4
    for found, other in zip(student.parameters(), first.parameters(), strict=True):
        assert torch.equal(found, other)
    snapshot.assert_unchanged()


def test_in_self_mode_a_masked_student_stays_masked():
    student, _ = masked_mlp(0.5)
    zeros = student[0].weight == 0
    assert 0.4 < float(zeros.float().mean()) < 0.6
    loader = classification_batches((9, 4), (17,), 10)
    fp.distill(student, None, loader, epochs=1, rounds=3, mode="self", features={"1": "1"}, progress=False)
    assert bool((student[0].weight[zeros] == 0).all())


def test_the_same_seed_gives_the_same_bits_in_every_mode():
    for mode in ("one_way", "mutual", "self"):
        results = []
        for _ in range(2):
            torch.manual_seed(3)
            student = nn.Sequential(nn.Linear(7, 9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, 5))
            teacher, batches = mlp(7, 15), classification_batches((9, 4))
            rounds = 2 if mode == "self" else 1
            options = {"features": {"2": "1"}, "rounds": rounds, "progress": False}
            if mode == "self":
                options["features"] = fp.FeatureLoss({"2": "2"})
                teacher = None
            history = fp.distill(student, teacher, batches, epochs=2, mode=mode, **options)
            results.append((student, [{**entry, "seconds": 0} for entry in history]))
        assert results[0][1] == results[1][1]
        for found, other in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
            assert torch.equal(found, other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "both"}, ValueError, "`mode` must be"),
        ({"teacher": None}, TypeError, "`teacher` must be"),
        ({"teacher": None, "mode": "mutual"}, TypeError, "`teacher` must be"),
        ({"teacher": "student"}, ValueError, "`teacher` must be another model"),
        ({"teacher": "student", "mode": "mutual"}, ValueError, "`teacher` must be another model"),
        ({"teacher": "shared", "mode": "mutual"}, ValueError, "`teacher` must share no trained parameter"),
        ({"teacher_optimizer": sgd}, ValueError, "`teacher_optimizer` must be None unless"),
        ({"mode": "mutual", "optimizer": "own"}, ValueError, "`teacher_optimizer` must be given"),
        (
            {"mode": "mutual", "teacher_optimizer": "own"},
            ValueError,
            "`teacher_optimizer` must hold parameters",
        ),
        ({"mode": "mutual", "teacher_optimizer": "adam"}, TypeError, "`teacher_optimizer` must be a torch"),
        ({"mode": "mutual", "teacher": "frozen"}, ValueError, "a model that learns must have parameters"),
        ({"mode": "mutual", "features": "loss"}, ValueError, "`features` must be pairs of names"),
        ({"rounds": 2}, ValueError, "`rounds` must be 1 unless"),
        ({"rounds": 0, "mode": "self"}, ValueError, "`rounds` must be an integer"),
        ({"rounds": 2, "mode": "self", "loader": iter([])}, TypeError, "`loader` is iterated several times"),
    ],
)
def test_a_wrong_argument_is_named_and_the_models_are_unchanged(arguments, error, message):
    student, other = mlp(), mlp()
    named = {
        "student": student,
        "shared": nn.Sequential(student[0], nn.ReLU(), nn.Linear(9, 5)),
        "frozen": mlp().requires_grad_(False),
        "own": torch.optim.SGD(student.parameters(), 0.1),
        "loss": fp.FeatureLoss({"1": "1"}),
    }
    options = {"teacher": other, "loader": classification_batches((4,)), "epochs": 1}
    options |= {
        key: named.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()
    }
    snapshots = [Snapshot(student), Snapshot(other)]
    with pytest.raises(error, match=message):
        fp.distill(student, **options, progress=False)
    for snapshot in snapshots:
        snapshot.assert_unchanged()
