"""compress with target="auto": the largest sparsity that is accurate enough, and below which all are."""

from __future__ import annotations

import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from compression import assert_same_bits, assert_same_history, digits, task
from fastprune.compression_search import probes

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")

run_module = importlib.import_module("fastprune.compression_run")
OPTIONS = {
    "granularity": fp.Element(),
    "progress": False,
    "target": "auto",
    "criterion": "magnitude",
    "rounds": 2,
}


def answer(holds, largest, tolerance):
    plan = probes(largest=largest, tolerance=tolerance)
    tried, sparsity = {}, next(plan)
    while True:
        assert sparsity not in tried
        tried[sparsity] = holds(sparsity)
        try:
            sparsity = plan.send(tried[sparsity])
        except StopIteration:
            return max((s for s, held in tried.items() if held), default=0.0), tried


@given(
    edge=st.floats(0.0, 1.0),
    largest=st.floats(0.05, 0.999),
    tolerance=st.sampled_from([0.002, 0.01, 0.1]),
)
def test_the_edge_is_found_within_the_tolerance(edge, largest, tolerance):
    found, tried = answer(lambda sparsity: sparsity < edge, largest, tolerance)
    assert min(edge, largest) - tolerance - 1e-3 <= found <= max(edge, 0.0)
    assert all(sparsity <= largest + 1e-4 for sparsity in tried)
    assert len(tried) <= 22


@given(holes=st.sets(st.integers(50, 99), max_size=12))
def test_all_that_was_tried_below_the_answer_holds(holes):
    found, tried = answer(lambda sparsity: int(sparsity * 100) not in holes, 0.99, 0.01)
    assert all(held for sparsity, held in tried.items() if sparsity <= found)


def _accuracy_of_sparsity(monkeypatch, accuracy):
    """Make accuracy a function of what is pruned."""

    def evaluate(model, loader, **options):
        zeros = sum(int((module.weight == 0).sum()) for module in model if isinstance(module, nn.Linear))
        total = sum(module.weight.numel() for module in model if isinstance(module, nn.Linear))
        return {"accuracy": accuracy(zeros / total), "loss": 1.0}

    monkeypatch.setattr(run_module, "evaluate", evaluate)


def test_the_largest_sparsity_that_holds_is_returned(tmp_path, monkeypatch):
    model, train, val = task()
    _accuracy_of_sparsity(monkeypatch, lambda sparsity: 0.9 if sparsity < 0.7 else 0.8)
    options = {**OPTIONS, "max_accuracy_drop": 0.05, "tolerance": 0.05, "checkpoint_dir": tmp_path}
    result = fp.compress(model, train, val, **options)
    assert [probe["sparsity"] for probe in result.probes] == [0.5, 0.75, 0.625, 0.6875, 0.7188]
    assert [probe["holds"] for probe in result.probes] == [True, False, True, True, False]
    assert [probe["accuracy"] for probe in result.probes] == [0.9, 0.8, 0.9, 0.9, 0.8]
    assert len(result.history) == 2
    assert result.history[-1]["target_sparsity"] == 0.6875
    assert result.dense_accuracy == 0.9
    given = fp.compress(
        model, train, val, **{**options, "target": None, "sparsity": 0.6875, "checkpoint_dir": None}
    )
    assert_same_bits(result.model, given.model)
    assert_same_history(result.history, given.history)
    assert json.loads(json.dumps(result.to_dict()))["probes"] == result.probes


def test_a_search_that_was_killed_goes_on_and_repeats_no_run(tmp_path, monkeypatch):
    model, train, val = task()
    _accuracy_of_sparsity(monkeypatch, lambda sparsity: 0.9 if sparsity < 0.7 else 0.8)
    options = {**OPTIONS, "max_accuracy_drop": 0.05, "tolerance": 0.05}
    expected = fp.compress(model, train, val, **options)
    distill, calls = run_module.distill, []

    def counted(*args, limit=5, **kwargs):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return distill(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "distill", counted)
        with pytest.raises(KeyboardInterrupt):
            fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
        result = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    assert len(calls) == 2 * 5 + 1
    assert result.probes == expected.probes
    assert_same_bits(result.model, expected.model)


def test_the_first_scores_are_made_once_for_all_runs(monkeypatch):
    model, train, val = task()
    _accuracy_of_sparsity(monkeypatch, lambda sparsity: 0.9 if sparsity < 0.7 else 0.8)
    score, calls = run_module.score, []
    monkeypatch.setattr(run_module, "score", lambda *args, **kw: calls.append(1) or score(*args, **kw))
    result = fp.compress(model, train, val, **OPTIONS, max_accuracy_drop=0.05, tolerance=0.05)
    assert len(calls) == 1 + len(result.probes)  # the second round of each run has its own


def test_all_that_is_allowed_is_tried_and_nothing_above(monkeypatch):
    model, train, val = task()
    _accuracy_of_sparsity(monkeypatch, lambda sparsity: 0.9)
    result = fp.compress(model, train, val, **OPTIONS, max_accuracy_drop=0.05, sparsity=0.8)
    assert [probe["sparsity"] for probe in result.probes] == [0.5, 0.75, 0.8]
    assert result.history[-1]["target_sparsity"] == 0.8
    options = {**OPTIONS, "rounds": 1, "max_accuracy_drop": 0.05, "tolerance": 0.3}
    result = fp.compress(model, train, val, **options)  # from 0.75 it is no further than the tolerance
    assert [probe["sparsity"] for probe in result.probes] == [0.5, 0.99]


def test_where_nothing_holds_the_dense_model_comes_back(monkeypatch):
    model, train, val = task()
    _accuracy_of_sparsity(monkeypatch, lambda sparsity: 0.9 if sparsity == 0 else 0.5)
    result = fp.compress(model, train, val, **OPTIONS, max_accuracy_drop=0.05, tolerance=0.3)
    assert result.history == []
    assert [probe["holds"] for probe in result.probes] == [False, False]
    assert result.model is not model
    assert_same_bits(result.model, model)


def test_the_digits_end_at_a_sparsity_that_holds_next_to_one_that_does_not():
    model, train, val = digits()
    options = {
        **OPTIONS,
        "granularity": fp.Block(8, 8),
        "criterion": "taylor",
        "epochs": 3,
        "tolerance": 0.05,
    }
    result = fp.compress(model, train, val, **options, max_accuracy_drop=0.02)
    held = [probe["sparsity"] for probe in result.probes if probe["holds"]]
    failed = [probe["sparsity"] for probe in result.probes if not probe["holds"]]
    assert held, result.probes
    assert failed, result.probes
    assert 0 < min(failed) - max(held) <= 0.05 + 1e-4
    assert result.history[-1]["target_sparsity"] == max(held)
    accuracy = fp.evaluate(result.model, val)["accuracy"]
    assert accuracy == result.history[-1]["accuracy"]
    assert result.dense_accuracy - accuracy <= 0.02
