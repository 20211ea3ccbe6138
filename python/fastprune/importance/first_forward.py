"""What one forward shows: how often weights are used, and which batch norms go with units."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..granularity import Granularity, ParameterTensor, is_scorable, weight_of
from ..graph import TracedModel
from .calibration import weight_shape_of


class FirstForward(NamedTuple):
    """For each layer the dimensions of its output, and how often its weights are multiplied for one sample,
    as FLOPs count it.
    """  # noqa: D205

    weight_uses: dict[str, float]
    output_dims: dict[str, int]


@torch.no_grad()
def first_forward(
    model: nn.Module, layers: dict[str, nn.Module], granularities: dict[str, Granularity], batch: Batch
) -> FirstForward:
    """Run a model on a batch and return what it shows."""
    multiplying = {
        name: [module] * (is_scorable(module) and name.rpartition(".")[2] == "weight")
        if isinstance(granularities[name], ParameterTensor)
        else [part for part in module.modules() if is_scorable(part)]
        for name, module in layers.items()
    }
    counts: dict[nn.Module, float] = {}
    dims: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            out = weight_of(module).shape[0]
            counts[module] = counts.get(module, 0.0) + output.numel() / out / batch.size
            dims[module] = output.dim()

    with contextlib.ExitStack() as undo:
        for module in dict.fromkeys(itertools.chain(*multiplying.values())):
            undo.callback(module.register_forward_hook(count).remove)
        batch.fresh().call(model)
    uses = {}
    for name, module in layers.items():
        size = weight_shape_of(module, granularities[name], name).numel()
        flops = sum(counts.get(part, 0.0) * weight_of(part).numel() for part in multiplying[name])
        uses[name] = flops / size if size else 0.0
    return FirstForward(uses, {name: dims.get(module, 0) for name, module in layers.items()})


def fitting_norms(norms: dict[str, str], layers: dict[str, nn.Module], first: FirstForward) -> dict[str, str]:
    """The norms whose channels are the layer's units: after a Linear on ``[*, L, features]`` they are L."""
    return {
        name: norm
        for name, norm in norms.items()
        if not (isinstance(layers[name], nn.Linear) and first.output_dims[name] != 2)
    }


def find_norms(model: nn.Module, layers: dict[str, nn.Module], traced: TracedModel | None) -> dict[str, str]:
    """Layer name to the name of the batch norm that is the only consumer of its output."""
    if traced is None:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            warnings.warn(
                "fastprune: the model cannot be traced, so units are scored and masked without the batch "
                "norm after them",
                stacklevel=3,
            )
        return {}
    norms = {}
    for name, module in layers.items():
        node = traced.single_call(module)
        norm_node = traced.batch_norm_of(node) if node is not None else None
        norm = traced.module_of(norm_node) if norm_node is not None else None
        if norm is not None and norm.affine and norm.num_features == weight_of(module).shape[0]:
            norms[name] = str(traced.module_name(norm_node))  # type: ignore[arg-type]
    return norms
