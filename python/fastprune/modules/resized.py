"""Parameters that took another size, and optimizers that remember moments of the one before."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

# By identity: tensors compare entry by entry. With each parameter the optimizers that have stepped since.
_resized: dict[int, tuple[weakref.ref[Tensor], weakref.WeakSet[torch.optim.Optimizer]]] = {}


def forget_moments(parameter: Tensor) -> None:
    """Let each optimizer drop what it remembers of a parameter of another size, before its next step.

    Fused optimizers would write past the end of it.
    """
    _watch_optimizers()
    for key in [key for key, (reference, _) in _resized.items() if reference() is None]:
        del _resized[key]
    _resized[id(parameter)] = (weakref.ref(parameter), weakref.WeakSet())


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_drop)


def _drop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for reference, stepped in list(_resized.values()):
        parameter = reference()
        if parameter is None or optimizer in stepped:
            continue
        stepped.add(optimizer)
        state = optimizer.state.get(parameter, {})
        moments = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
        if any(moment.shape != parameter.shape for moment in moments):
            del optimizer.state[parameter]
