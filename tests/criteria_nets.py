"""Nets on which criteria are compared with plain computations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import masked_mlp, mlp
from networks import DataDependent, ResidualInPlace, SharedLayer, SmallConvNet, TiedAutoencoder, spoil_norm


class Sequences(nn.Module):
    """Linears on [samples, steps, features]; ``steps_first`` transposes what they get."""

    def __init__(self, steps_first=False):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 9), nn.Linear(9, 6), nn.Linear(6, 5)
        self.steps_first = steps_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.steps_first else x
        x = self.second(F.relu(self.first(x)))
        return self.head(x.mean(0 if self.steps_first else 1))


class ManyConvolutions(nn.Module):
    """Every padding, stride, dilation and grouping."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding="same", padding_mode="circular", groups=3)
        self.b = nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
        self.c = nn.Conv2d(4, 4, (1, 3), padding="valid", groups=4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.c(F.silu(self.b(torch.tanh(self.a(x))))).mean((2, 3)))


def _norm_net():
    norms = spoil_norm(nn.BatchNorm1d(9)), spoil_norm(nn.BatchNorm1d(6))
    layers = nn.Linear(7, 9), norms[0], nn.ReLU(inplace=True), nn.Linear(9, 6), norms[1]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 5))


# name: (model, shape of a sample, layer to batch norm)
NETS = {
    "mlp": (mlp, (7,), {}),
    "masked": (lambda: masked_mlp(0.5, (4, 3), (7, 9, 5))[0], (7,), {}),
    "norms": (_norm_net, (7,), {"0": "1", "3": "4"}),
    "conv": (SmallConvNet, (3, 7, 5), {"conv1": "norm1", "conv2": "norm2"}),
    "convolutions": (ManyConvolutions, (3, 7, 9), {}),
    "sequences": (Sequences, (6, 7), {}),
    "steps first": (lambda: Sequences(True), (15, 7), {}),
    "in place": (lambda: ResidualInPlace("module"), (7,), {}),
    "shared": (SharedLayer, (7,), {}),
    "tied": (TiedAutoencoder, (7,), {}),
    "untraced": (DataDependent, (7,), {}),
}
GRANULARITIES = [fp.Block(4, 3), fp.Unit(), fp.Element()]
