"""Which channels of which layers can only be cut together, as Torch-Pruning's dependency graph finds them.

The graph (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning") says what hangs together. It takes
every operation that it does not know for an elementwise one, so what it says is tried before it is believed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batches import Batch

Side = tuple[str, str]
"""A layer's name, and "out", "in" or, where the two are the same channels, "through"."""


@dataclasses.dataclass
class ChannelGroup:
    """Channels of several layers that can only be cut together.

    Attributes:
        channels: the indices of each side of a layer.
        obstacle: why they cannot be cut at all, or None.

    """

    channels: dict[Side, list[int]] = dataclasses.field(default_factory=dict)
    obstacle: str | None = None

    def sides(self, kind: str) -> list[tuple[str, list[int]]]:
        """Return the layers and indices of one kind of side."""
        return [(name, indices) for (name, side), indices in self.channels.items() if side == kind]


def import_torch_pruning() -> Any:
    """Return the module ``torch_pruning``.

    Raises:
        ImportError: it is not installed.

    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "fp.shrink finds what hangs together by Torch-Pruning: pip install 'fastprune[structured]'"
        ) from error
    return torch_pruning


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, whatever structure holds them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    else:
        parts = list(vars(output).values()) if hasattr(output, "__dict__") else []
    return [tensor for part in parts for tensor in output_tensors(part)]


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether each output channel of a convolution is made of the input channel of its index alone."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def sides_of(module: nn.Module) -> dict[str, int]:
    """Return how many channels each side of a layer has that can be cut; none for other modules."""
    if isinstance(module, nn.Linear):
        return {"out": module.out_features, "in": module.in_features}
    if is_depthwise(module):
        return {"through": module.out_channels}  # type: ignore[dict-item]
    if isinstance(module, nn.Conv2d):
        return {"out": module.out_channels, "in": module.in_channels}
    return {"through": module.num_features} if isinstance(module, _BatchNorm) else {}


class _Groups:
    """Sets of channels that grow together (union-find), and what keeps some of them."""

    def __init__(self, sides: Mapping[Side, int]) -> None:
        self.sides = sides
        self.starts: dict[Side, int] = {}
        total = 0
        for side, size in sides.items():
            self.starts[side] = total
            total += size
        self.parents = list(range(total))
        self.obstacles: dict[int, str] = {}

    def root(self, channel: int) -> int:
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def join(self, first: int, second: int) -> None:
        first, second = self.root(first), self.root(second)
        if first != second:
            self.parents[second] = first
            if second in self.obstacles:
                self.obstacles.setdefault(first, self.obstacles[second])

    def keep(self, channel: int, obstacle: str) -> None:
        self.obstacles.setdefault(self.root(channel), obstacle)

    def result(self) -> list[ChannelGroup]:
        groups: dict[int, ChannelGroup] = {}
        for side, start in self.starts.items():
            for index in range(self.sides[side]):
                root = self.root(start + index)
                group = groups.setdefault(root, ChannelGroup(obstacle=self.obstacles.get(root)))
                group.channels.setdefault(side, []).append(index)
        return list(groups.values())


def channel_groups(model: nn.Module, batch: Batch, kept: Mapping[str, str]) -> list[ChannelGroup]:
    """Return all channels of a model's layers in the groups that can only be cut together.

    Args:
        model: without parametrizations; its parameters require gradients, by which the graph is traced.
        batch: that the model runs on.
        kept: layers that are not to be cut, and why.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the graph cannot be built.

    """
    names = {module: name for name, module in model.named_modules()}
    sides = {(name, side): size for module, name in names.items() for side, size in sides_of(module).items()}
    groups = _Groups(sides)
    for (name, side), start in groups.starts.items():
        if name in kept:
            for index in range(sides[name, side]):
                groups.keep(start + index, kept[name])
    seen: set[Side] = set()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = _graph(model, batch)
        for module in list(graph.module2node):
            layer = names.get(module) if isinstance(module, nn.Module) else None
            root = ("" if layer is None else layer, "through" if is_depthwise(module) else "out")
            if layer is not None and root in sides and root not in seen:
                _add(groups, graph, module, root, names, seen)
    return groups.result()


def _graph(model: nn.Module, batch: Batch) -> Any:
    torch_pruning = import_torch_pruning()
    try:
        return torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs=batch,
            forward_fn=lambda model, batch: batch.fresh().call(model),
            output_transform=lambda output: [t for t in output_tensors(output) if t.grad_fn is not None],
            verbose=False,
        )
    except Exception as error:  # a model's own code runs there, and what it does may be new to the graph
        raise ValueError(
            f"`model` cannot be shrunk: Torch-Pruning cannot trace it ({type(error).__name__}: {error})"
        ) from error


def _add(
    groups: _Groups,
    graph: Any,
    module: nn.Module,
    root: Side,
    names: Mapping[nn.Module, str],
    seen: set[Side],
) -> None:
    """Join what goes with the outputs of a layer."""
    size, start = groups.sides[root], groups.starts[root]
    outputs = graph.get_pruner_of_module(module).prune_out_channels
    for item in graph.get_pruning_group(module, outputs, list(range(size))):
        target = item.dep.target.module
        name = names.get(target) if isinstance(target, nn.Module) else None
        kinds = {} if name is None else sides_of(target)
        side = None
        if "through" in kinds:
            side = "through"
        elif kinds:
            side = (
                "out" if item.dep.handler == graph.get_pruner_of_module(target).prune_out_channels else "in"
            )
        obstacle = None if side is not None else _obstacle(target, name)
        for index, source in zip(item.idxs, item.root_idxs, strict=True):
            if source is None or not 0 <= source < size:
                continue
            if obstacle is not None:
                groups.keep(start + source, obstacle)
            elif side is not None and name is not None:
                if 0 <= index < kinds[side]:
                    groups.join(start + source, groups.starts[name, side] + index)
                else:
                    groups.keep(start + source, f"it has no counterpart in layer '{name}'")
        if side is not None and name is not None and len(item.idxs) == kinds[side]:
            seen.add((name, side))


def _obstacle(target: Any, name: str | None) -> str | None:
    """Why the channels that reach a target stay, or None where it only passes them on."""
    if isinstance(target, nn.Parameter):
        return "a parameter that belongs to no layer has the same channels"
    if type(target).__name__ == "_OutputOp":
        return "the model returns it"
    if name is not None and next(target.parameters(), None) is not None:
        return f"'{name}', a {type(target).__name__}, needs all of its channels"
    return None
