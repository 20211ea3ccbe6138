"""What does exactness buy? Accuracy after pruning by every criterion, and its agreement with exact deltas.

Run: python examples/compare_criteria.py [--data-dir FOLDER] [--plot FILE]

"predictions" is the exact delta against what the network predicts, all others look at labels or weights.
One-shot: blocks of 8x8 are pruned at once, the lowest of the whole model, and nothing is trained
afterwards. The digits come with scikit-learn; --data-dir names the folder of Fashion-MNIST's IDX files.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import Data, load_digits_data, load_idx_data, train

SPARSITIES = (0.5, 0.75, 0.9)
CRITERIA = (
    "loss_delta", "|loss_delta|", "predictions", "taylor", "fisher", "gradient", "wanda", "magnitude",
    "random",
)  # fmt: skip
CALIBRATION_SAMPLES = 1000

Row = tuple[str, list[float], float]


def compare(data: Data, epochs: int) -> tuple[float, list[Row]]:
    """Return the dense accuracy, and each criterion's accuracies and rank correlation with exact deltas."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(data.train_inputs.shape[1], 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    train(model, loader, epochs=epochs, progress=False)
    tests = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=1000)
    calibration = [(data.train_inputs[:CALIBRATION_SAMPLES], data.train_labels[:CALIBRATION_SAMPLES])]
    exact, rows = None, []
    for criterion in CRITERIA:
        if exact is not None and criterion == "|loss_delta|":
            scores = exact.absolute()
        else:
            chosen = fp.criteria.LossDelta(targets="predictions") if criterion == "predictions" else criterion
            scores = fp.score(
                model, calibration, criterion=chosen, granularity=fp.Block(8, 8), progress=False
            )
        exact = scores if exact is None else exact
        accuracies = []
        for sparsity in SPARSITIES:
            masks = scores.select(sparsity=sparsity)
            accuracies.append(fp.evaluate(fp.apply_masks_(copy.deepcopy(model), masks), tests)["accuracy"])
        rows.append((criterion, accuracies, scores.correlation(exact).overall.spearman))
    return fp.evaluate(model, tests)["accuracy"], rows


def print_table(name: str, dense: float, rows: list[Row]) -> None:
    """Print one line for each criterion."""
    columns = " ".join(f"{f'{sparsity:.0%} pruned':>11}" for sparsity in SPARSITIES)
    print(f"\n{name}: dense accuracy {dense:.2%}\n{'criterion':<12} {columns} {'rank correlation':>17}")
    for criterion, accuracies, correlation in rows:
        cells = " ".join(f"{accuracy:>11.2%}" for accuracy in accuracies)
        print(f"{criterion:<12} {cells} {correlation:>17.3f}")


def draw(results: dict[str, tuple[float, list[Row]]], path: Path) -> None:
    """Draw accuracy over sparsity, one picture for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    for index, (name, (dense, rows)) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), index + 1)
        for criterion, accuracies, _ in rows:
            axes.plot([0, *SPARSITIES], [dense, *accuracies], marker="o", label=criterion)
        axes.set(xlabel="sparsity", ylabel="accuracy, not retrained", title=name)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Compare on the digits, and on Fashion-MNIST where its folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder of Fashion-MNIST's IDX files")
    parser.add_argument("--plot", type=Path, help="draw the accuracies into this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="fastprune: nothing is left")
    data_sets = {"digits": (load_digits_data(), 15)}
    if arguments.data_dir is not None:
        data_sets["Fashion-MNIST"] = (load_idx_data(arguments.data_dir), 5)
    results = {}
    for name, (data, epochs) in data_sets.items():
        results[name] = compare(data, epochs)
        print_table(name, *results[name])
    if arguments.plot is not None:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
