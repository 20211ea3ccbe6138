"""The example of the largest sparsity: where its runs to each percentage end, and all of it on small data."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastprune as fp
from fastprune.demo import Data

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import largest_sparsity

    return largest_sparsity


def random_data():
    """Inputs of 64 whose class is the one of the first ten that is large."""
    labels = torch.arange(200) % 10
    inputs = torch.rand(200, 64)
    inputs[torch.arange(200), labels] += 1.0
    return Data(inputs[:150], labels[:150], inputs[150:], labels[150:])


@pytest.mark.parametrize(("edge", "expected"), [(0.07, 8), (0.02, 2), (1.0, None)])
def test_every_second_percentage_is_run_to_until_the_first_that_is_not_accurate_enough(
    example, monkeypatch, edge, expected
):
    tried = []

    def compress(*arguments, sparsity, rounds, **options):
        tried.append(sparsity)
        return SimpleNamespace(history=[{}] * (rounds if sparsity < edge else rounds - 1))

    monkeypatch.setattr(fp, "compress", compress)
    assert example.first_failure(None, None, None, fp.Block(16, 16)) == expected
    assert tried == [percent / 100 for percent in range(2, (expected or 98) + 1, 2)]


def test_the_whole_example_prints_what_the_search_and_the_runs_found(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "load_digits_data", random_data)
    monkeypatch.setattr(example, "STEP", 30)
    monkeypatch.setattr(example, "OPTIONS", {**example.OPTIONS, "epochs": 1, "max_samples": 32})
    monkeypatch.setattr(sys, "argv", ["largest_sparsity.py", "--seeds", "1"])
    compress, calls = fp.compress, []

    def recorded(*arguments, **options):
        calls.append((options, compress(*arguments, **options)))
        return calls[-1][1]

    monkeypatch.setattr(fp, "compress", recorded)
    example.main()
    (searched, found), *runs = calls
    assert searched["target"] == "auto"
    assert found.dense_accuracy > 0.5
    holds = [len(result.history) == 2 for _, result in runs]
    assert [options["sparsity"] for options, _ in runs] == [0.3, 0.6, 0.9][: len(runs)]
    assert all(holds[:-1])
    heads, row = capsys.readouterr().out.splitlines()
    assert heads.split()[:5] == ["seed", "dense", "runs", "found", "accuracy"]
    seed, dense, probes, target, accuracy, *edge = row.split()
    assert (seed, dense, int(probes)) == ("0", f"{found.dense_accuracy:.2%}", len(found.probes))
    last = found.history[-1] if found.history else {"target_sparsity": 0.0, "accuracy": found.dense_accuracy}
    assert (target, accuracy) == (f"{last['target_sparsity']:.2%}", f"{last['accuracy']:.2%}")
    assert edge == (["all"] if holds[-1] else ["up", "to", f"{30 * (len(runs) - 1)}", "%"])
