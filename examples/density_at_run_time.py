"""One set of weights at several speeds: accuracy and latency of a digits network over the share that runs.

Run: python examples/density_at_run_time.py

An MLP is compressed to half of its blocks. Then `fp.set_density` runs fewer and fewer of these: the largest
by their weights; those that the exact loss deltas of the pruned network call the most important; and the
largest again after two epochs in which every step runs another share of the blocks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import load_digits_data, train

DENSITIES = (1.0, 0.75, 0.5, 0.35, 0.25)
BLOCK = fp.Block(16, 16)


def train_at_many_densities(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Train a converted model on the labels; each step runs all of its blocks, or a share drawn by chance.

    After Yu and Huang 2019, "Universally slimmable networks and improved training techniques", who draw
    widths.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad(set_to_none=True)
            for density in (1.0, random.uniform(DENSITIES[-1], 1.0), DENSITIES[-1]):
                fp.set_density(model, density)
                F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def table(
    model: nn.Module, dense: nn.Module, tests: DataLoader, scores: Mapping[str, Tensor] | None = None
) -> list[tuple[float, float, float]]:
    """Return density, accuracy, and the speed-up over the dense model at batch 256."""
    rows = []
    for density in DENSITIES:
        fp.set_density(model, density, scores)
        found = fp.compare(dense, model, tests, example_inputs=torch.randn(256, 64))
        rows.append((density, found.compressed.accuracy, found.speedup))
    return rows


def main() -> None:
    torch.manual_seed(0)
    random.seed(0)
    data = load_digits_data()
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    tests = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=1000)
    dense = nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    train(dense, loader, epochs=10, progress=False)
    options = {"granularity": BLOCK, "include": ["0", "2"], "rounds": 2, "progress": False}
    model = fp.compress(dense, loader, tests, sparsity=0.5, epochs=3, criterion="magnitude", **options).model
    # The converted model holds no dense weights to score; its zeros are those of the masks.
    twin = copy.deepcopy(dense)
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        twin.get_submodule(name).load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias})
    scores = fp.score(twin, loader, granularity=BLOCK, include=["0", "2"], progress=False)
    columns = {"by weight": table(model, dense, tests), "by loss delta": table(model, dense, tests, scores)}
    train_at_many_densities(model, loader, epochs=2)
    columns["trained so"] = table(model, dense, tests)
    print(f"{'blocks that run':<18}" + "".join(f"{name:>16}" for name in (*columns, "faster")))
    for index, density in enumerate(DENSITIES):
        cells = "".join(f"{rows[index][1]:>16.2%}" for rows in columns.values())
        print(f"{density * 0.5:<18.1%}{cells}{columns['trained so'][index][2]:>15.2f}x")


if __name__ == "__main__":
    main()
