"""Which of the masked channels can go: those that nothing depends on, or that give the same for any input."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..layers import is_plain
from .dependencies import ChannelGroup, Side, sides_of


@dataclasses.dataclass
class Part:
    """Channels that are cut in one go, or not at all.

    Attributes:
        removed: the channels, by side of a layer.
        constants: layer name to inputs that go although they are not zero, and their values.
        attributes: module name to attributes that change with the number of heads.

    """

    removed: dict[Side, list[int]] = dataclasses.field(default_factory=dict)
    constants: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers whose outputs go."""
        return [name for (name, side), indices in self.removed.items() if side != "in" and indices]


@dataclasses.dataclass
class MaskedLayers:
    """What masks have left nothing of, by layer name: bool tensors, True for what is masked.

    Attributes:
        rows: ``[outputs]``.
        columns: ``[inputs]``, of all groups of a convolution.

    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[tuple[str, str], Tensor]) -> MaskedLayers:
        """Return what masks, by layer and parameter, leave of the layers of a model."""
        rows, columns = {}, {}
        for (name, parameter), mask in masks.items():
            if parameter != "weight" or mask.dim() < 2:
                continue
            rows[name] = ~mask.flatten(1).any(1).cpu()
            groups = getattr(model.get_submodule(name), "groups", 1)
            by_group = mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1)
            columns[name] = ~by_group.any(3).any(1).flatten().cpu()
        return cls(rows, columns)

    def row(self, name: str, index: int) -> bool:
        """Tell whether an output is masked."""
        return name in self.rows and bool(self.rows[name][index])

    def column(self, name: str, index: int) -> bool:
        """Tell whether an input is masked."""
        return name in self.columns and bool(self.columns[name][index])


def folds_constants(layer: nn.Module) -> bool:
    """Tell whether the bias can do what a constant input does: nowhere may padding stand beside it."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return False
    if is_plain(layer):
        return layer.padding in ((0, 0), "valid")
    # A forward of its own may pad, but not for a 1x1 kernel; what else it does shows in the comparison.
    return layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid", "same")


def why_kept(
    group: ChannelGroup,
    masked: MaskedLayers,
    constants: Mapping[str, tuple[Tensor, Tensor]],
    layers: Mapping[str, nn.Module],
) -> str | None:
    """Return why the channels of a group cannot be cut, or None where they can.

    Either every layer that reads them is masked there; or the layers that make them are masked, all of them,
    and give a constant, which is zero or which the bias of the readers can take over.
    """
    if group.obstacle is not None:
        return group.obstacle
    readers = [(name, index) for name, indices in group.sides("in") for index in indices]
    makers = [(name, index) for name, indices in group.sides("out") for index in indices]
    if not makers or not readers:
        return "no layer that can be cut " + ("reads it" if makers else "makes it")
    dead = all(masked.row(*maker) for maker in makers)
    for name, index in readers:
        if masked.column(name, index):
            continue
        if not dead:
            return "it is masked in only a part of the layers that it can only be removed from together"
        if name not in constants or not bool(constants[name][0][index]):
            return f"what is left of it is no constant where '{name}' reads it"
        if float(constants[name][1][index]) != 0.0 and not folds_constants(layers[name]):
            return f"a constant is left of it, which the bias of '{name}' cannot take over"
    return None


def parts_of(
    groups: Iterable[ChannelGroup],
    masked: MaskedLayers,
    constants: Mapping[str, tuple[Tensor, Tensor]],
    layers: Mapping[str, nn.Module],
) -> tuple[list[Part], list[ChannelGroup]]:
    """Return the groups as parts, and those that stay so that something, or as much everywhere, is left.

    In one part are groups that share a layer that makes channels, or a grouped convolution.
    """
    parents: dict[Side, Side] = {}

    def root(side: Side) -> Side:
        while parents.setdefault(side, side) != side:
            side = parents[side]
        return side

    members: dict[Side, list[ChannelGroup]] = {}
    ties = [
        (group, [side for side in group.channels if side[1] != "in" or _groups_of(layers[side[0]]) > 1])
        for group in groups
    ]
    for _, (first, *others) in ties:
        for side in others:
            parents[root(side)] = root(first)
    for group, sides in ties:
        members.setdefault(root(sides[0]), []).append(group)
    parts, staying = [], []
    for chosen in members.values():
        balanced = _balanced(chosen, layers)
        going = {id(group) for group in balanced}
        staying += [group for group in chosen if id(group) not in going]
        part = Part()
        for group in balanced:
            for side, indices in group.channels.items():
                part.removed.setdefault(side, []).extend(indices)
            for name, indices in group.sides("in"):
                for index in indices:
                    if not masked.column(name, index) and float(constants[name][1][index]) != 0.0:
                        part.constants.setdefault(name, {})[index] = float(constants[name][1][index])
        if part.removed:
            parts.append(part)
    return parts, staying


def _balanced(groups: list[ChannelGroup], layers: Mapping[str, nn.Module]) -> list[ChannelGroup]:
    """Leave groups out until one channel of each side stays, and as many of each group of a convolution."""
    groups = list(groups)
    while True:
        surplus = _surplus(groups, layers)
        if not surplus:
            return groups
        groups = [group for index, group in enumerate(groups) if index not in surplus]


def _surplus(groups: list[ChannelGroup], layers: Mapping[str, nn.Module]) -> set[int]:
    """Which groups are too many on the first side of a layer that has too many, by index."""
    going: dict[Side, list[tuple[int, int]]] = {}
    for position, group in enumerate(groups):
        for side, indices in group.channels.items():
            going.setdefault(side, []).extend((index, position) for index in indices)
    for (name, kind), channels in going.items():
        count = 1 if kind == "through" else _groups_of(layers[name])
        width = sides_of(layers[name])[kind] // count
        shares: list[Counter[int]] = [Counter() for _ in range(count)]
        for index, position in sorted(channels):
            shares[index // width][position] += 1
        allowed = min(width - 1, *(share.total() for share in shares))
        extra: set[int] = set()
        for share in shares:
            taken = 0
            for position, own in share.items():
                taken += own
                if taken > allowed:
                    taken -= own
                    extra.add(position)
        if extra:
            return extra
    return set()


def _groups_of(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def joined(parts: Iterable[Part]) -> Part:
    """Return all parts as one."""
    whole = Part()
    for part in parts:
        for side, indices in part.removed.items():
            whole.removed.setdefault(side, []).extend(indices)
        for name, values in part.constants.items():
            whole.constants.setdefault(name, {}).update(values)
        whole.attributes.update(part.attributes)
    return whole


def constant_tensors(part: Part) -> dict[str, tuple[list[int], Tensor]]:
    """Return the constants of a part as indices and values."""
    return {
        name: (list(values), torch.tensor(list(values.values()), dtype=torch.float64))
        for name, values in part.constants.items()
    }
