"""The inputs that a conversion is measured on: those of the model, and those of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch


def example_batches(example_inputs: Any, device: torch.device) -> list[Batch]:
    """Return example inputs as batches without targets, on a device.

    Raises:
        TypeError: they are no tensor, tuple, dict, or list of these.
        ValueError: the list is empty.

    """
    inputs = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    batches = []
    for entry in inputs:
        if isinstance(entry, Tensor):
            batch = Batch((entry,), {}, None, 0)
        elif isinstance(entry, tuple):
            batch = Batch(entry, {}, None, 0)
        elif isinstance(entry, dict):
            batch = Batch((), entry, None, 0)
        else:
            raise TypeError(
                "`example_inputs` must be a tensor, a tuple, a dict or a list of these, "
                f"got {type(entry).__name__}"
            )
        batches.append(batch.to(device).fresh())
    if not batches:
        raise ValueError("`example_inputs` must hold at least one input, got an empty list")
    return batches


def record_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]
) -> dict[str, list[Tensor]]:
    """Return the inputs that each layer sees, by running the model."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: inputs[name].append((*args, *kwargs.values())[0].detach())

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True) for name, module in layers.items()
    ]
    try:
        for batch in batches:
            batch.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
