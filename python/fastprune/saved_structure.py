"""The structure of a saved model: what a fresh one needs before the tensors of a file fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._fake_checks import is_mixed
from .block_sparse import BlockSparseTensor
from .masks import piece_mask_of
from .modules import BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from .modules.fold import NORMS, identity_for
from .modules.formats import is_channels_last
from .modules.own_forward import has_own_forward
from .node_ops import ACTIVATION_MODULES, computes_activation
from .reference import ACTIVATIONS
from .shrinking import shrunk_structure

FORMAT = 1
PARTS = (
    ("block_sparse_linear", dict),
    ("block_sparse_conv2d", dict),
    ("folded", dict),
    ("channels_last", list),
    ("masked", list),
    ("aliases", dict),
)
_BLOCK_SPARSE_TENSORS = ("packed_values", "crow_indices", "col_indices", "bias")
_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Return what a fresh model needs before its state fits: all of ``PARTS`` but the aliases.

    Raises:
        ValueError: the model is a block-sparse layer itself, or has a foreign parametrization.

    """
    linears, convolutions, folded = {}, {}, {}
    channels_last, masked = [], []
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLayer) and not name:
            kind = type(module).__name__
            raise ValueError(f"`model` must not be a {kind} itself; put it into a Sequential")
        if isinstance(module, BlockSparseLinear):
            shape = [module.out_features, module.in_features]
            linears[name] = {"shape": shape, "activation": module.activation}
        elif isinstance(module, BlockSparseConv2d):
            convolutions[name] = {"geometry": _geometry(module), "activation": module.activation}
            if module.channels_last:
                channels_last.append(name)
        elif parametrize.is_parametrized(module):
            for parameter in module.parametrizations:
                chain = module.parametrizations[parameter]
                if len(chain) != 1 or piece_mask_of(module, parameter) is None:
                    raise ValueError(
                        f"layer '{name}' has a parametrization of '{parameter}' that is no fastprune mask; "
                        "remove it before saving"
                    )
                masked.append([name, parameter])
        elif isinstance(module, nn.Conv2d) and is_channels_last(module.weight):
            channels_last.append(name)
        elif isinstance(module, nn.Identity) and hasattr(module, "_fastprune_folded_into"):
            folded[name] = module._fastprune_folded_into
    return {
        "format": FORMAT,
        "block_sparse_linear": linears,
        "block_sparse_conv2d": convolutions,
        "folded": folded,
        "channels_last": channels_last,
        "masked": masked,
        **shrunk_structure(model),
    }


def _geometry(conv: nn.Conv2d | BlockSparseConv2d) -> dict[str, Any]:
    """What a convolution is beside its parameters, as JSON gives it back."""
    if isinstance(conv, BlockSparseConv2d):
        own_class = conv.own_class
    else:
        own_class = parametrize.type_before_parametrizations(conv) if has_own_forward(conv) else None
    values = {name: getattr(conv, name) for name in _GEOMETRY}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {**values, "forward": None if own_class is None else own_class.__qualname__}


