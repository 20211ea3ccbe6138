"""The gradients of block_sparse_linear: every CPU kernel against the reference twin in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from block_sparse_cases import BLOCKSIZES, SIZES, assert_matches, make_weight
from fastprune import ops, reference


def input_gradient(grad_output: Tensor, weight: fp.BlockSparseTensor, function=None) -> Tensor:
    function = function or ops.block_sparse_linear_input_gradient
    return function(
        grad_output,
        weight.packed_values.to(grad_output.dtype),
        weight.crow_indices,
        weight.col_indices,
        in_features=weight.shape[1],
    )


def weight_gradient(
    grad_output: Tensor, input: Tensor, weight: fp.BlockSparseTensor, function=None
) -> Tensor:
    function = function or ops.block_sparse_linear_weight_gradient
    return function(grad_output, input, weight.crow_indices, weight.col_indices, blocksize=weight.blocksize)


def check(samples: int, weight: fp.BlockSparseTensor) -> None:
    out_features, in_features = weight.shape
    input, grad_output = torch.randn(samples, in_features), torch.randn(samples, out_features)
    wanted = input_gradient(grad_output.double(), weight, reference.block_sparse_linear_input_gradient)
    assert_matches(input_gradient(grad_output, weight), wanted, out_features)
    wanted = weight_gradient(
        grad_output.double(), input.double(), weight, reference.block_sparse_linear_weight_gradient
    )
    assert_matches(weight_gradient(grad_output, input, weight), wanted, samples)


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_they_match_the_reference_over_ugly_sizes(
    isa: str, blocksize: tuple[int, int], density: float
) -> None:
    torch.manual_seed(0)
    for samples, out_features, in_features in itertools.product((1, 17, 129), SIZES, SIZES):
        check(samples, make_weight(out_features, in_features, blocksize, density))


@pytest.mark.parametrize("samples", [*range(1, 50), 127, 128, 129, 400])
def test_every_number_of_samples_fills_its_tiles(isa: str, samples: int) -> None:
    torch.manual_seed(samples)
    for blocksize in ((4, 8), (8, 1), (16, 16), (40, 20)):
        check(samples, make_weight(80, 60, blocksize, 0.5))


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(0, 40),
    out_features=st.integers(1, 90),
    in_features=st.integers(1, 90),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_structure_matches_the_reference(
    samples: int, out_features: int, in_features: int, rows: int, cols: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    check(samples, make_weight(out_features, in_features, (rows, cols), density))


def test_float64_and_inputs_of_any_layout(isa: str) -> None:
    torch.manual_seed(2)
    weight = make_weight(40, 24, (8, 8), 0.5, torch.float64)
    base = torch.randn(6, 5, 40, dtype=torch.float64), torch.randn(6, 5, 24, dtype=torch.float64)
    layouts = {
        "batched": base,
        "sliced rows": tuple(x.repeat_interleave(2, 0)[::2] for x in base),
        "sliced columns": tuple(torch.cat([x, x], dim=2)[..., : x.shape[2]] for x in base),
        "transposed": tuple(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in base),
        "one dimension": tuple(x[0, 0] for x in base),
        "expanded": tuple(x[:1, :1].expand_as(x) for x in base),
        "one value expanded": tuple(x[:1, :1, :1].expand_as(x) for x in base),
    }
    for name, (grad_output, input) in layouts.items():
        found = input_gradient(grad_output, weight)
        assert found.shape == input.shape, name
        wanted = input_gradient(grad_output, weight, reference.block_sparse_linear_input_gradient)
        torch.testing.assert_close(found, wanted)
        wanted = weight_gradient(grad_output, input, weight, reference.block_sparse_linear_weight_gradient)
        torch.testing.assert_close(weight_gradient(grad_output, input, weight), wanted)


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    torch.manual_seed(3)
    weight = make_weight(700, 500, (16, 16), 0.2)
    input, grad_output = torch.randn(260, 500), torch.randn(260, 700)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((input_gradient(grad_output, weight), weight_gradient(grad_output, input, weight)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_no_samples_give_zeros() -> None:
    weight = make_weight(9, 7, (4, 4), 1.0)
    assert input_gradient(torch.randn(3, 0, 9), weight).shape == (3, 0, 7)
    grads = weight_gradient(torch.randn(0, 9), torch.randn(0, 7), weight)
    assert torch.equal(grads, torch.zeros_like(weight.packed_values))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_padding_stays_zero_where_gradients_are_not_finite(isa: str, broken: float) -> None:
    weight = make_weight(21, 19, (16, 16), 1.0)
    input, grad_output = torch.full((5, 19), broken), torch.full((5, 21), broken)
    dense = fp.BlockSparseTensor(
        weight_gradient(grad_output, input, weight), weight.crow_indices, weight.col_indices, (32, 32)
    ).to_dense()
    assert not bool(dense[:21, :19].isfinite().any())
    assert int(dense.isfinite().sum()) == 32 * 32 - 21 * 19
    assert float(dense[21:].abs().max()) == float(dense[:, 19:].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["input", "weight"])
def test_they_have_gradients_themselves(name: str) -> None:
    torch.manual_seed(5)
    weight = make_weight(10, 7, (4, 3), 0.6, torch.float64)
    grad_output = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    if name == "input":
        values = weight.packed_values.requires_grad_()

        def function(grad_output: Tensor, values: Tensor) -> Tensor:
            return ops.block_sparse_linear_input_gradient(
                grad_output, values, weight.crow_indices, weight.col_indices, in_features=7
            )

        arguments = (grad_output, values)
    else:
        arguments = (grad_output, torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True))

        def function(grad_output: Tensor, input: Tensor) -> Tensor:
            return weight_gradient(grad_output, input, weight)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_opcheck() -> None:
    weight = make_weight(20, 30, (16, 8), 0.5)
    grad_output, input = torch.randn(4, 20, requires_grad=True), torch.randn(4, 30, requires_grad=True)
    indices = (weight.crow_indices, weight.col_indices)
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_linear_input_gradient.default,
        (grad_output, weight.packed_values.requires_grad_(), *indices, 30),
    )
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_linear_weight_gradient.default,
        (grad_output, input, *indices, 16, 8),
    )


def _change(**changes):
    weight = fp.BlockSparseTensor.from_dense(torch.ones(8, 8), (4, 4))
    arguments = {
        "grad_output": torch.randn(2, 8),
        "input": torch.randn(2, 8),
        "packed_values": weight.packed_values,
        "crow_indices": weight.crow_indices,
        "col_indices": weight.col_indices,
        "in_features": 8,
        "blocksize": (4, 4),
    }
    return {**arguments, **changes}


INT = torch.int32
BAD_FOR_BOTH = {
    "scalar gradient": ("grad_output", _change(grad_output=torch.tensor(1.0), input=torch.tensor(1.0))),
    "integer gradient": (
        "dtype",
        _change(
            grad_output=torch.ones(2, 8).long(),
            input=torch.ones(2, 8).long(),
            packed_values=torch.ones(4, 4, 4).long(),
        ),
    ),
    "int64 crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 2, 4]))),
    "too few crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 4], dtype=INT))),
    "decreasing crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 5, 4], dtype=INT))),
    "column out of range": ("col_indices", _change(col_indices=torch.tensor([0, 2, 0, 1], dtype=INT))),
    "duplicate column": ("col_indices", _change(col_indices=torch.tensor([0, 0, 0, 1], dtype=INT))),
    "gradient of other rows": ("crow_indices", _change(grad_output=torch.randn(2, 9))),
}
BAD_FOR_INPUT = {
    "values of another dtype": ("packed_values", _change(packed_values=torch.ones(4, 4, 4).double())),
    "values of two dimensions": ("packed_values", _change(packed_values=torch.ones(4, 16))),
    "blocks too large": ("packed_values", _change(packed_values=torch.ones(4, 4, 129))),
    "another number of blocks": ("col_indices", _change(packed_values=torch.ones(3, 4, 4))),
    "negative in_features": ("in_features", _change(in_features=-1)),
    "fewer features than columns": ("col_indices", _change(in_features=4)),
}
BAD_FOR_WEIGHT = {
    "input of another dtype": ("input", _change(input=torch.randn(2, 8).double())),
    "input of other samples": ("input", _change(input=torch.randn(3, 8))),
    "input of other dimensions": ("input", _change(input=torch.randn(2, 1, 8))),
    "blocksize out of range": ("cols", _change(blocksize=(4, 0))),
    "input of fewer columns": ("col_indices", _change(input=torch.randn(2, 4))),
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*BAD_FOR_BOTH.values(), *BAD_FOR_INPUT.values()],
    ids=[*BAD_FOR_BOTH, *BAD_FOR_INPUT],
)
def test_bad_arguments_of_the_input_gradient_are_named(name: str, arguments: dict) -> None:
    names = ("grad_output", "packed_values", "crow_indices", "col_indices", "in_features")
    with pytest.raises(ValueError, match=name):
        ops.block_sparse_linear_input_gradient(**{key: arguments[key] for key in names})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*BAD_FOR_BOTH.values(), *BAD_FOR_WEIGHT.values()],
    ids=[*BAD_FOR_BOTH, *BAD_FOR_WEIGHT],
)
def test_bad_arguments_of_the_weight_gradient_are_named(name: str, arguments: dict) -> None:
    names = ("grad_output", "input", "crow_indices", "col_indices", "blocksize")
    with pytest.raises(ValueError, match=name):
        ops.block_sparse_linear_weight_gradient(**{key: arguments[key] for key in names})
