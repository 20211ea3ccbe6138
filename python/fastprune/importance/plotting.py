"""Scores as a figure: their distribution in each layer, and heat maps of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond that the maps are too small to read.
_MAPS = 12
_COLUMNS = 3
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def plot_scores(scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor], title: str) -> Figure:
    """Return a figure with a box for each layer, and a heat map for each of the first twelve with blocks.

    Boxes reach from the first quartile to the third, whiskers from the 5th percentile to the 95th. Pieces
    that were pruned already are left out of the boxes and blank in the maps; a map's colours reach from the
    2nd percentile to the 98th.

    Raises:
        ImportError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'fastprune[plot]'") from error
    maps = [name for name, layer in scores.items() if layer.dim() == 2 and layer.numel() > 1][:_MAPS]
    rows = -(-len(maps) // _COLUMNS)
    heights = [max(1.6, 0.32 * len(scores) + 1.0), *[2.8] * rows]
    figure = Figure(figsize=(10.5, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(1 + rows, _COLUMNS, height_ratios=heights)
    _boxes(figure.add_subplot(grid[0, :]), scores, pruned)
    for index, name in enumerate(maps):
        axes = figure.add_subplot(grid[1 + index // _COLUMNS, index % _COLUMNS])
        _map(figure, axes, name, _kept(scores, pruned, name))
    return figure


def _kept(scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor], name: str) -> Tensor:
    layer = scores[name]
    return torch.where(pruned[name], torch.nan, layer) if name in pruned else layer


def _boxes(axes: Any, scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    layers = [_kept(scores, pruned, name).flatten() for name in scores]
    positions = list(range(len(layers), 0, -1))  # the first layer on top
    for position, layer in zip(positions, layers, strict=True):
        known = layer[~layer.isnan()]
        lowest, first, median, third, highest = (_quantile(known, share) for share in _SHARES)
        axes.hlines(position, lowest, highest, color="0.4", linewidth=1)
        axes.barh(position, third - first, left=first, height=0.6, color="C0", alpha=0.6)
        axes.vlines(median, position - 0.3, position + 0.3, color="black", linewidth=1.5)
    axes.set_yticks(positions, [name or "(model)" for name in scores])
    everything = torch.cat([layer[~layer.isnan()].abs() for layer in layers])
    typical = float(everything.median()) if everything.numel() else 0.0
    if typical > 0 and float(everything.max()) > 50 * typical:
        axes.set_xscale("symlog", linthresh=typical)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_ylabel("layer")
    axes.set_xlabel("score of a piece (larger matters more)")


def _map(figure: Any, axes: Any, name: str, layer: Tensor) -> None:
    known = layer[~layer.isnan()]
    low, high = (_quantile(known, share) for share in (0.02, 0.98))
    image = axes.imshow(layer.numpy(), aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, format="%.1e")
    axes.set_title(f"layer {name}" if name else "(model)", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("block column", fontsize=8)
    axes.set_ylabel("block row", fontsize=8)


def _quantile(values: Tensor, share: float) -> float:
    # Tensor.quantile takes no more than 16 million entries.
    ordered = values.flatten().sort().values
    return float(ordered[round(share * (len(ordered) - 1))]) if len(ordered) else 0.0
