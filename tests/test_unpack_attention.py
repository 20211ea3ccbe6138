"""MultiheadAttention and unpack_attention_ against torch's own module."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp

pytestmark = [pytest.mark.usefixtures("one_thread")]


def make(embed_dim=12, num_heads=3, **options):
    """torch's attention in float64, with biases that are not zero, and the unpacked one."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(embed_dim, num_heads, dtype=torch.float64, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    return attention, fp.MultiheadAttention.from_torch(attention)


def sequences(batch, length, keys, batch_first, features=(12, 12, 12)):
    sizes = (length, keys, keys)
    if batch is None:
        shapes = list(zip(sizes, features, strict=True))
    elif batch_first:
        shapes = [(batch, size, count) for size, count in zip(sizes, features, strict=True)]
    else:
        shapes = [(size, batch, count) for size, count in zip(sizes, features, strict=True)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def masks(kind, batch, heads, length, keys):
    """Arguments of a kind of mask; no query loses all of its keys."""
    torch.manual_seed(1)
    causal = torch.ones(length, keys).triu(1).bool()
    padding = torch.zeros(batch or 1, keys, dtype=torch.bool)
    padding[-1, keys // 2 + 1 :] = True
    padding = padding if batch is not None else padding[0]
    each = torch.rand((batch or 1) * heads, length, keys) < 0.3
    each[..., 0] = False
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "causal hint": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True},
        "each head": {"attn_mask": each},
        "floats": {
            "attn_mask": torch.randn(length, keys, dtype=torch.float64),
            "key_padding_mask": torch.randn(padding.shape, dtype=torch.float64),
        },
    }[kind]


KINDS = ("none", "causal", "causal hint", "padding", "both", "each head", "floats")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "batch_first"), [(4, True), (4, False), (1, True), (None, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_weights_and_gradients_are_torchs(kind, batch, batch_first, bias):
    attention, own = make(batch_first=batch_first, bias=bias)
    length = keys = 5
    arguments = masks(kind, batch, 3, length, keys)
    for need_weights, average in itertools.product([True, False], repeat=2):
        x = sequences(batch, length, keys, batch_first)
        x, again = ([t.clone().requires_grad_() for t in x] for _ in range(2))
        options = {"need_weights": need_weights, "average_attn_weights": average, **arguments}
        expected, expected_weights = attention(*x, **options)
        found, weights = own(*again, **options)
        torch.testing.assert_close(found, expected)
        assert (weights is None) == (not need_weights)
        torch.testing.assert_close(weights, expected_weights)
        upstream = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, [*x, attention.out_proj.weight], upstream)
        grads = torch.autograd.grad(found, [*again, own.out_proj.weight], upstream)
        for one, other in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(one, other)


def test_keys_and_values_of_other_sizes_and_lengths():
    attention, own = make(kdim=7, vdim=9, batch_first=True)
    x = sequences(3, 4, 6, True, (12, 7, 9))
    for found, expected in zip(own(*x), attention(*x), strict=True):
        torch.testing.assert_close(found, expected)


def test_dropout_acts_on_the_weights_in_train_mode():
    _, own = make(dropout=0.5, batch_first=True)
    x = sequences(3, 5, 5, True)
    weights = own(*x, average_attn_weights=False)[1]
    zeros = float((weights == 0).double().mean())
    assert 0.2 < zeros < 0.8
    assert torch.allclose(weights.mean(), torch.tensor(0.2, dtype=torch.float64), atol=0.05)
    own(*x, need_weights=False)
    own.eval()
    assert bool((own(*x)[1] > 0).all())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformer_gives_the_same(batch_first, training):
    torch.manual_seed(0)
    model = nn.Transformer(12, 2, 2, 2, 20, dropout=0.0, batch_first=batch_first).train(training)
    own = fp.unpack_attention_(copy.deepcopy(model))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in own.modules())
    assert sum(isinstance(module, fp.MultiheadAttention) for module in own.modules()) == 6
    source, target = (torch.randn((3, size, 12) if batch_first else (size, 3, 12)) for size in (6, 4))
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    options = {"tgt_mask": causal, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's nested tensors are a prototype
            expected, found = model(source, target, **options), own(source, target, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_place_mode_and_flag_is_kept():
    shared = nn.MultiheadAttention(12, 3)
    shared.in_proj_weight.requires_grad_(False)
    shared.out_proj.bias.requires_grad_(False)
    model = nn.ModuleDict({"one": shared, "two": nn.ModuleList([shared, nn.Linear(3, 3)])})
    shared.eval()
    assert fp.unpack_attention_(model) is model
    own = model["one"]
    assert own is model["two"][0]
    assert isinstance(own, fp.MultiheadAttention)
    assert not own.training
    assert model["two"][1].training
    frozen = {name for name, parameter in own.named_parameters() if not parameter.requires_grad}
    assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}])
