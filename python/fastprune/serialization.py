"""save and load: safetensors for the tensors, JSON in its metadata for the structure. No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .block_sparse import BlockSparseTensor
from .files import write_atomically
from .layers import check_model
from .masks import piece_mask_of, set_piece_mask
from .modules import BlockSparseLinear, swap_modules

FORMAT = 1
_BLOCK_SPARSE_TENSORS = ("packed_values", "crow_indices", "col_indices", "bias")


def _structure(model: nn.Module) -> dict[str, Any]:
    """What a fresh model needs before its state fits: block-sparse modules and masks."""
    block_sparse = {}
    masked = []
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            if not name:
                raise ValueError("`model` must not be a BlockSparseLinear itself; put it into a Sequential")
            block_sparse[name] = {
                "shape": [module.out_features, module.in_features],
                "activation": module.activation,
            }
        elif parametrize.is_parametrized(module):
            for parameter in module.parametrizations:
                chain = module.parametrizations[parameter]
                if len(chain) != 1 or piece_mask_of(module, parameter) is None:
                    raise ValueError(
                        f"layer '{name}' has a parametrization of '{parameter}' that is no fastprune mask; "
                        "remove it before saving"
                    )
                masked.append([name, parameter])
    return {"format": FORMAT, "block_sparse_linear": block_sparse, "masked": masked}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a file, atomically: weights, masks and block-sparse structure.

    Example:
        >>> fp.save(model, "small.safetensors")
        >>> model = fp.load("small.safetensors", make_model())

    Raises:
        ValueError: the state holds something that is no tensor, or a foreign parametrization.

    """
    manifest = _structure(check_model(model))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_by_memory: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"the state '{name}' is no tensor but {type(tensor).__name__}: it cannot be saved"
            )
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and memory in first_by_memory:
            aliases[name] = first_by_memory[memory]
            continue
        first_by_memory[memory] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    manifest["aliases"] = aliases
    write_atomically(
        path, lambda temporary: save_file(tensors, temporary, metadata={"fastprune": json.dumps(manifest)})
    )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file that fastprune saved, got {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})["fastprune"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{os.fspath(path)}' is no whole fastprune file: {error}") from error
    except KeyError as error:
        raise ValueError(f"'{os.fspath(path)}' was not saved by fastprune: it has no structure") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"'{os.fspath(path)}' has format {found!r}, this fastprune reads {FORMAT}")
    for key, kind in (("block_sparse_linear", dict), ("masked", list), ("aliases", dict)):
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"'{os.fspath(path)}' has a damaged structure: no {kind.__name__} '{key}'")
    for alias, source in manifest["aliases"].items():
        if not isinstance(source, str) or source not in tensors or alias in tensors:
            raise ValueError(f"'{os.fspath(path)}' has a damaged structure: alias '{alias}' of '{source}'")
        tensors[alias] = tensors[source]
    return manifest, tensors


def _block_sparse_module(
    name: str, entry: Any, tensors: dict[str, Tensor], fresh: nn.Module
) -> BlockSparseLinear:
    try:
        out_features, in_features = (int(size) for size in entry["shape"])
        parts = {part: tensors.get(f"{name}.{part}") for part in _BLOCK_SPARSE_TENSORS}
        packed_values, crow_indices, col_indices, bias = parts.values()
        if packed_values is None or crow_indices is None or col_indices is None:
            raise ValueError(f"it lacks {sorted(part for part, tensor in parts.items() if tensor is None)}")
        weight = BlockSparseTensor(packed_values, crow_indices, col_indices, (out_features, in_features))
        module = BlockSparseLinear(weight, bias, entry["activation"])
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the saved layer '{name}' is damaged: {error}") from error
    old = dict(fresh.named_modules()).get(name)
    sizes = (getattr(old, "out_features", None), getattr(old, "in_features", None))
    if (
        not name
        or not isinstance(old, (nn.Linear, BlockSparseLinear))
        or sizes != (out_features, in_features)
    ):
        raise ValueError(
            f"`fresh_model` does not fit: layer '{name}' must be a Linear with {in_features} inputs and "
            f"{out_features} outputs, got {old}"
        )
    _check_state(
        {f"{name}.{part}": tensor for part, tensor in old.state_dict().items() if part == "bias"},
        {f"{name}.{part}": tensor for part, tensor in module.state_dict().items() if part == "bias"},
    )
    parameter = next(iter(old.parameters()))
    module.requires_grad_(parameter.requires_grad)
    if packed_values.dtype != parameter.dtype:
        raise ValueError(
            f"`fresh_model` does not fit: layer '{name}' must be {packed_values.dtype}, got {parameter.dtype}"
        )
    return module.to(parameter.device).train(old.training)


def load(path: str | os.PathLike[str], fresh_model: nn.Module) -> nn.Module:
    """Read a saved model into a fresh one of the same architecture, in place, and return it.

    Everything is checked first: on an error the fresh model is left as it was.

    Example:
        >>> model = fp.load("small.safetensors", make_model())

    Args:
        path: a file that :func:`save` wrote.
        fresh_model: the dense architecture the saved model came from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, tampered with or of another model; the message says where.

    """
    check_model(fresh_model, "fresh_model")
    manifest, tensors = _read(path)
    replacements = {
        name: _block_sparse_module(name, entry, tensors, fresh_model)
        for name, entry in manifest["block_sparse_linear"].items()
    }
    modules = dict(fresh_model.named_modules())
    # A module that is used in several places has its state under each of its names.
    names: dict[int, list[str]] = {}
    for name, module in fresh_model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    masks: list[tuple[nn.Module, str, Tensor]] = []
    replaced = {alias: module for name, module in replacements.items() for alias in names[id(modules[name])]}
    expected = {
        name: tensor
        for name, tensor in fresh_model.state_dict().items()
        if name.rpartition(".")[0] not in replaced
    }
    for name, module in replaced.items():
        expected.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})
    for entry in manifest["masked"]:
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise ValueError(f"the saved masks are damaged: {entry!r}")
        name, parameter = entry
        prefix = f"{name}." if name else ""
        key = f"{prefix}parametrizations.{parameter}"
        mask = tensors.get(f"{key}.0.mask")
        original = getattr(modules.get(name), parameter, None)
        if not isinstance(original, Tensor) or mask is None:
            raise ValueError(f"`fresh_model` does not fit: it has no '{parameter}' in layer '{name}' to mask")
        if mask.shape != original.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"`fresh_model` does not fit: the mask of '{name}.{parameter}' must be bool of shape "
                f"{list(original.shape)}, got {mask.dtype} of shape {list(mask.shape)}"
            )
        if piece_mask_of(modules[name], parameter) is None:
            for alias in names[id(modules[name])]:
                prefix = f"{alias}." if alias else ""
                if f"{prefix}{parameter}" not in expected:
                    raise ValueError(f"the saved masks are damaged: {entry!r} is no plain parameter")
                expected[f"{prefix}parametrizations.{parameter}.original"] = expected.pop(
                    f"{prefix}{parameter}"
                )
                expected[f"{prefix}parametrizations.{parameter}.0.mask"] = mask
            masks.append((modules[name], parameter, mask))
    _check_state(expected, tensors)

    swap_modules(fresh_model, replacements)
    for owner, parameter, mask in masks:
        set_piece_mask(owner, parameter, mask)
    fresh_model.load_state_dict(tensors)
    return fresh_model


def _overlaps(tensor: Tensor) -> bool:
    """Whether a tensor has elements that share memory, as an expanded one has: it cannot be written to."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check_state(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
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
