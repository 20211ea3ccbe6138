"""A small compression that several test files run."""

from __future__ import annotations

import pytest
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


def digits():
    """Train and validation loaders of scikit-learn's digits, and an MLP that was trained on them."""
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the digits").load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, val = order[:1200], order[1200:]
    loader = DataLoader(TensorDataset(inputs[train], labels[train]), 64, shuffle=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(15):
        for batch, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), targets).backward()
            optimizer.step()
    return model, loader, [(inputs[val], labels[val])]


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
        return {key: value for key, value in entry.items() if not key.endswith(("seconds", "layer_latency"))}

    assert [untimed(entry) for entry in history] == [untimed(entry) for entry in other]
    for entry in (*history, *other):
        assert all(value > 0 for key, value in entry.items() if key.endswith("seconds"))
