"""Granularities: how a layer's weight is cut into pieces that are scored and masked.

A weight is seen as ``[out, taps, in]``: a Linear has one tap, a Conv2d ``kh * kw`` of them, with the
input channels innermost. Granularities map between pieces and that view.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ScoresT = TypeVar("ScoresT")


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
        """Whether masking takes a unit's bias along with its weights."""
        return False

    @property
    def masks_norms(self) -> bool:
        """Whether masking takes a unit's batch-norm channel along with it."""
        return False

    def expand_units(self, pieces: Tensor, out: int) -> Tensor:
        """Spread one entry per piece over the ``out`` units, where pieces are whole units."""
        raise ValueError(f"pieces of {self} are not made of whole units")

    def for_layer(self, name: str, module: nn.Module, model: nn.Module) -> Granularity | None:
        """Return the granularity with what this layer adds to it, or None where it has no such pieces."""
        return self

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

    Example:
        >>> fp.score(model, loader, granularity=fp.Unit(group_size=32))    # 32 neighbouring units a piece
        >>> fp.score(resnet, loader, granularity=fp.Unit(coupled=True))    # as they can be removed

    Args:
        group_size: how many neighbouring units are one piece; scores are ``[ceil(out / group_size)]``.
        norm: whether the batch-norm channel goes with the unit.
        coupled: whether unit i of all layers whose outputs a residual sum adds up is one piece, scored by
            one joint mask and kept or pruned in all of them; each of the layers gets the same scores. The
            sums are found by running a traced model on the first batch of the loader.

    Raises:
        ValueError: ``group_size`` is below 1.

    """

    group_size: int = 1
    norm: bool = True
    coupled: bool = False

    def __post_init__(self) -> None:
        check_count(self.group_size, "group_size")

    @property
    def masks_whole_units(self) -> bool:
        """Whether the bias goes with the weights: always."""
        return True

    @property
    def masks_norms(self) -> bool:
        """Whether the batch-norm channel goes with the unit."""
        return self.norm

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return ``[ceil(out / group_size)]``."""
        return torch.Size([-(-weight_shape[0] // self.group_size)])

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum each group of rows."""
        return _sum_groups(per_weight.flatten(1).sum(1), self.group_size)

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Repeat each entry over its rows."""
        rows = self.expand_units(pieces, weight_shape[0])
        return rows.view(-1, *[1] * (len(weight_shape) - 1)).expand(weight_shape)

    def expand_units(self, pieces: Tensor, out: int) -> Tensor:
        """Repeat each entry over its units."""
        return pieces.repeat_interleave(self.group_size)[:out]


@dataclasses.dataclass(frozen=True)
class InputUnit(Granularity):
    """What one input feature, or one input channel in all kernel taps, feeds; scores are ``[in]``.

    Args:
        groups: those of a grouped convolution; taken from the layer.

    """

    groups: int = 1

    def for_layer(self, name: str, module: nn.Module, model: nn.Module) -> Granularity:
        """Return the granularity with the layer's groups."""
        return InputUnit(getattr(module, "groups", 1))

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return ``[in]``, the inputs of all groups."""
        return torch.Size([weight_shape[1] * self.groups])

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum each input's column, in the rows of its group."""
        out, inputs = per_weight.shape[:2]
        return per_weight.reshape(self.groups, out // self.groups, inputs, -1).sum((1, 3)).flatten()

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Repeat each entry over its column."""
        out, inputs = weight_shape[:2]
        columns = pieces.view(self.groups, inputs).repeat_interleave(out // self.groups, 0)
        return columns.view(out, inputs, *[1] * (len(weight_shape) - 2)).expand(weight_shape)


# How attention modules call the projection behind their heads, and the number of these.
_OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "proj", "out_lin", "o", "dense")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


@dataclasses.dataclass(frozen=True)
class Head(Granularity):
    """The columns of an attention's output projection that one head feeds; scores are ``[heads]``.

    Example:
        >>> fp.score(model, loader, granularity=fp.Head())
        >>> fp.score(model, loader, granularity=fp.Head(8), include="*.mix")      # a projection of your own

    Args:
        num_heads: of the layers that ``include`` names; None recognises the output projections of
            torch's and Hugging Face's attention and reads the number from the module around them.

    Raises:
        ValueError: ``num_heads`` is below 1, or does not divide a layer's inputs.

    """

    num_heads: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads is not None:
            check_count(self.num_heads, "num_heads")

    def for_layer(self, name: str, module: nn.Module, model: nn.Module) -> Granularity | None:
        """Return the granularity with the layer's number of heads, None where it is no output projection."""
        in_features = getattr(module, "in_features", None)  # of a Linear, block-sparse ones too
        if not isinstance(in_features, int):
            return None
        num_heads = self.num_heads
        if num_heads is None:
            parent_name, _, own_name = name.rpartition(".")
            if own_name not in _OUTPUT_PROJECTIONS:
                return None
            parent = model.get_submodule(parent_name)
            around = model.get_submodule(parent_name.rpartition(".")[0])
            # Hugging Face's BERT has the heads in `attention.self`, beside `attention.output.dense`.
            siblings = [parent, *(around.children() if own_name == "dense" else ())]
            counts = [getattr(owner, count, None) for owner in siblings for count in HEAD_COUNTS]
            num_heads = next((count for count in counts if isinstance(count, int)), None)
            if num_heads is None:
                return None
        if in_features % num_heads:
            raise ValueError(
                f"`granularity` has {num_heads} heads, which do not divide the {in_features} inputs "
                f"of layer '{name}'"
            )
        return Head(num_heads)

    def _count(self) -> int:
        if self.num_heads is None:
            raise ValueError("Head() needs `num_heads`, which for_layer takes from a layer")
        return self.num_heads

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return ``[heads]``."""
        return torch.Size([self._count()])

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum each head's columns."""
        return per_weight.view(per_weight.shape[0], self._count(), -1).sum((0, 2))

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Repeat each entry over its head's columns."""
        return pieces.repeat_interleave(weight_shape[1] // self._count()).expand(weight_shape)


@dataclasses.dataclass(frozen=True)
class Layer(Granularity):
    """A whole layer: its output becomes its input where shapes agree, else zeros; scores are scalars.

    ``include`` may name modules of any kind, whole blocks too.
    """

    def shape(self, weight_shape: torch.Size) -> torch.Size:
        """Return ``[]``."""
        return torch.Size([])

    def sum_pieces(self, per_weight: Tensor) -> Tensor:
        """Sum everything."""
        return per_weight.sum()

    def expand(self, pieces: Tensor, weight_shape: torch.Size) -> Tensor:
        """Repeat the entry over all weights."""
        return pieces.expand(weight_shape)


@dataclasses.dataclass(frozen=True)
class ParameterTensor(Layer):
    """A whole parameter, set to zero; scores are scalars, named like parameters. Tied ones are left out."""


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


class GranularityRule(abc.ABC):
    """A way to choose the granularity for a model: what ``score`` takes in the place of one.

    A subclass made with ``name=...`` goes by that name, too: ``granularity="auto"``.
    """

    named: ClassVar[dict[str, type[GranularityRule]]] = {}

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            GranularityRule.named[name] = cls

    @abc.abstractmethod
    def choose(
        self,
        score: Callable[[Granularity], ScoresT],
        model: nn.Module,
        loader: Iterable[Any] | None,
        options: Mapping[str, Any],
    ) -> ScoresT:
        """Return the scores of the granularity that suits the model best.

        Args:
            score: gives the scores of a granularity.
            model: that is scored.
            loader: that it is scored with.
            options: the other keyword arguments of :func:`score`.

        """


def _sum_groups(values: Tensor, group_size: int) -> Tensor:
    """Sum neighbouring entries, the last group possibly smaller."""
    return F.pad(values, (0, -len(values) % group_size)).view(-1, group_size).sum(1)


def check_count(count: int, name: str) -> None:
    """Raise ValueError unless a count is an integer of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {count!r}")


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
            "`granularity` must be fp.Block(rows, cols), fp.Unit(), fp.InputUnit(), fp.Head(), fp.Element(), "
            f"fp.Layer() or fp.ParameterTensor(), got {granularity!r}"
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
