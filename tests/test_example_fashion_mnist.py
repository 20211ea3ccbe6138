"""The Fashion-MNIST example, on a few dozen random images and narrow networks."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.demo import Data
from fastprune.modules import BlockSparseLayer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fastprune")]

WIDTHS = (16, 16, 32, 32)


@pytest.fixture
def example(monkeypatch, fake_medians):
    """The example with narrow networks; every masked layer is converted, and times are made up."""
    fake_medians(lambda functions, **options: [2.0, 1.0, 2.0, 1.0][: len(functions)])
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    module = importlib.import_module("fashion_mnist")
    for name, network in module.NETWORKS.items():
        monkeypatch.setitem(module.NETWORKS, name, functools.partial(network, WIDTHS))
    monkeypatch.setattr(
        module,
        "interleaved_medians",
        lambda functions, **options: [3.0, 2.0, *([1.0] * (len(functions) - 2))],
    )
    yield module
    del sys.modules["fashion_mnist"], sys.modules["fashion_networks"]


def random_data():
    """Images of 28x28 whose class is where they are bright."""
    labels = torch.arange(144) % 10
    images = torch.rand(144, 28, 28)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[2 * label : 2 * label + 4] += 1.0
    inputs = images.flatten(1) / 2
    return Data(inputs[:112], labels[:112], inputs[112:], labels[112:])


def run(example, name, criterion, folder=None):
    """Return the dense and the compressed network, their figures, and what was read."""
    recipe = example.Recipe(
        train_images=96, batch_size=32, dense_epochs=1, rounds=2, round_images=64, scored_images=4
    )
    loaders = example.make_loaders(random_data(), recipe)
    dense = example.trained_network(name, loaders, recipe, folder)
    result = example.compress(name, dense, criterion, loaders, recipe, folder)
    return dense, result, example.measure(dense, [result.model], loaders.test), loaders


@pytest.mark.parametrize(("name", "criterion"), [("VGG", "loss_delta"), ("ResNet-18", "predictions")])
def test_ninety_percent_go_and_the_first_and_the_last_layer_keep_all(example, name, criterion):
    dense, result, figures, loaders = run(example, name, criterion)
    layers = {
        layer: module
        for layer, module in dense.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and layer not in ("first", "last")
    }
    assert set(result.history[-1]["layers"]) == set(layers)
    for layer in ("first", "last"):
        assert not isinstance(result.model.get_submodule(layer), BlockSparseLayer)
        assert bool((result.model.get_submodule(layer).weight != 0).all())
    weights = {layer: result.model.get_submodule(layer).weight.detach() for layer in layers}
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    share = zeros / sum(weight.numel() for weight in weights.values())
    assert 0.88 < share <= 0.9
    assert all((weight != 0).any() for weight in weights.values())
    assert figures[1].pruning_rate == pytest.approx(share)
    assert figures[0].pruning_rate == 0.0
    assert figures[1].parameters < 0.3 * figures[0].parameters
    assert figures[1].flops < figures[0].flops
    assert [entry.speedups for entry in figures] == [[1.0, 1.0], [2.0, 2.0]]
    for entry, model in zip(figures, (dense, result.model), strict=True):
        assert entry.accuracy == fp.evaluate(model, loaders.test)["accuracy"]
    lines = example.table([criterion], figures).splitlines()
    assert lines[0].split() == ["dense", criterion]
    assert lines[-1].split() == ["latency,", "batch", "32", "2000.00", "ms", "1000.00", "ms", "(2.00x)"]


def test_no_image_is_in_two_parts(example):
    recipe = example.Recipe(train_images=96, batch_size=32, round_images=64)
    loaders = example.make_loaders(random_data(), recipe)
    parts = [loader.dataset.tensors[0] for loader in (loaders.train, loaders.validation, loaders.test)]
    assert [len(part) for part in parts] == [96, 16, 32]
    assert len(torch.unique(torch.cat(parts).flatten(1), dim=0)) == 144
    assert parts[0].shape[1:] == (1, 28, 28)
    assert float(parts[0].mean()) == pytest.approx(0.0, abs=0.1)
    assert float(parts[0].std()) == pytest.approx(1.0, abs=0.1)
    assert sum(len(labels) for _, labels in loaders.rounds) == 64


def test_a_second_run_trains_nothing_and_gives_the_same(example, tmp_path, monkeypatch):
    dense, result, figures, _ = run(example, "VGG", "magnitude", tmp_path)

    def refuse(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(example, "train", refuse)
    monkeypatch.setattr(importlib.import_module("fastprune.compression_run"), "distill", refuse)
    again, repeated, figures_again, _ = run(example, "VGG", "magnitude", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), again.parameters(), strict=True))
    assert repeated.history == result.history
    assert figures_again == figures
    with pytest.raises(AssertionError, match="trained again"):
        run(example, "ResNet-18", "magnitude", tmp_path)
