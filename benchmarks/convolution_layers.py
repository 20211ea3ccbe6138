"""The convolutions that the benchmarks of block_sparse_conv2d and of sparsify_ share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import fastprune as fp


class Layer(NamedTuple):
    """A square convolution of square images."""

    size: int
    in_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 1

    def __str__(self) -> str:
        kernel = f"{self.kernel_size}x{self.kernel_size}" + (f"/{self.stride}" if self.stride > 1 else "")
        return f"{kernel} {self.in_channels}-{self.out_channels} of {self.size}x{self.size}"


# ResNet-18 (He et al. 2016, table 1) for images of 224x224 and of 32x32, and what VGG-16 adds.
RESNET = tuple(
    Layer(size, channels, channels) for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512))
)
RESNET_32 = tuple(
    Layer(size, channels, channels) for size, channels in ((32, 64), (16, 128), (8, 256), (4, 512))
)
VGG = tuple(
    Layer(size, channels, channels) for size, channels in ((112, 128), (56, 256), (28, 512), (14, 512))
)
STRIDED = tuple(
    Layer(size, channels, 2 * channels, 3, 2)
    for size, channels in ((56, 64), (28, 128), (14, 256), (32, 64), (16, 128), (8, 256))
)
# Expansions and projections of EfficientNet-Lite0 (Tan and Le 2019, table 1).
POINTWISE = tuple(
    Layer(size, inputs, outputs, 1)
    for size, inputs, outputs in (
        (56, 96, 24), (56, 24, 144), (28, 144, 40), (28, 40, 240), (14, 480, 112), (14, 112, 672),
        (7, 672, 192), (7, 192, 1152), (7, 320, 1280),
    )
)  # fmt: skip
KINDS = {
    **dict.fromkeys(RESNET + RESNET_32 + VGG, "convolution 3x3"),
    **dict.fromkeys(STRIDED, "convolution 3x3, stride 2"),
    **dict.fromkeys(POINTWISE, "convolution 1x1"),
}


def make_dense(layer: Layer) -> nn.Conv2d:
    """Return a dense layer."""
    torch.manual_seed(0)
    return nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.kernel_size // 2
    )


def make_convolution(layer: Layer, blocksize: tuple[int, int], sparsity: float) -> fp.BlockSparseConv2d:
    """Return a layer with blocks kept at random."""
    conv = make_dense(layer)
    grid = fp.Block(*blocksize).shape(conv.weight.shape)
    order = torch.rand(grid).flatten().argsort()
    mask = torch.ones(len(order), dtype=torch.bool)
    mask[order[: round(sparsity * len(order))]] = False
    return fp.BlockSparseConv2d.from_dense(conv, blocksize, mask.view(grid))
