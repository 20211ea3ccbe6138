"""The two networks of fashion_mnist.py, one like VGG, one like ResNet-18, for grey images of 28x28.

In both, `first` and `last` are the layers that see the image and that give the logits. Every activation is a
module of its own, so that `fp.sparsify_(..., fold_batch_norm=True)` can compute it in the layer before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


def convolution(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps height and width, up to its stride."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class Vgg(nn.Module):
    """Pairs of 3x3 convolutions between poolings, and two wide Linear layers, as Simonyan and Zisserman 2015.

    Images of 28x28 are halved twice at once; the pairs see 7x7, 4x4 and 2x2 pixels.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), classes: int = 10) -> None:
        super().__init__()
        self.first = convolution(1, widths[0], size=5, stride=2)
        layers = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for before, width in itertools.pairwise(widths):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for in_channels in (before, width):
                layers += [convolution(in_channels, width), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        features = 4 * widths[-1]
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU()
        )
        self.last = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.hidden(self.features(self.first(images))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as He et al. 2016."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = convolution(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = convolution(in_channels, out_channels, size=1, stride=stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two basic blocks.

    Half as wide as the original. The stem halves 28x28 twice, as the original's does; the stages see 7x7,
    4x4, 2x2 and 2x2 pixels. The last keeps its size: on a single pixel eight of nine taps would read padding
    alone, and could be pruned for nothing.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int] = (1, 2, 2, 1),
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.first = convolution(1, widths[0], size=5, stride=2)
        self.stem = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(2))
        blocks, in_channels = [], widths[0]
        for width, stride in zip(widths, strides, strict=True):
            blocks += [BasicBlock(in_channels, width, stride), BasicBlock(width, width, 1)]
            in_channels = width
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(in_channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.pool(self.stages(self.stem(self.first(images)))))
