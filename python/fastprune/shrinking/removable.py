"""What of a model can be cut out at all, so that nothing else is scored for it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from ..batches import model_device
from ..masks import remove_masks_
from ..modules.examples import example_batches
from .dependencies import channel_groups
from .heads import attentions
from .removal import kept_layers


class Removable(NamedTuple):
    """Layer names.

    Attributes:
        units: layers that lose units.
        heads: the output projections of attentions that lose heads.

    """

    units: list[str]
    heads: list[str]


@torch.inference_mode(False)
def removable_layers(model: nn.Module, example_inputs: Any) -> Removable:
    """Return the layers whose units, and attentions whose heads, :func:`shrink` can cut if they are masked.

    Left out are layers whose outputs the model returns, that a layer norm or another module needs whole, that
    are used more than once, and the projections of attentions, of which only whole heads go.

    Example:
        >>> removable_layers(nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5)), torch.randn(2, 7))
        Removable(units=['0'], heads=[])

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: it cannot trace the model.

    """
    twin = remove_masks_(copy.deepcopy(model)).eval().requires_grad_(True)
    batch = example_batches(example_inputs, model_device(model))[0]
    heads = attentions(twin)
    free = {
        name
        for group in channel_groups(twin, batch, kept_layers(twin, heads, batch))
        if group.obstacle is None and group.sides("in")
        for name, _ in group.sides("out")
    }
    units = [name for name, module in twin.named_modules() if name in free]
    return Removable(units, [attention.output for attention in heads])
