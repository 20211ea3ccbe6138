"""Networks that make exact loss deltas hard: each guards one way in which a shortcut would be wrong."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn


class ResidualInPlace(nn.Module):
    """Layers whose outputs are written over after they were read."""

    def __init__(self, way):
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.second = nn.Linear(9, 9)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(9, 5)
        self.way = way

    def forward(self, x):
        z = self.first(x)
        if self.way == "module":
            h = self.relu(z)
            h = h + self.second(h)
        elif self.way == "functional":
            h = F.relu(z, inplace=True)
            h = h + self.second(h)
        elif self.way == "method":
            h = z.relu_()
            h = h + self.second(h)
        elif self.way == "aliased":  # z is read again after the in-place relu has changed it
            h = self.relu(z)
            h = self.second(h) + z
        else:
            alias = h = torch.tanh(z)
            h += self.second(h)
            h = h + alias
        return self.head(F.gelu(h))


class SmallConvNet(nn.Module):
    """Convolutions with padding, stride, groups and depthwise, each followed by a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8, bias=False)
        self.skip = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        for norm in (self.norm1, self.norm2):
            spoil_norm(norm)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.silu(self.norm2(self.conv2(x)))
        x = self.depthwise(x) + self.skip(x)
        return self.head(x.mean((2, 3)))


def spoil_norm(norm):
    """Give a fresh batch norm the statistics and channels of a trained one; return it."""
    with torch.no_grad():
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.5)
    return norm


class SharedNorm(nn.Module):
    """One batch norm after two layers: its channel does not go with either's unit."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 9)
        self.norm = spoil_norm(nn.BatchNorm1d(9))
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.second(F.relu(self.norm(self.first(x)))))))


class NormOverSteps(nn.Module):
    """A batch norm whose channels are the six steps, and not the six features, of a Linear's output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 6)
        self.norm = spoil_norm(nn.BatchNorm1d(6))
        self.head = nn.Linear(36, 5)

    def forward(self, x):
        steps = torch.stack([x * step for step in range(1, 7)], 1)
        return self.head(F.relu(self.norm(self.layer(steps))).flatten(1))


class SharedLayer(nn.Module):
    """One layer called twice, under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(7, 9)
        self.layer = self.again = nn.Linear(9, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        return self.head(F.relu(self.again(F.relu(self.layer(self.stem(x))))))


class TiedAutoencoder(nn.Module):
    """A weight that is called as a layer and read as a tensor."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(7, 6)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        hidden = torch.tanh(self.encoder(x))
        return self.head(torch.tanh(F.linear(hidden, self.encoder.weight.t())))


class PartOfEncoder(nn.Module):
    """A layer that is called, and also used within torch's encoder layer, which a trace does not enter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(7, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder.linear1(self.encoder(self.stem(x)[:, None])).squeeze(1))


class DataDependent(nn.Module):
    """Control flow that no trace follows."""

    def __init__(self, wrap=lambda layer: layer):
        super().__init__()
        self.layer = wrap(nn.Linear(7, 9))
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        h = self.layer(x)
        return self.head(torch.tanh(h) if h.sum() > 0 else F.relu(h))


class KeepsWhatItComputes(nn.Module):
    """A forward with a tensor of its own, that keeps its features and counts its calls on the module."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 9)
        self.head = nn.Linear(9, 5)
        self.calls = 0
        self.features = None

    def forward(self, x):
        self.calls += 1
        self.features = self.layer(x) * torch.linspace(0.5, 1.5, 9)
        return self.head(F.relu(self.features))


class OptionalInput(nn.Module):
    """Two ways through the model; a trace knows one of them."""

    def __init__(self):
        super().__init__()
        self.alone, self.paired = nn.Linear(7, 9), nn.Linear(7, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x, other=None):
        hidden = self.alone(x) if other is None else self.paired(x)
        return self.head(torch.tanh(hidden))


class LSTMClassifier(nn.Module):
    """A module with several outputs before the layers that are scored."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(7, 9, batch_first=True)
        self.layer = nn.Linear(9, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        _, (hidden, _) = self.lstm(x)
        return self.head(F.relu(self.layer(hidden[-1])))


class WritesIntoInput(nn.Module):
    """A forward that normalises its input in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        x.sub_(0.5)
        return self.head(F.relu(self.layer(x)))


