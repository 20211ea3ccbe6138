"""load: a file that was changed on purpose is refused, and the fresh model is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastprune as fp
from helpers import Snapshot, masked_mlp, mlp
from networks import SmallVGG
from test_serialization import MODELS, SIZES, sparse_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = "is damaged|are damaged|has a damaged structure|is no whole fastprune file|`fresh_model`|has format"


def _tampered(path, change):
    """Write a file anew after ``change(manifest, tensors)``."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["fastprune"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    manifest = change(manifest, tensors) or manifest
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    save_file(tensors, path, metadata={"fastprune": text})


def _set(part, value):
    def change(manifest, tensors):
        tensors[part] = value(tensors[part]) if part in tensors else value

    return change


def _without(part):
    def change(manifest, tensors):
        del tensors[part]

    return change


def _edit(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def _entry(key, value):
    return lambda manifest, tensors: manifest["block_sparse_linear"]["0"].__setitem__(key, value)


def _manifest(key, value):
    return lambda manifest, tensors: manifest.__setitem__(key, value)


def _both_sparse_and_masked(manifest, tensors):
    manifest["masked"].append(["0", "weight"])
    tensors["0.parametrizations.weight.0.mask"] = torch.ones(33, 17, dtype=torch.bool)


TAMPERED = {
    "crow_indices beyond the blocks": _set("0.crow_indices", _edit(-1, 10_000)),
    "crow_indices negative": _set("0.crow_indices", _edit(1, -1)),
    "crow_indices decreasing": _set("0.crow_indices", _edit(1, 10_000)),
    "crow_indices too short": _set("0.crow_indices", lambda t: t[:-1].clone()),
    "crow_indices int64": _set("0.crow_indices", lambda t: t.long()),
    "col_indices beyond the columns": _set("0.col_indices", _edit(0, 5)),
    "col_indices huge": _set("0.col_indices", _edit(0, 2**31 - 1)),
    "col_indices negative": _set("0.col_indices", _edit(0, -1)),
    "col_indices unsorted": _set("0.col_indices", lambda t: t.flip(0)),
    "col_indices too many": _set("0.col_indices", lambda t: torch.cat([t, t[:1]])),
    "values of too few blocks": _set("0.packed_values", lambda t: t[1:].clone()),
    "values flat": _set("0.packed_values", lambda t: t.flatten()),
    "values int": _set("0.packed_values", lambda t: t.int()),
    "values double": _set("0.packed_values", lambda t: t.double()),
    "values missing": _without("0.packed_values"),
    "bias of another size": _set("0.bias", lambda t: t[:-1].clone()),
    "bias missing": _without("0.bias"),
    "bias double": _set("0.bias", lambda t: t.double()),
    "a tensor too many": _set("extra", torch.zeros(2)),
    "shape larger": _entry("shape", [2**40, 17]),
    "shape too large for an integer": _entry("shape", [10**30, 17]),
    "shape infinite": _entry("shape", [float("inf"), 17]),
    "shape negative": _entry("shape", [-33, 17]),
    "shape of another layer": _entry("shape", [33, 18]),
    "shape with one size": _entry("shape", [33]),
    "shape a string": _entry("shape", "33x17"),
    "shape missing": lambda manifest, tensors: manifest["block_sparse_linear"]["0"].pop("shape") and None,
    "activation unknown": _entry("activation", "os.system"),
    "activation a list": _entry("activation", ["relu"]),
    "entry a list": lambda manifest, tensors: manifest["block_sparse_linear"].__setitem__("0", []),
    "entry of no layer": lambda manifest, tensors: manifest["block_sparse_linear"].__setitem__(
        "9", manifest["block_sparse_linear"]["0"]
    ),
    "entry of another kind of layer": lambda manifest, tensors: manifest["block_sparse_linear"].__setitem__(
        "1", manifest["block_sparse_linear"].pop("0")
    ),
    "block_sparse_linear a list": _manifest("block_sparse_linear", []),
    "masked a dict": _manifest("masked", {}),
    "masked without names": _manifest("masked", [3]),
    "masked three names": _manifest("masked", [["2", "weight", "x"]]),
    "masked a layer that is not there": _manifest("masked", [["9", "weight"]]),
    "masked a flag": _manifest("masked", [["0", "training"]]),
    "masked without a mask": _manifest("masked", [["2", "weight"]]),
    "masked and sparse": _both_sparse_and_masked,
    "aliases a list": _manifest("aliases", []),
    "alias of nothing": _manifest("aliases", {"x": "nothing"}),
    "alias of a list": _manifest("aliases", {"x": ["0.bias"]}),
    "alias of what is there": _manifest("aliases", {"0.bias": "2.bias"}),
    "format of the future": _manifest("format", 2),
    "format missing": lambda manifest, tensors: manifest.pop("format") and None,
    "structure no dict": lambda manifest, tensors: "[]",
    "structure a number": lambda manifest, tensors: "3",
    "structure no JSON": lambda manifest, tensors: "{",
    "structure nested without end": lambda manifest, tensors: "[" * 100_000,
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_sparse_file_is_refused_and_the_fresh_model_is_unchanged(kind, tmp_path):
    path = tmp_path / "model"
    fp.save(sparse_mlp()[0], path)
    _tampered(path, lambda manifest, tensors: None)
    fp.load(path, mlp(*SIZES))  # written anew without a change it is good
    _tampered(path, TAMPERED[kind])
    fresh = mlp(*SIZES).train()
    snapshot = Snapshot(fresh)
    with pytest.raises(ValueError, match=REFUSED):
        fp.load(path, fresh)
    snapshot.assert_unchanged()


KEY = "0.parametrizations.weight"
TAMPERED_MASKS = {
    "mask of another shape": _set(f"{KEY}.0.mask", lambda t: t[:-1].clone()),
    "mask of numbers": _set(f"{KEY}.0.mask", lambda t: t.float()),
    "original of another shape": _set(f"{KEY}.original", lambda t: t[:-1].clone()),
    "original missing": _without(f"{KEY}.original"),
    "listed twice": lambda manifest, tensors: manifest["masked"].append(["0", "weight"]),
    "not listed": lambda manifest, tensors: manifest["masked"].clear(),
}


@pytest.mark.parametrize("kind", TAMPERED_MASKS)
def test_a_tampered_masked_file_is_refused_and_the_fresh_model_is_unchanged(kind, tmp_path):
    path = tmp_path / "model"
    fp.save(masked_mlp()[0], path)
    _tampered(path, TAMPERED_MASKS[kind])
    fresh = mlp(*SIZES)
    snapshot = Snapshot(fresh)
    with pytest.raises(ValueError, match=REFUSED):
        fp.load(path, fresh)
    snapshot.assert_unchanged()


def _conv(key, value):
    return lambda manifest, tensors: manifest["block_sparse_conv2d"]["3"].__setitem__(key, value)


def _geometry(key, value):
    return lambda manifest, tensors: manifest["block_sparse_conv2d"]["3"]["geometry"].__setitem__(key, value)


TAMPERED_CONVOLUTIONS = {
    "crow_indices beyond the blocks": _set("3.crow_indices", _edit(-1, 10_000)),
    "col_indices beyond the taps": _set("3.col_indices", _edit(-1, 18)),
    "col_indices unsorted": _set("3.col_indices", lambda t: t.flip(0)),
    "values flat": _set("3.packed_values", lambda t: t.flatten()),
    "values without dimensions": _set("3.packed_values", lambda t: t.sum()),
    "values without columns": _set("3.packed_values", lambda t: t[:, :0].clone()),
    "values of wider blocks": _set("3.packed_values", lambda t: torch.ones(len(t), 9, 4)),
    "values double": _set("3.packed_values", lambda t: t.double()),
    "values missing": _without("3.packed_values"),
    "bias of another size": _set("3.bias", lambda t: t[:-1].clone()),
    "bias of a folded norm missing": _without("3.bias"),
    "bias of a dense layer's folded norm missing": _without("0.bias"),
    "bias of a dense layer of another size": _set("0.bias", lambda t: t[:-1].clone()),
    "stride": _geometry("stride", [2, 2]),
    "kernel_size huge": _geometry("kernel_size", [10**30, 3]),
    "groups zero": _geometry("groups", 0),
    "forward of another class": _geometry("forward", "SamePadded"),
    "geometry missing": lambda manifest, tensors: (
        manifest["block_sparse_conv2d"]["3"].pop("geometry") and None
    ),
    "geometry a list": _conv("geometry", [1]),
    "geometry a number": _conv("geometry", 3),
    "activation unknown": _conv("activation", "os.system"),
    "activation a list": _conv("activation", ["relu"]),
    "entry a string": lambda manifest, tensors: manifest["block_sparse_conv2d"].__setitem__("3", "x"),
    "entry of no layer": lambda manifest, tensors: manifest["block_sparse_conv2d"].__setitem__(
        "99", manifest["block_sparse_conv2d"]["3"]
    ),
    "entry without a name": lambda manifest, tensors: manifest["block_sparse_conv2d"].__setitem__(
        "", manifest["block_sparse_conv2d"]["3"]
    ),
    "entry of a linear": lambda manifest, tensors: manifest["block_sparse_linear"].__setitem__(
        "3", manifest["block_sparse_conv2d"].pop("3")
    ),
    "block_sparse_conv2d missing": lambda manifest, tensors: manifest.pop("block_sparse_conv2d") and None,
    "folded a list": _manifest("folded", []),
    "folded a layer": lambda manifest, tensors: manifest["folded"].__setitem__("0", "3"),
    "folded a module that is not there": lambda manifest, tensors: manifest["folded"].__setitem__("99", "3"),
    "folded into a pool": lambda manifest, tensors: manifest["folded"].__setitem__("1", "9"),
    "folded into nothing": lambda manifest, tensors: manifest["folded"].__setitem__("1", "99"),
    "activation folded into a pool": lambda manifest, tensors: manifest["folded"].__setitem__("5", "9"),
    "folded into a number": lambda manifest, tensors: manifest["folded"].__setitem__("1", 3),
    "folded into a list": lambda manifest, tensors: manifest["folded"].__setitem__("1", ["3"]),
    "not folded": _manifest("folded", {}),
    "channels_last a dict": _manifest("channels_last", {}),
    "channels_last a number": _manifest("channels_last", [3]),
    "channels_last a list": _manifest("channels_last", [["3"]]),
    "channels_last a norm": _manifest("channels_last", ["1"]),
    "channels_last a layer that is not there": _manifest("channels_last", ["99"]),
}


@pytest.mark.parametrize("kind", TAMPERED_CONVOLUTIONS)
def test_a_tampered_file_of_convolutions_is_refused_and_the_fresh_model_is_unchanged(kind, tmp_path):
    path = tmp_path / "model"
    fp.save(MODELS["folded batch norms of dense layers"][0](), path)
    _tampered(path, lambda manifest, tensors: None)
    fp.load(path, SmallVGG())
    _tampered(path, TAMPERED_CONVOLUTIONS[kind])
    fresh = SmallVGG().train()
    snapshot = Snapshot(fresh)
    with pytest.raises(ValueError, match=REFUSED):
        fp.load(path, fresh)
    snapshot.assert_unchanged()
