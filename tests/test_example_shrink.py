"""The examples that cut units and heads out, with narrow networks, random images and made-up sentences."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastprune as fp
from test_example_fashion_mnist import WIDTHS, random_data

pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fastprune")]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def load(monkeypatch):
    """A function that imports an example, and forgets it and what it imports afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == EXAMPLES:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["VGG", "ResNet-18"])
def test_fashion_networks_lose_half_of_their_units(name, load, monkeypatch, tmp_path):
    example, fashion = load("shrink_fashion_mnist"), load("fashion_mnist")
    monkeypatch.setitem(fashion.NETWORKS, name, functools.partial(fashion.NETWORKS[name], WIDTHS))
    monkeypatch.setattr(fashion, "interleaved_medians", lambda functions, **_: [3.0, 2.0, 1.0])
    recipe = fashion.Recipe(
        train_images=96,
        batch_size=32,
        dense_epochs=1,
        rounds=2,
        round_images=64,
        scored_images=4,
        sparsity=0.5,
    )
    assert example.recipe_for(0.5).sparsity == 0.5
    loaders = fashion.make_loaders(random_data(), recipe)
    dense = fashion.trained_network(name, loaders, recipe, tmp_path)
    result = example.compress(name, dense, loaders, recipe, tmp_path)
    assert 2 * example.channels(result.model) == example.channels(dense)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.model.modules())  # folded
    for module in result.model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % example.ROUND_TO == 0
    again = example.compress(name, dense, loaders, recipe, tmp_path)  # reads
    assert again.history == result.history
    before, after = fashion.measure(dense, [result.model], loaders.test)
    assert after.flops < 0.4 * before.flops
    assert after.speedups == [2.0, 2.0]


def test_a_tiny_bert_loses_a_quarter_of_its_heads_and_half_of_its_units(load, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    example, recipe = load("shrink_minilm_movie_snippets"), load("minilm_movie_snippets")
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = recipe.SentenceClassifier(transformers.BertModel(config, add_pooling_layer=False)).eval()
    snippets = [recipe.Snippet([1, *[5 + index % 2] * (index % 7 + 1), 2], index % 2) for index in range(40)]
    snippets += [recipe.Snippet([1] * 32, 0)] * 3
    train = recipe.Batches(snippets, 8, shuffle=True)
    result = example.cut(
        model,
        train,
        recipe.Batches(snippets, 8, shuffle=False),
        example_inputs=recipe.example_inputs(snippets),
        heads_left=3,
        rounds=2,
        epochs=1,
        max_samples=8,
        checkpoint_dir=tmp_path,
        progress=False,
    )
    for layer in result.model.bert.encoder.layer:
        assert layer.attention.self.num_attention_heads == 3
        assert layer.attention.self.query.out_features == 24
        assert layer.intermediate.dense.out_features == 32
    fresh = recipe.SentenceClassifier(transformers.BertModel(config, add_pooling_layer=False)).eval()
    loaded = fp.load(tmp_path / "round_001_compressed.safetensors", fresh)
    inputs = recipe.example_inputs(snippets)[0]
    assert torch.equal(loaded(**inputs), result.model(**inputs))
