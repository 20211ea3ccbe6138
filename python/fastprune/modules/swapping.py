"""Putting modules into the places of others, and copies of layers that go there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .attention import MultiheadAttention
from .linear import BlockSparseLinear

_CUT_FROM = "_fastprune_cut_from"


def sizes_before_cut(module: nn.Module) -> dict[str, int | bool] | None:
    """Return the sizes that a layer had before units were cut out of it, or None where none were."""
    return getattr(module, _CUT_FROM, None)


def mark_cut(module: nn.Module, before: Mapping[str, int | bool]) -> None:
    """Let a layer remember the sizes that it had; those that it remembers already stay."""
    if sizes_before_cut(module) is None:
        setattr(module, _CUT_FROM, dict(before))


def copy_of(module: nn.Module, **changes: Any) -> nn.Module:
    """Return a layer that computes the same, with plain parameters that need no gradient.

    Args:
        module: whose memory the copy shares, but for what a mask makes anew.
        changes: parameters and attributes that the copy has instead.

    """
    kind = parametrize.type_before_parametrizations(module)
    copied: nn.Module = object.__new__(kind)
    names = [*module._parameters]
    if parametrize.is_parametrized(module):
        names = list(dict.fromkeys([*module.parametrizations, *names]))  # type: ignore[misc]
    parameters = {}
    for name in names:
        tensor = changes.pop(name) if name in changes else getattr(module, name)
        parameters[name] = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
    modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    vars(copied).update({**vars(module), "_parameters": parameters, "_modules": modules, **changes})
    return copied


def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules at every place where the ones of these names are used; return the way back.

    torch's encoder is kept from its fast path where one of its Linears makes room for a block-sparse one, or
    its attention for an unpacked one.
    """
    undo: list[Callable[[], None]] = []

    def assign(owner: nn.Module, attribute: str, value: object) -> None:
        undo.append(functools.partial(setattr, owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    new = {id(model.get_submodule(name)): module for name, module in replacements.items()}
    for name, module in replacements.items():
        before = sizes_before_cut(model.get_submodule(name))
        if before is not None and not isinstance(module, nn.Identity):
            mark_cut(module, before)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and id(child) in new:
                undo.append(functools.partial(parent._modules.__setitem__, child_name, child))
                parent._modules[child_name] = new[id(child)]
    called = (BlockSparseLinear, MultiheadAttention)
    own = {id(module) for module in replacements.values() if isinstance(module, called)}
    for parent in model.modules():
        if not own.isdisjoint(id(module) for module in parent.modules()):
            if isinstance(parent, nn.TransformerEncoderLayer):
                # torch's fast path reads linear1.weight and would never call the swapped module.
                assign(parent, "activation_relu_or_gelu", 0)
            elif isinstance(parent, nn.TransformerEncoder):
                # For that path the encoder packs padded inputs as nested tensors, which need it.
                assign(parent, "use_nested_tensor", False)

    def revert() -> None:
        for step in reversed(undo):
            step()

    return revert
