"""Problems that the tests of ablate_conv2d and updated_conv2d share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Case(NamedTuple):
    """A convolution: padding is top, bottom, left and right."""

    images: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """The convolution by torch."""
        top, bottom, left, right = self.padding
        return F.conv2d(F.pad(input, (left, right, top, bottom)), weight, None, self.stride, 0, self.dilation)

    def problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output with a bias in it, input and weight."""
        input = torch.randn(self.images, self.in_channels, self.height, self.width)
        weight = torch.randn(self.out_channels, self.in_channels, *self.kernel)
        bias = torch.randn(self.out_channels, 1, 1)
        return self.convolve(input, weight) + bias, input, weight


def channels_last(tensor: Tensor) -> Tensor:
    """The same in that format."""
    return tensor.contiguous(memory_format=torch.channels_last)


def on_several_threads(function):
    """What a function returns on 1, 2, 3 and 5 threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    return results
