"""save and load: round trips of every kind of model, and no file that harms the fresh one."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastprune as fp
from fastprune.files import write_atomically
from fastprune.modules.formats import is_channels_last, use_format_
from helpers import Snapshot, masked_mlp, mlp
from networks import SamePadded, SharedLayer, SmallConvNet, SmallResNet, SmallVGG, spoil_norm

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (17, 33, 10)


def sparse_mlp(**options):
    model, x = masked_mlp(0.5, **options)
    return fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always"), x


def mask(model, granularity=fp.Block(4, 4), **options):  # noqa: B008
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, **options)
    return fp.apply_masks_(model, scores.select(sparsity=0.5, scope="layer"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.head(torch.relu(self.body(self.embedding(x)))) * self.scale


def _unit_masked():
    model = nn.Sequential(nn.Linear(17, 9), spoil_norm(nn.BatchNorm1d(9)), nn.Linear(9, 4)).eval()
    masks = fp.Masks({"0": torch.arange(9) > 3}, fp.Unit(), {"0": torch.Size([9, 17])}, norms={"0": "1"})
    return fp.apply_masks_(model, masks)


def _sparse(model, x, fold=False, **options):
    return fp.sparsify_(
        mask(model, **options), example_inputs=x, blocksize=(4, 4), policy="always", fold_batch_norm=fold
    )


def _encoder():
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()


def _images(*sizes):
    return torch.randn(2, *sizes)


def _padded():
    return nn.Sequential(SamePadded(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3, padding="same")).eval()


def _channels_last():
    """Sparse and dense convolutions in a model that was measured to be faster channels-last."""
    model = _sparse(SmallConvNet().eval(), _images(3, 7, 5), include=["conv2", "head"])
    use_format_(model, torch.channels_last)
    return model


X = torch.randn(3, 17)
MODELS = {
    "dense": (lambda: mlp(*SIZES), lambda: mlp(*SIZES), X),
    "masked": (lambda: masked_mlp()[0], lambda: mlp(*SIZES), X),
    "masked, into a masked one": (lambda: masked_mlp()[0], lambda: masked_mlp(0.25)[0], X),
    "masked units and norm": (
        _unit_masked,
        lambda: nn.Sequential(nn.Linear(17, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)).eval(),
        X,
    ),
    "sparse": (lambda: sparse_mlp()[0], lambda: mlp(*SIZES), X),
    "sparse, into a sparse one": (lambda: sparse_mlp()[0], lambda: sparse_mlp(sizes=SIZES)[0], X),
    "sparse in double": (lambda: sparse_mlp()[0].double(), lambda: mlp(*SIZES).double(), X.double()),
    "bfloat16": (lambda: mlp(*SIZES).bfloat16(), lambda: mlp(*SIZES).bfloat16(), X.bfloat16()),
    "tied weights": (Tied, Tied, torch.tensor([0, 3, 4])),
    "tied weights and a sparse layer": (
        lambda: _sparse(Tied(), torch.tensor([0, 3]), include="body"),
        Tied,
        torch.tensor([0, 3, 4]),
    ),
    "a shared layer, masked": (lambda: mask(SharedLayer()), SharedLayer, torch.randn(3, 7)),
    "a shared layer, sparse": (
        lambda: _sparse(SharedLayer(), torch.randn(2, 7)),
        SharedLayer,
        torch.randn(3, 7),
    ),
    "convolutions, masked": (
        lambda: mask(SmallConvNet()).eval(),
        lambda: SmallConvNet().eval(),
        torch.randn(2, 3, 7, 5),
    ),
    "convolutions, sparse": (
        lambda: _sparse(SmallConvNet().eval(), _images(3, 7, 5)),
        lambda: SmallConvNet().eval(),
        _images(3, 7, 5),
    ),
    "convolutions, sparse into sparse": (
        lambda: _sparse(SmallResNet().eval(), _images(3, 7, 5)),
        lambda: _sparse(SmallResNet().eval(), _images(3, 7, 5)),
        _images(3, 7, 5),
    ),
    "convolutions, channels-last": (_channels_last, lambda: SmallConvNet().eval(), _images(3, 7, 5)),
    "convolutions with a padding of their own": (
        lambda: _sparse(_padded(), _images(3, 7, 5)),
        _padded,
        _images(3, 7, 5),
    ),
    "folded batch norms": (
        lambda: _sparse(SmallVGG().eval(), _images(3, 7, 5), fold=True),
        lambda: SmallVGG().eval(),
        _images(3, 7, 5),
    ),
    "folded batch norms of dense layers": (
        lambda: _sparse(SmallVGG().eval(), _images(3, 7, 5), fold=True, include="3"),
        lambda: SmallVGG().eval(),
        _images(3, 7, 5),
    ),
    "folded, into a folded one": (
        lambda: _sparse(SmallVGG().eval(), _images(3, 7, 5), fold=True),
        lambda: _sparse(SmallVGG().eval(), _images(3, 7, 5), fold=True, include="3"),
        _images(3, 7, 5),
    ),
    "an encoder layer": (lambda: _sparse(_encoder(), torch.randn(2, 3, 16)), _encoder, torch.randn(2, 3, 16)),
    "a layer by itself, masked": (lambda: mask(nn.Linear(17, 8)), lambda: nn.Linear(17, 8), X),
    "empty and scalar tensors": (lambda: _odd(1.0), lambda: _odd(0.0), X),
}


def _odd(value):
    model = nn.Sequential(nn.Linear(17, 4))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("scalar", torch.tensor(value))
    model.register_buffer("view", torch.arange(12.0).view(3, 4).t() * value)
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:fastprune")
def test_a_saved_model_comes_back_bit_by_bit(kind, tmp_path):
    make, make_fresh, x = MODELS[kind]
    model, fresh = make(), make_fresh()
    model.eval()
    fresh.eval()
    with torch.no_grad():
        expected = model(x)
        path = tmp_path / "model.safetensors"
        snapshot = Snapshot(model)
        fp.save(model, path)
        snapshot.assert_unchanged()
        assert os.listdir(tmp_path) == ["model.safetensors"]
        loaded = fp.load(path, fresh)
        assert loaded is fresh
        assert torch.equal(loaded(x), expected)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype
    types = [(name, type(m).__name__) for name, m in model.named_modules(remove_duplicate=False)]
    assert [(n, type(m).__name__) for n, m in loaded.named_modules(remove_duplicate=False)] == types
    assert not any(module.training for module in loaded.modules())
    # What came back can be saved again, copied and trained.
    fp.save(copy.deepcopy(loaded), path)
    output = loaded(x)
    output.float().square().mean().backward()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    fp.save(Tied(), tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        assert len([name for name in file.keys() if name.endswith("weight")]) == 2  # noqa: SIM118
    loaded = fp.load(tmp_path / "model", Tied())
    assert loaded.head.weight is loaded.embedding.weight


def test_loaded_masks_still_hold_in_training(tmp_path):
    model, x = masked_mlp(0.5)
    fp.save(model, tmp_path / "model")
    loaded = fp.load(tmp_path / "model", mlp(*SIZES))
    zeros = loaded[0].weight == 0
    assert int(zeros.sum()) == int((model[0].weight == 0).sum()) > 0
    optimizer = torch.optim.AdamW(loaded.parameters(), 0.1)
    loaded(x).square().sum().backward()
    optimizer.step()
    assert bool((loaded[0].weight[zeros] == 0).all())


def test_a_fused_activation_comes_back(tmp_path):
    model = nn.Sequential(fp.BlockSparseLinear.from_dense(nn.Linear(17, 8), activation="relu"))
    fp.save(model, tmp_path / "model")
    loaded = fp.load(tmp_path / "model", nn.Sequential(nn.Linear(17, 8)))
    assert loaded[0].activation == "relu"
    assert torch.equal(loaded(X), model(X))


def test_the_memory_format_comes_back(tmp_path):
    fp.save(_channels_last(), tmp_path / "model")
    loaded = fp.load(tmp_path / "model", SmallConvNet())
    assert loaded.conv2.channels_last
    assert is_channels_last(loaded.conv1.weight)
    assert loaded(_images(3, 7, 5)).shape == (2, 5)


def test_a_layer_that_got_a_bias_from_a_norm_comes_back_with_it(tmp_path):
    model = MODELS["folded batch norms of dense layers"][0]()
    fp.save(model, tmp_path / "model")
    fresh = SmallVGG().eval()
    fresh[0].weight.requires_grad_(False)
    loaded = fp.load(tmp_path / "model", fresh)
    assert type(loaded[0]) is nn.Conv2d
    assert loaded[0] is fresh[0]
    assert torch.equal(loaded[0].bias, model[0].bias)
    assert [loaded[index].bias.requires_grad for index in (0, 3, 6)] == [False, True, True]
    assert fp.explain(loaded).count("BatchNorm2d folded into") == 3


OTHER_CONVOLUTIONS = {
    "stride": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "padding": lambda: nn.Conv2d(3, 8, 3),
    "padding of another form": lambda: nn.Conv2d(3, 8, 3, padding="same"),
    "padding mode": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    "dilation": lambda: nn.Conv2d(3, 8, 3, padding=1, dilation=2),
    "channels": lambda: nn.Conv2d(2, 8, 3, padding=1),
    "channels within the padding of a block": lambda: nn.Conv2d(4, 8, 3, padding=1),
    "outputs": lambda: nn.Conv2d(3, 7, 3, padding=1),
    "kernel": lambda: nn.Conv2d(3, 8, (3, 1), padding=1),
    "bias": lambda: nn.Conv2d(3, 8, 3, padding=1, bias=False),
    "dtype": lambda: nn.Conv2d(3, 8, 3, padding=1).double(),
    "forward": lambda: SamePadded(3, 8, 3, padding=1),
    "kind": lambda: nn.Linear(3, 8),
}


@pytest.mark.parametrize("other", OTHER_CONVOLUTIONS)
def test_a_convolution_of_another_geometry_is_refused_and_the_model_unchanged(other, tmp_path):
    conv = fp.BlockSparseConv2d.from_dense(nn.Conv2d(3, 8, 3, padding=1), (4, 4))
    fp.save(nn.Sequential(conv), tmp_path / "model")
    fp.load(tmp_path / "model", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
    fresh = nn.Sequential(OTHER_CONVOLUTIONS[other]())
    snapshot = Snapshot(fresh)
    with pytest.raises(ValueError, match="`fresh_model`"):
        fp.load(tmp_path / "model", fresh)
    snapshot.assert_unchanged()


def test_a_convolution_by_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be a BlockSparseConv2d itself"):
        fp.save(fp.BlockSparseConv2d.from_dense(nn.Conv2d(3, 8, 3)), tmp_path / "model")


@pytest.mark.parametrize("kind", ["masked", "sparse"])
def test_a_file_truncated_anywhere_is_refused_and_the_fresh_model_is_unchanged(kind, tmp_path):
    fp.save(MODELS[kind][0](), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    lengths = {0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1, *range(0, len(content), 997)}
    fresh = mlp(*SIZES)
    snapshot = Snapshot(fresh)
    for length in sorted(lengths):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="is no whole fastprune file"):
            fp.load(tmp_path / "cut", fresh)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "content", [b"garbage" * 40, b"\xff" * 64, b"\x00" * 64, b"{}", b"PK\x03\x04" + b"\x00" * 60]
)
def test_garbage_is_refused(content, tmp_path):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ValueError, match="fastprune"):
        fp.load(tmp_path / "model", mlp(*SIZES))


def test_what_is_no_file_is_refused_by_name(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match="`path` must be a file"):
            fp.load(path, mlp())
    with pytest.raises(TypeError, match="`fresh_model`"):
        fp.load(tmp_path / "missing", None)
    with pytest.raises(TypeError, match="`model`"):
        fp.save({}, tmp_path / "model")


def test_a_file_of_another_program_is_refused(tmp_path):
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "model")
    with pytest.raises(ValueError, match="was not saved by fastprune"):
        fp.load(tmp_path / "model", mlp())


OTHER_MODELS = {
    "wider": lambda: mlp(17, 34, 10),
    "deeper": lambda: nn.Sequential(*mlp(*SIZES), nn.Linear(10, 2)),
    "shallower": lambda: mlp(*SIZES)[:2],
    "without bias": lambda: nn.Sequential(
        nn.Linear(17, 33, bias=False), nn.ReLU(), nn.Linear(33, 10, bias=False)
    ),
    "other names": lambda: nn.ModuleDict({"a": nn.Linear(17, 33), "b": nn.Linear(33, 10)}),
    "other kinds": lambda: nn.Sequential(nn.Conv2d(17, 33, 1), nn.ReLU(), nn.Conv2d(33, 10, 1)),
    "another dtype": lambda: mlp(*SIZES).double(),
    "not a network": lambda: nn.ReLU(),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
@pytest.mark.parametrize("kind", ["dense", "masked", "sparse"])
def test_a_model_of_another_architecture_or_dtype_is_refused_and_unchanged(kind, other, tmp_path):
    fp.save(MODELS[kind][0](), tmp_path / "model")
    fresh = OTHER_MODELS[other]()
    snapshot = Snapshot(fresh)
    with pytest.raises(ValueError, match="`fresh_model`"):
        fp.load(tmp_path / "model", fresh)
    snapshot.assert_unchanged()


def test_a_dense_file_does_not_load_into_a_masked_or_sparse_model(tmp_path):
    fp.save(mlp(*SIZES), tmp_path / "model")
    for fresh in (masked_mlp()[0], sparse_mlp()[0]):
        snapshot = Snapshot(fresh)
        with pytest.raises(ValueError, match="`fresh_model`"):
            fp.load(tmp_path / "model", fresh)
        snapshot.assert_unchanged()


def test_what_cannot_be_saved_is_refused_and_no_file_is_left(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

    normed = mlp()
    nn.utils.parametrizations.weight_norm(normed[0])
    for model, message in ((Extra(2, 2), "it cannot be saved"), (normed, "no fastprune mask")):
        with pytest.raises(ValueError, match=message):
            fp.save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with open(path) as reader:  # who has the old file open still reads it
        write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert reader.read() == "old"
    assert path.read_text() == "new"