class SigmoidLinear(nn.Linear):
    """A Linear with a forward of its own: a masked unit gives 0.5."""

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class Encoder(nn.Module):
    """A transformer layer, attention by itself, and a classifier for each step: logits [N, C, L]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(7, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 17, dropout=0.3, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.encoder(self.stem(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x).transpose(1, 2)


class TwoInputs(nn.Module):
    """Two inputs, and an output that is a dict or an object with `logits`."""

    def __init__(self, output=dict):
        super().__init__()
        self.left, self.right = nn.Linear(7, 9), nn.Linear(4, 9)
        self.head = nn.Linear(9, 5)
        self.output = output

    def forward(self, left, right=None):
        hidden = self.left(left) if right is None else self.left(left) * self.right(right)
        return self.output(logits=self.head(torch.tanh(hidden)), hidden=hidden)


class Output(types.SimpleNamespace):
    """What models of other libraries return: an object with `logits`."""


class SmallResNet(nn.Module):
    """Residual blocks with a pool before them and a pool, a flattening and a Linear after them."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), spoil_norm(nn.BatchNorm2d(4))
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, 2, 1, bias=False), spoil_norm(nn.BatchNorm2d(6))
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding="same"), spoil_norm(nn.BatchNorm2d(6))
        self.shortcut, self.shortcut_norm = nn.Conv2d(4, 6, 1, 2), spoil_norm(nn.BatchNorm2d(6))
        self.pool, self.head = nn.AdaptiveAvgPool2d((2, 1)), nn.Linear(12, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 2)
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut_norm(self.shortcut(x))
        return self.head(torch.flatten(self.pool(F.relu(y)), 1))


class SelfAttention(nn.Module):
    """Attention as libraries of transformers write it: four projections and the number of heads."""

    def __init__(self, size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x):
        split = [
            layer(x).view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*split)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class TextClassifier(nn.Module):
    """Embeddings, attention, feed-forward and layer norms, with control flow that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention, self.norm1 = SelfAttention(8, 4), nn.LayerNorm(8)
        self.up, self.down, self.norm2 = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens, mask=None):
        if tokens.shape[1] > 32:
            raise ValueError("too long")
        x = self.embedding(tokens)
        x = self.norm1(x + self.attention(x))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        if mask is None:
            return self.head(x.mean(1))
        weight = mask[..., None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))


class MobileBlock(nn.Module):
    """An expansion, a depthwise and a grouped convolution with several outputs for each group."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 6, 1), spoil_norm(nn.BatchNorm2d(6))
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6, dilation=1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=(2, 0), groups=4, dilation=(2, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.hardswish(self.norm(self.expand(x)))
        x = F.avg_pool2d(F.silu(self.depthwise(x)), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu6(self.grouped(x)), 1).flatten(1))


class SamePadded(nn.Conv2d):
    """A convolution that pads its input as TensorFlow does, by what its size needs."""

    def forward(self, x):
        sides = []
        for size, kernel, stride, dilation in zip(
            x.shape[:-3:-1], self.weight.shape[:-3:-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            padding = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sides += [padding // 2, padding - padding // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StaticallyPadded(nn.Conv2d):
    """A convolution with a module that pads its input."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.static_padding = nn.ZeroPad2d((1, 1, 2, 3))

    def forward(self, x):
        return super().forward(self.static_padding(x))


class SmallVGG(nn.Sequential):
    """Convolutions, batch norms and activations in a row, each a module used once."""

    def __init__(self, activation=lambda: nn.ReLU(inplace=True), conv=nn.Conv2d):
        layers = []
        for in_channels, out_channels in ((3, 8), (8, 12), (12, 17)):
            norm = spoil_norm(nn.BatchNorm2d(out_channels))
            layers += [conv(in_channels, out_channels, 3, padding=1, bias=False), norm, activation()]
        super().__init__(
            *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(17 * 6, 16), spoil_norm(nn.BatchNorm1d(16)),
            nn.ReLU(), nn.Linear(16, 5),
        )  # fmt: skip
