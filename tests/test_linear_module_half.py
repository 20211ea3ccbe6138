"""BlockSparseLinear in 16 bits on the CPU: as a whole, or its weights alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from block_sparse_cases import HALF, ROUNDING
from helpers import masked_mlp, mlp
from networks import SmallConvNet

MIXED = {"weight_dtype": torch.bfloat16}


def _close(found, wanted, dtype, roundings=2):
    """Compare within some roundings of the largest value: torch's own sums are rounded too."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max()
    assert error <= roundings * ROUNDING[dtype][0] * wanted.double().abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("samples", [1, 40])
def test_a_converted_module_gives_what_the_dense_one_gives(dtype, samples):
    dense = nn.Linear(33, 17).to(dtype)
    mask = torch.rand(3, 9) < 0.5
    sparse = fp.BlockSparseLinear.from_dense(dense, (8, 4), mask)
    layer = fp.BlockSparseLinear.from_dense(dense.float(), (8, 4), mask).to(dtype)
    with torch.no_grad():
        dense.weight *= fp.Block(8, 4).expand(mask, dense.weight.shape)
    x = torch.randn(samples, 33, dtype=dtype)
    assert sparse(x).dtype == dtype
    assert torch.equal(sparse(x), layer(x))
    _close(sparse(x), dense(x.float()), dtype)
    assert (sparse.weight.dtype, sparse.to_dense().weight.dtype) == (dtype, dtype)
    assert torch.equal(sparse.weight.float(), dense.weight)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_weights_alone_are_rounded(dtype, activation):
    linear = nn.Linear(33, 17)
    sparse = fp.BlockSparseLinear.from_dense(linear, (8, 4), activation=activation, weight_dtype=dtype)
    assert (sparse.packed_values.dtype, sparse.bias.dtype) == (dtype, torch.float32)
    linear.weight.data = linear.weight.data.to(dtype).float()
    for shape in ((33,), (1, 33), (40, 33), (2, 3, 33), (0, 33)):
        x = torch.randn(shape)
        output = sparse(x)
        assert output.dtype == torch.float32
        wanted = linear(x) if activation is None else F.relu(linear(x))
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(sparse).float()
    assert torch.equal(again(x), sparse(x))


def test_it_goes_back_to_a_dense_layer_of_its_activations():
    linear = nn.Linear(33, 17)
    dense = fp.BlockSparseLinear.from_dense(linear, (8, 4), **MIXED).to_dense()
    assert dense.weight.dtype == dense.bias.dtype == torch.float32
    assert torch.equal(dense.weight, linear.weight.bfloat16().float())


