"""set_density: one set of weights at several speeds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import check_model
from ..masks import check_scope
from .base import BlockSparseLayer, check_running_density, top_share


def set_density(
    model: nn.Module, density: float, scores: Mapping[str, Tensor] | None = None, *, scope: str = "layer"
) -> nn.Module:
    """Run only the most important of the blocks that a model's layers keep, in place; return the model.

    The blocks that do not run are not lost: a later call may run more of them, and a state dict holds all.
    So one model serves several latency targets (:meth:`BlockSparseLinear.set_density`).

    Example:
        >>> fp.sparsify_(model, example_inputs=x)
        >>> fp.set_density(model, 0.5)  # faster, less accurate
        >>> fp.set_density(model, 1.0)  # as before

    Args:
        model: with block-sparse layers; at least one.
        density: share of the kept blocks, in [0, 1].
        scores: layer name to scores in the shape of the layer's grid of blocks, such as those that
            :func:`score` gave for ``fp.Block`` of the same size before the model was converted; None for the
            sum of squares of a block's weights. Layers that they do not name run all blocks.
        scope: "layer" for the same share of each layer's blocks, "global" to rank those of all together.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``density`` or ``scope`` is out of range, the model has no block-sparse layer, or
            scores do not have the shape of a layer's blocks. The model is left as it was.

    """
    check_model(model)
    check_running_density(density)
    check_scope(scope)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLayer)}
    if not layers:
        raise ValueError("`model` has no block-sparse layer; call sparsify_ first")
    if scores is not None:
        missing = [name for name in scores if name not in dict(model.named_modules())]
        if missing:
            raise ValueError(f"`scores` has layers that the model has not: {', '.join(missing)}")
    importance = {
        name: layer.block_importance(None if scores is None else scores[name])
        for name, layer in layers.items()
        if scores is None or name in scores
    }
    if scope == "global":
        every = torch.cat([values.double().cpu() for values in importance.values()])
        counts = [len(values) for values in importance.values()]
        runs = dict(zip(importance, top_share(every, density).split(counts), strict=True))
    else:
        runs = {name: top_share(values, density) for name, values in importance.items()}
    for name, layer in layers.items():
        every_block = torch.ones(len(layer.packed_values), dtype=torch.bool)
        layer.run_blocks(runs.get(name, every_block))
    return model
