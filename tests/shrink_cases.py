"""What the tests of shrink share: networks that hide a cut well, and the comparison with the masked model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.shrinking.dependencies import output_tensors
from helpers import call
from networks import spoil_norm


class ConcatNet(nn.Module):
    """Layers that read all that was computed before, as DenseNet's do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = spoil_norm(nn.BatchNorm2d(14))
        self.third = nn.Conv2d(14, 6, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = torch.cat([x, F.relu(self.second(x))], 1)
        x = torch.cat([x, F.relu(self.third(F.relu(self.norm(x))))], 1)
        return self.head(x.mean((2, 3)))


class GroupedNet(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3), spoil_norm(nn.BatchNorm2d(12))
        self.grouped = nn.Conv2d(12, 8, 3, groups=2, padding=1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.last(F.relu(self.grouped(F.relu(self.norm(self.first(x)))))).amax((2, 3)))


class Mixed(nn.Module):
    """Two layers with some function of all channels, or of something beside them, in between."""

    def __init__(self, mix, extra=None):
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 5)
        self.mix = mix
        self.extra = extra

    def forward(self, x):
        return self.second(self.mix(self, self.first(x), x))


def magnitude_masks(model, x, granularity, sparsity=0.5, **options):
    """Masks by magnitude, the same share of each layer."""
    batch = {**x, "labels": None} if isinstance(x, dict) else (x, None)
    scores = fp.score(
        model, [batch], criterion="magnitude", granularity=granularity, progress=False, **options
    )
    return scores.select(sparsity=sparsity, scope="layer")


def unit_masks(model, **dropped):
    """Masks that drop these units of each layer, `layer=(index, ...)`, names with _ for dots."""
    masks, shapes = {}, {}
    for name, units in dropped.items():
        name = name.replace("__", ".").lstrip("_")
        weight = model.get_submodule(name).weight
        masks[name], shapes[name] = torch.ones(len(weight), dtype=torch.bool), weight.shape
        masks[name][list(units)] = False
    return fp.Masks(masks, fp.Unit(norm=False), shapes)


def masked_twin(model, *masks):
    """A copy with the masks on, in eval mode."""
    twin = copy.deepcopy(model).eval()
    for each in masks:
        fp.apply_masks_(twin, each)
    return twin


def assert_same(small, twin, *inputs):
    """Within 1e-5 of the largest output, on every input."""
    for x in inputs:
        outputs, expected = (output_tensors(call(model, x)) for model in (small, twin))
        for output, tensor in zip(outputs, expected, strict=True):
            largest = float(tensor.detach().abs().max())
            torch.testing.assert_close(output, tensor, rtol=0, atol=1e-5 * largest)
            assert largest > 1e-3  # zeros would agree with anything


def shrinks(model, x, *masks, others=()):
    """The shrunk model, after a comparison with the masked one on the examples and on other inputs."""
    model.eval()
    small = fp.shrink(model, masks, x)
    assert_same(small, masked_twin(model, *masks), x, *others)
    return small


def tiny_bert():
    """A Hugging Face classifier of two layers, and tokens for it."""
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=40,
        num_labels=3,
    )
    tokens = {"input_ids": torch.randint(0, 99, (4, 11)), "attention_mask": torch.ones(4, 11).long()}
    tokens["attention_mask"][0, 5:] = 0
    return transformers.BertForSequenceClassification(config).eval(), tokens


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