@pytest.mark.parametrize("convert", ["whole", "weights"])
def test_it_trains_in_its_dtype(convert):
    linear = nn.Linear(33, 17)
    sparse = fp.BlockSparseLinear.from_dense(linear, (8, 4), **({} if convert == "whole" else MIXED))
    if convert == "whole":
        sparse = sparse.bfloat16()
    dtype = sparse.bias.dtype
    optimizer = torch.optim.AdamW(sparse.parameters(), 0.05)
    x, target = torch.randn(64, 33, dtype=dtype), torch.randn(64, 17, dtype=dtype)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(sparse(x), target)
        loss.backward()
        assert (sparse.packed_values.grad.dtype, sparse.bias.grad.dtype) == (torch.bfloat16, dtype)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_gradients_with_checkpoints_and_frozen_weights_are_those_of_the_layer():
    sparse = fp.BlockSparseLinear.from_dense(nn.Linear(33, 17), (8, 4), **MIXED)
    x = torch.randn(5, 33, requires_grad=True)
    sparse(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    sparse.packed_values.requires_grad_(False)
    torch.utils.checkpoint.checkpoint(sparse, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("dtype", HALF)
def test_states_keep_their_dtypes(dtype):
    sparse = fp.BlockSparseLinear.from_dense(nn.Linear(33, 17), (8, 4), weight_dtype=dtype)
    other = fp.BlockSparseLinear.from_dense(nn.Linear(33, 17), (16, 16), weight_dtype=dtype)
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(3, 33)
    assert other.packed_values.dtype == dtype
    assert torch.equal(other(x), sparse(x))


@pytest.mark.parametrize("dtype", HALF)
def test_sparsify_stores_weights_in_a_dtype_of_their_own(dtype):
    model, x = masked_mlp()
    wanted = model(x)
    sparse = fp.sparsify_(
        copy.deepcopy(model), example_inputs=x, blocksize=(4, 4), policy="always", weight_dtype=dtype
    )
    assert {module.packed_values.dtype for module in (sparse[0], sparse[2])} == {dtype}
    assert sparse(x).dtype == torch.float32
    _close(sparse(x), wanted, dtype, roundings=4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_choice_is_made_for_the_weights_as_they_are_stored(monkeypatch, dtype):
    measured = []

    def layer_seconds(dense, sparse, inputs, device):
        measured.append((sparse.packed_values.dtype, inputs[0].dtype))
        return 1.0, 2.0

    monkeypatch.setattr("fastprune.modules.convert.layer_seconds", layer_seconds)
    model, x = masked_mlp()
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), weight_dtype=dtype)
    assert measured == [(dtype or torch.float32, torch.float32)] * 2
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_sparsify_converts_linear_layers_of_a_half_model_and_leaves_convolutions(dtype):
    model = SmallConvNet().eval()
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4))
    fp.apply_masks_(model, scores.select(sparsity=0.5, scope="layer")).to(dtype)
    x = torch.randn(2, 3, 7, 5, dtype=dtype)
    wanted = model(x)
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always")
    assert isinstance(model.head, fp.BlockSparseLinear)
    assert type(model.conv1) is nn.Conv2d
    assert f"no kernel for {dtype}" in fp.explain(model)
    assert model(x).dtype == dtype
    _close(model(x), wanted, dtype, roundings=4)


def _saved(convert, path):
    model, x = masked_mlp()
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always", **convert)
    fp.save(model, path)
    return model, x


@pytest.mark.parametrize("into", ["dense", "sparse"])
def test_a_saved_model_keeps_its_weights_dtype(tmp_path, into):
    model, x = _saved(MIXED, tmp_path / "model.safetensors")
    fresh = mlp(17, 33, 10) if into == "dense" else _saved(MIXED, tmp_path / "other.safetensors")[0]
    loaded = fp.load(tmp_path / "model.safetensors", fresh)
    assert loaded[0].packed_values.dtype == torch.bfloat16
    assert torch.equal(loaded(x), model(x))
    smaller = (tmp_path / "model.safetensors").stat().st_size
    _saved({}, tmp_path / "float.safetensors")
    assert smaller < (tmp_path / "float.safetensors").stat().st_size


def test_a_saved_half_model_goes_into_a_half_model_alone(tmp_path):
    model, x = masked_mlp()
    fp.sparsify_(model.bfloat16(), example_inputs=x.bfloat16(), blocksize=(4, 4), policy="always")
    fp.save(model, tmp_path / "model.safetensors")
    loaded = fp.load(tmp_path / "model.safetensors", mlp(17, 33, 10).bfloat16())
    assert torch.equal(loaded(x.bfloat16()), model(x.bfloat16()))
    for other in (torch.float32, torch.float64, torch.float16):
        with pytest.raises(ValueError, match=r"must be torch\."):
            fp.load(tmp_path / "model.safetensors", mlp(17, 33, 10).to(other))


@pytest.mark.parametrize("wrong", [torch.float32, torch.float64, torch.int8, "bfloat16"])
def test_other_weight_dtypes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`weight_dtype` must be torch\.float16, torch\.bfloat16 or None"):
        fp.BlockSparseLinear.from_dense(nn.Linear(8, 8), weight_dtype=wrong)
    model, x = masked_mlp()
    with pytest.raises(ValueError, match="`weight_dtype` must be"):
        fp.sparsify_(model, example_inputs=x, weight_dtype=wrong)
    assert type(model[0]) is not fp.BlockSparseLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_their_own_dtype_are_for_float32_layers(dtype):
    with pytest.raises(ValueError, match=r"`weight_dtype` is for layers of torch\.float32, got one of"):
        fp.BlockSparseLinear.from_dense(nn.Linear(8, 8, dtype=dtype), weight_dtype=torch.float16)
