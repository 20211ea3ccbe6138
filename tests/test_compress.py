"""compress: rounds on a copy, reproducible, resumable at any instant, and stopped in time."""

from __future__ import annotations

import copy
import importlib
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from compression import BLOCK, OPTIONS, assert_same_bits, task
from helpers import Snapshot, mlp
from networks import SmallConvNet, TwoInputs

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")

run_module = importlib.import_module("fastprune.compression_run")


def test_a_copy_is_compressed_and_the_model_and_the_generators_are_left_alone():
    model, train, val = task()
    model.train()
    model[0].eval()
    snapshot = Snapshot(model)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    result = fp.compress(model, train, val, **OPTIONS)
    snapshot.assert_unchanged()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert result.model is not model
    assert [module.training for module in result.model] == [module.training for module in model]
    originals = {tensor.data_ptr() for tensor in model.parameters()}
    assert originals.isdisjoint(tensor.data_ptr() for tensor in result.model.parameters())


def test_each_round_keeps_the_same_share_and_reports_what_it_did():
    model, train, val = task()
    result = fp.compress(model, train, val, **OPTIONS)
    assert [entry["round"] for entry in result.history] == [0, 1, 2]
    targets = [entry["target_sparsity"] for entry in result.history]
    assert targets == pytest.approx([1 - 0.4 ** (1 / 3), 1 - 0.4 ** (2 / 3), 0.6])
    for entry in result.history:
        assert entry["target_sparsity"] - 0.08 < entry["sparsity"] <= entry["target_sparsity"]
        assert set(entry["layers"]) == {"0", "3"}
        assert 0 <= entry["accuracy"] <= 1
        assert entry["loss"] > 0
        assert entry["train_loss"] > 0
    assert json.loads(json.dumps(result.history)) == result.history
    assert result.dense_accuracy == fp.evaluate(model, val)["accuracy"]
    last = fp.evaluate(result.model, val)
    assert last["accuracy"] == result.history[-1]["accuracy"]
    assert last["loss"] == pytest.approx(result.history[-1]["loss"], rel=1e-4)


def test_the_result_holds_block_sparse_layers_of_the_sparsity_asked_for():
    model, train, val = task()
    result = fp.compress(model, train, val, **OPTIONS)
    converted = [module for module in result.model if isinstance(module, fp.BlockSparseLinear)]
    assert len(converted) == 2
    zeros = sum(int((layer.weight == 0).sum()) for layer in converted)
    assert zeros / (12 * 17 + 34) == pytest.approx(result.history[-1]["sparsity"], abs=1e-6)


def test_convolutions_are_converted_at_the_end_and_from_a_checkpoint(tmp_path):
    inputs = torch.randn(30, 3, 7, 5)
    loader = DataLoader(TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 0).long()), 10)
    options = {**OPTIONS, "granularity": fp.Block(2, 3), "checkpoint_dir": tmp_path, "rounds": 2}
    model = SmallConvNet()
    result = fp.compress(model, loader, loader, **options)
    for name in ("conv1", "conv2", "skip"):
        layer = result.model.get_submodule(name)
        assert isinstance(layer, fp.BlockSparseConv2d), name
        zeros = float((layer.weight == 0).float().mean())
        assert zeros == pytest.approx(result.history[-1]["layers"][name], abs=1e-6)
    assert type(result.model.depthwise) is nn.Conv2d
    assert fp.evaluate(result.model, loader)["loss"] == pytest.approx(result.history[-1]["loss"], rel=1e-4)
    again = fp.compress(model, loader, loader, **options)
    assert again.history == result.history
    assert_same_bits(again.model, result.model)


CRITERIA = ("gradient", "gradient_change", "taylor", "fisher", "activation", "wanda", "random")


@pytest.mark.parametrize(
    ("granularity", "criterion"),
    [
        *(
            (granularity, name)
            for granularity in (fp.Unit(), fp.Element())
            for name in ("loss_delta", "magnitude")
        ),
        *((fp.Unit(), name) for name in CRITERIA),
    ],
)
def test_other_granularities_and_criteria_end_as_zeros(granularity, criterion):
    model, train, val = task()
    options = {**OPTIONS, "granularity": granularity, "criterion": criterion, "scope": "layer"}
    result = fp.compress(model, train, val, **options)
    layer = result.model[0]
    assert type(layer) is nn.Linear or (
        isinstance(granularity, fp.Element) and type(layer) is fp.BlockSparseLinear
    )
    share = float((layer.weight == 0).float().mean())
    assert share == pytest.approx(result.history[-1]["layers"]["0"], abs=1e-6)
    assert share > 0.5


