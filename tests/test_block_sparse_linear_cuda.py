"""block_sparse_linear on a GPU against the reference twin in float64, which runs on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastprune as fp
from fastprune import _library, ops, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if (missing := _library.cuda_kernels_unavailable_reason()) is not None:
    pytest.skip(f"the CUDA kernels are {missing}", allow_module_level=True)

# One below, at and above the kernel's tiles: 64 samples, 16 rows, steps of 32 columns.
SIZES = (1, 15, 17, 33, 151)
SAMPLES = (1, 17, 63, 64, 65, 129)
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (8, 1), (1, 8), (5, 3), (15, 33), (17, 31))


def make_weight(
    out_features: int, in_features: int, blocksize: tuple[int, int], density: float
) -> fp.BlockSparseTensor:
    grid = (-(-out_features // blocksize[0]), -(-in_features // blocksize[1]))
    dense = torch.randn(out_features, in_features)
    return fp.BlockSparseTensor.from_dense(dense, blocksize, mask=torch.rand(grid) < density).to("cuda")


def call(input: Tensor, weight: fp.BlockSparseTensor, bias: Tensor | None, activation: str | None) -> Tensor:
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
        input.cpu().double(),
        weight.packed_values.cpu().double(),
        weight.crow_indices.cpu(),
        weight.col_indices.cpu(),
        None if bias is None else bias.cpu().double(),
        out_features=weight.shape[0],
        activation=activation,
    )


def assert_matches(output: Tensor, wanted: Tensor, in_features: int) -> None:
    assert output.is_cuda
    assert output.dtype == torch.float32
    # Rounding of a sum of in_features products of standard normals.
    tolerance = 4e-7 * 8 * max(in_features, 1) ** 0.5
    torch.testing.assert_close(output.cpu().double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_matches_the_reference_over_ugly_sizes(blocksize: tuple[int, int], density: float) -> None:
    torch.manual_seed(0)
    for out_features, in_features in itertools.product(SIZES, SIZES):
        weight = make_weight(out_features, in_features, blocksize, density)
        bias = torch.randn(out_features, device="cuda")
        for samples in SAMPLES:
            input = torch.randn(samples, in_features, device="cuda")
            output = call(input, weight, bias, "relu")
            assert_matches(output, expected(input, weight, bias, "relu"), in_features)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_and_activation(activation: str | None, with_bias: bool) -> None:
    torch.manual_seed(1)
    weight = make_weight(700, 512, (16, 16), 0.25)
    input = torch.randn(300, 512, device="cuda")
    bias = torch.randn(700, device="cuda") if with_bias else None
    assert_matches(call(input, weight, bias, activation), expected(input, weight, bias, activation), 512)


def test_inputs_of_any_layout_give_the_same() -> None:
    torch.manual_seed(2)
    weight = make_weight(40, 24, (8, 8), 0.5)
    base = torch.randn(6, 5, 24, device="cuda")
    layouts = {
        "batched": base,
        "sliced rows": base.repeat_interleave(2, 0)[::2],
        "sliced columns": torch.cat([base, base], dim=2)[..., :24],
        "one matrix of a slice": torch.cat([base, base], dim=2)[0, :, 24:],
        "transposed": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one dimension": base[0, 0],
        "expanded": base[0, :1].expand(9, 24),
        "no samples": base[:0],
    }
    for name, input in layouts.items():
        output = call(input, weight, None, None)
        assert output.shape == (*input.shape[:-1], 40), name
        assert_matches(output, expected(input.contiguous(), weight, None, None), 24)


def test_relu_keeps_nan_and_empty_rows_do_not_touch_inf() -> None:
    weight = fp.BlockSparseTensor.from_dense(torch.eye(32), (16, 16), mask=torch.eye(2, dtype=torch.bool))
    input = torch.zeros(4, 32, device="cuda")
    input[0, 0] = float("nan")
    input[1, 20] = float("inf")
    output = call(input, weight.to("cuda"), None, "relu")
    assert output[0, 0].isnan()
    assert torch.equal(output[1, :16], torch.zeros(16, device="cuda"))
    assert output[1, 20] == float("inf")


def test_bits_depend_neither_on_the_run_nor_on_other_samples() -> None:
    torch.manual_seed(3)
    weight = make_weight(700, 1024, (32, 32), 0.3)
    input = torch.randn(260, 1024, device="cuda")
    output = call(input, weight, None, None)
    for _ in range(5):
        assert torch.equal(call(input, weight, None, None), output)
    for sample in (0, 63, 64, 259):
        assert torch.equal(call(input[sample : sample + 1], weight, None, None), output[sample : sample + 1])


def test_it_never_waits_for_the_device() -> None:
    torch.manual_seed(4)
    weight = make_weight(64, 64, (16, 16), 0.5)
    input = torch.randn(2, 3, 64, device="cuda").transpose(0, 1)
    call(input, weight, None, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(input, weight, None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream_and_in_a_graph() -> None:
    torch.manual_seed(5)
    weight = make_weight(64, 64, (16, 16), 0.5)
    input = torch.zeros(100, 64, device="cuda")
    call(input, weight, None, None)
    graph = torch.cuda.CUDAGraph()
    # Capture fails for work on any other stream, and for a call that waits.
    with torch.cuda.graph(graph):
        output = call(input, weight, None, None)
    for _ in range(2):
        input.copy_(torch.randn(100, 64))
        graph.replay()
        assert_matches(output, expected(input, weight, None, None), 64)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_where_its_input_is() -> None:
    weight = make_weight(64, 64, (16, 16), 0.5).to("cuda:1")
    input = torch.randn(10, 64, device="cuda:1")
    output = call(input, weight, None, None)
    assert output.device == input.device
    assert torch.cuda.current_device() == 0
    assert_matches(output, expected(input, weight, None, None), 64)


def test_gradients_are_those_of_the_reference() -> None:
    torch.manual_seed(6)
    weight = make_weight(40, 60, (16, 16), 0.6)
    bias = torch.randn(40, device="cuda", requires_grad=True)
    input = torch.randn(20, 60, device="cuda", requires_grad=True)
    leaves = (input, weight.packed_values.requires_grad_(), bias)
    upstream = torch.randn(20, 40, device="cuda")
    ours = torch.autograd.grad(call(input, weight, bias, "relu"), leaves, upstream)
    wanted = torch.autograd.grad(expected(input, weight, bias, "relu"), leaves, upstream.cpu().double())
    for gradient, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["block_sparse_linear", "block_sparse_linear_inference"])
def test_opcheck(name: str) -> None:
    weight = make_weight(20, 30, (16, 8), 0.5)
    needs_grad = name == "block_sparse_linear"
    torch.library.opcheck(
        getattr(torch.ops.fastprune, name).default,
        (
            torch.randn(4, 30, device="cuda", requires_grad=needs_grad),
            weight.packed_values.requires_grad_(needs_grad),
            weight.crow_indices,
            weight.col_indices,
            torch.randn(20, device="cuda", requires_grad=needs_grad),
            20,
            "relu",
        ),
    )


def test_more_tiles_than_a_grid_has_in_y() -> None:
    weight = make_weight(70_000, 8, (1, 8), 0.5)
    input = torch.randn(3, 8, device="cuda")
    assert_matches(call(input, weight, None, None), expected(input, weight, None, None), 8)


def test_offsets_past_32_bits() -> None:
    samples, out_features = 2**16 + 1, 2**15
    bytes_needed = 3 * samples * out_features * 4 // 2
    if torch.cuda.mem_get_info()[0] < bytes_needed:
        pytest.skip(f"needs {bytes_needed >> 30} GiB of free GPU memory")
    torch.manual_seed(7)
    weight = make_weight(out_features, 16, (128, 16), 1.0)
    input = torch.randn(samples, 16, device="cuda")
    output = call(input, weight, None, None)
    for part in (slice(0, 70), slice(samples - 70, samples)):
        assert_matches(output[part], expected(input[part], weight, None, None), 16)


def test_bad_arguments_are_named() -> None:
    weight = make_weight(32, 32, (16, 16), 1.0)
    input = torch.randn(2, 32, device="cuda")
    op = torch.ops.fastprune.block_sparse_linear_inference
    structure = (weight.crow_indices, weight.col_indices)
    bad = {
        "must have dtype Float": (
            input.double(),
            weight.packed_values.double(),
            *structure,
            None,
            32,
            "none",
        ),
        "packed_values": (input, weight.packed_values.cpu(), *structure, None, 32, "none"),
        "crow_indices": (input, weight.packed_values, *structure, None, 99, "none"),
        "bias": (input, weight.packed_values, *structure, torch.randn(32), 32, "none"),
        "activation": (input, weight.packed_values, *structure, None, 32, "tanh"),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            op(*arguments)
