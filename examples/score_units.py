"""Which hidden units matter? Exact loss deltas of 2,048 units of a small network, and what pruning costs.

Run: python examples/score_units.py
"""

from __future__ import annotations

import copy

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import load_digits_data, make_model, train


def main() -> None:
    torch.manual_seed(0)
    data = load_digits_data()
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    test_loader = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=360)
    model = make_model(64)
    train(model, loader, epochs=15, progress=False)

    calibration = [(data.train_inputs, data.train_labels)]  # one large batch: fewer suffixes to run
    scores = {
        criterion: fp.score(
            model, calibration, criterion=criterion, granularity=fp.Unit(), include=["0", "2"], progress=False
        )
        for criterion in ("loss_delta", "magnitude")
    }
    print(scores["loss_delta"])
    print(f"\n{'pruned':>8} {'by loss delta':>15} {'by magnitude':>15}   (test accuracy, no retraining)")
    for sparsity in (0.25, 0.5, 0.75, 0.9):
        accuracies = []
        for found in scores.values():
            pruned = fp.apply_masks_(copy.deepcopy(model), found.select(sparsity=sparsity))
            accuracies.append(fp.evaluate(pruned, test_loader)["accuracy"])
        print(f"{sparsity:>8.0%} {accuracies[0]:>15.2%} {accuracies[1]:>15.2%}")


if __name__ == "__main__":
    main()
