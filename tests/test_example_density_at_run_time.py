"""The example of several densities: what a step of its training adds up, and all of it on small data."""

from __future__ import annotations

import copy
import importlib
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import Data

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("density_at_run_time")


def random_data():
    """Inputs of 64 whose class is the one of the first ten that is large."""
    labels = torch.arange(200) % 10
    inputs = torch.rand(200, 64)
    inputs[torch.arange(200), labels] += 1.0
    return Data(inputs[:150], labels[:150], inputs[150:], labels[150:])


def test_a_step_adds_the_gradients_of_all_blocks_of_a_drawn_share_and_of_the_fewest(example):
    layer = fp.BlockSparseLinear.from_dense(nn.Linear(64, 48), (16, 16))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(48, 10))
    inputs, labels = torch.randn(17, 64), torch.arange(17) % 10
    dense = nn.Sequential(copy.deepcopy(layer).to_dense(), nn.ReLU(), copy.deepcopy(model[2])).double()
    squares = fp.Block(16, 16).sum_pieces(dense[0].weight.detach().square())
    for density in (1.0, random.Random(7).uniform(0.25, 1.0), 0.25):
        runs = torch.zeros(squares.numel(), dtype=torch.bool)
        runs[squares.flatten().argsort(descending=True)[: round(density * squares.numel())]] = True
        mask = fp.Block(16, 16).expand(runs.view(squares.shape), dense[0].weight.shape)
        hidden = F.linear(inputs.double(), dense[0].weight * mask, dense[0].bias)
        F.cross_entropy(dense[2](hidden.relu()), labels).backward()
    torch.optim.AdamW(dense.parameters(), lr=1e-3).step()

    random.seed(7)
    example.train_at_many_densities(model, DataLoader(TensorDataset(inputs, labels), batch_size=17), epochs=1)
    for index in (0, 2):
        for part in ("weight", "bias"):
            found, expected = getattr(model[index], part), getattr(dense[index], part)
            torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=2e-5)


def test_the_whole_example_prints_the_accuracy_of_each_share_of_the_blocks(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "load_digits_data", random_data)
    compare, set_density = fp.compare, fp.set_density
    calls, compared = [], []

    def recorded_density(model, density, scores=None):
        calls.append((density, scores))
        return set_density(model, density, scores)

    def recorded_compare(*arguments, **options):
        compared.append((calls[-1], compare(*arguments, **options)))
        return compared[-1][1]

    monkeypatch.setattr(fp, "set_density", recorded_density)
    monkeypatch.setattr(fp, "compare", recorded_compare)
    example.main()
    assert [density for (density, _), _ in compared] == 3 * [1.0, 0.75, 0.5, 0.35, 0.25]
    used = [scores for (_, scores), _ in compared]
    assert used[:5] == used[10:] == [None] * 5
    assert {name: tuple(used[5][name].shape) for name in used[5]} == {"0": (64, 4), "2": (64, 64)}
    columns = [
        [found.compressed.accuracy for _, found in compared[start : start + 5]] for start in (0, 5, 10)
    ]
    assert columns[0][0] == columns[1][0] > 0.5
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "blocks that run"
    assert [row.split() for row in rows] == [
        [share, *(f"{column[index]:.2%}" for column in columns), "2.00x"]
        for index, share in enumerate(("50.0%", "37.5%", "25.0%", "17.5%", "12.5%"))
    ]
