"""block_sparse_conv2d and its input gradient on a GPU against the reference twin in float64, on the CPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from conv2d_cases import CHANNELS, IMAGES, Geometry, layouts, make_conv2d_weight
from fastprune import _library, ops, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if (missing := _library.cuda_kernels_unavailable_reason()) is not None:
    pytest.skip(f"the CUDA kernels are {missing}", allow_module_level=True)

# float32 as such and through tf32, and the types of the tensor cores.
ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")
GEOMETRIES = (
    Geometry(),
    Geometry(stride=(2, 2)),
    Geometry((1, 1), padding=(0, 0, 0, 0)),
    Geometry((1, 1), (2, 3), (0, 0, 0, 0)),
    Geometry((5, 3), (1, 2), (2, 3, 0, 1), (1, 2)),
    Geometry((2, 2), (3, 3), (0, 1, 1, 0)),
    Geometry((3, 3), (4, 6), (0, 4, 3, 1), (2, 4)),
)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def dtype_of(arithmetic: str) -> torch.dtype:
    return torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)


def parts(weight: fp.BlockSparseTensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight.packed_values, weight.crow_indices, weight.col_indices


def wanted_of(function, *tensors: Tensor | None, **options) -> Tensor:
    """What the twin gives in float64 on the CPU; indices stay what they are."""
    moved = [
        tensor if tensor is None else tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()
        for tensor in tensors
    ]
    return function(*moved, **options)


def assert_close(output: Tensor, wanted: Tensor, terms: int, arithmetic: str) -> None:
    assert output.is_cuda
    assert output.dtype == dtype_of(arithmetic)
    assert output.is_contiguous(memory_format=torch.channels_last)
    # As on the CPU (block_sparse_cases.py); tf32 rounds each operand by up to 2^-11 of itself.
    operand = 2**-10 if arithmetic == "tf32" else 0.0
    stored = {"float16": 2**-11, "bfloat16": 2**-8}.get(arithmetic, 1e-6)
    root = 8 * max(terms, 1) ** 0.5
    atol = 4e-7 * max(root, 0.6 * terms) + operand * root
    torch.testing.assert_close(output.cpu().double(), wanted, rtol=1.1 * stored, atol=atol)


def check(
    input: Tensor,
    weight: fp.BlockSparseTensor,
    geometry: Geometry,
    arithmetic: str,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Compare forward and input gradient with the twin; return the former."""
    options = {"out_channels": weight.shape[0], "activation": activation, **geometry.arguments()}
    with tf32(arithmetic == "tf32"):
        output = ops.block_sparse_conv2d(input, *parts(weight), bias, **options)
    wanted = wanted_of(reference.block_sparse_conv2d, input, *parts(weight), bias, **options)
    assert_close(output, wanted, weight.shape[1], arithmetic)
    grad = torch.randn_like(output)
    options = {"input_size": tuple(input.shape), **geometry.arguments()}
    with tf32(arithmetic == "tf32"):
        grad_input = ops.block_sparse_conv2d_input_gradient(grad, *parts(weight), **options)
    twin = reference.block_sparse_conv2d_input_gradient
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    wanted = wanted_of(twin, grad, *parts(weight), **options)
    assert_close(grad_input, wanted, weight.shape[0] * taps, arithmetic)
    return output


def make(
    out_channels: int,
    in_channels: int,
    geometry: Geometry,
    blocksize: tuple[int, int],
    density: float,
    arithmetic: str = "float32",
) -> fp.BlockSparseTensor:
    dtype = dtype_of(arithmetic)
    return make_conv2d_weight(out_channels, in_channels, geometry, blocksize, density, dtype).to("cuda")


def images(*size: int, arithmetic: str = "float32") -> Tensor:
    return torch.randn(*size).to(dtype_of(arithmetic)).cuda()


