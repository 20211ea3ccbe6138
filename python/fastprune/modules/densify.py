"""to_dense_: plain layers in the place of block-sparse ones, for what knows no others, such as exporters."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers import check_model
from .conv import BlockSparseConv2d
from .linear import BlockSparseLinear
from .swapping import swap_modules

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


def to_dense_(model: nn.Module) -> nn.Module:
    """Swap block-sparse layers for ``nn.Linear`` and ``nn.Conv2d`` in place, and return the model.

    Skipped blocks become plain zeros, and activations that the kernels computed modules again, at the place
    that they had. The model computes what it did before, at the speed of a dense one: ``torch.export``, ONNX
    and other tools that know only torch's own layers take it. A Linear without a bias whose weights have a
    dtype of their own (``weight_dtype``) keeps that; ``.float()`` gives the model one dtype.

    Example:
        >>> exported = torch.export.export(fp.to_dense_(copy.deepcopy(model)), (x,))
        >>> torch.onnx.export(exported, dynamo=True).save("small.onnx")

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model is a block-sparse layer itself.

    """
    replacements: dict[str, nn.Module] = {}
    for name, layer in check_model(model).named_modules():
        if not isinstance(layer, (BlockSparseLinear, BlockSparseConv2d)):
            continue
        if not name:
            raise ValueError(
                f"`model` must not be a {type(layer).__name__} itself, which has a to_dense() of its own"
            )
        activation, layer.activation = layer.activation, None
        try:
            dense: nn.Module = layer.to_dense()
        finally:
            layer.activation = activation
        if activation is not None:
            module = _ACTIVATIONS[activation]().train(layer.training)
            place = _place_of_activation(model, name)
            if place is None:
                dense = nn.Sequential(dense, module).train(layer.training)
            else:
                if getattr(model.get_submodule(place), "_fastprune_inplace", False):
                    # What reads its input afterwards reads what it gave.
                    module.inplace = True  # type: ignore[assignment]
                replacements[place] = module
        replacements[name] = dense
    swap_modules(model, replacements)
    return model


def _place_of_activation(model: nn.Module, layer: str) -> str | None:
    """The name of what stands where the activation of a layer stood: the last that was folded into it."""
    folded = [
        name
        for name, module in model.named_modules()
        if getattr(module, "_fastprune_folded_into", None) == layer
    ]
    return folded[-1] if folded else None
