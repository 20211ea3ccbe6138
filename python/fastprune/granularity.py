"""Granularities: how a layer's weight is cut into pieces that are scored and masked.

A weight is seen as ``[out, taps, in]``: a Linear has one tap, a Conv2d ``kh * kw`` of them, with the
input channels innermost. Granularities map between pieces and that view.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_as_taps(weight: Tensor) -> Tensor:
    """Return a view of a Linear or Conv2d weight as ``[out, taps, in]``."""
    if weight.dim() == 2:
        return weight.unsqueeze(1)
    if weight.dim() == 4:
        return weight.permute(0, 2, 3, 1).flatten(1, 2)
    raise ValueError(f"`weight` must be that of a Linear or Conv2d, got shape {list(weight.shape)}")


def weight_from_taps(taps: Tensor, shape: torch.Size) -> Tensor:
    """Return ``[out, taps, in]`` in the shape of the weight it came from."""
    if len(shape) == 2:
        return taps.squeeze(1)
    out_channels, in_channels, height, width = shape
    return taps.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)


class Granularity(abc.ABC):
    """What counts as one piece of a weight. Compared by value; pieces are indexed row-major."""

    @abc.abstractmethod
    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return the shape of one score or mask entry per piece."""

    @abc.abstractmethod
    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum a tensor of the weight's shape over each piece."""

    @abc.abstractmethod
    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Spread one entry per piece over the weights of the piece."""

    @property
    def masks_whole_units(self) -> bool:
        """Whether masking takes a unit's bias and batch-norm channel along with its weights."""
        return False

    def sizes(self, weight_shape: torch.Size) -> Tensor:
        """Count the real weights of each piece, padding left out, as int64."""
        return self.sum_pieces(torch.ones(weight_shape, dtype=torch.int64))


@dataclasses.dataclass(frozen=True)
class Element(Granularity):
    """Every weight is a piece; scores have the weight's shape."""

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return the weight's shape."""
        return torch.Size(weight_shape)

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Return a copy of the tensor."""
        return per_weight.clone()

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Return the pieces themselves."""
        return pieces


@dataclasses.dataclass(frozen=True)
class Unit(Granularity):
    """A neuron or filter: its weight row, its bias, and its batch-norm channel; scores are ``[out]``.

    The batch norm counts when it is the only consumer of the layer's output, which is seen where the
    model can be traced.
    """

    @property
    def masks_whole_units(self) -> bool:
        """Whether the bias goes with the weights: always."""
        return True

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return ``[out]``."""
        return torch.Size(weight_shape[:1])

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum each row."""
        return per_weight.flatten(1).sum(1)

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Repeat each entry over its row."""
        return pieces.view(-1, *[1] * (len(weight_shape) - 1)).expand(weight_shape)


@dataclasses.dataclass(frozen=True)
class Block(Granularity):
    """A tile of ``rows`` outputs by ``cols`` neighbouring inputs; scores are ``[block_rows, block_cols]``.

    Where a dimension does not divide, the last block is padded with zeros; padding counts neither as
    weights nor in scores. In a Conv2d a block lies within one kernel tap, and padding is per tap.

    Example:
        >>> fp.Block(16, 16).shape(torch.Size([100, 64]))
        torch.Size([7, 4])

    Raises:
        ValueError: ``rows`` or ``cols`` is not between 1 and 128.

    """

    rows: int = 16
    cols: int = 16

    def __post_init__(self) -> None:
        check_blocksize((self.rows, self.cols))

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return ``[block_rows, taps * block columns of a tap]``."""
        taps = weight_shape[2:].numel()
        return torch.Size([-(-weight_shape[0] // self.rows), taps * -(-weight_shape[1] // self.cols)])

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum each block."""
        taps = weight_as_taps(per_weight)
        out, num_taps, inputs = taps.shape
        block_rows, block_cols = -(-out // self.rows), -(-inputs // self.cols)
        padding = (0, block_cols * self.cols - inputs, 0, 0, 0, block_rows * self.rows - out)
        blocks = F.pad(taps, padding).view(block_rows, self.rows, num_taps, block_cols, self.cols)
        return blocks.sum((1, 4)).flatten(1)

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Repeat each entry over its block."""
        num_taps = weight_shape[2:].numel()
        taps = pieces.view(pieces.shape[0], num_taps, -1)
        taps = taps.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 2)
        return weight_from_taps(taps[: weight_shape[0], :, : weight_shape[1]].contiguous(), weight_shape)


def check_blocksize(blocksize: tuple[int, int], name: str = "blocksize") -> None:
    """Raise ValueError unless both sides of a block are integers from 1 to 128."""
    valid = (
        isinstance(blocksize, tuple)
        and len(blocksize) == 2
        and all(isinstance(side, int) and 1 <= side <= 128 for side in blocksize)
    )
    if not valid:
        raise ValueError(f"`{name}` must be two integers (rows, cols) from 1 to 128, got {blocksize!r}")


def check_granularity(granularity: object) -> Granularity:
    """Return the granularity, or raise TypeError for anything else."""
    if not isinstance(granularity, Granularity):
        raise TypeError(
            f"`granularity` must be fp.Block(rows, cols), fp.Unit() or fp.Element(), got {granularity!r}"
        )
    return granularity


def weight_of(module: nn.Module) -> Tensor:
    """Return a layer's weight as it takes part in the forward, masks applied."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def is_scorable(module: nn.Module) -> bool:
    """Tell whether pieces of this module's weight can be scored and masked."""
    return isinstance(module, (nn.Linear, nn.Conv2d))