def _parts(name: str, tensors: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """The tensors of a saved block-sparse layer."""
    parts = {part: tensors.get(f"{name}.{part}") for part in _BLOCK_SPARSE_TENSORS}
    packed_values, crow_indices, col_indices, bias = parts.values()
    if packed_values is None or crow_indices is None or col_indices is None:
        raise ValueError(f"it lacks {sorted(part for part, tensor in parts.items() if tensor is None)}")
    return (packed_values, crow_indices, col_indices), bias


def _linear(name: str, entry: Any, tensors: dict[str, Tensor], old: nn.Module | None) -> BlockSparseLinear:
    with _damage(name):
        out_features, in_features = (int(size) for size in entry["shape"])
        parts, bias = _parts(name, tensors)
        weight = BlockSparseTensor(*parts, (out_features, in_features))
        module = BlockSparseLinear(weight, bias, entry["activation"])
    sizes = (getattr(old, "out_features", None), getattr(old, "in_features", None))
    if not isinstance(old, (nn.Linear, BlockSparseLinear)) or sizes != (out_features, in_features):
        raise ValueError(
            f"`fresh_model` does not fit: layer '{name}' must be a Linear with {in_features} inputs and "
            f"{out_features} outputs, got {old}"
        )
    return module


def _conv2d(name: str, entry: Any, tensors: dict[str, Tensor], old: nn.Module | None) -> BlockSparseConv2d:
    with _damage(name):
        geometry, activation = dict(entry["geometry"]), entry["activation"]
        parts, bias = _parts(name, tensors)
    if not isinstance(old, (nn.Conv2d, BlockSparseConv2d)) or _geometry(old) != geometry:
        raise ValueError(
            f"`fresh_model` does not fit: layer '{name}' must be a Conv2d with {geometry}, got {old}"
        )
    with _damage(name):
        packed_values = parts[0]
        channels = old.in_channels // old.groups
        cols = packed_values.shape[1]
        width = old.kernel_size[0] * old.kernel_size[1] * -(-channels // cols) * cols
        weight = BlockSparseTensor(*parts, (old.out_channels, width))
        return BlockSparseConv2d.like(old, weight, bias, activation)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn what a damaged entry of a layer raises into one error."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"the saved layer '{name}' is damaged: {error}") from error


def block_sparse_layers(
    manifest: dict[str, Any], tensors: dict[str, Tensor], fresh: nn.Module
) -> dict[str, nn.Module]:
    """Return the saved block-sparse layers by name, for the places of those that a fresh model has.

    Raises:
        ValueError: the file is damaged, or the fresh model is another.

    """
    modules = {name: module for name, module in fresh.named_modules() if name}
    biased = norms_folded_into(manifest, fresh)
    layers: dict[str, nn.Module] = {}
    for kind, read in (("block_sparse_linear", _linear), ("block_sparse_conv2d", _conv2d)):
        for name, entry in manifest[kind].items():
            old = modules.get(name)
            layer: BlockSparseLayer = read(name, entry, tensors, old)
            assert old is not None
            bias = layer.packed_values.new_empty(layer.weight_shape[0]) if name in biased else old.bias
            check_state(
                {} if bias is None else {f"{name}.bias": bias},
                {} if layer.bias is None else {f"{name}.bias": layer.bias},
            )
            parameter = next(iter(old.parameters()))
            layer.requires_grad_(parameter.requires_grad)
            own_dtype = isinstance(layer, BlockSparseLinear) and is_mixed(parameter, layer.packed_values)
            if layer.packed_values.dtype != parameter.dtype and not own_dtype:
                raise ValueError(
                    f"`fresh_model` does not fit: layer '{name}' must be {layer.packed_values.dtype}, "
                    f"got {parameter.dtype}"
                )
            layers[name] = layer.to(parameter.device).train(old.training)
    return layers


def identities(manifest: dict[str, Any], fresh: nn.Module) -> dict[str, nn.Module]:
    """Return by name what stands for the modules of a fresh model whose work layers do in the saved one.

    Raises:
        ValueError: the file is damaged, or the fresh model is another.

    """
    modules = dict(fresh.named_modules())
    fused = {**manifest["block_sparse_linear"], **manifest["block_sparse_conv2d"]}
    found: dict[str, nn.Module] = {}
    for name, layer in manifest["folded"].items():
        old, target = modules.get(name), modules.get(layer) if isinstance(layer, str) else None
        activation = fused.get(layer, {}).get("activation") if isinstance(layer, str) else None
        foldable = (
            isinstance(old, (*NORMS, *ACTIVATION_MODULES))
            or hasattr(old, "_fastprune_folded_into")
            or (old is not None and activation in ACTIVATIONS and computes_activation(old, activation))
        )
        if not foldable or not isinstance(target, (nn.Linear, nn.Conv2d, BlockSparseLayer)):
            raise ValueError(
                f"`fresh_model` does not fit: '{name}' must be a batch norm or activation to fold into the "
                f"layer '{layer}', got {old} and {target}"
            )
        assert old is not None
        found[name] = identity_for(old, layer).train(old.training)
    return found


def norms_folded_into(manifest: dict[str, Any], fresh: nn.Module) -> set[str]:
    """Return the names of layers that got a bias with a batch norm, which those of the fresh model lack."""
    modules = dict(fresh.named_modules())
    return {
        layer
        for name, layer in manifest["folded"].items()
        if isinstance(layer, str)
        and isinstance(modules.get(name), NORMS)
        and getattr(modules.get(layer), "bias", False) is None
    }


def channels_last_layers(manifest: dict[str, Any], fresh: nn.Module) -> list[str]:
    """Return the names of the layers that run channels-last.

    Raises:
        ValueError: the file is damaged, or the fresh model is another.

    """
    modules = dict(fresh.named_modules())
    for name in manifest["channels_last"]:
        module = modules.get(name) if isinstance(name, str) else None
        if not isinstance(module, (nn.Conv2d, BlockSparseConv2d)):
            raise ValueError(f"`fresh_model` does not fit: layer {name!r} must be a Conv2d, got {module}")
    return manifest["channels_last"]


def _overlaps(tensor: Tensor) -> bool:
    """Whether a tensor has elements that share memory, as an expanded one has: it cannot be written to."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_state(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless saved tensors have the names, shapes and dtypes that are expected."""
    missing, unexpected = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"the file does not fit `fresh_model`: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    for name, tensor in expected.items():
        saved = tensors[name]
        if _overlaps(tensor):
            raise ValueError(f"`fresh_model` cannot be loaded into: '{name}' is an expanded tensor; clone it")
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise ValueError(
                f"the file does not fit `fresh_model`: '{name}' must be {tensor.dtype} of shape "
                f"{list(tensor.shape)}, got {saved.dtype} of shape {list(saved.shape)}"
            )
