"""compress with a checkpoint_dir: stopped at any instant, it goes on and ends with the same bits."""

from __future__ import annotations

import copy
import importlib
import json
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from compression import OPTIONS, assert_same_bits, assert_same_history, task
from helpers import Snapshot
from networks import SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")

run_module = importlib.import_module("fastprune.compression_run")
checkpoints_module = importlib.import_module("fastprune.checkpoints")


class _Stop(BaseException):
    """Stands for the kill that no handler sees."""


def _stop_at(monkeypatch, name, call):
    """Make the n-th call of a function of the module stop the run."""
    module = run_module if hasattr(run_module, name) else checkpoints_module
    function = getattr(module, name)
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise _Stop
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)
    return calls


@pytest.mark.parametrize("teacher", ["original", "previous"])
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("score", 1),
        ("score", 2),
        ("add_masks_", 3),
        ("distill", 2),
        ("evaluate", 3),  # the first is that of the dense model
        ("save", 1),
        ("save", 4),
        ("write_atomically", 2),  # the models are written, the round is not committed
        ("sparsify_", 1),
        ("measure_costs", 3),
    ],
)
def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, function, call, teacher):
    model, train, val = task()
    options = {**OPTIONS, "teacher": teacher}
    expected = fp.compress(model, train, val, **options)
    snapshot = Snapshot(model)
    with monkeypatch.context() as patch:
        _stop_at(patch, function, call)
        with pytest.raises(_Stop):
            fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    snapshot.assert_unchanged()
    state = tmp_path / "state.json"
    finished = len(json.loads(state.read_text())["history"]) if state.exists() else 0
    kept_scores = len(list(tmp_path.glob("round_*_scores.safetensors")))
    scored, distilled = (_stop_at(monkeypatch, name, None) for name in ("score", "distill"))
    result = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    assert len(scored) == 3 - kept_scores
    assert len(distilled) == 3 - finished
    assert_same_bits(result.model, expected.model)
    assert_same_history(result.history, expected.history)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_stopped_run_of_a_masked_conv_net_ends_with_the_same_bits(tmp_path, monkeypatch):
    model = SmallConvNet().to(memory_format=torch.channels_last)
    data = TensorDataset(torch.randn(12, 3, 7, 5), torch.randint(0, 5, (12,)))
    train, val = DataLoader(data, 6, shuffle=True), DataLoader(data, 6)
    options = {**OPTIONS, "rounds": 2, "granularity": fp.Block(4, 2), "criterion": "magnitude"}
    expected = fp.compress(model, train, val, **options)
    with monkeypatch.context() as patch:
        _stop_at(patch, "score", 2)
        with pytest.raises(_Stop):
            fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    result = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    assert_same_bits(result.model, expected.model)


@pytest.mark.parametrize("granularity", [fp.Block(4, 4), fp.Unit()], ids=str)
def test_with_more_options_of_distill_a_stopped_run_ends_with_the_same_bits(
    tmp_path, monkeypatch, granularity
):
    model, train, val = task()
    distillation = {
        "features": {"1": "1"},
        "accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "autocast_dtype": torch.bfloat16,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        "penalty": lambda student: 1e-3 * fp.l1_penalty(student),
        "after_step": lambda student: fp.max_norm_(student, 2.0),
        "soft_loss": "mse",
    }
    options = {**OPTIONS, "granularity": granularity, "distillation": distillation}
    expected = fp.compress(model, train, val, **options)
    with monkeypatch.context() as patch:
        _stop_at(patch, "distill", 2)
        with pytest.raises(_Stop):
            fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    result = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    assert_same_bits(result.model, expected.model)
    plain = fp.compress(model, train, val, **{**options, "distillation": None})
    assert plain.history[-1]["train_loss"] != expected.history[-1]["train_loss"]


