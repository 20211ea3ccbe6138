"""Masked forwards: the whole model with one piece masked, for what no trace serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..granularity import Granularity, Layer, ParameterTensor, Unit, weight_of
from .replacement import replaced

Forward = Callable[[], Any]


def masked_forwards(
    forward: Forward,
    name: str,
    module: nn.Module,
    pieces: Granularity,
    also: Sequence[nn.Module] = (),
) -> Generator[Any, None, None]:
    """Yield the model's output with each piece masked, in order; None for a piece that is zero already.

    Args:
        forward: runs the model.
        name: the layer's name, or the parameter's where it is the piece.
        module: the layer, or the parameter's owner.
        pieces: the granularity, with what the layer adds to it.
        also: modules whose channels go with the layer's whole units: its batch norm, and the layers that
            are coupled to it with theirs.

    """
    if isinstance(pieces, ParameterTensor):
        parameter = name.rpartition(".")[2]
        tensor = getattr(module, parameter)
        with replaced([(module, parameter, torch.zeros_like(tensor))]):
            yield forward()
    elif isinstance(pieces, Layer):
        with without_layer(module):
            yield forward()
    elif isinstance(pieces, Unit):
        out = len(weight_of(module))
        for index in range(pieces.shape(weight_of(module).shape).numel()):
            units = slice(index * pieces.group_size, min((index + 1) * pieces.group_size, out))
            masked = []
            for owner in (module, *also):
                for parameter in ("weight", "bias"):
                    tensor = getattr(owner, parameter)
                    if tensor is not None:
                        masked.append((owner, parameter, tensor.clone()))
                        masked[-1][2][units] = 0
            with replaced(masked):
                yield forward()
    else:
        for weight in _masked_weights(pieces, weight_of(module)):
            if weight is None:
                yield None
                continue
            with replaced([(module, "weight", weight)]):
                yield forward()


@contextlib.contextmanager
def without_layer(module: nn.Module) -> Iterator[None]:
    """Let a module give its input where the shapes agree, else zeros; of several outputs, the first."""
    copies: list[Tensor | None] = []

    def keep(_: nn.Module, inputs: tuple) -> None:
        first = inputs[0] if inputs else None
        copies.append(first.clone() if isinstance(first, Tensor) else None)

    def give(_: nn.Module, inputs: tuple, output: Any) -> Any:
        before = copies.pop()
        if before is not None:
            # A module that is not there does not write into its input, as nn.ReLU(inplace=True) does.
            inputs[0].data.copy_(before)
        return _in_place_of(output, before)

    with contextlib.ExitStack() as undo:
        undo.callback(module.register_forward_pre_hook(keep).remove)
        undo.callback(module.register_forward_hook(give).remove)
        yield


def _in_place_of(output: Any, given: Tensor | None) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)([_in_place_of(output[0], given), *output[1:]])
    return given if given is not None and given.shape == output.shape else torch.zeros_like(output)


def _masked_weights(pieces: Granularity, weight: Tensor) -> Iterator[Tensor | None]:
    """The weight with one piece zeroed, for each piece; None where the piece is zero already."""
    shape = pieces.shape(weight.shape)
    nonzero = pieces.sum_pieces((weight != 0).long()).flatten().tolist()
    for index in range(shape.numel()):
        if not nonzero[index]:
            yield None
            continue
        piece = torch.zeros(shape.numel(), dtype=torch.bool, device=weight.device)
        piece[index] = True
        yield weight.masked_fill(pieces.expand(piece.view(shape), weight.shape), 0.0)
