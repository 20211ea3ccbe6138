"""A small compression that several test files run."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp

BLOCK = fp.Block(4, 4)
OPTIONS = {"sparsity": 0.6, "rounds": 3, "granularity": BLOCK, "progress": False}


def task():
    """A model, and loaders of 40 training and 20 validation samples that a line separates."""
    inputs = torch.randn(60, 12)
    labels = (inputs[:, 0] + inputs[:, 1] > 0).long()
    data = [TensorDataset(inputs[part], labels[part]) for part in (slice(0, 40), slice(40, 60))]
    model = nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Dropout(0.2), nn.Linear(17, 2))
    return model, DataLoader(data[0], 16, shuffle=True), DataLoader(data[1], 16)


def weights(model):
    """Everything that a compressed model computes with, converted or not."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, other):
    expected = weights(other)
    assert weights(model).keys() == expected.keys()
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, expected[name]), name


def assert_same_history(history, other):
    """Hold everything against each other but what was timed."""

    def untimed(entry):
        return {key: value for key, value in entry.items() if not key.endswith("seconds")}

    assert [untimed(entry) for entry in history] == [untimed(entry) for entry in other]
    for entry in (*history, *other):
        assert all(value > 0 for key, value in entry.items() if key.endswith("seconds"))
