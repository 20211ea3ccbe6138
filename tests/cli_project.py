"""What a user of the command line has in a folder: a model, loaders and functions, and no times that vary."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastprune import metrics
from fastprune.modules import choice, formats, latency

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(120, 12, generator=generator)
labels = (inputs[:, 0] + inputs[:, 1] > 0).long()
val_loader = DataLoader(TensorDataset(inputs[80:], labels[80:]), 16)
value = 3


def fake_medians(functions, **options):
    """Measured times differ from run to run, and with them which layers become sparse."""
    return [2e-3, 1e-3][: len(functions)]


for module in (choice, formats, latency, metrics):
    module.interleaved_medians = fake_medians


class Training:
    """A loader that kills its process in the pass that $KILL_IN_PASS names."""

    def __init__(self):
        self.loader, self.passes = DataLoader(TensorDataset(inputs[:80], labels[:80]), 16, shuffle=True), 0

    def __iter__(self):
        self.passes += 1
        if str(self.passes) == os.environ.get("KILL_IN_PASS"):
            os.kill(os.getpid(), signal.SIGKILL)
        return iter(self.loader)


def make_model():
    """Not trained; the command line seeds it."""
    return nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 2))


def needs_an_argument(size):
    return make_model()


def broken():
    raise ValueError("the weights are lost")


class BrokenModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 2)

    def forward(self, x):
        raise ValueError("this model cannot run")


def example():
    return inputs[:8]


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def only_the_first(name, module):
    return name == "0"
