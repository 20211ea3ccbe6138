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

from .files import write_atomically
from .granularity import weight_of
from .layers import check_model
from .masks import piece_mask_of, set_piece_mask
from .modules import swap_modules
from .modules.formats import use_format_
from .saved_structure import (
    FORMAT,
    PARTS,
    block_sparse_layers,
    channels_last_layers,
    check_state,
    identities,
    norms_folded_into,
    structure_of,
)
from .shrinking import PARTS as SHRUNK_PARTS
from .shrinking import shaped_like_saved


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to a file, atomically: weights, masks and block-sparse structure.

    Example:
        >>> fp.save(model, "small.safetensors")
        >>> model = fp.load("small.safetensors", make_model())

    Raises:
        ValueError: the state holds something that is no tensor, or a foreign parametrization.

    """
    manifest, state = _what_is_saved(check_model(model))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_by_memory: dict[tuple, str] = {}
    for name, tensor in state.items():
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


def check_saved(model: nn.Module) -> None:
    """Raise the ValueError that :func:`save` would raise."""
    _what_is_saved(model)


def _what_is_saved(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the structure and the state of a model."""
    manifest, state = structure_of(model), model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"the state '{name}' is no tensor but {type(tensor).__name__}: it cannot be saved"
            )
    return manifest, state


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
    for key in SHRUNK_PARTS:  # files of before models were shrunk lack them
        manifest.setdefault(key, {})
    for key, kind in (*PARTS, *((key, dict) for key in SHRUNK_PARTS)):
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"'{os.fspath(path)}' has a damaged structure: no {kind.__name__} '{key}'")
    for alias, source in manifest["aliases"].items():
        if not isinstance(source, str) or source not in tensors or alias in tensors:
            raise ValueError(f"'{os.fspath(path)}' has a damaged structure: alias '{alias}' of '{source}'")
        tensors[alias] = tensors[source]
    return manifest, tensors


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
    with shaped_like_saved(fresh_model, manifest):
        return _load_into(fresh_model, manifest, tensors)


def _load_into(fresh_model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Read tensors into a model whose layers have the sizes of the saved ones."""
    layers = block_sparse_layers(manifest, tensors, fresh_model)
    replacements = {**layers, **identities(manifest, fresh_model)}
    biased = norms_folded_into(manifest, fresh_model) - layers.keys()
    channels_last = channels_last_layers(manifest, fresh_model)
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
    biases = {name: _empty_bias(modules[name]) for name in biased}
    for name, bias in biases.items():
        expected.update({f"{alias}.bias": bias for alias in names[id(modules[name])]})
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
    check_state(expected, tensors)

    swap_modules(fresh_model, replacements)
    for name, bias in biases.items():
        modules[name].register_parameter("bias", bias)
    for owner, parameter, mask in masks:
        set_piece_mask(owner, parameter, mask)
    fresh_model.load_state_dict(tensors)
    for name in channels_last:
        use_format_(fresh_model.get_submodule(name), torch.channels_last)
    return fresh_model


def _empty_bias(layer: nn.Module) -> nn.Parameter:
    """A bias for a layer that has none, to load the one of a folded batch norm into."""
    weight = weight_of(layer)
    return nn.Parameter(weight.detach().new_empty(weight.shape[0]), next(layer.parameters()).requires_grad)
