"""Whole layers that are masked: modules that give their input, or zeros, in the place of others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..importance.masked_forwards import without_layer

SKIPPED = "_fastprune_skipped"


class FirstInput(nn.Module):
    """Gives the first of its inputs: what is left of a layer that is called with more than one."""

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the first input."""
        return input


class Zeros(nn.Module):
    """Gives zeros of one shape for each sample: what is left of a layer that changes the shape.

    Args:
        input_shape: of one sample, without the batch dimension.
        output_shape: of one sample.

    """

    def __init__(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.output_shape = tuple(output_shape)

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return zeros.

        Raises:
            ValueError: the samples have another shape than those that the model was shrunk with.

        """
        if tuple(input.shape[1:]) != self.input_shape:
            raise ValueError(
                f"a layer that was masked whole gives zeros for samples of shape {list(self.input_shape)}, "
                f"with which the model was shrunk, got {list(input.shape[1:])}"
            )
        return input.new_zeros(input.shape[0], *self.output_shape)

    def extra_repr(self) -> str:
        """Return the shapes."""
        return f"{list(self.input_shape)} -> {list(self.output_shape)}"


def describe_skipped(module: nn.Module) -> dict[str, Any] | None:
    """Return what stands for a masked layer, as JSON takes it, or None for any other module."""
    if not hasattr(module, SKIPPED):
        return None
    if isinstance(module, Zeros):
        return {"kind": "zeros", "shapes": [list(module.input_shape), list(module.output_shape)]}
    return {"kind": "identity" if isinstance(module, nn.Identity) else "first_input"}


def skipped_from(entry: Any) -> nn.Module:
    """Return the module that :func:`describe_skipped` described.

    Raises:
        ValueError: it described none.

    """
    kind = entry.get("kind") if isinstance(entry, dict) else None
    module: nn.Module
    if kind == "identity":
        module = nn.Identity()
    elif kind == "first_input":
        module = FirstInput()
    elif kind == "zeros" and _are_shapes(entry.get("shapes")):
        module = Zeros(*(tuple(shape) for shape in entry["shapes"]))
    else:
        raise ValueError(f"what stands for a masked layer is damaged: {entry!r}")
    setattr(module, SKIPPED, True)
    return module


def _are_shapes(shapes: Any) -> bool:
    return (
        isinstance(shapes, list)
        and len(shapes) == 2
        and all(isinstance(shape, list) for shape in shapes)
        and all(type(size) is int and size >= 0 for shape in shapes for size in shape)
    )


def stand_ins(model: nn.Module, names: list[str], batches: list[Batch]) -> dict[str, nn.Module]:
    """Return what stands for layers that are masked whole: their input where shapes agree, else zeros.

    Args:
        model: in eval mode.
        names: of modules of any kind.
        batches: on which the model runs.

    Raises:
        ValueError: a module is never called, or gives something else than one tensor.

    """
    found: dict[str, dict[str, Any]] = {}

    def record(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not isinstance(output, Tensor):
            raise ValueError(
                f"layer '{name}' is masked whole and cannot be cut out: it must be called with a tensor and "
                f"give one, got {type(first).__name__} and {type(output).__name__}"
            )
        if first.shape == output.shape:
            entry: dict[str, Any] = {"kind": "first_input" if len(args) > 1 or kwargs else "identity"}
        else:
            entry = {"kind": "zeros", "shapes": [list(first.shape[1:]), list(output.shape[1:])]}
        if found.setdefault(name, entry) != entry:
            raise ValueError(f"layer '{name}' is masked whole and called in different ways: it stays")

    with contextlib.ExitStack() as undo, torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            hook = functools.partial(record, name)
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            batch.fresh().call(model)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"layers {missing} are masked whole, but `example_inputs` never reach them")
    return {name: skipped_from(entry) for name, entry in found.items()}


@contextlib.contextmanager
def without_layers(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Let layers give their input where the shapes agree, else zeros, as a masked layer does."""
    with contextlib.ExitStack() as undo:
        for name in names:
            undo.enter_context(without_layer(model.get_submodule(name)))
        yield


def outermost(names: Mapping[str, Any]) -> list[str]:
    """Return the names that lie in none of the others."""
    return [
        name for name in names if not any(name.startswith(f"{other}.") for other in names if other != name)
    ]
