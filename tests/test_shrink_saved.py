"""save and load of shrunk models, sparsify_ after shrink, and files that were changed on purpose."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastprune as fp
from helpers import Snapshot, call, mlp
from networks import SmallConvNet, SmallResNet, SmallVGG
from shrink_cases import GroupedNet, magnitude_masks, tiny_bert, unit_masks

pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def small_resnet():
    return fp.shrink(
        model := SmallResNet().eval(),
        magnitude_masks(model, IMAGES, fp.Unit(coupled=True), exclude="head"),
        IMAGES,
    )


def biased():
    model = nn.Sequential(nn.Linear(9, 15), nn.Sigmoid(), nn.Linear(15, 5, bias=False)).eval()
    return fp.shrink(model, unit_masks(model, _0=(0, 3)), torch.randn(4, 9))


def biased_fresh():
    return nn.Sequential(nn.Linear(9, 15), nn.Sigmoid(), nn.Linear(15, 5, bias=False)).eval()


def same(first, second, x):
    outputs = [call(model, x) for model in (first, second)]
    return all(
        torch.equal(a, b)
        for a, b in zip(*(o.values() if isinstance(o, dict) else [o] for o in outputs), strict=True)
    )


@pytest.mark.parametrize(
    ("make", "fresh", "x"),
    [
        (small_resnet, lambda: SmallResNet().eval(), IMAGES),
        (biased, biased_fresh, torch.randn(4, 9, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_a_shrunk_model_loads_into_a_fresh_one(make, fresh, x, tmp_path):
    small = make()
    fp.save(small, tmp_path / "small.safetensors")
    loaded = fp.load(tmp_path / "small.safetensors", model := fresh())
    assert loaded is model
    assert same(loaded, small, x)
    # What was loaded can be saved, loaded over and trained.
    fp.save(loaded, tmp_path / "again.safetensors")
    assert same(fp.load(tmp_path / "again.safetensors", fresh()), small, x)
    assert same(fp.load(tmp_path / "again.safetensors", copy.deepcopy(loaded)), small, x)
    loaded(x).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_heads_and_layers_that_were_left_out_are_in_the_file(tmp_path):
    model, tokens = tiny_bert()
    heads = magnitude_masks(model, tokens, fp.Head())
    layer = fp.Masks(
        {"bert.encoder.layer.1": torch.tensor(False)}, fp.Layer(), {"bert.encoder.layer.1": torch.Size([])}
    )
    small = fp.shrink(model, [heads, layer], tokens)
    fp.save(small, tmp_path / "small.safetensors")
    fresh, _ = tiny_bert()
    loaded = fp.load(tmp_path / "small.safetensors", fresh)
    assert same(loaded, small, tokens)
    assert loaded.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    assert not list(loaded.bert.encoder.layer[1].parameters())


@pytest.mark.parametrize("fold", [False, True])
def test_sparsify_after_shrink_and_the_file_of_both(fold, tmp_path):
    small = small_resnet()
    blocks = magnitude_masks(small, IMAGES, fp.Block(2, 2))
    fp.apply_masks_(small, blocks)
    fp.save(small, tmp_path / "masked.safetensors")
    masked = fp.load(tmp_path / "masked.safetensors", SmallResNet().eval())
    assert same(masked, small, IMAGES)
    expected = small(IMAGES)
    fp.sparsify_(small, example_inputs=IMAGES, policy="always", blocksize=(2, 2), fold_batch_norm=fold)
    assert type(small.conv2) is fp.BlockSparseConv2d
    torch.testing.assert_close(small(IMAGES), expected)
    fp.save(small, tmp_path / "both.safetensors")
    loaded = fp.load(tmp_path / "both.safetensors", SmallResNet().eval())
    assert same(loaded, small, IMAGES)
    assert (loaded.conv2.in_channels, loaded.conv2.out_channels) == (3, 3)
    fp.save(loaded, tmp_path / "again.safetensors")
    assert same(fp.load(tmp_path / "again.safetensors", SmallResNet().eval()), small, IMAGES)


def test_files_of_before_models_were_shrunk_load(tmp_path):
    model, path = mlp(), tmp_path / "old.safetensors"
    fp.save(model, path)
    _tamper(path, lambda manifest: [manifest.pop(key) for key in ("cut", "skipped")])
    assert same(fp.load(path, mlp()), model, torch.randn(3, 7))


def _tamper(path, change):
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["fastprune"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(manifest)
    save_file(tensors, path, metadata={"fastprune": json.dumps(manifest)})


def _size(layer, key, value, side="to"):
    return lambda manifest: manifest["cut"][layer][side].__setitem__(key, value)


REFUSED = "damaged|`fresh_model` does not fit|does not fit `fresh_model`"
TAMPERED = {
    "no dict": lambda manifest: manifest.__setitem__("cut", []),
    "skipped no dict": lambda manifest: manifest.__setitem__("skipped", 3),
    "no entry": lambda manifest: manifest["cut"].__setitem__("conv1", 3),
    "no sizes": lambda manifest: manifest["cut"].__setitem__("conv1", {"from": {}, "to": {}}),
    "another size": _size("conv1", "out_channels", 4),
    "larger than before": _size("conv1", "out_channels", 7),
    "nothing": _size("conv1", "out_channels", 0),
    "negative": _size("norm1", "num_features", -1),
    "a float": _size("conv1", "out_channels", 3.0),
    "a bool": _size("conv1", "out_channels", True),
    "groups": _size("conv1", "groups", 3),
    "another before": _size("conv1", "out_channels", 8, "from"),
    "a bias that goes": _size("conv2", "bias", False),
    "a bias that is no bool": _size("conv2", "bias", 1),
    "another key": lambda manifest: manifest["cut"]["conv1"]["to"].__setitem__("kernel_size", 1),
    "a layer that is none": lambda manifest: manifest["cut"].__setitem__("conv9", manifest["cut"]["conv1"]),
    "a pool": lambda manifest: manifest["cut"].__setitem__("pool", manifest["cut"]["conv1"]),
    "left out": lambda manifest: manifest["cut"].pop("conv1"),
    "skipped": lambda manifest: manifest["skipped"].__setitem__("conv2", {"kind": "identity"}),
    "skipped nothing": lambda manifest: manifest["skipped"].__setitem__("conv9", {"kind": "identity"}),
    "skipped the model": lambda manifest: manifest["skipped"].__setitem__("", {"kind": "identity"}),
    "skipped kind": lambda manifest: manifest["skipped"].__setitem__("conv2", {"kind": "eval"}),
    "skipped shapes": lambda manifest: manifest["skipped"].__setitem__(
        "conv2", {"kind": "zeros", "shapes": [[1, -2], [3]]}
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_file_is_refused_and_the_fresh_model_is_unchanged(kind, tmp_path):
    fp.save(small_resnet(), tmp_path / "small.safetensors")
    _tamper(tmp_path / "small.safetensors", TAMPERED[kind])
    fresh = SmallResNet()
    before = Snapshot(fresh)
    with pytest.raises(ValueError, match=REFUSED):
        fp.load(tmp_path / "small.safetensors", fresh)
    before.assert_unchanged()


@pytest.mark.parametrize("make", [SmallConvNet, SmallVGG, GroupedNet, mlp])
def test_another_model_is_refused_and_unchanged(make, tmp_path):
    fp.save(small_resnet(), tmp_path / "small.safetensors")
    fresh = make()
    before = Snapshot(fresh)
    with pytest.raises(ValueError, match=REFUSED):
        fp.load(tmp_path / "small.safetensors", fresh)
    before.assert_unchanged()


def test_a_dense_file_is_refused_by_a_shrunk_model(tmp_path):
    fp.save(SmallResNet(), tmp_path / "dense.safetensors")
    small = small_resnet()
    before = Snapshot(small)
    with pytest.raises(ValueError, match=REFUSED):
        fp.load(tmp_path / "dense.safetensors", small)
    before.assert_unchanged()
