"""Letting modules compute with other tensors for a while.

torch.func.functional_call is no help: a module that is registered under two names keeps the replacement
for good, and it cannot reach behind a parametrization.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Fixed(nn.Module):
    """A parametrization that gives one tensor, whatever it is given."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def put_tensor(undo: contextlib.ExitStack, module: nn.Module, parameter: str, tensor: Tensor) -> None:
    """Let a module compute with another tensor until the stack is closed."""
    if parametrize.is_parametrized(module, parameter):
        chain: Any = module.parametrizations[parameter]  # type: ignore[index]
        # `del chain[-1]` would put a new dict in the place of the one that EvalMode gives back.
        undo.callback(chain._modules.pop, str(len(chain)))
        chain.append(_Fixed(tensor))
    else:
        undo.callback(module._parameters.__setitem__, parameter, module._parameters[parameter])
        module._parameters[parameter] = tensor  # type: ignore[assignment]


@contextlib.contextmanager
def replaced(replacements: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Let modules compute with other tensors within a block: (module, parameter, tensor) each."""
    with contextlib.ExitStack() as undo:
        for replacement in replacements:
            put_tensor(undo, *replacement)
        yield
