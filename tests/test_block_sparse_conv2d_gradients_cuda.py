"""block_sparse_conv2d_weight_gradient on a GPU against the reference twin in float64, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastprune as fp
from conv2d_cases import Geometry, layouts, make_conv2d_weight
from fastprune import _library, ops, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if (missing := _library.cuda_kernels_unavailable_reason()) is not None:
    pytest.skip(f"the CUDA kernels are {missing}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Blocks of the tensor cores' tiles and between them, and of the plain kernel's.
BLOCKSIZES = ((16, 16), (32, 32), (64, 64), (128, 128), (48, 16), (16, 80), (8, 1), (1, 8), (5, 3), (33, 17))
GEOMETRIES = (
    Geometry(),
    Geometry(stride=(2, 3), padding=(0, 1, 2, 0)),
    Geometry(kernel_size=(3, 2), dilation=(2, 3), padding=(2, 1, 3, 0)),
    Geometry(kernel_size=(1, 5), padding=(0, 0, 4, 4)),
    Geometry(kernel_size=(1, 1), padding=(4, 3, 2, 4)),
    Geometry(kernel_size=(1, 1), padding=(0, 0, 0, 0)),
    Geometry(kernel_size=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2)),
)
# Rows and images that end anywhere in a stage, and two slices.
SIZES = ((1, 1, 4), (3, 5, 4), (2, 9, 9), (4, 17, 13))


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    switches = torch.backends.cudnn.conv
    before = switches.fp32_precision
    switches.fp32_precision = "tf32" if request.param else "ieee"
    yield request.param
    switches.fp32_precision = before


def operands(
    images: int, channels: tuple[int, int], size: tuple[int, int], geometry: Geometry, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Random grad_output and input, on the GPU."""
    input = torch.randn(images, channels[0], *size, device="cuda")
    shape = torch.nn.functional.conv2d(
        reference._padded(input[:1, :1], geometry.padding),
        input.new_zeros(1, 1, *geometry.kernel_size),
        stride=geometry.stride,
        dilation=geometry.dilation,
    ).shape
    grad_output = torch.randn(images, channels[1], *shape[2:], device="cuda")
    return grad_output.to(dtype), input.to(dtype)


def call(grad_output: Tensor, input: Tensor, weight: fp.BlockSparseTensor, geometry: Geometry) -> Tensor:
    return ops.block_sparse_conv2d_weight_gradient(
        grad_output,
        input,
        weight.crow_indices.to("cuda"),
        weight.col_indices.to("cuda"),
        blocksize=weight.blocksize,
        **geometry.arguments(),
    )


def assert_right(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: fp.BlockSparseTensor,
    geometry: Geometry,
    tf32: bool = False,
) -> None:
    def gradient(*tensors: Tensor) -> Tensor:
        return reference.block_sparse_conv2d_weight_gradient(
            *tensors,
            weight.crow_indices,
            weight.col_indices,
            blocksize=weight.blocksize,
            **geometry.arguments(),
        )

    tensors = [tensor.cpu().double() for tensor in (grad_output, input)]
    wanted, magnitude = gradient(*tensors), gradient(*(tensor.abs() for tensor in tensors))
    # A chain of float32 multiply-adds, operands rounded to tf32, and the rounding of the result.
    relative = (grad_output[:, 0].numel() + 2) * 2.0**-23 + (2.001 * 2.0**-11 if tf32 else 0)
    kind = torch.finfo(output.dtype)
    rounding = 0.0 if output.dtype == torch.float32 else kind.eps / 2
    # Below the smallest normal number, of float16 above all, what is rounded no longer shrinks.
    subnormal = kind.smallest_normal * kind.eps / 2
    bound = relative * magnitude + rounding * (1 + relative) * wanted.abs() + subnormal + 1e-12
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
    for geometry in GEOMETRIES:
        for channels in ((1, 17), (17, 1), (48, 64), (151, 129)):
            weight = make_conv2d_weight(channels[1], channels[0], geometry, blocksize, density)
            for images, *size in SIZES:
                if geometry.fits(*size):
                    pair = operands(images, channels, (size[0], size[1]), geometry, dtype)
                    output = call(*pair, weight, geometry)
                    assert_right(output, *pair, weight, geometry, tf32 and dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "channels"), [(2, 16), (3, 8), (2, 20), (5, 3)])
