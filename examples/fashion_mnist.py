"""Fashion-MNIST: a VGG-style and a ResNet-18-style network, each compressed by one call of `fp.compress`.

Run: OMP_NUM_THREADS=2 python examples/fashion_mnist.py --data-dir FOLDER [--checkpoint-dir FOLDER]

The folder of the data holds four IDX files, as Debian's package dataset-fashion-mnist has them. Each
network is trained here, then loses 90 % of the 16x16 blocks of all its Linear and Conv2d layers together,
but for the first and the last layer: by exact loss deltas, and by magnitude and Taylor scores with the same
rounds, epochs, images and seeds.

55,000 of the 60,000 training images train. The other 5,000 are what `compress` validates on; the test
images are read once, at the end, for the accuracies of the table. Latencies are medians of one interleaved
run in eval mode, batch norms folded on both sides; the dense network counts with the faster of both memory
formats.

With --checkpoint-dir the trained networks and the rounds of `compress` are kept: an interrupted run goes
on, and a finished one only evaluates and measures again. What is kept was converted for the machine, and
with the number of threads, of the run that made it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fastprune as fp
from fashion_networks import ResNet18, Vgg
from fastprune.batches import Batch
from fastprune.demo import Data, load_idx_data, train
from fastprune.metrics import count_flops, count_parameters
from fastprune.timing import interleaved_medians

NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG": Vgg, "ResNet-18": ResNet18}
# Exact loss deltas against the dense network's predictions, and against the labels; and cheaper stand-ins.
CRITERIA: dict[str, Any] = {
    "predictions": fp.criteria.LossDelta(targets="predictions"),
    "loss_delta": "loss_delta",
    "magnitude": "magnitude",
    "taylor": "taylor",
}
NOT_PRUNED = ("first", "last")
BATCH_SIZES = (1, 32)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How networks are trained and compressed; images of a round are drawn anew in each epoch."""

    train_images: int = 55_000
    batch_size: int = 128
    dense_epochs: int = 2
    sparsity: float = 0.9
    max_layer_sparsity: float = 0.97
    rounds: int = 3
    round_epochs: int = 1
    round_images: int = 20_000
    scored_images: int = 64
    temperature: float = 4.0
    hard_label_weight: float = 0.3
    learning_rate: float = 2e-3
    seed: int = 0

    def key(self, network: str, *fields: str) -> str:
        """Return a short name for these fields, or all, so that no file of other settings is taken for it."""
        values = dataclasses.asdict(self)
        text = json.dumps([network, {field: values[field] for field in fields or sorted(values)}])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """From the learning rate to zero within the epochs of a round."""
        steps = self.round_epochs * -(-self.round_images // self.batch_size)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


class Loaders(NamedTuple):
    """All that is read; images are ``[1, height, width]`` with mean 0 and standard deviation 1."""

    train: DataLoader
    rounds: DataLoader
    validation: DataLoader
    test: DataLoader


class Figures(NamedTuple):
    """One column of the table; latencies in seconds and speed-ups for each of ``BATCH_SIZES``."""

    accuracy: float
    pruning_rate: float
    parameters: int
    flops: int
    latencies: list[float]
    speedups: list[float]


def make_loaders(data: Data, recipe: Recipe) -> Loaders:
    """Split the training images, and bring all to the mean and deviation of those that train."""
    height = round(data.train_inputs.shape[1] ** 0.5)
    mean, deviation = data.train_inputs.mean(), data.train_inputs.std()

    def images(inputs: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset(((inputs - mean) / deviation).reshape(-1, 1, height, height), labels)

    order = torch.randperm(
        len(data.train_labels), generator=torch.Generator().manual_seed(recipe.seed)
    ).split([recipe.train_images, len(data.train_labels) - recipe.train_images])
    training, validation = (images(data.train_inputs[part], data.train_labels[part]) for part in order)
    sampler = RandomSampler(training, num_samples=recipe.round_images)
    return Loaders(
        DataLoader(training, batch_size=recipe.batch_size, shuffle=True),
        DataLoader(training, batch_size=recipe.batch_size, sampler=sampler),
        DataLoader(validation, batch_size=500),
        DataLoader(images(data.test_inputs, data.test_labels), batch_size=500),
    )


def trained_network(name: str, loaders: Loaders, recipe: Recipe, folder: Path | None) -> nn.Module:
    """Return a trained network, from a file of an earlier run where there is one."""
    torch.manual_seed(recipe.seed)
    model = NETWORKS[name]().to(memory_format=torch.channels_last)  # trains faster so on most CPUs
    key = recipe.key(name, "train_images", "batch_size", "dense_epochs", "seed")
    path = None if folder is None else folder / f"{name}-{key}.safetensors"
    if path is not None and path.exists():
        return fp.load(path, model).eval()
    start = time.perf_counter()
    train(model, loaders.train, recipe.dense_epochs, progress=sys.stderr.isatty())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fp.save(model, path)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    return model


def compress(
    name: str, dense: nn.Module, criterion: str, loaders: Loaders, recipe: Recipe, folder: Path | None
) -> fp.CompressionResult:
    """Compress a network by one criterion."""
    images = loaders.validation.dataset.tensors[0]  # type: ignore[attr-defined]
    result = fp.compress(
        dense,
        loaders.rounds,
        loaders.validation,
        sparsity=recipe.sparsity,
        rounds=recipe.rounds,
        epochs=recipe.round_epochs,
        granularity=fp.Block(16, 16),
        criterion=CRITERIA[criterion],
        exclude=NOT_PRUNED,
        floor=fp.Floor(max_sparsity=recipe.max_layer_sparsity),
        temperature=recipe.temperature,
        hard_label_weight=recipe.hard_label_weight,
        optimizer=recipe.optimizer,
        distillation={"scheduler": recipe.scheduler, "scheduler_interval": "step"},
        example_inputs=[images[:size] for size in BATCH_SIZES],
        fold_batch_norm=True,
        max_samples=recipe.scored_images,
        checkpoint_dir=None if folder is None else folder / f"{name}-{criterion}-{recipe.key(name)}",
        seed=recipe.seed,
        progress=sys.stderr.isatty(),
    )
    rounds = ", ".join(
        f"{entry['accuracy']:.2%} at {entry['sparsity']:.1%} ({entry['seconds']:.0f} s)"
        for entry in result.history
    )
    print(f"{name}, {criterion}: validation {result.dense_accuracy:.2%} dense, then {rounds}", flush=True)
    return result


def pruning_rate(model: nn.Module, names: Iterable[str]) -> float:
    """Return the share of zeros in the weights of some layers, dense or block-sparse."""
    weights = [model.get_submodule(name).weight for name in names]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def measure(dense: nn.Module, models: Sequence[nn.Module], test: DataLoader) -> list[Figures]:
    """Return the figures of the dense network, batch norms folded, and of the compressed ones."""
    images = test.dataset.tensors[0]  # type: ignore[attr-defined]
    names = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in NOT_PRUNED
    ]
    forms = [
        fuse(copy.deepcopy(dense).eval()).to(memory_format=memory_format)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    latencies = []
    for size in BATCH_SIZES:
        calls = [lambda model=model, batch=images[:size]: model(batch) for model in (*forms, *models)]
        seconds = interleaved_medians(calls, repeats=25, minimum_seconds=5e-3, maximum_seconds=10.0)
        latencies.append([min(seconds[: len(forms)]), *seconds[len(forms) :]])
    return [
        Figures(
            fp.evaluate(model, test)["accuracy"],
            pruning_rate(model, names),
            count_parameters(model),
            count_flops(model, Batch((images[:1],), {}, None, 1)),
            [seconds[index] for seconds in latencies],
            [seconds[0] / seconds[index] for seconds in latencies],
        )
        for index, model in enumerate((forms[0], *models))
    ]


def table(criteria: Sequence[str], figures: Sequence[Figures]) -> str:
    """One column for the dense network, one for each criterion."""
    rows = {
        "": ["dense", *criteria],
        "test accuracy": [f"{entry.accuracy:.2%}" for entry in figures],
        "pruning rate": ["-", *(f"{entry.pruning_rate:.1%}" for entry in figures[1:])],
        "parameters": [f"{entry.parameters:,}" for entry in figures],
        "FLOPs, one image": [f"{entry.flops:,}" for entry in figures],
    }
    for index, size in enumerate(BATCH_SIZES):
        rows[f"latency, batch {size}"] = [
            f"{entry.latencies[index] * 1e3:.2f} ms" + (f" ({entry.speedups[index]:.2f}x)" if column else "")
            for column, entry in enumerate(figures)
        ]
    return "\n".join(
        f"{name:<20}" + "".join(f"{value:>20}" for value in values) for name, values in rows.items()
    )


def main() -> None:
    """Train, compress and measure each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of the IDX files")
    parser.add_argument("--checkpoint-dir", type=Path, help="where finished work is kept and looked for")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    arguments = parser.parse_args()
    recipe = Recipe()
    loaders = make_loaders(load_idx_data(arguments.data_dir), recipe)
    for name in arguments.networks:
        dense = trained_network(name, loaders, recipe, arguments.checkpoint_dir)
        models = [
            compress(name, dense, criterion, loaders, recipe, arguments.checkpoint_dir).model
            for criterion in arguments.criteria
        ]
        figures = measure(dense, models, loaders.test)
        threads = f"{torch.get_num_threads()} threads, {fp.cpu_isa()}, torch {torch.__version__}"
        print(f"\n{name}, {threads}\n{table(arguments.criteria, figures)}\n", flush=True)


if __name__ == "__main__":
    main()