def test_a_state_of_torchs_module_is_taken_and_left_whole(options):
    attention = nn.MultiheadAttention(12, 3, **options)
    state = nn.Sequential(attention).state_dict()
    names = set(state)
    own = nn.Sequential(fp.MultiheadAttention(12, 3, **options))
    own.load_state_dict(state)
    assert set(state) == names
    for name, parameter in fp.MultiheadAttention.from_torch(attention).named_parameters():
        assert torch.equal(own[0].get_parameter(name), parameter)
    own.load_state_dict(own.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        own.load_state_dict({name: tensor for name, tensor in state.items() if "out_proj" not in name})


class OwnAttention(nn.MultiheadAttention):
    pass


def masked():
    attention = nn.MultiheadAttention(12, 3)
    nn.utils.parametrize.register_parametrization(attention.out_proj, "weight", nn.Identity())
    return attention


def hooked():
    attention = nn.MultiheadAttention(12, 3)
    attention.register_forward_hook(lambda module, inputs, output: None)
    return attention


@pytest.mark.parametrize(
    ("make_attention", "reason"),
    [
        (lambda: nn.MultiheadAttention(12, 3, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(12, 3, add_zero_attn=True), "add_zero_attn"),
        (lambda: OwnAttention(12, 3), "OwnAttention may have a forward of its own"),
        (masked, "unpack it first, then mask"),
        (hooked, "has hooks"),
    ],
)
def test_what_cannot_be_unpacked_stays_and_says_why(make_attention, reason):
    attention = make_attention()
    with pytest.raises(ValueError, match=reason):
        fp.MultiheadAttention.from_torch(attention)
    model = nn.ModuleList([attention, nn.MultiheadAttention(12, 3)])
    with pytest.warns(UserWarning, match=f"'0' stays packed: .*{reason}"):
        fp.unpack_attention_(model)
    assert model[0] is attention
    assert isinstance(model[1], fp.MultiheadAttention)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`num_heads` must divide `embed_dim`, 12, got 5"):
        fp.MultiheadAttention(12, 5)
    with pytest.raises(TypeError, match=r"`attention` must be an nn\.MultiheadAttention, got Linear"):
        fp.MultiheadAttention.from_torch(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"use fastprune\.MultiheadAttention\.from_torch"):
        fp.unpack_attention_(nn.MultiheadAttention(12, 3))
    with pytest.raises(TypeError, match="`model`"):
        fp.unpack_attention_("model")
    own = fp.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12)
    for message, options in {
        "`attn_mask` must be the causal mask": {"is_causal": True},
        r"`attn_mask` must have shape \[5, 5\] or \[6, 5, 5\], got \[4, 5\]": {
            "attn_mask": torch.ones(4, 5).bool()
        },
        r"`key_padding_mask` must have shape \[2, 5\], got \[5\]": {"key_padding_mask": torch.ones(5).bool()},
        "`attn_mask` must be of bool or floating point, got torch.int64": {
            "attn_mask": torch.ones(5, 5, dtype=torch.long)
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            own(x, x, x, **options)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return fp.unpack_attention_(Classifier()).eval()


@pytest.fixture
def loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(40, 6, 32), torch.randint(0, 3, (40,))), 20)


def test_projections_are_scored_masked_and_swapped(classifier, loader):
    scores = fp.score(classifier, loader, granularity=fp.Block(8, 8), criterion="magnitude", progress=False)
    names = {f"encoder.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in ("q", "k", "v", "out")}
    assert names <= set(scores.keys())
    fp.apply_masks_(classifier, scores.select(sparsity=0.6, scope="layer"))
    x = torch.randn(4, 6, 32)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        expected, expected_padded = classifier(x), classifier(x, padding)
        fp.sparsify_(classifier, example_inputs=x, blocksize=(8, 8), policy="always")
        for name in names:
            assert isinstance(classifier.get_submodule(name), fp.BlockSparseLinear)
        torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier(x, padding), expected_padded, rtol=1e-4, atol=1e-5)


def test_exact_loss_deltas_of_heads_are_those_of_masked_forwards(classifier, loader):
    scores = fp.score(classifier, loader, granularity=fp.Head(), progress=False)
    assert set(scores.keys()) == {f"encoder.layers.{i}.self_attn.out_proj" for i in range(2)}
    inputs = torch.cat([x for x, _ in loader])
    labels = torch.cat([y for _, y in loader])
    for name in scores:
        for head in range(4):
            masked = copy.deepcopy(classifier).double()
            plain = nn.functional.cross_entropy(masked(inputs.double()), labels)
            with torch.no_grad():
                masked.get_submodule(name).weight[:, 8 * head : 8 * (head + 1)] = 0
            delta = nn.functional.cross_entropy(masked(inputs.double()), labels) - plain
            assert float(scores[name][head]) == pytest.approx(float(delta), rel=1e-3, abs=1e-6)


def test_heads_are_cut_out(classifier, loader):
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    scores = fp.score(classifier, loader, granularity=fp.Head(), criterion="magnitude", progress=False)
    masks = scores.select(sparsity=0.5, scope="layer")
    x = torch.randn(4, 6, 32)
    masked = fp.apply_masks_(copy.deepcopy(classifier), masks)
    small = fp.shrink(classifier, masks, x)
    attention = small.encoder.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim, attention.q_proj.out_features) == (2, 8, 16)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(small)
    assert torch.equal(again(x), small(x))


def test_a_saved_model_comes_back(classifier, tmp_path):
    fp.save(classifier, tmp_path / "model.safetensors")
    fresh = fp.load(tmp_path / "model.safetensors", fp.unpack_attention_(Classifier())).eval()
    x = torch.randn(2, 6, 32)
    assert torch.equal(fresh(x), classifier(x))


def test_autocast_and_export(classifier):
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(
                classifier(x).float(), classifier.float()(x).float(), rtol=0.1, atol=0.1
            )
        exported = torch.export.export(classifier, (x,)).module()
        torch.testing.assert_close(exported(x), classifier(x))
