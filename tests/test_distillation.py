"""distill: the loss is the published one, the student learns, the teacher and the masks stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fastprune as fp
from fastprune.distillation_losses import distillation_loss
from fastprune.learners import make_optimizer
from helpers import Snapshot, classification_batches, masked_mlp, mlp
from networks import TwoInputs, WritesIntoInput

pytestmark = pytest.mark.usefixtures("one_thread")


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def test_a_teacher_with_another_number_of_classes_is_refused():
    for student, teacher in ((mlp(7, 9, 5), mlp(7, 9, 1)), (mlp(7, 9, 1), mlp(7, 9, 5))):
        loader = [(torch.randn(4, 7), torch.zeros(4, dtype=torch.long))]
        with pytest.raises(ValueError, match="`teacher` must give outputs of the student's shape"):
            fp.distill(student, teacher, loader, epochs=1, progress=False)


def test_a_student_learns_what_its_teacher_gives_from_no_label_at_all():
    teacher, student = mlp(7, 17), mlp(7, 17)
    loader = [(torch.randn(32, 7), torch.full((32,), -100)) for _ in range(4)]
    x = torch.randn(64, 7)
    before = F.mse_loss(student(x), teacher(x)).item()
    history = fp.distill(
        student,
        teacher,
        loader,
        epochs=15,
        hard_label_weight=0.0,
        progress=False,
        optimizer=lambda p: torch.optim.Adam(p, 0.02),
    )
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    assert F.mse_loss(student(x), teacher(x)).item() < 0.3 * before


@pytest.mark.parametrize("hard_label_weight", [0.0, 0.3, 1.0])
def test_each_step_takes_the_gradient_of_the_weighted_loss(hard_label_weight):
    student, teacher, batches = mlp(), mlp(), classification_batches((6, 3, 1))
    expected = copy.deepcopy(student)
    optimizer = sgd(expected.parameters())
    losses = []
    for x, y in batches:
        output = expected(x)
        hard = F.cross_entropy(output, y)
        soft = distillation_loss(output, teacher(x).detach(), 3.0)
        loss = hard_label_weight * hard + (1 - hard_label_weight) * soft
        losses.append(float(loss.detach()) * len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    history = fp.distill(
        student,
        teacher,
        batches,
        epochs=1,
        temperature=3.0,
        optimizer=sgd,
        progress=False,
        hard_label_weight=hard_label_weight,
    )
    for parameter, other in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)
    assert history[0]["loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_masked_weights_stay_exactly_zero():
    student, _ = masked_mlp(0.5)
    zeros = student[0].weight == 0
    assert 0.4 < float(zeros.float().mean()) < 0.6
    before = student[0].weight.detach().clone()
    loader = classification_batches((9, 4), (17,), 10)
    fp.distill(student, mlp(17, 33, 10), loader, epochs=2, progress=False)
    assert bool((student[0].weight[zeros] == 0).all())
    assert bool((student[0].weight[~zeros] != before[~zeros]).all())


def test_the_teacher_runs_in_eval_mode_and_is_left_as_it_was():
    teacher = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 5)).train()
    teacher[1].eval()
    modes = []
    teacher[2].register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    snapshot = Snapshot(teacher)
    fp.distill(mlp(), teacher, classification_batches((9, 4)), epochs=2, progress=False)
    snapshot.assert_unchanged()
    assert modes == [False] * 4


def test_the_student_trains_in_train_mode_and_its_flags_come_back():
    student = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)).eval()
    student[2].train()
    modes = []
    student[1].register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    fp.distill(student, mlp(), classification_batches((9, 4)), epochs=1, progress=False)
    assert modes == [True, True]
    assert [module.training for module in student] == [False, False, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_flags_come_back_after_an_interrupt(error):
    def loader():
        yield classification_batches((4,))[0]
        raise error

    student, teacher = mlp().eval(), mlp().train()
    snapshot = Snapshot(teacher)
    with pytest.raises(error):
        fp.distill(student, teacher, loader(), epochs=1, progress=False)
    snapshot.assert_unchanged()
    assert not any(module.training for module in student.modules())


def test_frozen_parameters_do_not_train():
    student = mlp()
    student[0].weight.requires_grad_(False)
    frozen = student[0].weight.detach().clone()
    fp.distill(student, mlp(), classification_batches((9, 4)), epochs=1, progress=False)
    assert torch.equal(student[0].weight, frozen)


def test_the_optimizer_may_be_made_given_or_left_out():
    model = mlp()
    given = torch.optim.SGD(model.parameters(), 0.1)
    assert make_optimizer(given, model) is given
    assert isinstance(make_optimizer(sgd, model), torch.optim.SGD)
    default = make_optimizer(None, model)
    assert isinstance(default, torch.optim.AdamW)
    assert default.param_groups[0]["lr"] == 1e-3
    for wrong in ("adam", 3, lambda parameters: None, lambda parameters: list(parameters)):
        with pytest.raises(TypeError, match="`optimizer` must be"):
            make_optimizer(wrong, model)


def test_the_state_of_a_given_optimizer_goes_on():
    student = mlp()
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    loader = classification_batches((4, 4))
    for epochs in (1, 2):
        fp.distill(student, mlp(), loader, epochs=epochs, optimizer=optimizer, progress=False)
    assert int(optimizer.state[student[0].weight]["step"]) == 6


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("student", None, TypeError),
        ("teacher", "model", TypeError),
        ("loader", [], ValueError),
        ("loader", 3, TypeError),
        ("loader", [torch.randn(4, 7)], TypeError),
        ("epochs", 0, ValueError),
        ("epochs", -1, ValueError),
        ("epochs", 1.5, ValueError),
        ("temperature", 0.0, ValueError),
        ("temperature", -2.0, ValueError),
        ("temperature", float("nan"), ValueError),
        ("hard_label_weight", -0.1, ValueError),
        ("hard_label_weight", 1.1, ValueError),
        ("hard_label_weight", float("nan"), ValueError),
        ("mode", "both", ValueError),
        ("optimizer", "adam", TypeError),
        ("loss_fn", "ce", TypeError),
    ],
)
def test_a_wrong_argument_is_named_and_the_student_is_unchanged(argument, value, error):
    arguments = {"student": mlp(), "teacher": mlp(), "loader": classification_batches((4,)), "epochs": 1}
    snapshots = [Snapshot(arguments[name]) for name in ("student", "teacher")]
    with pytest.raises(error, match=f"`{argument}`"):
        fp.distill(**{**arguments, argument: value}, progress=False)
    for snapshot in snapshots:
        snapshot.assert_unchanged()


def test_a_loss_that_explodes_is_reported():
    loader = classification_batches((4,)) * 30
    with pytest.raises(ValueError, match="became NaN or inf"):
        fp.distill(
            mlp(), mlp(), loader, epochs=3, progress=False, optimizer=lambda p: torch.optim.SGD(p, 1e30)
        )


def test_a_batch_without_a_single_label_teaches_through_the_teacher():
    student = mlp()
    batch = (torch.randn(4, 7), torch.full((4,), -100))
    history = fp.distill(student, mlp(), [batch], epochs=1, progress=False)
    assert history[0]["loss"] > 0
    assert history[0]["accuracy"] != history[0]["accuracy"]
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())


def test_a_student_that_writes_into_its_input_does_not_change_the_teachers():
    loader = [(torch.randn(4, 7), torch.zeros(4, dtype=torch.long))]
    inputs = loader[0][0].clone()
    seen = []
    teacher = mlp()
    teacher[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    fp.distill(WritesIntoInput(), teacher, loader, epochs=2, progress=False)
    assert all(torch.equal(x, inputs) for x in seen)
    assert len(seen) == 2
    fp.distill(mlp(), WritesIntoInput(), loader, epochs=1, progress=False)
    assert torch.equal(loader[0][0], inputs)


def test_every_kind_of_batch_and_loader_trains():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(7), torch.tensor(1)) for _ in range(5)])

    history = fp.distill(mlp(), mlp(), DataLoader(Stream(), 2), epochs=2, progress=False)
    assert len(history) == 2
    batch = {
        "left": torch.randn(4, 7),
        "right": torch.randn(4, 4),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    student = TwoInputs()
    before = student.left.weight.detach().clone()
    fp.distill(student, TwoInputs(), [batch], epochs=1, progress=False)
    assert not torch.equal(student.left.weight, before)
    binary = [(torch.randn(4, 7), torch.ones(4, 1))]
    history = fp.distill(
        mlp(7, 9, 1), mlp(7, 9, 1), binary, epochs=1, loss_fn=nn.BCEWithLogitsLoss(), progress=False
    )
    assert history[0]["loss"] > 0


def test_the_history_has_loss_accuracy_and_seconds_of_each_epoch():
    history = fp.distill(mlp(), mlp(), classification_batches((9, 4)), epochs=3, progress=False)
    assert len(history) == 3
    for entry in history:
        assert set(entry) == {"loss", "accuracy", "seconds"}
        assert 0 <= entry["accuracy"] <= 1
        assert entry["seconds"] > 0


def test_each_epoch_has_a_loss_and_an_accuracy_of_its_own():
    torch.manual_seed(2)
    student, teacher, batches = mlp(), mlp(), classification_batches((33, 15))
    again = copy.deepcopy(student)
    options = {"hard_label_weight": 1.0, "optimizer": lambda p: torch.optim.SGD(p, 1.0), "progress": False}
    together = fp.distill(student, teacher, batches, epochs=3, **options)
    alone = [fp.distill(again, teacher, batches, epochs=1, **options)[0] for _ in range(3)]
    assert len({entry["accuracy"] for entry in together}) > 1
    for entry, expected in zip(together, alone, strict=True):
        assert (entry["loss"], entry["accuracy"]) == (expected["loss"], expected["accuracy"])


def test_a_block_sparse_student_trains_and_keeps_its_structure():
    student, x = masked_mlp(0.5)
    fp.sparsify_(student, example_inputs=x, blocksize=(4, 4), policy="always")
    columns = student[0].col_indices.clone()
    values = student[0].packed_values.detach().clone()
    loader = classification_batches((9, 4), (17,), 10)
    fp.distill(student, mlp(17, 33, 10), loader, epochs=1, progress=False)
    assert torch.equal(student[0].col_indices, columns)
    assert not torch.equal(student[0].packed_values, values)
    student[0].block_sparse_weight.validate()


def test_the_progress_bar_can_be_silenced(capsys):
    fp.distill(mlp(), mlp(), classification_batches((4,)), epochs=1, progress=False)
    assert capsys.readouterr().err == ""
    fp.distill(mlp(), mlp(), classification_batches((4,)), epochs=1, progress=True)
    assert "distill 1/1" in capsys.readouterr().err
