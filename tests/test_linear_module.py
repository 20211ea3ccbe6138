"""BlockSparseLinear: a drop-in for nn.Linear, in inference and in training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import masked_mlp


def _pair(in_features=33, out_features=17, block=(8, 4), density=0.5, bias=True, dtype=torch.float32):
    """A block-sparse layer and the masked dense one that it must equal."""
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    mask = torch.rand(fp.Block(*block).shape(dense.weight.shape)) < density
    sparse = fp.BlockSparseLinear.from_dense(dense, block, mask)
    with torch.no_grad():
        dense.weight *= fp.Block(*block).expand(mask, dense.weight.shape)
    return dense, sparse, mask


@pytest.mark.parametrize(
    ("in_features", "out_features", "block"),
    [(1, 1, (16, 16)), (15, 17, (16, 16)), (129, 151, (16, 8)), (33, 5, (1, 1)), (64, 64, (32, 128))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_the_masked_dense_layer_gives(in_features, out_features, block, dtype, bias):
    dense, sparse, _ = _pair(in_features, out_features, block, bias=bias, dtype=dtype)
    for shape in ((in_features,), (1, in_features), (17, in_features), (2, 3, in_features), (0, in_features)):
        x = torch.randn(shape, dtype=dtype)
        output = sparse(x)
        assert output.shape == (*shape[:-1], out_features)
        torch.testing.assert_close(output, dense(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_layer_of_no_or_of_all_blocks_works_and_trains(density):
    dense, sparse, _ = _pair(density=density)
    x = torch.randn(5, 33)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
    sparse(x).square().sum().backward()
    assert sparse.packed_values.grad.shape == sparse.packed_values.shape
    assert sparse.density == density


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_are_those_of_the_dense_layer_in_the_kept_blocks(activation):
    dense, sparse, mask = _pair(dtype=torch.float64)
    sparse = fp.BlockSparseLinear.from_dense(dense, (8, 4), mask, activation)
    x = torch.randn(6, 33, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    factor = torch.randn(6, 17, dtype=torch.float64)
    out = dense(y)
    (factor * (F.relu(out) if activation else out)).sum().backward()
    (factor * sparse(x)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    expected = fp.BlockSparseTensor.from_dense(dense.weight.grad, (8, 4), mask)
    torch.testing.assert_close(sparse.packed_values.grad, expected.packed_values)


def test_training_follows_the_masked_dense_layer_and_keeps_the_structure():
    dense, sparse, mask = _pair(dtype=torch.float64)
    wrapped = nn.Sequential(dense)
    fp.apply_masks_(wrapped, fp.Masks({"0": mask}, fp.Block(8, 4), {"0": dense.weight.shape}))
    optimizers = [torch.optim.AdamW(module.parameters(), 0.01) for module in (wrapped, sparse)]
    before = sparse.weight.detach().clone()
    for _ in range(5):
        x, target = torch.randn(9, 33, dtype=torch.float64), torch.randn(9, 17, dtype=torch.float64)
        for module, optimizer in zip((wrapped, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight, wrapped[0].weight, rtol=1e-9, atol=1e-12)
    assert not torch.equal(sparse.weight, before)
    sparse.block_sparse_weight.validate()


def test_padding_stays_zero_in_training():
    linear = nn.Linear(5, 3)
    sparse = fp.BlockSparseLinear.from_dense(linear, (4, 4))
    optimizer = torch.optim.AdamW(sparse.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
    assert int((sparse.packed_values != 0).sum()) == 15


def test_the_weight_is_a_dense_view_that_passes_gradients_on():
    _, sparse, _ = _pair()
    factor = torch.randn(17, 33)
    (sparse.weight * factor).sum().backward()
    expected = fp.BlockSparseTensor.from_dense(factor, (8, 4), _kept(sparse))
    torch.testing.assert_close(sparse.packed_values.grad, expected.packed_values)


def _kept(sparse):
    return fp.Block(*sparse.blocksize).sum_pieces((sparse.weight != 0).long()) > 0


def test_from_dense_copies_the_weights():
    linear = nn.Linear(8, 8)
    sparse = fp.BlockSparseLinear.from_dense(linear, (4, 4))
    with torch.no_grad():
        linear.weight.fill_(7.0)
        linear.bias.fill_(7.0)
    assert not bool((sparse.weight == 7).any())
    assert not bool((sparse.bias == 7).any())


def test_from_dense_sees_masks_as_zeros():
    model, x = masked_mlp(0.5)
    sparse = fp.BlockSparseLinear.from_dense(model[0], (4, 4))
    assert sparse.density == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(sparse(x), model[0](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "bias", None])
@pytest.mark.parametrize("masked", [True, False])
def test_flags_and_frozen_parameters_come_along(training, frozen, masked):
    model = masked_mlp(0.5)[0] if masked else nn.Sequential(nn.Linear(17, 33))
    linear = model[0].train(training)
    if frozen == "weight":
        (linear.parametrizations.weight.original if masked else linear.weight).requires_grad_(False)
    elif frozen == "bias":
        linear.bias.requires_grad_(False)
    sparse = fp.BlockSparseLinear.from_dense(linear)
    assert sparse.training is training
    assert sparse.packed_values.requires_grad is (frozen != "weight")
    assert sparse.bias.requires_grad is (frozen != "bias")


def test_it_goes_back_to_a_dense_layer():
    dense, sparse, _ = _pair(dtype=torch.float64)
    back = sparse.eval().to_dense()
    assert type(back) is nn.Linear
    assert not back.training
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    fused = fp.BlockSparseLinear.from_dense(dense, activation="relu")
    with pytest.raises(ValueError, match="would lose the fused activation 'relu'"):
        fused.to_dense()


def test_copies_states_and_dtypes_behave_like_those_of_any_module():
    _, sparse, _ = _pair()
    x = torch.randn(3, 33)
    duplicate = copy.deepcopy(sparse)
    with torch.no_grad():
        duplicate.packed_values.zero_()
    assert bool((sparse.packed_values != 0).any())
    duplicate.load_state_dict(sparse.state_dict())
    assert torch.equal(duplicate(x), sparse(x))
    assert set(sparse.state_dict()) == {"packed_values", "crow_indices", "col_indices", "bias"}
    double = copy.deepcopy(sparse).double()
    assert double.crow_indices.dtype == torch.int32
    torch.testing.assert_close(double(x.double()).float(), sparse(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.3])
def test_a_state_round_trips_into_a_fresh_module_of_another_pattern(density):
    _, trained, _ = _pair(density=density)
    fresh = fp.BlockSparseLinear.from_dense(nn.Linear(33, 17), (16, 16))
    parameter = fresh.packed_values
    fresh(torch.randn(2, 33)).sum().backward()
    fresh.load_state_dict(trained.state_dict())
    assert fresh.packed_values is parameter
    assert parameter.grad is None
    assert fresh.blocksize == (8, 4)
    x = torch.randn(3, 33)
    assert torch.equal(fresh(x), trained(x))
    fresh(x).sum().backward()
    assert parameter.grad.shape == trained.packed_values.shape
    fresh.packed_values.data.add_(1.0)
    if density:
        assert not torch.equal(fresh(x), trained(x))


def test_a_state_of_another_layer_is_refused_and_changes_nothing():
    _, sparse, _ = _pair()
    before = copy.deepcopy(sparse.state_dict())
    for other in (nn.Linear(65, 17), nn.Linear(33, 40)):
        with pytest.raises(ValueError, match="no valid structure"):
            sparse.load_state_dict(fp.BlockSparseLinear.from_dense(other, (8, 4)).state_dict())
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_state_without_its_weights_must_fit_those_that_stay():
    _, sparse, _ = _pair()
    state = sparse.state_dict()
    del state["packed_values"]
    sparse.load_state_dict(state, strict=False)
    state["col_indices"] = state["col_indices"].flip(0)
    with pytest.raises(ValueError, match="no valid structure: `col_indices`"):
        sparse.load_state_dict(state, strict=False)
    sparse.block_sparse_weight.validate()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
        lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True),
        lambda parameters: torch.optim.Adam(parameters, 0.01, foreach=True),
    ],
    ids=["fused AdamW", "fused SGD", "foreach Adam"],
)
def test_fused_optimisers_train_it_like_the_masked_dense_layer(optimizer):
    dense, sparse, mask = _pair()
    wrapped = nn.Sequential(dense)
    fp.apply_masks_(wrapped, fp.Masks({"0": mask}, fp.Block(8, 4), {"0": dense.weight.shape}))
    optimizers = [optimizer(module.parameters()) for module in (wrapped, sparse)]
    for _ in range(5):
        x, target = torch.randn(9, 33), torch.randn(9, 17)
        for module, step in zip((wrapped, sparse), optimizers, strict=True):
            step.zero_grad()
            F.mse_loss(module(x), target).backward()
            step.step()
    torch.testing.assert_close(sparse.weight, wrapped[0].weight, rtol=1e-3, atol=1e-5)


def test_edits_of_the_data_and_averaged_models_are_seen_at_once():
    dense, sparse, _ = _pair()
    x = torch.randn(4, 33)
    average = torch.optim.swa_utils.AveragedModel(
        sparse, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(sparse)
    sparse.packed_values.data.mul_(3.0)
    sparse.bias.data.mul_(3.0)
    torch.testing.assert_close(sparse(x), 3 * dense(x), rtol=1e-4, atol=1e-5)
    average.update_parameters(sparse)
    torch.testing.assert_close(average(x), 2 * dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_fused_activation_is_that_of_torch(activation, grad):
    dense, _, mask = _pair()
    sparse = fp.BlockSparseLinear.from_dense(dense, (8, 4), mask, activation)
    x = torch.randn(6, 33)
    with torch.set_grad_enabled(grad):
        expected = fp.reference.ACTIVATIONS[activation](dense(x))
        torch.testing.assert_close(sparse(x), expected, rtol=1e-4, atol=1e-5)


def test_it_prints_what_it_is():
    sparse = fp.BlockSparseLinear.from_dense(nn.Linear(32, 16), activation="relu")
    expected = (
        "BlockSparseLinear(in_features=32, out_features=16, bias=True, blocksize=(16, 16), density=1.000, "
        "activation=relu)"
    )
    assert repr(sparse) == expected


@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("linear", {"linear": nn.Conv2d(3, 3, 1)}, TypeError),
        ("linear", {"linear": torch.ones(3, 3)}, TypeError),
        ("blocksize", {"blocksize": (0, 16)}, ValueError),
        ("blocksize", {"blocksize": 16}, ValueError),
        ("mask", {"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError),
        ("mask", {"mask": torch.ones(2, 1)}, ValueError),
        ("activation", {"activation": "tanh"}, ValueError),
        ("activation", {"activation": nn.ReLU()}, ValueError),
    ],
)
def test_from_dense_names_the_argument_that_is_wrong(argument, options, error):
    with pytest.raises(error, match=f"`{argument}`"):
        fp.BlockSparseLinear.from_dense(**{"linear": nn.Linear(16, 32), **options})


def test_a_bias_of_another_size_is_refused():
    weight = fp.BlockSparseTensor.from_dense(torch.ones(8, 4), (4, 4))
    with pytest.raises(ValueError, match=r"`bias` must have shape \[8\], got \[4\]"):
        fp.BlockSparseLinear(weight, torch.ones(4))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 32), torch.float32),
        ((3, 34), torch.float32),  # within the padding of the last block
        ((33, 3), torch.float32),
        ((), torch.float32),
        ((3, 33), torch.float64),
        ((3, 33), torch.int64),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_an_input_that_does_not_fit_is_refused(shape, dtype, grad):
    _, sparse, _ = _pair()
    x = torch.ones(shape, dtype=dtype)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"`(input|packed_values)` must have"):
        sparse(x)
