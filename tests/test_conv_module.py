"""BlockSparseConv2d: a drop-in for nn.Conv2d, in inference and in training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from conv_module_cases import (
    CHANNELS,
    IMAGES,
    LAYOUTS,
    assert_same,
    conv2d,
    kept_blocks,
    make_pair,
    with_weight,
)
from networks import SamePadded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("in_channels", CHANNELS)
@pytest.mark.parametrize("out_channels", CHANNELS)
def test_it_gives_what_the_masked_dense_layer_gives(size, in_channels, out_channels):
    dense, sparse, _ = make_pair(conv2d(in_channels, out_channels, 3, padding=1))
    assert torch.equal(sparse.weight, dense.weight)
    assert_same(sparse, dense, torch.randn(2, in_channels, *size, dtype=torch.float64))


@pytest.mark.parametrize("block", [(16, 16), (8, 1), (1, 8), (5, 3), (128, 128), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_of_any_size_give_the_same(block, bias):
    dense, sparse, _ = make_pair(conv2d(17, 33, 3, bias=bias), block)
    assert sparse.blocksize == block
    assert_same(sparse, dense, torch.randn(2, 17, 7, 5, dtype=torch.float64))


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(
        st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])
    ),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    channels_last=st.booleans(),
)
def test_any_geometry_gives_the_same(kernel, stride, padding, dilation, groups, mode, channels_last):
    if padding == "same":
        stride = (1, 1)
    sizes = (5 * groups, 4 * groups, kernel, stride, padding, dilation, groups)
    dense, sparse, _ = make_pair(conv2d(*sizes, padding_mode=mode))
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(sparse, name) == getattr(dense, name), name
    x = torch.randn(2, 5 * groups, 15, 17, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(sparse, dense, x)
    torch.testing.assert_close(sparse(x[0]), dense(x[0]))


@pytest.mark.parametrize("padding", [(1, 2), "same"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_images_without_a_batch_are_padded_in_every_mode(mode, padding):
    dense, sparse, _ = make_pair(conv2d(3, 8, (3, 4), padding=padding, padding_mode=mode))
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    output = sparse(x)
    assert output.dim() == 3
    torch.testing.assert_close(output, dense(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_any_layout_give_the_same_in_their_format(layout, dtype):
    dense, sparse, _ = make_pair(conv2d(15, 17, 3, padding=1, dtype=dtype))
    x = LAYOUTS[layout](torch.randn(2, 15, 7, 5, dtype=dtype))
    output = sparse(x)
    torch.testing.assert_close(output, dense(x.contiguous()), rtol=1e-4, atol=1e-5)
    last = layout == "channels-last"
    assert output.is_contiguous(memory_format=torch.channels_last) is last
    assert output.is_contiguous() is not last


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_last_is_the_format_of_the_output(layout):
    dense, sparse, _ = make_pair(conv2d(15, 17, 3, padding=1))
    sparse.channels_last = True
    x = LAYOUTS[layout](torch.randn(2, 15, 7, 5, dtype=torch.float64))
    assert_same(sparse, dense, x)
    assert sparse(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sparse(x[0]), dense(x[0]))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_layer_of_no_or_of_all_blocks_works_and_trains(density):
    dense, sparse, _ = make_pair(conv2d(5, 9, 3), density=density)
    assert sparse.density == density
    assert_same(sparse, dense, torch.randn(2, 5, 7, 5, dtype=torch.float64))


def test_the_density_counts_the_padded_blocks_of_every_tap():
    mask = torch.zeros(5, 9 * 2, dtype=torch.bool)
    mask[:3] = True
    sparse = fp.BlockSparseConv2d.from_dense(nn.Conv2d(5, 17, 3), (4, 4), mask)
    assert sparse.packed_values.shape == (54, 4, 4)
    assert sparse.density == 0.6


def test_no_images_give_no_images():
    sparse = fp.BlockSparseConv2d.from_dense(nn.Conv2d(5, 9, 3))
    assert sparse(torch.ones(0, 5, 7, 5)).shape == (0, 9, 5, 3)


@pytest.mark.parametrize("activation", list(fp.reference.ACTIVATIONS))
@pytest.mark.parametrize("grad", [True, False])
def test_a_fused_activation_is_that_of_torch(activation, grad):
    dense, sparse, _ = make_pair(conv2d(5, 9, 3), activation=activation)
    x = torch.randn(2, 5, 7, 5, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(sparse(x), fp.reference.ACTIVATIONS[activation](dense(x)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_training_follows_the_masked_dense_layer_and_keeps_the_structure(channels_last):
    dense, sparse, mask = make_pair(conv2d(5, 9, 3, padding=1, groups=1))
    wrapped = nn.Sequential(dense)
    fp.apply_masks_(wrapped, fp.Masks({"0": mask}, fp.Block(4, 4), {"0": dense.weight.shape}))
    optimizers = [torch.optim.AdamW(module.parameters(), 0.01) for module in (wrapped, sparse)]
    before = sparse.weight.detach().clone()
    for _ in range(5):
        x, target = (torch.randn(3, channels, 7, 5, dtype=torch.float64) for channels in (5, 9))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for module, optimizer in zip((wrapped, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight, wrapped[0].weight, rtol=1e-9, atol=1e-12)
    assert not torch.equal(sparse.weight, before)
    sparse.block_sparse_weight.validate()
    # Five channels in blocks of four, nine rows in blocks of four: what pads them stays zero.
    assert int((sparse.packed_values != 0).sum()) == int((sparse.weight != 0).sum())


def test_the_weight_passes_gradients_on_to_the_blocks():
    dense, sparse, mask = make_pair(conv2d(5, 9, 3))
    factor = torch.randn_like(dense.weight)
    (sparse.weight * factor).sum().backward()
    expected = fp.BlockSparseConv2d.from_dense(with_weight(dense, factor), (4, 4), mask)
    torch.testing.assert_close(sparse.packed_values.grad, expected.packed_values.detach())


def test_from_dense_copies_the_weights_and_sees_masks_as_zeros():
    model = nn.Sequential(nn.Conv2d(5, 9, 3))
    weight = model[0].weight
    mask = torch.rand(fp.Block(4, 4).shape(weight.shape)) < 0.5
    fp.apply_masks_(model, fp.Masks({"0": mask}, fp.Block(4, 4), {"0": weight.shape}))
    sparse = fp.BlockSparseConv2d.from_dense(model[0], (4, 4))
    assert torch.equal(kept_blocks(sparse), mask)
    with torch.no_grad():
        model[0].parametrizations.weight.original.fill_(7.0)
        model[0].bias.fill_(7.0)
    assert not bool((sparse.weight == 7).any())
    assert not bool((sparse.bias == 7).any())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_flags_and_frozen_parameters_come_along(training, frozen):
    conv = nn.Conv2d(5, 9, 3).train(training)
    if frozen is not None:
        getattr(conv, frozen).requires_grad_(False)
    sparse = fp.BlockSparseConv2d.from_dense(conv)
    assert sparse.training is training
    assert sparse.packed_values.requires_grad is (frozen != "weight")
    assert sparse.bias.requires_grad is (frozen != "bias")


def test_it_goes_back_to_a_dense_layer():
    dense, sparse, _ = make_pair(
        conv2d(6, 8, (3, 2), stride=2, padding=(1, 0), groups=2, padding_mode="reflect")
    )
    back = sparse.eval().to_dense()
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(dense)
    assert not back.training
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    fused = fp.BlockSparseConv2d.from_dense(dense, (4, 4), activation="relu")
    with pytest.raises(ValueError, match="would lose the fused activation 'relu'"):
        fused.to_dense()


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("conv", [lambda: nn.Conv2d(5, 9, 3), lambda: SamePadded(5, 9, 3)])
def test_copies_are_whole_and_apart(kind, conv):
    _, sparse, _ = make_pair(conv())
    sparse.channels_last = True
    if kind == "deepcopy":
        other = copy.deepcopy(sparse)
    elif kind == "pickle":
        other = pickle.loads(pickle.dumps(sparse))
    else:
        buffer = io.BytesIO()
        torch.save(sparse, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 5, 7, 5)
    expected = sparse(x)
    assert torch.equal(other(x), expected)
    assert other.channels_last
    with torch.no_grad():
        other.packed_values.zero_()
        other.bias.zero_()
    assert torch.equal(sparse(x), expected)
    assert not other(x).any()


@pytest.mark.parametrize("density", [0.0, 0.3])
def test_a_state_round_trips_into_a_fresh_module_of_another_pattern(density):
    _, trained, _ = make_pair(nn.Conv2d(5, 9, 3), density=density)
    fresh = fp.BlockSparseConv2d.from_dense(nn.Conv2d(5, 9, 3), (16, 16))
    assert set(trained.state_dict()) == {"packed_values", "crow_indices", "col_indices", "bias"}
    parameter = fresh.packed_values
    x = torch.randn(2, 5, 7, 5)
    fresh(x).sum().backward()
    fresh.load_state_dict(trained.state_dict())
    assert fresh.packed_values is parameter
    assert parameter.grad is None
    assert fresh.blocksize == (4, 4)
    assert torch.equal(fresh(x), trained(x))
    fresh(x).sum().backward()
    assert parameter.grad.shape == trained.packed_values.shape


def _edit(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


TAMPERED = {
    "crow_indices beyond the blocks": ("crow_indices", _edit(-1, 10_000)),
    "crow_indices decreasing": ("crow_indices", _edit(1, 10_000)),
    "crow_indices too short": ("crow_indices", lambda t: t[:-1]),
    "crow_indices int64": ("crow_indices", lambda t: t.long()),
    "col_indices beyond the taps": ("col_indices", _edit(-1, 18)),
    "col_indices negative": ("col_indices", _edit(0, -1)),
    "col_indices unsorted": ("col_indices", lambda t: t.flip(0)),
    "values of too few blocks": ("packed_values", lambda t: t[1:]),
    "values flat": ("packed_values", lambda t: t.flatten()),
    "values of blocks without columns": ("packed_values", lambda t: t[:, :0]),
    "values of blocks that are too large": ("packed_values", lambda t: t.new_ones(t.shape[0], 129, 4)),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_state_is_refused_and_changes_nothing(kind):
    _, sparse, _ = make_pair(nn.Conv2d(5, 9, 3))
    before = copy.deepcopy(sparse.state_dict())
    state = copy.deepcopy(before)
    name, change = TAMPERED[kind]
    state[name] = change(state[name])
    with pytest.raises(ValueError, match="no valid structure"):
        sparse.load_state_dict(state)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_state_of_blocks_that_cut_groups_is_refused():
    sparse = fp.BlockSparseConv2d.from_dense(nn.Conv2d(6, 8, 3, groups=2), (4, 4))
    whole = fp.BlockSparseConv2d.from_dense(nn.Conv2d(3, 8, 3), (8, 4))
    with pytest.raises(ValueError, match="no valid structure: `blocksize` must have rows that divide the 4"):
        sparse.load_state_dict(whole.state_dict())


def test_another_dtype_converts_the_blocks_and_leaves_the_indices():
    dense, sparse, _ = make_pair(conv2d(5, 9, 3, dtype=torch.float32))
    sparse.double()
    assert sparse.crow_indices.dtype == torch.int32
    x = torch.randn(2, 5, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), dense.double()(x))


def test_it_prints_what_it_is():
    conv = nn.Conv2d(32, 16, 3, 2, 1, 2, 2, padding_mode="reflect")
    expected = (
        "BlockSparseConv2d(32, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2), "
        "groups=2, padding_mode=reflect, bias=True, blocksize=(8, 8), density=1.000, activation=relu)"
    )
    assert repr(fp.BlockSparseConv2d.from_dense(conv, (8, 8), activation="relu")) == expected
    plain = fp.BlockSparseConv2d.from_dense(nn.Conv2d(3, 16, 1, bias=False))
    expected = (
        "BlockSparseConv2d(3, 16, kernel_size=(1, 1), stride=(1, 1), bias=False, blocksize=(16, 16), "
        "density=1.000)"
    )
    assert repr(plain) == expected


@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("conv", {"conv": nn.Linear(3, 3)}, TypeError),
        ("conv", {"conv": nn.ConvTranspose2d(3, 3, 1)}, TypeError),
        ("conv", {"conv": torch.ones(3, 3, 1, 1)}, TypeError),
        ("blocksize", {"blocksize": (0, 16)}, ValueError),
        ("blocksize", {"blocksize": 16}, ValueError),
        ("blocksize", {"blocksize": (16, 129)}, ValueError),
        ("blocksize", {"conv": nn.Conv2d(16, 32, 3, groups=4)}, ValueError),
        ("mask", {"mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError),
        ("mask", {"mask": torch.ones(2, 18)}, ValueError),
        ("mask", {"mask": [[True]]}, TypeError),
        ("activation", {"activation": "tanh"}, ValueError),
        ("activation", {"activation": nn.ReLU()}, ValueError),
    ],
)
def test_from_dense_names_the_argument_that_is_wrong(argument, options, error):
    with pytest.raises(error, match=f"`{argument}`"):
        fp.BlockSparseConv2d.from_dense(**{"conv": nn.Conv2d(17, 32, 3), **options})


GEOMETRY = {"in_channels": 5, "kernel_size": 3}


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("bias", {"bias": torch.ones(5)}),
        ("activation", {"activation": "tanh"}),
        ("in_channels", {"in_channels": 0}),
        ("in_channels", {"in_channels": 5.0}),
        ("groups", {"groups": 0}),
        ("groups", {"groups": 2}),
        ("weight", {"in_channels": 9}),
        ("weight", {"kernel_size": (3, 2)}),
        ("kernel_size", {"kernel_size": 0}),
        ("kernel_size", {"kernel_size": (3, 3, 3)}),
        ("stride", {"stride": (1, 0)}),
        ("stride", {"stride": "2"}),
        ("dilation", {"dilation": 0.5}),
        ("padding", {"padding": -1}),
        ("padding", {"padding": "full"}),
        ("padding", {"padding": "same", "stride": 2}),
        ("padding_mode", {"padding_mode": "mirror"}),
    ],
)
def test_the_constructor_names_the_argument_that_is_wrong(argument, options):
    weight = fp.BlockSparseTensor.from_dense(torch.ones(9, 9 * 8), (4, 4))
    assert fp.BlockSparseConv2d(weight, **GEOMETRY)(torch.ones(1, 5, 3, 3)).shape == (1, 9, 1, 1)
    with pytest.raises(ValueError, match=f"`{argument}`"):
        fp.BlockSparseConv2d(weight, **{**GEOMETRY, **options})


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 6, 7, 5), torch.float32),
        ((2, 8, 7, 5), torch.float32),  # within the padding of the last block
        ((6, 7, 5), torch.float32),
        ((5, 7), torch.float32),
        ((1, 2, 5, 7, 5), torch.float32),
        ((2, 5, 2, 5), torch.float32),  # smaller than the kernel
        ((2, 5, 7, 5), torch.float64),
        ((2, 5, 7, 5), torch.int64),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_an_input_that_does_not_fit_is_refused(shape, dtype, grad):
    _, sparse, _ = make_pair(nn.Conv2d(5, 9, 3))
    x = torch.ones(shape, dtype=dtype)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"`(input|packed_values)` must have"):
        sparse(x)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_it_compiles_whole_and_exports(channels_last, grad):
    _, sparse, _ = make_pair(nn.Conv2d(5, 9, 3, padding=1, padding_mode="reflect"), activation="relu")
    sparse.channels_last = channels_last
    model = nn.Sequential(sparse, nn.Conv2d(9, 4, 1))
    x = torch.randn(2, 5, 7, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x))
    if grad:
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_transforms_give_what_the_dense_layer_gives():
    dense, sparse, _ = make_pair(conv2d(5, 9, 3))
    x, direction = torch.randn(2, 2, 5, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.jvp(sparse, (x,), (direction,)), torch.func.jvp(dense, (x,), (direction,))
    )
    torch.testing.assert_close(torch.func.vmap(sparse)(x), torch.func.vmap(dense)(x))