@pytest.mark.parametrize(
    "blocksize", [(16, 16), (32, 32), (64, 64), (48, 16), (128, 128), (8, 8), (8, 1), (1, 8), (5, 3)], ids=str
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_matches_the_reference_over_ugly_sizes(
    arithmetic: str, blocksize: tuple[int, int], density: float
) -> None:
    torch.manual_seed(0)
    geometry = Geometry()
    for out_channels, in_channels in itertools.product(CHANNELS, CHANNELS):
        weight = make(out_channels, in_channels, geometry, blocksize, density, arithmetic)
        bias = images(out_channels, arithmetic=arithmetic)
        for size in IMAGES:
            check(images(2, in_channels, *size, arithmetic=arithmetic), weight, geometry, arithmetic, bias)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_any_geometry_matches_the_reference(arithmetic: str, geometry: Geometry) -> None:
    torch.manual_seed(1)
    for in_channels, out_channels, size in ((24, 40, (7, 9)), (64, 96, (30, 33)), (3, 64, (14, 14))):
        weight = make(out_channels, in_channels, geometry, (16, 16), 0.4, arithmetic)
        for count in (1, 5, 64):
            check(images(count, in_channels, *size, arithmetic=arithmetic), weight, geometry, arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_groups_match_the_reference(arithmetic: str) -> None:
    torch.manual_seed(2)
    for groups, channels, outputs in ((2, 20, 16), (3, 8, 16), (4, 32, 64), (5, 1, 16)):
        geometry = Geometry(stride=(2, 1), groups=groups)
        weight = make(groups * outputs, groups * channels, geometry, (16, 16), 0.6, arithmetic)
        check(images(3, groups * channels, 9, 8, arithmetic=arithmetic), weight, geometry, arithmetic)


@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bias_and_activation(arithmetic: str, activation: str | None, with_bias: bool) -> None:
    torch.manual_seed(3)
    geometry = Geometry()
    weight = make(132, 64, geometry, (16, 16), 0.3, arithmetic)
    bias = images(132, arithmetic=arithmetic) if with_bias else None
    for size in ((2, 64, 5, 7), (16, 64, 30, 30)):
        check(images(*size, arithmetic=arithmetic), weight, geometry, arithmetic, bias, activation)


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_inputs_of_any_layout_give_the_same(arithmetic: str, geometry: Geometry) -> None:
    torch.manual_seed(4)
    weight = make(48, 24, geometry, (16, 16), 0.5, arithmetic)
    for count in (1, 3):
        for name, input in layouts(images(count, 24, 9, 12, arithmetic=arithmetic)).items():
            output = check(input, weight, geometry, arithmetic)
            assert torch.equal(output, check(input.contiguous(), weight, geometry, arithmetic)), name


def test_no_images_and_no_channels() -> None:
    geometry = Geometry()
    weight = make(9, 7, geometry, (4, 4), 1.0)
    options = {"out_channels": 9, **geometry.arguments()}
    assert ops.block_sparse_conv2d(images(0, 7, 5, 6), *parts(weight), **options).shape == (0, 9, 5, 6)
    empty = make(5, 0, geometry, (4, 4), 1.0)
    bias = images(5)
    output = ops.block_sparse_conv2d(
        images(2, 0, 3, 4), *parts(empty), bias, out_channels=5, **geometry.arguments()
    )
    torch.testing.assert_close(output, bias[:, None, None].expand(2, 5, 3, 4))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_other_groups_do_not_see_nan_and_neighbours_of_the_images_are_not_read(arithmetic: str) -> None:
    torch.manual_seed(5)
    geometry = Geometry(groups=2)
    weight = make(32, 40, geometry, (16, 16), 1.0, arithmetic)
    base = torch.full((4, 40, 13, 20), float("nan")).to(dtype_of(arithmetic)).cuda()
    base[1:3, :, 2:11, 3:19] = images(2, 40, 9, 16, arithmetic=arithmetic)
    check(base[1:3, :, 2:11, 3:19], weight, geometry, arithmetic)
    input = images(1, 40, 6, 6, arithmetic=arithmetic)
    input[0, 3, 0, 0] = float("nan")
    with tf32(arithmetic == "tf32"):
        output = ops.block_sparse_conv2d(
            input, *parts(weight), out_channels=32, activation="relu", **geometry.arguments()
        )
    assert bool(output[0, :16, :2, :2].isnan().all())
    assert int(output.isnan().sum()) == 16 * 4


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bits_depend_neither_on_the_run_nor_on_other_images(arithmetic: str) -> None:
    torch.manual_seed(6)
    geometry = Geometry()
    weight = make(128, 64, geometry, (32, 32), 0.3, arithmetic)
    input = images(33, 64, 28, 28, arithmetic=arithmetic)
    options = {"out_channels": 128, **geometry.arguments()}
    with tf32(arithmetic == "tf32"):
        output = ops.block_sparse_conv2d(input, *parts(weight), **options)
        for part in (slice(0, 33), slice(0, 1), slice(31, 33)):
            assert torch.equal(ops.block_sparse_conv2d(input[part], *parts(weight), **options), output[part])


def test_tf32_only_where_it_is_allowed() -> None:
    torch.manual_seed(7)
    geometry = Geometry()
    weight = make(64, 128, geometry, (16, 16), 1.0)
    input = images(2, 128, 14, 14)
    options = {"out_channels": 64, **geometry.arguments()}
    wanted = wanted_of(reference.block_sparse_conv2d, input, *parts(weight), None, **options)
    errors = {}
    for allowed in (False, True):
        with tf32(allowed):
            output = ops.block_sparse_conv2d(input, *parts(weight), **options)
        errors[allowed] = (output.cpu().double() - wanted).abs().max().item()
    assert errors[False] < 1e-3 < errors[True]


@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
def test_both_directions_run_in_a_graph_and_never_wait(geometry: Geometry) -> None:
    torch.manual_seed(8)
    weight = make(64, 32, geometry, (16, 16), 0.5, "bfloat16")
    input = images(2, 32, 9, 9, arithmetic="bfloat16").transpose(2, 3)
    forward = {"out_channels": 64, **geometry.arguments()}
    backward = {"input_size": tuple(input.shape), **geometry.arguments()}

    def both() -> tuple[Tensor, Tensor]:
        output = ops.block_sparse_conv2d(input, *parts(weight), **forward)
        return output, ops.block_sparse_conv2d_input_gradient(output, *parts(weight), **backward)

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


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
def test_gradients_are_those_of_the_reference(geometry: Geometry, activation: str | None) -> None:
    torch.manual_seed(9)
    weight = make(48, 20, geometry, (16, 16), 0.6)
    values = weight.packed_values.requires_grad_()
    input, bias = images(2, 20, 7, 8).requires_grad_(), images(48).requires_grad_()
    options = {"out_channels": 48, "activation": activation, **geometry.arguments()}
    leaves = (input, values, bias)

    def gradients(function, input: Tensor, values: Tensor, indices: tuple, bias: Tensor) -> tuple:
        output = function(input, values, *indices, bias, **options)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).to(output.device)
        return torch.autograd.grad(output, (input, values, bias), upstream.view(output.shape))

    with tf32(False):
        ours = gradients(ops.block_sparse_conv2d, input, values, parts(weight)[1:], bias)
    moved = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    indices = tuple(index.cpu() for index in parts(weight)[1:])
    wanted = gradients(reference.block_sparse_conv2d, *moved[:2], indices, moved[2])
    for found, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), other, rtol=1e-4, atol=1e-3)