@pytest.mark.parametrize("first", [None, {"max_grad_norm": 1.0}])
def test_a_directory_of_a_run_with_other_options_of_distill_is_refused(tmp_path, first):
    model, train, val = task()
    options = {**OPTIONS, "rounds": 1, "checkpoint_dir": tmp_path}
    fp.compress(model, train, val, **options, distillation=first)
    for other in ({"max_grad_norm": 2.0}, {"max_grad_norm": 1.0, "soft_loss": "mse"}, None if first else {}):
        if (other or None) == first:
            continue
        with pytest.raises(ValueError, match=r"other arguments \(distillation\)"):
            fp.compress(model, train, val, **options, distillation=other)
    fp.compress(model, train, val, **options, distillation=first)


def test_a_finished_run_is_read_and_not_repeated(tmp_path, monkeypatch):
    model, train, val = task()
    first = fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path / "new" / "run")
    calls = [_stop_at(monkeypatch, name, None) for name in ("score", "distill")]
    again = fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path / "new" / "run")
    assert calls == [[], []]
    assert_same_bits(again.model, first.model)
    assert again.history == first.history


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sparsity", 0.7),
        ("rounds", 4),
        ("epochs", 2),
        ("granularity", fp.Block(4, 2)),
        ("criterion", "magnitude"),
        ("include", ["0", "3"]),
        ("exclude", "3"),
        ("scope", "layer"),
        ("floor", fp.Floor(max_sparsity=0.9)),
        ("teacher", "previous"),
        ("temperature", 3.0),
        ("hard_label_weight", 0.1),
        ("loss_fn", nn.CrossEntropyLoss()),
        ("output_transform", torch.clone),
        ("optimizer", torch.optim.Adam),
        ("fold_batch_norm", True),
        ("max_samples", 10),
        ("max_accuracy_drop", 0.5),
        ("seed", 7),
    ],
)
def test_a_directory_of_a_run_with_other_arguments_is_refused(tmp_path, argument, value):
    model, train, val = task()
    options = {**OPTIONS, "rounds": 1}
    fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(
        ValueError, match=rf"`checkpoint_dir` holds a run with other arguments \({argument}\)"
    ):
        fp.compress(model, train, val, **{**options, argument: value}, checkpoint_dir=tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_scores_that_cannot_be_written_stop_the_run(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("no space is left")

    monkeypatch.setattr(importlib.import_module("fastprune.importance.scores_file"), "save_file", full)
    model, train, val = task()
    with pytest.raises(ValueError, match="no space is left"):
        fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path)


def test_a_directory_of_a_run_to_another_budget_is_refused(tmp_path):
    model, train, val = task()
    options = {**OPTIONS, "rounds": 1, "sparsity": None, "checkpoint_dir": tmp_path}
    fp.compress(model, train, val, **options, budget=fp.Budget(params=0.5))
    for budget in (fp.Budget(params=0.4), fp.Budget(flops=0.5)):
        with pytest.raises(ValueError, match=r"other arguments \(budget\)"):
            fp.compress(model, train, val, **options, budget=budget)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3}', '{"settings": {}, "history": []}'])
def test_a_damaged_state_is_refused(tmp_path, text):
    model, train, val = task()
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match="`checkpoint_dir` holds"):
        fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path)


def test_the_rounds_of_another_model_are_refused(tmp_path):
    model, train, val = task()
    fp.compress(model, train, val, **{**OPTIONS, "rounds": 1}, checkpoint_dir=tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"`checkpoint_dir` holds a run with other arguments \(model\)"):
        fp.compress(model, train, val, **{**OPTIONS, "rounds": 1}, checkpoint_dir=tmp_path)


def test_a_damaged_round_is_refused(tmp_path):
    model, train, val = task()
    fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path)
    other = nn.Sequential(nn.Linear(12, 19), nn.ReLU(), nn.Dropout(0.2), nn.Linear(19, 2))
    trained_on = copy.deepcopy(model)
    with torch.no_grad():
        trained_on[0].bias[3] += 1e-3
    for another in (other, trained_on):
        with pytest.raises(ValueError, match=r"`checkpoint_dir` holds a run with other arguments \(model\)"):
            fp.compress(another, train, val, **OPTIONS, checkpoint_dir=tmp_path)
    path = tmp_path / "round_002_compressed.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is no whole fastprune file"):
        fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path)
