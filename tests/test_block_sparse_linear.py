"""block_sparse_linear: every CPU kernel against the reference twin in float64."""

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

ACTIVATIONS = [None, *reference.ACTIVATIONS]


def run(input: Tensor, weight: fp.BlockSparseTensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return ops.block_sparse_linear(
        input,
        weight.packed_values,
        weight.crow_indices,
        weight.col_indices,
        bias,
        out_features=weight.shape[0],
        activation=activation,
    )


def expected(
    input: Tensor, weight: fp.BlockSparseTensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    return reference.block_sparse_linear(
        input.double(),
        weight.packed_values.double(),
        weight.crow_indices,
        weight.col_indices,
        None if bias is None else bias.double(),
        out_features=weight.shape[0],
        activation=activation,
    )


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_matches_the_reference_over_ugly_sizes(isa: str, blocksize: tuple[int, int], density: float) -> None:
    torch.manual_seed(0)
    for samples, out_features, in_features in itertools.product((1, 17, 129), SIZES, SIZES):
        weight = make_weight(out_features, in_features, blocksize, density)
        input, bias = torch.randn(samples, in_features), torch.randn(out_features)
        assert_matches(run(input, weight, bias, None), expected(input, weight, bias, None), in_features)


@pytest.mark.parametrize("samples", [*range(1, 30), 191, 192, 193, 400])
def test_every_number_of_samples_fills_its_register_tiles(isa: str, samples: int) -> None:
    torch.manual_seed(samples)
    for rows in (4, 8, 16, 32, 40):
        weight = make_weight(80, 64, (rows, 16), 0.5)
        input, bias = torch.randn(samples, 64), torch.randn(80)
        assert_matches(run(input, weight, bias, "relu"), expected(input, weight, bias, "relu"), 64)


@pytest.mark.parametrize("blocksize", [(8, 8), (16, 16), (24, 5), (48, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_outputs_are_written_past_the_caches_right(
    isa: str, blocksize: tuple[int, int], dtype: torch.dtype
) -> None:
    # From 4 MiB on: aligned rows, rows that are not, a last group of few samples, a last block row cut off.
    torch.manual_seed(0)
    for samples, out_features in ((1029, 1040), (1029, 1049), (2072, 528)):
        weight = make_weight(out_features, 20, blocksize, 0.5, dtype)
        input, bias = torch.randn(samples, 20, dtype=dtype), torch.randn(out_features, dtype=dtype)
        assert 4 * samples * out_features >= 4 << 20
        assert_matches(run(input, weight, bias, "relu"), expected(input, weight, bias, "relu"), 20)


@pytest.mark.parametrize("in_features", [512, 1024, 2048])
def test_rows_that_share_cache_sets_are_copied_right(isa: str, in_features: int) -> None:
    torch.manual_seed(0)
    weight = make_weight(48, in_features, (16, 16), 0.3)
    for input in (
        torch.randn(37, in_features),
        torch.randn(37, in_features + 512)[:, 100 : in_features + 100],
    ):
        assert_matches(run(input, weight, None, None), expected(input, weight, None, None), in_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_activation_and_dtype(
    isa: str, dtype: torch.dtype, activation: str | None, with_bias: bool
) -> None:
    torch.manual_seed(1)
    weight = make_weight(33, 50, (16, 16), 0.5, dtype)
    input = torch.randn(21, 50, dtype=dtype)
    bias = torch.randn(33, dtype=dtype) if with_bias else None
    output = run(input, weight, bias, activation)
    assert output.dtype == dtype
    assert_matches(output, expected(input, weight, bias, activation), 50)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("samples", [3, 40])
def test_activations_are_those_of_torch_over_their_whole_range(
    isa: str, samples: int, activation: str
) -> None:
    values = torch.cat([torch.linspace(-110, 110, 16 * samples - 6), torch.tensor([0.0, -0.0])])
    values = torch.cat([values, torch.tensor([1e30, -1e30, float("inf"), float("nan")])]).view(samples, 16)
    weight = fp.BlockSparseTensor.from_dense(torch.eye(16), (16, 16))
    # One product at a time, so that inf * 0 does not come in: the bias carries the values.
    outputs = torch.cat([run(torch.zeros(samples, 16), weight, row, activation)[:1] for row in values])
    wanted = reference.ACTIVATIONS[activation](values.double())
    assert outputs[-1, -1].isnan()
    finite = wanted.isfinite()
    error = (outputs.double() - wanted).abs()[finite]
    assert float((error / wanted.abs().clamp(min=1.0)[finite]).max()) < 5e-7
    assert torch.equal(outputs[~finite & ~wanted.isnan()].double(), wanted[~finite & ~wanted.isnan()])


def test_inputs_of_any_layout_give_the_same() -> None:
    torch.manual_seed(2)
    weight = make_weight(40, 24, (8, 8), 0.5)
    base = torch.randn(6, 5, 24)
    layouts = {
        "batched": base,
        "sliced rows": torch.randn(12, 5, 24).copy_(base.repeat_interleave(2, 0))[::2],
        "sliced columns": torch.cat([base, base], dim=2)[..., :24],
        "transposed": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one dimension": base[0, 0],
        "expanded": base[:1, :1].expand(6, 5, 24),
        "negative view": torch._neg_view(-base),
    }
    for name, input in layouts.items():
        output = run(input, weight, None, None)
        assert output.shape == (*input.shape[:-1], 40), name
        assert_matches(output, expected(input.contiguous(), weight, None, None), 24)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)], ids=["no samples", "no samples, three dimensions"])
def test_no_samples_give_an_empty_output(shape: tuple[int, ...]) -> None:
    weight = make_weight(9, 7, (4, 4), 1.0)
    assert run(torch.randn(shape), weight, None, None).shape == (*shape[:-1], 9)


def test_no_inputs_leave_the_bias() -> None:
    weight = fp.BlockSparseTensor.from_dense(torch.randn(5, 0), (4, 4))
    bias = torch.randn(5)
    torch.testing.assert_close(run(torch.randn(3, 0), weight, bias, None), bias.expand(3, 5))


def test_relu_keeps_nan_and_empty_rows_do_not_touch_inf() -> None:
    weight = fp.BlockSparseTensor.from_dense(torch.eye(32), (16, 16), mask=torch.eye(2, dtype=torch.bool))
    input = torch.zeros(4, 32)
    input[0, 0] = float("nan")
    input[1, 20] = float("inf")
    output = run(input, weight, None, "relu")
    assert output[0, 0].isnan()
    # Column 20 lies in a block that the first block row does not keep.
    assert torch.equal(output[1, :16], torch.zeros(16))
    assert output[1, 20] == float("inf")


def test_bits_do_not_depend_on_threads_or_on_other_samples(isa: str) -> None:
    torch.manual_seed(3)
    weight = make_weight(700, 1024, (16, 16), 0.2)
    input = torch.randn(260, 1024)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outputs.append(run(input, weight, None, None))
    finally:
        torch.set_num_threads(threads)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])
    assert torch.equal(run(input[100:101], weight, None, None), outputs[0][100:101])


def test_uneven_patterns_are_split_into_all_block_rows() -> None:
    torch.manual_seed(4)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3] = True
    mask[31] = True
    weight = fp.BlockSparseTensor.from_dense(torch.randn(512, 512), (16, 16), mask=mask)
    input = torch.randn(200, 512)
    assert_matches(run(input, weight, None, None), expected(input, weight, None, None), 512)


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
    weight = make_weight(out_features, in_features, (rows, cols), density)
    input, bias = torch.randn(samples, in_features), torch.randn(out_features)
    assert_matches(run(input, weight, bias, "relu"), expected(input, weight, bias, "relu"), in_features)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str | None) -> None:
    torch.manual_seed(5)
    weight = make_weight(10, 7, (4, 3), 0.6, torch.float64)
    arguments = (
        torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True),
        weight.packed_values.requires_grad_(),
        torch.randn(10, dtype=torch.float64, requires_grad=True),
    )

    def function(input: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return ops.block_sparse_linear(
            input,
            values,
            weight.crow_indices,
            weight.col_indices,
            bias,
            out_features=10,
            activation=activation,
        )

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("name", ["block_sparse_linear", "block_sparse_linear_inference"])
@pytest.mark.parametrize("activation", ["none", *reference.ACTIVATIONS])
def test_opcheck(name: str, activation: str) -> None:
    weight = make_weight(20, 30, (16, 8), 0.5)
    needs_grad = name == "block_sparse_linear"
    torch.library.opcheck(
        getattr(torch.ops.fastprune, name).default,
        (
            torch.randn(4, 30, requires_grad=needs_grad),
            weight.packed_values.requires_grad_(needs_grad),
            weight.crow_indices,
            weight.col_indices,
            torch.randn(20, requires_grad=needs_grad),
            20,
            activation,
        ),
    )


def test_autocast_keeps_float32() -> None:
    weight = make_weight(20, 30, (16, 8), 0.5)
    input = torch.randn(4, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(input.bfloat16(), weight, None, None)
    assert output.dtype == torch.float32
    assert_matches(output, expected(input.bfloat16().float(), weight, None, None), 30)


def _change(**changes):
    weight = fp.BlockSparseTensor.from_dense(torch.ones(8, 8), (4, 4))
    arguments = {
        "input": torch.randn(2, 8),
        "packed_values": weight.packed_values,
        "crow_indices": weight.crow_indices,
        "col_indices": weight.col_indices,
        "bias": torch.randn(8),
        "out_features": 8,
        "activation": None,
    }
    return {**arguments, **changes}


INT = torch.int32
BAD_ARGUMENTS = {
    "scalar input": ("input", _change(input=torch.tensor(1.0))),
    "half input": ("dtype", _change(input=torch.randn(2, 8).half())),
    "integer input": ("dtype", _change(input=torch.ones(2, 8, dtype=torch.long))),
    "values of another dtype": ("packed_values", _change(packed_values=torch.ones(4, 4, 4).double())),
    "values of two dimensions": ("packed_values", _change(packed_values=torch.ones(4, 16))),
    "blocks of no rows": ("packed_values", _change(packed_values=torch.ones(4, 4, 0))),
    "int64 crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 2, 4]))),
    "too few crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 4], dtype=INT))),
    "crow_indices not from 0": ("crow_indices", _change(crow_indices=torch.tensor([1, 2, 4], dtype=INT))),
    "crow_indices past the end": ("crow_indices", _change(crow_indices=torch.tensor([0, 9, 4], dtype=INT))),
    "decreasing crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, -1, 4], dtype=INT))),
    "too few col_indices": ("col_indices", _change(col_indices=torch.tensor([0, 1, 0], dtype=INT))),
    "column out of range": ("col_indices", _change(col_indices=torch.tensor([0, 2, 0, 1], dtype=INT))),
    "negative column": ("col_indices", _change(col_indices=torch.tensor([-1, 1, 0, 1], dtype=INT))),
    "duplicate column": ("col_indices", _change(col_indices=torch.tensor([1, 1, 0, 1], dtype=INT))),
    "unsorted columns": ("col_indices", _change(col_indices=torch.tensor([1, 0, 0, 1], dtype=INT))),
    "fewer inputs than columns": ("col_indices", _change(input=torch.randn(2, 4))),
    "bias of another size": ("bias", _change(bias=torch.randn(7))),
    "bias of another dtype": ("bias", _change(bias=torch.randn(8).double())),
    "negative out_features": ("out_features", _change(out_features=-1)),
    "unknown activation": ("activation", _change(activation="tanh")),
    "values on another device": ("packed_values", _change(packed_values=torch.ones(4, 4, 4, device="meta"))),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        ops.block_sparse_linear(**arguments)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="avx1024"):
        fp.set_cpu_isa("avx1024")
    assert fp.cpu_isa() in fp.supported_cpu_isas()
