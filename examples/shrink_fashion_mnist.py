"""Fashion-MNIST: a VGG-style and a ResNet-18-style network lose half of their channels in one call.

Run: OMP_NUM_THREADS=2 python examples/shrink_fashion_mnist.py --data-dir FOLDER [--checkpoint-dir FOLDER]

The networks, the data, the splits and the training are those of fashion_mnist.py; with its --checkpoint-dir
the dense networks are not trained again. `fp.compress(structure="units")` scores all filters and neurons by
exact loss deltas against the network's own predictions, those that a residual sum ties by one joint mask,
takes the same share of each layer, and cuts them out: what is left is a smaller network of plain layers, the
widths of which are multiples of 8. Needs `pip install 'fastprune[structured]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import fashion_mnist
import fastprune as fp
from fashion_mnist import BATCH_SIZES, NETWORKS, Loaders, Recipe
from fastprune.demo import load_idx_data

ROUND_TO = 8


def recipe_for(sparsity: float) -> Recipe:
    """Return the recipe of fashion_mnist.py with one long round, and more samples for the fewer pieces."""
    return Recipe(sparsity=sparsity, rounds=1, round_epochs=2, round_images=40_000, scored_images=128)


def compress(
    name: str, dense: nn.Module, loaders: Loaders, recipe: Recipe, folder: Path | None
) -> fp.CompressionResult:
    """Cut units out of a network."""
    images = loaders.validation.dataset.tensors[0]  # type: ignore[attr-defined]
    result = fp.compress(
        dense,
        loaders.rounds,
        loaders.validation,
        structure="units",
        round_to=ROUND_TO,
        sparsity=recipe.sparsity,
        rounds=recipe.rounds,
        epochs=recipe.round_epochs,
        criterion=fp.criteria.LossDelta(targets="predictions"),
        scope="layer",
        temperature=recipe.temperature,
        hard_label_weight=recipe.hard_label_weight,
        optimizer=recipe.optimizer,
        distillation={"scheduler": recipe.scheduler, "scheduler_interval": "step"},
        example_inputs=[images[:size] for size in BATCH_SIZES],
        fold_batch_norm=True,
        max_samples=recipe.scored_images,
        checkpoint_dir=None if folder is None else folder / f"{name}-units-{recipe.key(name)}",
        seed=recipe.seed,
        progress=sys.stderr.isatty(),
    )
    rounds = ", ".join(
        f"{entry['accuracy']:.2%} at {entry['sparsity']:.1%} ({entry['seconds']:.0f} s)"
        for entry in result.history
    )
    print(f"{name}: validation {result.dense_accuracy:.2%} dense, then {rounds}", flush=True)
    return result


def channels(model: nn.Module) -> int:
    """Return how many units the layers of a network have in front of its last."""
    return sum(
        module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name != "last"
    )


def main() -> None:
    """Train, compress and measure each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of the IDX files")
    parser.add_argument("--checkpoint-dir", type=Path, help="where finished work is kept and looked for")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of each layer's units that goes")
    arguments = parser.parse_args()
    recipe = recipe_for(arguments.sparsity)
    loaders = fashion_mnist.make_loaders(load_idx_data(arguments.data_dir), recipe)
    for name in arguments.networks:
        dense = fashion_mnist.trained_network(name, loaders, recipe, arguments.checkpoint_dir)
        small = compress(name, dense, loaders, recipe, arguments.checkpoint_dir).model
        figures = fashion_mnist.measure(dense, [small], loaders.test)
        # What was cut out is no zero that could be counted.
        figures[1] = figures[1]._replace(pruning_rate=1 - figures[1].parameters / figures[0].parameters)
        threads = f"{torch.get_num_threads()} threads, {fp.cpu_isa()}, torch {torch.__version__}"
        print(f"\n{name}, {threads}\n{fashion_mnist.table(['units'], figures)}")
        print(f"{'units':<20}{channels(dense):>20,}{channels(small):>20,}\n", flush=True)


if __name__ == "__main__":
    main()