class Columns(fp.Block):
    """Pieces of the user's own: they have no file format."""


@pytest.mark.parametrize(
    "criterion", [fp.criteria.Taylor(per_sample=True), fp.criteria.LossDelta("predictions")], ids=str
)
def test_pieces_and_criteria_of_the_users_own_are_compressed_and_resumed(criterion, tmp_path):
    model, train, val = task()

    options = {**OPTIONS, "granularity": Columns(17, 1), "criterion": criterion}
    first = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    again = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    assert_same_bits(again.model, first.model)
    assert not list(tmp_path.glob("*_scores.safetensors"))


def test_the_same_seed_gives_the_same_bits_and_another_gives_others():
    model, train, val = task()
    first = fp.compress(model, train, val, **OPTIONS)
    torch.rand(5)  # whatever the caller drew in between
    again = fp.compress(model, train, val, **OPTIONS)
    assert_same_bits(again.model, first.model)
    other = fp.compress(model, train, val, **OPTIONS, seed=1)
    assert not torch.equal(other.model[0].bias, first.model[0].bias)


def _accuracies(monkeypatch, values):
    """Make each evaluation find the next accuracy: that of the dense model first."""
    remaining = list(values)
    monkeypatch.setattr(
        run_module,
        "evaluate",
        lambda *args, **kwargs: {"accuracy": remaining.pop(0), "loss": 1.0},
    )


def test_the_round_before_the_accuracy_fell_too_low_is_returned(tmp_path, monkeypatch):
    model, train, val = task()
    with monkeypatch.context() as patch:
        _accuracies(patch, [0.9, 0.88])
        expected = fp.compress(
            model, train, val, sparsity=1 - 0.4 ** (1 / 3), rounds=1, granularity=BLOCK, progress=False
        )
    options = {**OPTIONS, "max_accuracy_drop": 0.05, "checkpoint_dir": tmp_path}
    for accuracies in ([0.9, 0.88, 0.8], []):  # the second time all is read
        with monkeypatch.context() as patch:
            _accuracies(patch, accuracies)
            result = fp.compress(model, train, val, **options)
        assert [entry["accuracy"] for entry in result.history] == [0.88]
        assert_same_bits(result.model, expected.model)


@pytest.mark.filterwarnings("error:fastprune")
def test_a_first_round_that_is_too_low_gives_the_dense_model_back(tmp_path, monkeypatch):
    model, train, val = task()
    options = {**OPTIONS, "max_accuracy_drop": 0.05, "checkpoint_dir": tmp_path}
    for accuracies in ([0.9, 0.1], []):
        with monkeypatch.context() as patch:
            _accuracies(patch, accuracies)
            result = fp.compress(model, train, val, **options)
        assert result.history == []
        assert_same_bits(result.model, model)
        assert result.model is not model


def test_a_drop_of_accuracy_needs_an_accuracy():
    loader = [(torch.randn(8, 12), torch.randn(8, 2))]
    options = {**OPTIONS, "hard_label_weight": 1.0, "loss_fn": nn.MSELoss()}
    model = task()[0]
    with pytest.raises(ValueError, match="`max_accuracy_drop` needs an accuracy"):
        fp.compress(model, loader, loader, **options, max_accuracy_drop=0.1)
    assert len(fp.compress(model, loader, loader, **options).history) == 3


def test_a_drop_that_is_just_allowed_goes_on(monkeypatch):
    model, train, val = task()
    _accuracies(monkeypatch, [0.75, 0.5, 0.8, 0.5])  # binary fractions: the drop is exact
    result = fp.compress(model, train, val, **OPTIONS, max_accuracy_drop=0.25)
    assert len(result.history) == 3


def test_scoring_and_distillation_of_each_round_have_seeds_of_their_own(monkeypatch):
    model, train, val = task()
    functions = {name: getattr(run_module, name) for name in ("score", "distill")}
    drawn = []
    for name in functions:

        def spy(*args, function=functions[name], **kwargs):
            drawn.append((torch.initial_seed(), random.random(), float(np.random.rand())))
            return function(*args, **kwargs)

        monkeypatch.setattr(run_module, name, spy)
    for _ in range(2):
        fp.compress(model, train, val, **OPTIONS)
    assert drawn[:6] == drawn[6:]
    for values in zip(*drawn[:6], strict=True):
        assert len(set(values)) == 6


def test_three_quarters_go_unless_something_else_is_asked_for():
    model, train, val = task()
    result = fp.compress(model, train, val, **{**OPTIONS, "rounds": 1, "sparsity": None})
    assert result.history[-1]["target_sparsity"] == 0.75


