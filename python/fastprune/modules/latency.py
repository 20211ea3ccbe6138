"""measure_latency: what each layer of a model takes dense, and block-sparse at several densities."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import model_device
from ..granularity import Block, weight_of
from ..latency import LatencyTable, LayerLatency
from ..layers import Selection, check_model, select_layers
from ..timing import interleaved_medians
from .choice import layer_seconds
from .conv import BlockSparseConv2d
from .convert import why_dense
from .examples import example_batches, record_inputs
from .linear import BlockSparseLinear
from .swapping import copy_of

DENSITIES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@torch.inference_mode(False)
@torch.no_grad()
def measure_latency(
    model: nn.Module,
    *,
    example_inputs: Any,
    granularity: Block = Block(16, 16),  # noqa: B008  frozen
    densities: Sequence[float] = DENSITIES,
    include: Selection = None,
    exclude: Selection = None,
    seed: int = 0,
) -> LatencyTable:
    """Measure what each layer takes dense, and block-sparse at several densities.

    Each layer runs on the inputs that it gets from ``example_inputs``, dense and sparse in turn, up to 15
    times for each density and no longer than half a second once five are done; blocks are kept at random.
    Layers that :func:`sparsify_` would leave dense have their dense time alone, those that the inputs never
    reach one of 0. The model is left as it was.

    Example:
        >>> costs = fp.measure_latency(model, example_inputs=torch.randn(256, 64))
        >>> masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))

    Args:
        model: dense, or masked.
        example_inputs: as for :func:`sparsify_`; for a list, seconds are those of all together.
        granularity: the blocks.
        densities: kept shares of the blocks, in [0, 1]; what lies between is interpolated.
        include: layers, as for :func:`score`.
        exclude: layers to leave out, in the same forms.
        seed: of the random blocks.

    Raises:
        TypeError: ``model``, ``granularity`` or ``example_inputs`` is of the wrong kind.
        ValueError: ``densities`` are empty or out of range, or no layer is left.

    """
    check_model(model)
    if not isinstance(granularity, Block):
        raise TypeError(f"`granularity` must be fp.Block(rows, cols), got {granularity!r}")
    densities = [_check_density(density) for density in densities]
    if not densities:
        raise ValueError("`densities` must hold at least one number in [0, 1], got none")
    layers = select_layers(model, include, exclude)
    device = model_device(model)
    batches = example_batches(example_inputs, device)
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        inputs = record_inputs(model, layers, batches)
        blocksize = (granularity.rows, granularity.cols)
        generator = torch.Generator().manual_seed(seed)
        table = {}
        for name, module in layers.items():
            if why_dense(model, name, module, inputs[name], blocksize, "measured") is None:
                table[name] = _sparse_latency(module, granularity, densities, inputs[name], device, generator)
            else:
                table[name] = LayerLatency(_dense_seconds(copy_of(module), inputs[name], device))
    finally:
        for flagged, training in flags:
            flagged.training = training
    return LatencyTable(table, granularity)


def _check_density(density: float) -> float:
    if isinstance(density, bool) or not isinstance(density, Real) or not 0.0 <= float(density) <= 1.0:
        raise ValueError(f"`densities` must be numbers in [0, 1], got {density!r}")
    return float(density)


def _dense_seconds(dense: nn.Module, inputs: list[Tensor], device: torch.device) -> float:
    if not inputs:
        return 0.0
    calls = [lambda: [dense(x) for x in inputs]]
    return interleaved_medians(calls, device=device, minimum_seconds=1e-3, maximum_seconds=0.5)[0]


def _sparse_latency(
    module: nn.Module,
    granularity: Block,
    densities: Sequence[float],
    inputs: list[Tensor],
    device: torch.device,
    generator: torch.Generator,
) -> LayerLatency:
    """Measure one layer; each sparse time is scaled from the dense one of its run to the median of those."""
    kind: Any = BlockSparseLinear if isinstance(module, nn.Linear) else BlockSparseConv2d
    grid = granularity.shape(weight_of(module).shape)
    order = torch.randperm(grid.numel(), generator=generator)
    dense, pairs = copy_of(module), {}
    for kept in sorted({round(density * grid.numel()) for density in densities}):
        mask = torch.zeros(grid.numel(), dtype=torch.bool)
        mask[order[:kept]] = True
        sparse = kind.from_dense(module, (granularity.rows, granularity.cols), mask.view(grid))
        pairs[kept / grid.numel()] = layer_seconds(dense, sparse, inputs, device)
    dense_seconds = statistics.median(pair[0] for pair in pairs.values())
    return LayerLatency(
        dense_seconds,
        tuple(pairs),
        tuple(sparse_seconds / seconds * dense_seconds for seconds, sparse_seconds in pairs.values()),
    )