def test_gradients_of_gradients_are_those_of_the_reference() -> None:
    torch.manual_seed(10)
    geometry = Geometry(stride=(2, 1))
    weight = make(32, 16, geometry, (16, 16), 0.6)
    values = weight.packed_values.detach().requires_grad_()
    grad = images(2, 32, 3, 6).requires_grad_()
    options = {"input_size": (2, 16, 5, 6), **geometry.arguments()}
    twin = reference.block_sparse_conv2d_input_gradient
    with tf32(False):
        ours = ops.block_sparse_conv2d_input_gradient(grad, values, *parts(weight)[1:], **options)
        upstream = torch.randn_like(ours)
        found = torch.autograd.grad(ours, (grad, values), upstream)
        wanted = torch.autograd.grad(
            twin(grad, values, *parts(weight)[1:], **options), (grad, values), upstream
        )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["block_sparse_conv2d", "block_sparse_conv2d_inference"])
@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(name: str, geometry: Geometry, memory_format: torch.memory_format) -> None:
    weight = make(16, 10, geometry, (8, 4), 0.5)
    needs_grad = name == "block_sparse_conv2d"
    torch.library.opcheck(
        getattr(torch.ops.fastprune, name).default,
        (
            images(2, 10, 7, 6).contiguous(memory_format=memory_format).requires_grad_(needs_grad),
            weight.packed_values.requires_grad_(needs_grad),
            weight.crow_indices,
            weight.col_indices,
            images(16).requires_grad_(needs_grad),
            16,
            *(geometry.positions() if needs_grad else (geometry.flat(),)),
            "relu",
            True,
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_opcheck_of_the_input_gradient(geometry: Geometry) -> None:
    weight = make(16, 10, geometry, (8, 4), 0.5)
    output = ops.block_sparse_conv2d(
        images(2, 10, 7, 6), *parts(weight), out_channels=16, **geometry.arguments()
    )
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_conv2d_input_gradient.default,
        (output.detach().requires_grad_(), *parts(weight), (2, 10, 7, 6), *geometry.positions(), True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_runs_in_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(11)
    layer = fp.BlockSparseConv2d.from_dense(nn.Conv2d(32, 48, 3, padding=1)).cuda()
    input = images(2, 32, 10, 10)
    with torch.autocast("cuda", dtype=dtype):
        output = layer(input)
    assert output.dtype == dtype
    wanted = nn.functional.conv2d(input.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype), padding=1)
    torch.testing.assert_close(output, wanted, rtol=0.02, atol=0.02)
    output.float().sum().backward()
    assert layer.packed_values.grad is not None
    assert layer.packed_values.grad.dtype == torch.float32


def test_float64_takes_the_dense_weight() -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(16, 8, geometry, (8, 8), 0.5, torch.float64).to("cuda")
    options = {"out_channels": 16, **geometry.arguments()}
    input = torch.randn(2, 8, 5, 5, dtype=torch.float64, device="cuda")
    output = ops.block_sparse_conv2d(input, *parts(weight), **options)
    wanted = wanted_of(reference.block_sparse_conv2d, input, *parts(weight), **options)
    torch.testing.assert_close(output.cpu(), wanted)


def test_bad_arguments_are_named() -> None:
    geometry = Geometry()
    weight = make(32, 16, geometry, (16, 16), 1.0)
    input = images(2, 16, 5, 5)
    op = torch.ops.fastprune.block_sparse_conv2d_inference
    structure = (weight.crow_indices, weight.col_indices)
    rest = (geometry.flat(), "none")
    bad = {
        "must have dtype Float": (input.double(), weight.packed_values.double(), *structure, None, 32, *rest),
        "packed_values": (input, weight.packed_values.cpu(), *structure, None, 32, *rest),
        "crow_indices": (input, weight.packed_values, *structure, None, 99, *rest),
        "bias": (input, weight.packed_values, *structure, torch.randn(32), 32, *rest),
        "activation": (input, weight.packed_values, *structure, None, 32, geometry.flat(), "tanh"),
        "dimensions": (input[0], weight.packed_values, *structure, None, 32, *rest),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            op(*arguments)
