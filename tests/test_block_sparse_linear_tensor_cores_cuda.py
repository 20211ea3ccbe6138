"""block_sparse_linear and its input gradient in float16, bfloat16 and tf32 on a GPU, against float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune import _library, ops, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if (missing := _library.cuda_kernels_unavailable_reason()) is not None:
    pytest.skip(f"the CUDA kernels are {missing}", allow_module_level=True)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # float32 through tf32
# Few samples, the smaller tiles and, with many outputs, the larger ones.
SAMPLES = (1, 8, 16, 17, 65, 151)
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (48, 80), (24, 17))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def make_weight(
    shape: tuple[int, int], blocksize: tuple[int, int], density: float, dtype: torch.dtype
) -> fp.BlockSparseTensor:
    grid = (-(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1]))
    dense = torch.randn(shape).to(dtype)
    return fp.BlockSparseTensor.from_dense(dense, blocksize, mask=torch.rand(grid) < density).to("cuda")


def parts(weight: fp.BlockSparseTensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight.packed_values, weight.crow_indices, weight.col_indices


def assert_close(output: Tensor, wanted: Tensor, terms: int, dtype: torch.dtype) -> None:
    assert output.is_cuda
    assert output.dtype == dtype
    # Sums of products of standard normals; tf32 rounds each operand by up to 2^-11 of itself. Tensor cores
    # cut off what they add, half a unit in the last place on average, all to the same side.
    operand = 2**-10 if dtype == torch.float32 else 0.0
    cut = terms / 16 * 2**-24
    stored = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    atol = (4e-7 * 8 + operand * 8 + cut * 1.5) * max(terms, 1) ** 0.5
    torch.testing.assert_close(output.cpu().double(), wanted, rtol=1.1 * stored, atol=atol)


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_input_gradient_match_float64(dtype: torch.dtype, blocksize: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for shape, density in itertools.product(((129, 151), (2000, 264)), (0.0, 0.3, 1.0)):
        weight = make_weight(shape, blocksize, density, dtype)
        dense = weight.to_dense().cpu().double()
        bias = torch.randn(shape[0]).to(dtype).cuda()
        for samples in SAMPLES + ((2100,) if shape[0] == 2000 else ()):
            input = torch.randn(samples, shape[1]).to(dtype).cuda()
            grad = torch.randn(samples, shape[0]).to(dtype).cuda()
            with tf32(True):
                output = ops.block_sparse_linear(
                    input, *parts(weight), bias, out_features=shape[0], activation="gelu"
                )
                grad_input = ops.block_sparse_linear_input_gradient(
                    grad, *parts(weight), in_features=shape[1]
                )
            wanted = nn.functional.gelu(input.cpu().double() @ dense.T + bias.cpu().double())
            assert_close(output, wanted, shape[1], dtype)
            assert_close(grad_input, grad.cpu().double() @ dense, shape[0], dtype)


def test_tf32_only_where_it_is_allowed() -> None:
    torch.manual_seed(1)
    weight = make_weight((64, 512), (16, 16), 1.0, torch.float32)
    input = torch.randn(64, 512, device="cuda")
    wanted = input.cpu().double() @ weight.to_dense().cpu().double().T
    errors = {}
    for allowed in (False, True):
        with tf32(allowed):
            output = ops.block_sparse_linear(input, *parts(weight), out_features=64)
        errors[allowed] = (output.cpu().double() - wanted).abs().max().item()
    assert errors[False] < 1e-4 < errors[True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same_in_every_run_and_on_rows_of_any_alignment(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = make_weight((256, 264), (32, 32), 0.4, dtype)
    input = torch.randn(70, 264, device="cuda").to(dtype)
    with tf32(True):
        output = ops.block_sparse_linear(input, *parts(weight), out_features=256)
        for offset in (0, 1, 2, 3, 8):
            memory = torch.full((70, 264 + 11), float("nan"), device="cuda", dtype=dtype)
            memory[:, offset : offset + 264] = input
            sliced = memory[:, offset : offset + 264]
            again = ops.block_sparse_linear(sliced, *parts(weight), out_features=256)
            assert torch.equal(again, output), offset


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_trains_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    dense = nn.Linear(96, 80)
    layer = fp.BlockSparseLinear.from_dense(dense, (16, 16), mask=torch.rand(5, 6) < 0.5).to("cuda", dtype)
    input = torch.randn(40, 96).to(dtype).cuda().requires_grad_()
    layer(input).square().sum().backward()
    weight = layer.weight.detach().cpu().double().requires_grad_()
    reference_input = input.detach().cpu().double().requires_grad_()
    nn.functional.linear(
        reference_input, weight, layer.bias.detach().cpu().double()
    ).square().sum().backward()
    assert input.grad is not None
    torch.testing.assert_close(input.grad.cpu().double(), reference_input.grad, rtol=0.05, atol=0.1)
    assert layer.packed_values.grad is not None
    assert layer.packed_values.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_runs_in_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    layer = fp.BlockSparseLinear.from_dense(nn.Linear(64, 48)).cuda()
    input = torch.randn(20, 64, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        output = layer(input)
    assert output.dtype == dtype
    wanted = nn.functional.linear(input.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
    torch.testing.assert_close(output, wanted, rtol=0.02, atol=0.02)
    output.float().sum().backward()
    assert layer.packed_values.grad is not None
    assert layer.packed_values.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_both_directions(dtype: torch.dtype) -> None:
    weight = make_weight((32, 48), (16, 16), 0.5, dtype)
    values = weight.packed_values.detach().requires_grad_()
    structure = (weight.crow_indices, weight.col_indices)
    input = torch.randn(4, 48, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(4, 32, device="cuda", dtype=dtype, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_linear.default,
        (input, values, *structure, None, 32, "none", True),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_linear_input_gradient.default,
        (grad, values, *structure, 48, True),
        test_utils=tests,
    )


def test_both_directions_run_in_a_graph_and_never_wait() -> None:
    torch.manual_seed(5)
    weight = make_weight((64, 96), (16, 16), 0.5, torch.bfloat16)
    input = torch.randn(40, 96, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)

    def both() -> tuple[Tensor, Tensor]:
        return (
            ops.block_sparse_linear(input, *parts(weight), out_features=64),
            ops.block_sparse_linear_input_gradient(grad, *parts(weight), in_features=96),
        )

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = [tensor.clone() for tensor in both()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    for ours, other in zip(captured, wanted, strict=True):
        assert torch.equal(ours, other)


def test_half_precision_agrees_with_its_twin_where_it_is_differentiated() -> None:
    torch.manual_seed(6)
    weight = make_weight((48, 64), (16, 16), 0.6, torch.bfloat16)
    grad = torch.randn(20, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ours = ops.block_sparse_linear_input_gradient(grad, *parts(weight), in_features=64)
    twin = reference.block_sparse_linear_input_gradient(grad, *parts(weight), in_features=64)
    torch.testing.assert_close(ours, twin, rtol=0.02, atol=0.02)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, grad, upstream)[0]
    wanted = torch.autograd.grad(twin, grad, upstream)[0]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.05)
