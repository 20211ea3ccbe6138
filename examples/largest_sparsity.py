"""How much of the digits' MLP can go within one percentage point: the search, held against every sparsity.

Run: OMP_NUM_THREADS=1 python examples/largest_sparsity.py [--seeds 1]

For each seed an MLP is trained, `compress(target="auto", max_accuracy_drop=0.01)` searches, and then every
second percentage is run to by itself until the first that is not accurate enough.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import load_digits_data, train

STEP = 2
OPTIONS: dict[str, Any] = {
    "rounds": 2,
    "epochs": 4,
    "max_accuracy_drop": 0.01,
    "max_samples": 512,
    "progress": False,
}


def first_failure(
    model: nn.Module, loader: DataLoader, tests: DataLoader, granularity: fp.Granularity
) -> int | None:
    """Return the first percentage that is not accurate enough, None where all are."""
    for percent in range(STEP, 100, STEP):
        result = fp.compress(model, loader, tests, sparsity=percent / 100, granularity=granularity, **OPTIONS)
        if len(result.history) < OPTIONS["rounds"]:
            return percent
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    seeds = parser.parse_args().seeds
    data = load_digits_data()
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    tests = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=1000)
    heads = "".join(f"{head:>10}" for head in ("seed", "dense", "runs", "found", "accuracy"))
    print(f"{heads}  every lower one holds")
    granularity = fp.Block(16, 16)
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )
        train(model, loader, epochs=30, progress=False)
        found = fp.compress(model, loader, tests, target="auto", granularity=granularity, **OPTIONS)
        failure = first_failure(model, loader, tests, granularity)
        target = found.history[-1]["target_sparsity"] if found.history else 0.0
        accuracy = found.history[-1]["accuracy"] if found.history else found.dense_accuracy
        edge = "all" if failure is None else f"up to {failure - STEP} %"
        cells = (f"{seed}", f"{found.dense_accuracy:.2%}", f"{len(found.probes)}", f"{target:.2%}")
        cells = "".join(f"{cell:>10}" for cell in (*cells, f"{accuracy:.2%}"))
        print(f"{cells}  {edge}", flush=True)


if __name__ == "__main__":
    main()
