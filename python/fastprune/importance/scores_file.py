"""Scores as one safetensors file: tensors by layer, all else as JSON in the metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_atomically
from ..granularity import Block, Element, Granularity, Head, InputUnit, Layer, ParameterTensor, Unit
from .criterion import Merging, finish

FORMAT = 1
_GRANULARITIES = {
    kind.__name__: kind for kind in (Block, Element, Head, InputUnit, Layer, ParameterTensor, Unit)
}
_TENSORS = ("scores", "pruned", "means")


def has_file_format(granularity: Granularity) -> bool:
    """Tell whether a granularity is one of fastprune's own, which another process can read."""
    return _GRANULARITIES.get(type(granularity).__name__) is type(granularity)


def granularity_to_json(granularity: Granularity) -> dict[str, Any]:
    """Return a granularity as its class's name and fields.

    Raises:
        ValueError: it is not one of fastprune's own, which no other process could read.

    """
    if _GRANULARITIES.get(type(granularity).__name__) is not type(granularity):
        raise ValueError(f"scores of a granularity of your own cannot be saved: {granularity}")
    fields = dataclasses.asdict(granularity)
    return {"kind": type(granularity).__name__, **fields}


def granularity_from_json(entry: Mapping[str, Any]) -> Granularity:
    """Return the granularity of its name and fields.

    Raises:
        ValueError: there is no such granularity, or a field is of the wrong kind.

    """
    fields = {name: value for name, value in entry.items() if name != "kind"}
    if any(value is not None and not isinstance(value, (int, bool)) for value in fields.values()):
        raise ValueError(f"a granularity with {fields}")
    granularity = _GRANULARITIES[entry["kind"]](**fields)
    if isinstance(granularity, InputUnit) and granularity.groups < 1:
        raise ValueError(f"a granularity with {fields}")
    return granularity


def write_scores(
    path: str | os.PathLike[str], scores: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write scores and the keyword arguments that ImportanceScores are made with, atomically."""
    tensors = {}
    for kind in _TENSORS:
        for name, tensor in ((scores if kind == "scores" else facts[kind]) or {}).items():
            tensors[f"{kind}/{name}"] = tensor.detach().cpu().contiguous().clone()
    manifest = {
        **{key: value for key, value in facts.items() if key not in _TENSORS},
        "format": FORMAT,
        "layers": list(scores),
        "has_means": facts["means"] is not None,
        "granularity": granularity_to_json(facts["granularity"]),
        "granularities": {
            name: granularity_to_json(granularity) for name, granularity in facts["granularities"].items()
        },
        "weight_shapes": {name: list(shape) for name, shape in facts["weight_shapes"].items()},
    }
    metadata = {"fastprune_scores": json.dumps(manifest)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_scores(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return scores and the keyword arguments that ImportanceScores are made with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, tampered with, or holds no scores.

    """
    where = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file that ImportanceScores.save wrote, got {where!r}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("fastprune_scores")
            if text is None:
                raise ValueError("it has no `fastprune_scores` in its metadata")
            manifest = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{where}' is no whole file of fastprune scores: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"'{where}' has format {found!r}, this fastprune reads {FORMAT}")
    try:
        return _checked(manifest, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"'{where}' holds damaged scores: {type(error).__name__}: {error}") from error


def _checked(
    manifest: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers = manifest["layers"]
    _expect(isinstance(layers, list) and all(isinstance(name, str) for name in layers), "layers")
    facts: dict[str, Any] = {}
    for key, kinds in (
        ("criterion", str),
        ("merging", str),
        ("num_samples", int),
        ("loss", (float, type(None))),
        ("digest", (str, type(None))),
    ):
        facts[key] = manifest[key]
        _expect(isinstance(facts[key], kinds), key)
    _expect(facts["merging"] in get_args(Merging) and facts["num_samples"] >= 0, "merging or num_samples")
    for key, kind in (("weights", float), ("norms", str), ("element_sizes", int), ("weight_uses", float)):
        entries = manifest[key]
        facts[key] = entries
        if key == "weight_uses" and entries is None:
            continue
        _expect(set(entries) <= set(layers), key)
        _expect(all(isinstance(value, kind) for value in entries.values()), key)
    facts["coupled"] = tuple(tuple(group) for group in manifest["coupled"])
    members = [name for group in facts["coupled"] for name in group]
    _expect(len(set(members)) == len(members) and set(members) <= set(layers), "coupled")
    facts["granularity"] = granularity_from_json(manifest["granularity"])
    facts["granularities"] = {name: granularity_from_json(manifest["granularities"][name]) for name in layers}
    facts["weight_shapes"] = {name: torch.Size(manifest["weight_shapes"][name]) for name in layers}
    _expect(set(facts["element_sizes"]) == set(layers), "element_sizes")
    for group in facts["coupled"]:
        shapes = {facts["granularities"][name].shape(facts["weight_shapes"][name]) for name in group}
        _expect(len(group) > 1 and len(shapes) == 1, "coupled")
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in _TENSORS}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        shape = facts["granularities"][name].shape(facts["weight_shapes"][name])
        dtype = torch.bool if group == "pruned" else torch.float64
        _expect(tensor.shape == shape and tensor.dtype == dtype, key)
        found[group][name] = tensor
    _expect(set(found["scores"]) == set(layers), "scores")
    facts["pruned"] = {name: found["pruned"][name] for name in layers if name in found["pruned"]}
    facts["means"] = {name: found["means"][name] for name in layers} if manifest["has_means"] else None
    scores = {name: found["scores"][name] for name in layers}
    for name, means in (facts["means"] or {}).items():
        _expect(torch.equal(finish(facts["merging"], means), scores[name]), f"means of '{name}'")
    return scores, facts


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"unexpected {what}")
