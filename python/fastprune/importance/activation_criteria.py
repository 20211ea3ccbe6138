"""Criteria of what goes into layers and comes out of them: activation, wanda."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..granularity import Element, Granularity, Layer, ParameterTensor, Unit, is_scorable, weight_of
from ..graph import TracedModel
from ..node_ops import node_op
from .calibration import Calibration
from .criterion import Criterion, Merging
from .sample_gradients import unfold

Record = Callable[[str, nn.Module, Tensor, Tensor], None]


@torch.no_grad()
def _forward_all(calibration: Calibration, criterion: Criterion, record: Record) -> None:
    """Run the model over all batches; ``record`` gets name, layer, input and output of each layer's calls.

    Raises:
        ValueError: a layer was never called with a tensor.

    """
    called = set()

    def hook_of(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                called.add(name)
                record(name, module, args[0], output)

        return hook

    with contextlib.ExitStack() as undo:
        for name, module in calibration.layers.items():
            undo.callback(module.register_forward_hook(hook_of(name)).remove)
        for batch in calibration.batches():
            batch.fresh().call(calibration.model)
    silent = [name for name in calibration.layers if name not in called]
    if silent:
        raise ValueError(
            f"criterion '{criterion}' reads what layers are called with, but layer '{silent[0]}' was never "
            "called with one tensor: leave it out by `exclude`"
        )


@dataclasses.dataclass(frozen=True)
class Activation(Criterion):
    """How active a unit or a whole layer is, over all samples and positions.

    Read behind the layer's own batch norm and activation function where the model can be traced and each is
    the only consumer of what comes before; else right behind the layer.

    Example:
        >>> fp.score(model, loader, criterion=fp.criteria.Activation("zeros"), granularity=fp.Unit())

    Args:
        statistic: "mean", of ``|a|``; "max", of ``|a|``; "zeros", the share of ``a`` that is not zero, so
            that larger matters more.

    Raises:
        ValueError: the statistic is something else; pieces are neither units nor layers.

    Source: Hu et al. 2016, "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
    Architectures", equation 1: "zeros" is one minus the average percentage of zeros. Molchanov et al. 2017,
    "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.2, for the mean.

    """

    statistic: str = "mean"
    needs_trace: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.statistic not in ("mean", "max", "zeros"):
            raise ValueError(
                f"Activation `statistic` must be 'mean', 'max' or 'zeros', got {self.statistic!r}"
            )

    def check_granularity(self, granularity: Granularity) -> None:
        """Raise ValueError unless pieces are units or whole layers."""
        if not isinstance(granularity, (Unit, Layer)) or isinstance(granularity, ParameterTensor):
            raise ValueError(
                f"criterion '{self}' has scores for fp.Unit() and fp.Layer() alone, got `granularity` "
                f"{granularity}"
            )

    def merging(self, granularity: Granularity) -> Merging:
        """Return "max" for the largest activation, "mean" for the others."""
        return "max" if self.statistic == "max" else "mean"

    def join(self, means: Tensor) -> Tensor:
        """Return the largest activation of the layers, or their mean."""
        return means.amax(0) if self.statistic == "max" else means.mean(0)

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the statistic of each piece."""
        traced = calibration.traced
        behind = {
            name: [] if traced is None else _behind(traced, module)
            for name, module in calibration.layers.items()
        }
        found: dict[str, Tensor] = {}
        counts = dict.fromkeys(calibration.layers, 0.0)

        def record(name: str, module: nn.Module, value: Tensor, output: Tensor) -> None:
            if traced is not None:
                output = _run_behind(traced, behind[name], output)
            output = output.double().abs()
            if isinstance(calibration.granularities[name], Unit):
                channel_dim = output.dim() - 3 if isinstance(module, nn.Conv2d) else -1
                rows = output.movedim(channel_dim, 0).flatten(1)
            else:
                rows = output.reshape(1, -1)
            if self.statistic == "max":
                largest = rows.amax(1)
                found[name] = torch.maximum(found[name], largest) if name in found else largest
            else:
                active = (rows != 0).double() if self.statistic == "zeros" else rows
                found[name] = found.get(name, 0.0) + active.sum(1)
                counts[name] += rows.shape[1]

        _forward_all(calibration, self, record)
        calibration.weights = counts
        return {name: self._by_piece(calibration, name, found[name], counts[name]) for name in counts}

    def _by_piece(self, calibration: Calibration, name: str, units: Tensor, count: float) -> Tensor:
        """Reduce the statistic of units to that of groups of units, or of the layer."""
        granularity, shape = calibration.granularities[name], calibration.pieces(name)
        if not isinstance(granularity, Unit):
            return (units if self.statistic == "max" else units / count).view(shape)
        if self.statistic == "max":
            groups = granularity.expand_units(torch.arange(shape[0], device=units.device), len(units))
            return units.new_zeros(shape).scatter_reduce_(0, groups, units, "amax")
        sizes = granularity.sum_pieces(torch.ones_like(units)[:, None])
        return granularity.sum_pieces(units[:, None]) / (sizes * count)