def test_groups(dtype: torch.dtype, groups: int, channels: int, tf32: bool) -> None:
    torch.manual_seed(1)
    geometry = Geometry(groups=groups)
    weight = make_conv2d_weight(groups * 32, groups * channels, geometry, (16, 16), 0.6)
    pair = operands(3, (groups * channels, groups * 32), (9, 7), geometry, dtype)
    output = call(*pair, weight, geometry)
    assert_right(output, *pair, weight, geometry, tf32 and dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_operands_of_any_layout(dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    torch.manual_seed(2)
    border = kernel[0] // 2
    geometry = Geometry(kernel_size=kernel, padding=(border,) * 4)
    weight = make_conv2d_weight(48, 32, geometry, (16, 16), 0.6)
    grad_output, input = operands(3, (32, 48), (6, 5), geometry, dtype)
    for name, images in layouts(input).items():
        for grads in (layouts(grad_output)[name], grad_output):
            # tf32 or not, the bits are those of tensors that lie channels-last.
            output = call(grads, images, weight, geometry)
            last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (grads, images)]
            assert torch.equal(output, call(*last, weight, geometry))
            assert_right(output, grads, images, weight, geometry, dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_images_give_zeros(dtype: torch.dtype) -> None:
    weight = make_conv2d_weight(48, 32, Geometry(), (16, 16), 0.6)
    output = call(*operands(0, (32, 48), (6, 5), Geometry(), dtype), weight, Geometry())
    assert output.numel() > 0
    assert not output.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_run_and_padding_is_zero(dtype: torch.dtype, tf32: bool) -> None:
    torch.manual_seed(3)
    weight = make_conv2d_weight(150, 250, Geometry(), (32, 32), 0.5)
    grad_output, input = operands(16, (250, 150), (17, 19), Geometry(), dtype)
    output = call(grad_output, input, weight, Geometry())
    for _ in range(10):
        assert torch.equal(call(grad_output, input, weight, Geometry()), output)
    input[3, 7] = float("nan")
    grad_output[4, 149] = float("inf")
    output = call(grad_output, input, weight, Geometry()).cpu()
    crow, col = weight.crow_indices, weight.col_indices
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1), (crow[1:] - crow[:-1]).long())
    for block, row, column in zip(output, rows, col % 8, strict=True):
        assert column < 7 or not block[250 - 7 * 32 :].any()
        assert row < 4 or not block[:, 150 - 4 * 32 :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_never_waits_and_runs_in_a_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    weight = make_conv2d_weight(64, 64, Geometry(), (16, 16), 0.5).to("cuda")
    grad_output, input = operands(9, (64, 64), (14, 14), Geometry(), dtype)
    call(grad_output, input, weight, Geometry())
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(grad_output, input, weight, Geometry())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    # Capture fails for work on any other stream, and for a call that waits.
    with torch.cuda.graph(graph):
        output = call(grad_output, input, weight, Geometry())
    for _ in range(2):
        input.copy_(torch.randn(input.shape))
        graph.replay()
        assert_right(output, grad_output, input, weight.to("cpu"), Geometry(), dtype == torch.float32)


@pytest.mark.parametrize("tf32", [False], indirect=True)
def test_derivatives_are_those_of_the_reference(tf32: bool) -> None:
    torch.manual_seed(5)
    geometry = Geometry(stride=(2, 1))
    weight = make_conv2d_weight(40, 24, geometry, (16, 16), 0.6)
    leaves = operands(3, (24, 40), (7, 6), geometry, torch.float32)
    upstream = torch.randn(len(weight.col_indices), 16, 16, device="cuda")

    def derivatives(leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        structure = [index.to(upstream.device) for index in (weight.crow_indices, weight.col_indices)]
        value = ops.block_sparse_conv2d_weight_gradient(
            *leaves, *structure, blocksize=(16, 16), **geometry.arguments()
        )
        return torch.autograd.grad(value, leaves, upstream)

    ours = derivatives(list(leaves), upstream)
    wanted = derivatives([leaf.detach().cpu().double() for leaf in leaves], upstream.cpu().double())
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.cpu().double(), other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    weight = make_conv2d_weight(20, 30, Geometry(), (16, 8), 0.5).to("cuda")
    grad_output, input = operands(2, (30, 20), (5, 4), Geometry(), dtype)
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_conv2d_weight_gradient.default,
        (
            grad_output.requires_grad_(),
            input.requires_grad_(),
            weight.crow_indices,
            weight.col_indices,
            16,
            8,
            *Geometry().positions(),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_float64_and_bad_arguments() -> None:
    weight = make_conv2d_weight(48, 32, Geometry(), (16, 16), 0.6).to("cuda")
    grad_output, input = operands(2, (32, 48), (5, 4), Geometry(), torch.float32)
    arguments = (weight.crow_indices, weight.col_indices, 16, 16, *Geometry().positions())
    bad = {
        "grad_output` must have dtype": (grad_output.double(), input.double(), *arguments),
        "grad_output` must have size 5": (grad_output[:, :, 1:], input, *arguments),
        "input": (grad_output, input.half(), *arguments),
        "crow_indices": (grad_output, input, *arguments[:2], 8, 16, *Geometry().positions()),
        "rows": (grad_output, input, *arguments[:2], 129, 16, *Geometry().positions()),
    }
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=f"`{message}"):
            torch.ops.fastprune.block_sparse_conv2d_weight_gradient(*wrong)
    with pytest.warns(UserWarning, match="float64"):
        output = call(grad_output.double(), input.double(), weight, Geometry())
    assert_right(output.float(), grad_output, input, weight.to("cpu"), Geometry())


def test_offsets_past_32_bits() -> None:
    channels, height, width = 2**14, 2**9 + 1, 2**8
    bytes_needed = 2 * channels * height * width
    if torch.cuda.mem_get_info()[0] < 2 * bytes_needed:
        pytest.skip(f"needs {2 * bytes_needed >> 30} GiB of free GPU memory")
    torch.manual_seed(6)
    above = Geometry(kernel_size=(1, 1), padding=(1, 0, 0, 0))
    weight = make_conv2d_weight(16, channels, above, (16, 16), 1.0)
    options: dict = {"device": "cuda", "dtype": torch.float16, "memory_format": torch.channels_last}
    input = torch.empty(1, channels, height, width, **options).zero_()
    grad_output = torch.empty(1, 16, height + 1, width, **options).zero_()
    input[..., -1, -1], grad_output[..., -1, -1] = torch.randn(channels).half(), torch.randn(16).half()
    output = call(grad_output, input, weight, above)
    pixel = Geometry(kernel_size=(1, 1), padding=(0, 0, 0, 0))
    assert_right(output, grad_output[..., -1:, -1:], input[..., -1:, -1:], weight, pixel)
