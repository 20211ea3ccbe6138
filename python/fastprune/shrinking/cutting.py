"""Cutting channels out of layers in place, and what remembers the sizes that the layers had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..granularity import HEAD_COUNTS
from ..modules.swapping import mark_cut
from .dependencies import Side, is_depthwise

Removed = Mapping[Side, Sequence[int]]
"""The channels that go, by side of a layer."""

_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "groups")
HEADS = (*HEAD_COUNTS, "all_head_size", "inner_dim")


def sizes_of(module: nn.Module) -> dict[str, int | bool]:
    """Return the sizes that cutting changes, and whether there is a bias; {} where nothing is ever cut.

    Example:
        >>> sizes_of(nn.Linear(64, 10))
        {'in_features': 64, 'out_features': 10, 'bias': True}

    """
    names: Sequence[str] = HEADS
    if isinstance(module, _BatchNorm):
        names = ("num_features",)
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        names = _LINEAR
    elif hasattr(module, "in_channels") and hasattr(module, "out_channels"):
        names = _CONV
    sizes: dict[str, int | bool] = {
        name: value for name in names if isinstance(value := getattr(module, name, None), int)
    }
    if names is _LINEAR or names is _CONV:
        sizes["bias"] = getattr(module, "bias", None) is not None
    return sizes


def cut_(
    model: nn.Module,
    removed: Removed,
    masks: dict[tuple[str, str], Tensor],
    constants: Mapping[str, tuple[list[int], Tensor]],
    attributes: Mapping[str, Mapping[str, int]],
) -> None:
    """Cut channels out of the layers of a model in place.

    Args:
        model: without parametrizations.
        removed: the channels that go.
        masks: bool masks by layer and parameter, which are cut as the parameters are, in place.
        constants: layer name to inputs that go and their values, which the layer's bias takes over.
        attributes: module name to attributes that change with the number of heads.

    """
    for name, (inputs, values) in constants.items():
        _fold_constants(model.get_submodule(name), inputs, values)
    sides: dict[str, dict[str, list[int]]] = {}
    for (name, side), indices in removed.items():
        if indices:
            sides.setdefault(name, {})[side] = list(indices)
    for name, parts in sides.items():
        _cut_layer(model.get_submodule(name), name, parts, masks)
    for name, values_of in attributes.items():
        owner = model.get_submodule(name)
        mark_cut(owner, sizes_of(owner))
        for attribute, value in values_of.items():
            setattr(owner, attribute, value)


@torch.no_grad()
def _fold_constants(layer: Any, inputs: list[int], values: Tensor) -> None:
    """Let the bias do what inputs that are always the same do; the layer gets one where it has none."""
    weight = layer.weight.double()
    columns = weight if weight.dim() == 2 else weight.sum((2, 3))
    shift = columns[:, inputs] @ values.to(weight)
    if layer.bias is None:
        mark_cut(layer, sizes_of(layer))
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.copy_((layer.bias.double() + shift).to(layer.bias.dtype))


def _cut_layer(
    module: Any, name: str, parts: Mapping[str, list[int]], masks: dict[tuple[str, str], Tensor]
) -> None:
    """Cut the channels of one layer, its masks and its sizes."""
    mark_cut(module, sizes_of(module))
    kept = _kept_of(module, parts)
    for key in [key for key in masks if key[0] == name]:
        masks[key] = kept(key[1], masks[key])
    for parameter, tensor in list(module._parameters.items()):
        if tensor is not None:
            cut = kept(parameter, tensor.detach())
            if cut.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
                cut = cut.contiguous(memory_format=torch.channels_last)
            module._parameters[parameter] = nn.Parameter(cut.clone(), tensor.requires_grad)
    for buffer, tensor in list(module._buffers.items()):
        if tensor is not None and tensor.dim():
            module._buffers[buffer] = kept(buffer, tensor).clone()
    for side, indices in parts.items():
        _resize(module, side, len(indices))


def _resize(module: Any, side: str, removed: int) -> None:
    if isinstance(module, _BatchNorm):
        names: tuple[str, ...] = ("num_features",)
    elif side == "through":
        names = _CONV
    elif isinstance(module, nn.Linear):
        names = ("out_features" if side == "out" else "in_features",)
    else:
        names = ("out_channels" if side == "out" else "in_channels",)
    for name in names:
        setattr(module, name, getattr(module, name) - removed)


def _kept_of(module: Any, parts: Mapping[str, list[int]]) -> Callable[[str, Tensor], Tensor]:
    """Return a function from a parameter's name and tensor, or mask, to what is left of it."""
    if isinstance(module, _BatchNorm) or is_depthwise(module):
        size = module.num_features if isinstance(module, _BatchNorm) else module.out_channels
        through = _left(size, parts.get("through", ()))
        return lambda _, tensor: tensor[through.to(tensor.device)]
    linear = isinstance(module, nn.Linear)
    outputs = _left(module.out_features if linear else module.out_channels, parts.get("out", ()))
    inputs = _left(module.in_features if linear else module.in_channels, parts.get("in", ()))
    groups = 1 if linear else module.groups

    def kept(parameter: str, tensor: Tensor) -> Tensor:
        rows, columns = outputs.to(tensor.device), inputs.to(tensor.device)
        if parameter != "weight":
            return tensor[rows]
        if groups == 1:
            return tensor[rows][:, columns]
        # Each group has as many outputs and inputs as the others, but not the same ones.
        width = tensor.shape[1]
        return torch.cat(
            [
                tensor[own_rows][:, own_columns - group * width]
                for group, (own_rows, own_columns) in enumerate(
                    zip(rows.view(groups, -1), columns.view(groups, -1), strict=True)
                )
            ]
        )

    return kept


def _left(size: int, removed: Sequence[int]) -> Tensor:
    left = torch.ones(size, dtype=torch.bool)
    left[list(removed)] = False
    return torch.nonzero(left).flatten()
