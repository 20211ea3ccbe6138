"""block_sparse_linear_weight_gradient on a GPU against the reference twin in float64, on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastprune as fp
from fastprune import _library, ops, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if (missing := _library.cuda_kernels_unavailable_reason()) is not None:
    pytest.skip(f"the CUDA kernels are {missing}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Blocks of the tensor cores' tiles and between them, and of the plain kernel's.
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (48, 16), (16, 80), (8, 1), (1, 8), (5, 3), (33, 17))
# One below, at and above a stage, and with two slices.
SAMPLES = (1, 17, 31, 32, 33, 129, 513)


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if request.param else "ieee"
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def make_structure(
    out_features: int, in_features: int, blocksize: tuple[int, int], density: float
) -> tuple[Tensor, Tensor]:
    grid = (-(-out_features // blocksize[0]), -(-in_features // blocksize[1]))
    weight = fp.BlockSparseTensor.from_dense(
        torch.zeros(out_features, in_features), blocksize, mask=torch.rand(grid) < density
    ).to("cuda")
    return weight.crow_indices, weight.col_indices


def call(grad_output: Tensor, input: Tensor, structure: tuple, blocksize: tuple[int, int]) -> Tensor:
    return ops.block_sparse_linear_weight_gradient(grad_output, input, *structure, blocksize=blocksize)


def assert_right(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    structure: tuple,
    blocksize: tuple[int, int],
    tf32: bool = False,
) -> None:
    operands = [tensor.cpu().double() for tensor in (grad_output, input)]
    indices = [index.cpu() for index in structure]
    function = reference.block_sparse_linear_weight_gradient
    wanted = function(*operands, *indices, blocksize=blocksize)
    magnitude = function(*(tensor.abs() for tensor in operands), *indices, blocksize=blocksize)
    # A chain of float32 multiply-adds, operands rounded to tf32, and the rounding of the result.
    relative = (input[..., 0].numel() + 2) * 2.0**-23 + (2.001 * 2.0**-11 if tf32 else 0)
    kind = torch.finfo(output.dtype)
    rounding = 0.0 if output.dtype == torch.float32 else kind.eps / 2
    # Below the smallest normal number, of float16 above all, what is rounded no longer shrinks.
    subnormal = kind.smallest_normal * kind.eps / 2
    bound = relative * magnitude + rounding * (1 + relative) * wanted.abs() + subnormal
    assert output.is_cuda
    assert output.dtype == grad_output.dtype
    assert output.shape == wanted.shape
    assert bool(((output.cpu().double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_matches_the_reference_over_ugly_sizes(
    dtype: torch.dtype, blocksize: tuple[int, int], density: float, tf32: bool
) -> None:
    torch.manual_seed(0)
    for out_features, in_features in itertools.product((1, 17, 151, 160), repeat=2):
        structure = make_structure(out_features, in_features, blocksize, density)
        for samples in SAMPLES:
            grad_output = torch.randn(samples, out_features, device="cuda").to(dtype)
            input = torch.randn(samples, in_features, device="cuda").to(dtype)
            output = call(grad_output, input, structure, blocksize)
            assert_right(output, grad_output, input, structure, blocksize, tf32 and dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_any_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    structure = make_structure(48, 80, (16, 16), 0.6)
    grads = torch.randn(6, 5, 96, device="cuda").to(dtype)
    inputs = torch.randn(6, 5, 160, device="cuda").to(dtype)
    for first in (0, 1, 2, 8):  # elements after an aligned address
        pairs = {
            "batched": (grads[..., first : first + 48], inputs[..., first : first + 80]),
            "contiguous": (grads[..., first : first + 48].contiguous(), inputs[..., :80].contiguous()),
            "one matrix": (grads[0, :, first : first + 48], inputs[1, :, :80]),
            "one sample": (grads[0, 0, first : first + 48], inputs[1, 0, :80]),
            "no samples": (grads[:0, :, :48], inputs[:0, :, :80]),
            "expanded": (grads[0, :1, :48].expand(9, 48), inputs[0, :1, :80].expand(9, 80)),
        }
        for grad_output, input in pairs.values():
            output = call(grad_output, input, structure, (16, 16))
            assert_right(output, grad_output, input, structure, (16, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_run_and_padding_is_zero(dtype: torch.dtype, tf32: bool) -> None:
    torch.manual_seed(2)
    structure = make_structure(150, 250, (32, 32), 0.5)
    grad_output = torch.randn(5000, 150, device="cuda").to(dtype)
    input = torch.randn(5000, 250, device="cuda").to(dtype)
    output = call(grad_output, input, structure, (32, 32))
    for _ in range(10):
        assert torch.equal(call(grad_output, input, structure, (32, 32)), output)
    input[3, 7] = float("nan")
    grad_output[4, 149] = float("inf")
    output = call(grad_output, input, structure, (32, 32)).cpu()
    crow, col = (index.cpu() for index in structure)
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1), (crow[1:] - crow[:-1]).long())
    for block, row, column in zip(output, rows, col, strict=True):
        assert not block[250 - int(column) * 32 :].any() or column * 32 + 32 <= 250
        assert not block[:, 150 - int(row) * 32 :].any() or row * 32 + 32 <= 150


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_never_waits_and_runs_in_a_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    structure = make_structure(64, 64, (16, 16), 0.5)
    grad_output = torch.randn(1500, 64, device="cuda").to(dtype)
    input = torch.randn(1500, 64, device="cuda").to(dtype)
    call(grad_output, input, structure, (16, 16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(grad_output, input, structure, (16, 16))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    # Capture fails for work on any other stream, and for a call that waits.
    with torch.cuda.graph(graph):
        output = call(grad_output, input, structure, (16, 16))
    for _ in range(2):
        input.copy_(torch.randn(1500, 64))
        graph.replay()
        assert_right(output, grad_output, input, structure, (16, 16))


def test_first_and_second_derivatives_are_those_of_the_reference() -> None:
    torch.manual_seed(4)
    structure = make_structure(40, 60, (16, 16), 0.6)
    leaves = [torch.randn(20, 40, device="cuda"), torch.randn(20, 60, device="cuda")]
    upstream = torch.randn(len(structure[1]), 16, 16, device="cuda")

    def derivatives(leaves: list[Tensor], structure: list, upstream: Tensor) -> list[Tensor]:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        upstream = upstream.requires_grad_()
        value = ops.block_sparse_linear_weight_gradient(*leaves, *structure, blocksize=(16, 16))
        first = torch.autograd.grad(value, leaves, upstream, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [*leaves, upstream])
        return [*first, *second]

    ours = derivatives(leaves, list(structure), upstream)
    wanted = derivatives(
        [leaf.detach().cpu().double() for leaf in leaves],
        [index.cpu() for index in structure],
        upstream.detach().cpu().double(),
    )
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.cpu().double(), other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    structure = make_structure(20, 30, (16, 8), 0.5)
    operands = [torch.randn(4, size, device="cuda").to(dtype).requires_grad_() for size in (20, 30)]
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_linear_weight_gradient.default, (*operands, *structure, 16, 8, True)
    )


def test_float64_and_bad_arguments() -> None:
    structure = make_structure(32, 32, (16, 16), 1.0)
    operands = [torch.randn(9, 32, device="cuda") for _ in range(2)]
    doubles = [operand.double() for operand in operands]
    op = torch.ops.fastprune.block_sparse_linear_weight_gradient
    bad = {
        "grad_output": (*doubles, *structure, 16, 16),
        "input": (operands[0], operands[1].half(), *structure, 16, 16),
        "crow_indices": (*operands, *structure, 8, 16),
        "rows": (*operands, *structure, 129, 16),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"`{message}`"):
            op(*arguments)
    with pytest.warns(UserWarning, match="float64"):
        output = call(doubles[0], doubles[1], structure, (16, 16))
    assert_right(output.float(), *(operand.float() for operand in doubles), structure, (16, 16))


def test_offsets_past_32_bits() -> None:
    samples, features = 2**17 + 1, 2**14
    bytes_needed = 3 * samples * features * 2
    if torch.cuda.mem_get_info()[0] < bytes_needed:
        pytest.skip(f"needs {bytes_needed >> 30} GiB of free GPU memory")
    torch.manual_seed(5)
    structure = make_structure(16, features, (16, 16), 1.0)
    input = torch.zeros(samples, features, device="cuda", dtype=torch.float16)
    grad_output = torch.zeros(samples, 16, device="cuda", dtype=torch.float16)
    input[-1], grad_output[-1] = torch.randn(features).half(), torch.randn(16).half()
    output = call(grad_output, input, structure, (16, 16))
    assert_right(output, grad_output[-1:], input[-1:], structure, (16, 16))