@pytest.mark.parametrize("teacher", ["original", "previous"])
def test_the_teacher_is_the_model_or_the_student_of_the_round_before(monkeypatch, teacher):
    model, train, val = task()
    seen = []
    distill = run_module.distill

    def spy(student, teacher, *args, **kwargs):
        seen.append((copy.deepcopy(teacher), student))
        result = distill(student, teacher, *args, **kwargs)
        seen[-1] += (copy.deepcopy(student),)
        return result

    monkeypatch.setattr(run_module, "distill", spy)
    fp.compress(model, train, val, **OPTIONS, teacher=teacher)
    x = torch.randn(5, 12)
    model.eval()
    for index, (used, student, _) in enumerate(seen):
        assert used is not student
        expected = model if teacher == "original" or index == 0 else seen[index - 1][2]
        assert torch.equal(used.eval()(x), expected.eval()(x))


def test_options_reach_scoring_and_distillation(monkeypatch):
    model, train, val = task()
    received = {}
    for name in ("score", "distill"):
        function = getattr(run_module, name)

        def spy(*args, name=name, function=function, **kwargs):
            received[name] = kwargs
            return function(*args, **kwargs)

        monkeypatch.setattr(run_module, name, spy)
    made = []

    def optimizer(parameters):
        made.append(1)
        return torch.optim.SGD(parameters, 0.1)

    fp.compress(
        model,
        train,
        val,
        **OPTIONS,
        epochs=2,
        temperature=5.0,
        hard_label_weight=0.25,
        max_samples=7,
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        output_transform=lambda output: output,
    )
    assert len(made) == 3
    assert received["score"]["max_samples"] == 7
    assert received["score"]["loss_fn"].label_smoothing == 0.1
    assert received["distill"]["epochs"] == 2
    assert received["distill"]["temperature"] == 5.0
    assert received["distill"]["hard_label_weight"] == 0.25


def test_keyword_inputs_and_dict_outputs_are_compressed():
    model = TwoInputs()
    batches = [
        {"left": torch.randn(6, 7), "right": torch.randn(6, 4), "labels": torch.randint(0, 5, (6,))}
        for _ in range(2)
    ]
    result = fp.compress(model, batches, batches, **OPTIONS)
    assert isinstance(result.model.left, fp.BlockSparseLinear)
    assert result.model(batches[0]["left"], batches[0]["right"])["logits"].shape == (6, 5)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("model", None, TypeError),
        ("train_loader", [], ValueError),
        ("train_loader", 3, TypeError),
        ("val_loader", [], ValueError),
        ("val_loader", [torch.randn(4, 12)], TypeError),
        ("sparsity", 1.0, ValueError),
        ("sparsity", -0.5, ValueError),
        ("sparsity", "high", ValueError),
        ("rounds", 0, ValueError),
        ("rounds", 2.5, ValueError),
        ("epochs", 0, ValueError),
        ("granularity", 16, TypeError),
        ("criterion", "l3", ValueError),
        ("scope", "everywhere", ValueError),
        ("teacher", "mine", ValueError),
        ("teacher", mlp(), ValueError),
        ("temperature", 0.0, ValueError),
        ("hard_label_weight", 2.0, ValueError),
        ("optimizer", torch.optim.SGD([torch.zeros(1)], 0.1), TypeError),
        ("optimizer", "adam", TypeError),
        ("distillation", 3, TypeError),
        ("distillation", {"epochs": 2}, ValueError),
        ("distillation", {"mode": "mutual"}, ValueError),
        ("distillation", {"features": fp.FeatureLoss({"0": "0"})}, TypeError),
        ("distillation", {"scheduler": StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 1)}, TypeError),
        ("loss_fn", "ce", TypeError),
        ("max_samples", 0, ValueError),
        ("max_accuracy_drop", -0.1, ValueError),
        ("example_inputs", 3, TypeError),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_is_unchanged(argument, value, error):
    model, train, val = task()
    snapshot = Snapshot(model)
    arguments = {"model": model, "train_loader": train, "val_loader": val, **OPTIONS, "rounds": 1}
    name = "loader" if argument.endswith("loader") else argument
    with pytest.raises(error, match=f"`{name}`"):
        fp.compress(**{**arguments, argument: value})
    snapshot.assert_unchanged()


def test_the_progress_bars_can_be_silenced(capsys):
    model, train, val = task()
    fp.compress(model, train, val, **OPTIONS)
    assert capsys.readouterr() == ("", "")
