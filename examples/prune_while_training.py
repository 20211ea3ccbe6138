"""Pruning while a model trains: at once, gradually, and with regrowth, at the same sparsity.

Run: python examples/prune_while_training.py

Each run starts from the same trained network, trains it for the same number of steps while the weakest single
weights, or blocks of 4x4, go, and prints the accuracy on test digits.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import Data, load_digits_data, train

EPOCHS = 10


def train_pruned(
    model: nn.Module, data: Data, schedule: fp.Schedule, granularity: fp.Granularity, regrowth: fp.RigL | None
) -> fp.Pruner:
    """Train a model while it is pruned; return what pruned it."""
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = fp.Pruner(
        model,
        schedule=schedule,
        granularity=granularity,
        floor=fp.Floor(max_sparsity=0.98),
        regrowth=regrowth,
        optimizer=optimizer,
    )
    model.train()
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            pruner.step()
    return pruner


def main() -> None:
    torch.manual_seed(0)
    data = load_digits_data()
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    tests = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=1000)
    dense = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    train(dense, loader, epochs=15, progress=False)
    steps = EPOCHS * len(loader)
    last = steps // 2 // 10 * 10
    print(f"dense: accuracy {fp.evaluate(dense, tests)['accuracy']:.2%}; {steps} steps of training each")
    print(f"{'pieces':<24} {'sparsity':>8}  {'schedule':<24} {'accuracy':>8}")
    for granularity in (fp.Element(), fp.Block(4, 4)):
        for sparsity in (0.9, 0.95):
            runs = {
                "at once": (fp.OneShotSchedule(sparsity), None),
                "at once, RigL": (fp.OneShotSchedule(sparsity), fp.RigL(0.3, end=steps // 10 * 10, every=10)),
                "linear": (fp.LinearSchedule(sparsity, end=last, every=10), None),
                "exponential": (fp.ExponentialSchedule(sparsity, end=last, every=10), None),
                "cubic": (fp.CubicSchedule(sparsity, end=last, every=10), None),
            }
            for name, (schedule, regrowth) in runs.items():
                model = copy.deepcopy(dense)
                pruner = train_pruned(model, data, schedule, granularity, regrowth)
                accuracy = fp.evaluate(model, tests)["accuracy"]
                print(f"{granularity!s:<24} {pruner.sparsity():>8.1%}  {name:<24} {accuracy:>8.2%}")


if __name__ == "__main__":
    main()
