"""What the tests of block_sparse_conv2d and of its gradients share: layers of any geometry."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp

CHANNELS = (1, 15, 17, 129)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = ((1, 1), (1, 7), (5, 3), (9, 9))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a convolution is besides its weight."""

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def fits(self, height: int, width: int) -> bool:
        """Whether the padded image holds the kernel."""
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return height + top + bottom >= reach[0] and width + left + right >= reach[1]

    def arguments(self) -> dict:
        """The ops' keyword arguments."""
        return dataclasses.asdict(self)

    def positions(self) -> tuple:
        """What follows the tensors and sizes in the ops' schemas."""
        return (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def flat(self) -> tuple[int, ...]:
        """The same in one list, as the op without gradients takes it."""
        return (*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups)


def make_conv2d_weight(
    out_channels: int,
    in_channels: int,
    geometry: Geometry,
    blocksize: tuple[int, int],
    density: float,
    dtype: torch.dtype = torch.float32,
) -> fp.BlockSparseTensor:
    """A random weight [out_channels, taps * padded channels], its padding zero."""
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    channels = in_channels // geometry.groups
    padding = -channels % blocksize[1]
    weight = torch.randn(out_channels, taps, channels, dtype=dtype)
    dense = torch.nn.functional.pad(weight, (0, padding)).flatten(1)
    grid = (-(-out_channels // blocksize[0]), dense.shape[1] // blocksize[1])
    return fp.BlockSparseTensor.from_dense(dense, blocksize, mask=torch.rand(grid) < density)


def parts(weight: fp.BlockSparseTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What the ops take of a weight."""
    return weight.packed_values.to(dtype), weight.crow_indices, weight.col_indices


def layouts(images: Tensor) -> dict[str, Tensor]:
    """The same images in every kind of layout."""
    wider = torch.cat([images, images], dim=3)
    return {
        "contiguous": images.contiguous(),
        "channels-last": images.to(memory_format=torch.channels_last),
        "sliced columns": wider[..., : images.shape[3]],
        "every other column": images.repeat_interleave(2, dim=3)[..., ::2],
        "sliced channels": torch.cat([images, images], dim=1)[:, : images.shape[1]],
        "sliced channels-last": wider.to(memory_format=torch.channels_last)[..., : images.shape[3]],
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": images[:1, :1, :1].expand_as(images),
    }


geometries = st.builds(
    Geometry,
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
)
