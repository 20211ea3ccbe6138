"""block_sparse_linear and its gradients with weights, or weights and activations, of 16 bits on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastprune as fp
from block_sparse_cases import HALF, ROUNDING, SIZES, assert_matches, make_weight
from fastprune import ops, reference

# Blocks that fill vectors of every length, and some that do not.
BLOCKSIZES = ((16, 16), (32, 32), (8, 8), (8, 1), (1, 1), (5, 3), (48, 16), (128, 128))

pytestmark = pytest.mark.filterwarnings("error")


def run(input: Tensor, weight: fp.BlockSparseTensor, bias: Tensor | None = None, activation=None) -> Tensor:
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
    input: Tensor, weight: fp.BlockSparseTensor, bias: Tensor | None = None, activation=None
) -> Tensor:
    bias = None if bias is None else bias.double()
    return reference.block_sparse_linear(
        input.double(),
        weight.packed_values.double(),
        weight.crow_indices,
        weight.col_indices,
        bias,
        out_features=weight.shape[0],
        activation=activation,
    )


def check(samples: int, weight: fp.BlockSparseTensor, activation: str | None = None) -> None:
    """Compare float32 inputs, then inputs of the weight's dtype, with float64."""
    out_features, in_features = weight.shape
    input, bias = torch.randn(samples, in_features), torch.randn(out_features)
    output = run(input, weight, bias, activation)
    assert output.dtype == torch.float32
    assert_matches(output, expected(input, weight, bias, activation), in_features)
    # Widening is exact, and the sums are those of float32 weights, in their order.
    assert torch.equal(output, run(input, weight.to(torch.float32), bias, activation))

    dtype = weight.packed_values.dtype
    input, bias = input.to(dtype), bias.to(dtype)
    output = run(input, weight, bias, activation)
    assert output.dtype == dtype
    assert_matches(output, expected(input, weight, bias, activation), in_features)
    widened = run(input.float(), weight, bias.float(), activation)
    assert torch.equal(output, widened.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_it_matches_the_reference_over_ugly_sizes(
    isa: str, blocksize: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    for samples, out_features, in_features in itertools.product((1, 17, 65), SIZES, SIZES):
        check(samples, make_weight(out_features, in_features, blocksize, density, dtype))


@pytest.mark.parametrize("samples", [*range(1, 35), 129, 191, 400])
@pytest.mark.parametrize("dtype", HALF)
def test_every_number_of_samples_fills_its_register_tiles(isa: str, samples: int, dtype: torch.dtype) -> None:
    for rows in (2, 4, 8, 16, 24, 32, 64):
        check(samples, make_weight(80, 64, (rows, 16), 0.5, dtype), "relu")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_activations_are_computed_before_rounding(isa: str, dtype: torch.dtype, activation: str) -> None:
    for samples in (3, 70):
        check(samples, make_weight(33, 50, (16, 16), 0.5, dtype), activation)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16, 32, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_every_number_is_widened_exactly(isa: str, dtype: torch.dtype, rows: int) -> None:
    # All 65,536: zeros, denormals, infinities and NaN too, each by itself in a row of the weight.
    numbers = torch.arange(-(2**15), 2**15 - 2**16 % rows, dtype=torch.int16).view(dtype)
    block_rows = len(numbers) // rows
    weight = fp.BlockSparseTensor(
        numbers.view(block_rows, 1, rows),
        torch.arange(block_rows + 1, dtype=torch.int32),
        torch.zeros(block_rows, dtype=torch.int32),
        (len(numbers), 1),
    )
    for samples in (1, 5, 40):
        output = run(torch.ones(samples, 1), weight)
        torch.testing.assert_close(output[-1], numbers.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="the CPU always keeps denormal numbers")
def test_denormal_float16_are_kept_where_the_cpu_flushes_denormal_float32(isa: str) -> None:
    numbers = torch.arange(1, 1025, dtype=torch.int16).view(torch.float16)
    weight = fp.BlockSparseTensor.from_dense(numbers.view(1024, 1), (16, 1))
    assert torch.set_flush_denormal(True)
    try:
        output = run(torch.ones(1, 1), weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(output[0], numbers.float())


@pytest.mark.parametrize("dtype", HALF)
def test_results_that_overflow_or_are_no_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.tensor([3e38, -3e38, float("inf"), float("nan"), 65504.0, 65520.0, 1e-7, -1e-40])
    weight = fp.BlockSparseTensor.from_dense(torch.zeros(8, 4, dtype=dtype), (4, 4))
    bias = values.to(dtype)
    for samples in (1, 40):
        output = run(torch.zeros(samples, 4, dtype=dtype), weight, bias)
        torch.testing.assert_close(output[-1], bias, rtol=0, atol=0, equal_nan=True)
    weight = fp.BlockSparseTensor.from_dense(torch.full((8, 4), 300.0, dtype=dtype), (4, 4))
    output = run(torch.full((1, 4), 300.0, dtype=dtype), weight)
    assert torch.equal(output, torch.full((1, 8), 360_000.0).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_bits_do_not_depend_on_threads_or_on_other_samples(isa: str, dtype: torch.dtype) -> None:
    weight = make_weight(700, 1024, (16, 16), 0.2, dtype)
    input = torch.randn(70, 1024)
    threads = torch.get_num_threads()
    outputs: dict[int, list[Tensor]] = {16: [], 70: []}
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for samples, found in outputs.items():
                found.append(run(input[:samples], weight))
    finally:
        torch.set_num_threads(threads)
    for found in outputs.values():
        assert all(torch.equal(output, found[0]) for output in found)
    assert torch.equal(outputs[16][0], outputs[70][0][:16])
    assert torch.equal(run(input[10:11], weight), outputs[70][0][10:11])


@pytest.mark.parametrize("input_dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("samples", [6, 60])
def test_inputs_and_values_of_any_layout_give_the_same(input_dtype: torch.dtype, samples: int) -> None:
    dtype = torch.bfloat16 if input_dtype == torch.float32 else input_dtype
    weight = make_weight(40, 24, (8, 8), 0.5, dtype)
    base = torch.randn(samples // 2, 2, 24, dtype=input_dtype)
    layouts = {
        "batched": base,
        "sliced rows": base.repeat_interleave(2, 0)[::2],
        "sliced columns": torch.cat([base, base], dim=2)[..., :24],
        "transposed": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one dimension": base[0, 0],
        "expanded": base[:1, :1].expand_as(base),
        "no samples": base[:0],
    }
    strided = fp.BlockSparseTensor(
        weight.packed_values.transpose(1, 2).contiguous().transpose(1, 2),
        weight.crow_indices,
        weight.col_indices,
        weight.shape,
    )
    bias = torch.randn(80, dtype=input_dtype)[::2]
    for name, input in layouts.items():
        output = run(input, strided, bias)
        assert (output.shape, output.dtype) == ((*input.shape[:-1], 40), input_dtype), name
        assert_matches(output, expected(input, weight, bias), 24)


def _gradients(function, inputs, factor, activation):
    input, values, bias, weight = inputs
    output = function(
        input,
        values,
        weight.crow_indices,
        weight.col_indices,
        bias,
        out_features=weight.shape[0],
        activation=activation,
    )
    return torch.autograd.grad(output, (input, values, bias), factor.to(output.dtype))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("samples", [1, 17, 151])
def test_gradients_match_float64(
    isa: str, samples: int, activation: str | None, dtype: torch.dtype, mixed: bool
) -> None:
    for blocksize, density in (((16, 16), 0.3), ((8, 1), 0.5), ((5, 3), 1.0), ((16, 16), 0.0)):
        weight = make_weight(129, 51, blocksize, density, dtype)
        input_dtype = torch.float32 if mixed else dtype
        inputs = [torch.randn(samples, 51, dtype=input_dtype), weight.packed_values]
        inputs.append(torch.randn(129, dtype=input_dtype))
        factor = torch.randn(samples, 129, dtype=input_dtype)
        found = _gradients(
            ops.block_sparse_linear, (*(x.requires_grad_() for x in inputs), weight), factor, activation
        )
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        wanted = _gradients(reference.block_sparse_linear, (*doubles, weight), factor, activation)
        assert [x.dtype for x in found] == [input_dtype, dtype, input_dtype]
        for gradient, exact in zip(found, wanted, strict=True):
            if activation == "gelu" and not mixed:
                # What goes into the activation is rounded, as by torch's own layers: three roundings in all.
                error = (gradient.double() - exact).norm() / exact.norm().clamp(min=1e-30)
                assert error < 3 * ROUNDING[dtype][0]
            else:
                assert_matches(gradient, exact, max(samples, 129))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_gradients_match_float64(dtype: torch.dtype) -> None:
    weight = make_weight(20, 30, (16, 8), 0.5, dtype)
    factors = (
        torch.randn(9, 20),
        torch.randn(9, 30),
        torch.randn_like(weight.packed_values, dtype=torch.float32),
    )

    def second(input: Tensor, values: Tensor, function) -> tuple[Tensor, ...]:
        output = function(input, values, weight.crow_indices, weight.col_indices, out_features=20)
        factor = factors[0].to(output.dtype).requires_grad_()
        first = torch.autograd.grad(output, (input, values), factor, create_graph=True)
        total = (first[0] * factors[1]).sum() + (first[1] * factors[2]).sum()
        return torch.autograd.grad(total, (input, values, factor))

    input = torch.randn(9, 30)
    found = second(input.requires_grad_(), weight.packed_values.requires_grad_(), ops.block_sparse_linear)
    doubles = (x.detach().double().requires_grad_() for x in (input, weight.packed_values))
    wanted = second(*doubles, reference.block_sparse_linear)
    assert [x.dtype for x in found] == [torch.float32, dtype, torch.float32]
    for gradient, exact in zip(found, wanted, strict=True):
        # The factor of the weight's gradient is rounded to the weight's dtype on its way back.
        assert (gradient.double() - exact).abs().max() < 4 * ROUNDING[dtype][0] * exact.abs().max()


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["", "_inference", "_input_gradient", "_weight_gradient"])
def test_opcheck(name: str, input_dtype: torch.dtype) -> None:
    weight = make_weight(20, 30, (16, 8), 0.5, torch.bfloat16)
    grad = name != "_inference"
    values = weight.packed_values.requires_grad_(grad)
    input, grad_output = (torch.randn(4, size, dtype=input_dtype, requires_grad=grad) for size in (30, 20))
    bias = torch.randn(20, dtype=input_dtype, requires_grad=grad)
    indices = (weight.crow_indices, weight.col_indices)
    arguments = {
        "_input_gradient": (grad_output, values, *indices, 30),
        "_weight_gradient": (grad_output, input, *indices, 16, 8),
    }.get(name, (input, values, *indices, bias, 20, "relu"))
    torch.library.opcheck(getattr(torch.ops.fastprune, f"block_sparse_linear{name}").default, arguments)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.vmap])
def test_function_transforms_give_what_the_dense_weight_gives(transform) -> None:
    weight = make_weight(20, 30, (16, 8), 0.5, torch.bfloat16)
    dense, input = weight.to_dense().float(), torch.randn(3, 30)
    found = transform(lambda x: run(x, weight))(input)
    torch.testing.assert_close(found, transform(lambda x: x @ dense.T)(input))


@pytest.mark.parametrize("autocast_dtype", HALF)
@pytest.mark.parametrize("input_dtype", [*HALF, torch.float32])
def test_autocast_reads_weights_as_they_are(input_dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    weight = make_weight(20, 30, (16, 8), 0.5, torch.bfloat16)
    input, bias = torch.randn(4, 30, dtype=input_dtype), torch.randn(20)
    with torch.autocast("cpu", dtype=autocast_dtype):
        output = run(input, weight, bias)
        alone = run(input, weight)
    assert output.dtype == torch.float32
    assert_matches(output, expected(input, weight, bias), 30)
    assert alone.dtype == (torch.bfloat16 if input_dtype == torch.bfloat16 else torch.float32)
    assert_matches(alone, expected(input, weight), 30)


def test_on_cuda_weights_beside_float32_are_widened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    values = torch.randn(2, 4, 4).bfloat16().requires_grad_()
    widened = ops._widened_on_cuda(torch.ones(1, 8), values)
    assert widened.dtype == torch.float32
    widened.sum().backward()
    assert values.grad.dtype == torch.bfloat16
    assert ops._widened_on_cuda(torch.ones(1, 8).bfloat16(), values) is values


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtypes", "name"),
    [
        ((F64, BF16, F64), "packed_values"),
        ((F16, BF16, F16), "packed_values"),
        ((BF16, F32, BF16), "packed_values"),
        ((F32, F64, F32), "packed_values"),
        ((F32, BF16, BF16), "bias"),
        ((BF16, BF16, F32), "bias"),
    ],
)
def test_dtypes_that_do_not_go_together_are_named(dtypes: tuple[torch.dtype, ...], name: str) -> None:
    input, values, bias = (torch.ones(8, dtype=dtype) for dtype in dtypes)
    weight = fp.BlockSparseTensor.from_dense(values.expand(8, 8), (4, 4))
    with pytest.raises(ValueError, match=f"`{name}` must have dtype"):
        run(input, weight, bias)
    if name == "packed_values":
        with pytest.raises(ValueError, match=f"`{name}` must have dtype"):
            ops.block_sparse_linear_input_gradient(
                input, weight.packed_values, weight.crow_indices, weight.col_indices, in_features=8
            )