def _behind(traced: TracedModel, module: nn.Module) -> list[fx.Node]:
    """The batch norm and the activation function that alone consume a layer's output."""
    node, behind = traced.single_call(module), []
    for kind in ("batch_norm", "elementwise"):
        following = None if node is None else traced.only_consumer(node)
        op = None if following is None else node_op(traced, following)
        if following is None or op is None or op.kind != kind or following.all_input_nodes != [node]:
            continue
        behind.append(following)
        node = following
    return behind


def _run_behind(traced: TracedModel, nodes: list[fx.Node], value: Tensor) -> Tensor:
    with traced.functional():
        for node in nodes:
            before = value
            value = traced.evaluate(node, lambda _: before)  # noqa: B023  evaluated at once
    return value


@dataclasses.dataclass(frozen=True)
class Wanda(Criterion):
    """Weights times the norm of their inputs, summed over each piece: ``sum |w_ij| * |x_j|``.

    ``|x_j|`` is the L2 norm of input feature j over the positions of a sample, root mean square over samples;
    for a Conv2d, of what the weight's kernel tap sees of its input channel. Biases do not count. Scores of
    single weights can be merged, those of larger pieces cannot: a sum of roots is not made of its parts.

    Example:
        >>> fp.score(model, loader, criterion="wanda", granularity=fp.Element())

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", equation 1.

    """

    def check_granularity(self, granularity: Granularity) -> None:
        """Raise ValueError for parameters that are multiplied by no input."""
        if isinstance(granularity, ParameterTensor):
            raise ValueError(f"criterion '{self}' has no score for `granularity` {granularity}")

    def merging(self, granularity: Granularity) -> Merging:
        """Return "root mean" for single weights, "never" for larger pieces."""
        return "root mean" if isinstance(granularity, Element) else "never"

    def means(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the sums; for single weights their squares."""
        for name, module in calibration.layers.items():
            if not is_scorable(module):
                raise ValueError(
                    f"criterion '{self}' needs Linear or Conv2d layers, got a {type(module).__name__} as "
                    f"layer '{name}'; choose others by `include`"
                )
        squares = dict.fromkeys(calibration.layers, 0.0)

        def record(name: str, module: nn.Module, value: Tensor, output: Tensor) -> None:
            squares[name] = squares[name] + _input_squares(module, value)  # type: ignore[assignment]

        _forward_all(calibration, self, record)
        calibration.weights = dict.fromkeys(calibration.layers, float(calibration.num_samples))
        means = {}
        for name, module in calibration.layers.items():
            granularity, weight = calibration.granularities[name], weight_of(module).detach().double()
            mean_square = torch.as_tensor(squares[name]) / calibration.num_samples
            if isinstance(granularity, Element):
                means[name] = weight.square() * mean_square
            else:
                means[name] = granularity.sum_pieces(weight.abs() * mean_square.sqrt())
        return means


def _input_squares(module: nn.Module, value: Tensor) -> Tensor:
    """Sums of squares of what each weight is multiplied by, in a shape that broadcasts to the weight's."""
    if not isinstance(module, nn.Conv2d):
        return value.flatten(0, -2).double().square().sum(0)
    images = value if value.dim() == 4 else value[None]
    total = torch.zeros((), dtype=torch.float64)
    for image in images.split(1):  # patches are as many times the input as there are taps
        total = total.to(image.device) + unfold(module, image).double().square().sum((0, 3))
    out, inputs, *kernel = weight_of(module).shape
    rows = total.view(module.groups, 1, inputs, *kernel).expand(-1, out // module.groups, -1, -1, -1)
    return rows.reshape(out, inputs, *kernel)
