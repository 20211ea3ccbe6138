"""block_sparse_conv2d: every CPU kernel against the reference twin in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from block_sparse_cases import assert_matches
from conv2d_cases import CHANNELS, FORMATS, IMAGES, Geometry, geometries, layouts, make_conv2d_weight, parts
from fastprune import ops, reference

ACTIVATIONS = [None, *reference.ACTIVATIONS]


def run(
    input: Tensor,
    weight: fp.BlockSparseTensor,
    geometry: Geometry,
    bias: Tensor | None = None,
    activation: str | None = None,
    function=ops.block_sparse_conv2d,
) -> Tensor:
    return function(
        input,
        *parts(weight, input.dtype),
        None if bias is None else bias.to(input.dtype),
        out_channels=weight.shape[0],
        activation=activation,
        **geometry.arguments(),
    )


def check(
    input: Tensor,
    weight: fp.BlockSparseTensor,
    geometry: Geometry,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    output = run(input, weight, geometry, bias, activation)
    wanted = run(input.double(), weight, geometry, bias, activation, reference.block_sparse_conv2d)
    assert output.dtype == input.dtype
    assert_matches(output, wanted, weight.shape[1])
    return output


def test_the_twin_is_torchs_conv2d() -> None:
    conv = torch.nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, dtype=torch.float64)
    geometry = Geometry((3, 2), (2, 1), (1, 1, 0, 0), (1, 2), groups=2)
    taps = fp.granularity.weight_as_taps(conv.weight.detach())
    weight = fp.BlockSparseTensor.from_dense(F.pad(taps, (0, 1)).flatten(1), (4, 2))
    input = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    found = run(input, weight, geometry, conv.bias, None, reference.block_sparse_conv2d)
    torch.testing.assert_close(found, conv(input))


@pytest.mark.parametrize(
    "blocksize", [(16, 16), (8, 8), (8, 1), (1, 8), (5, 3), (48, 16), (128, 128)], ids=str
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_matches_the_reference_over_ugly_sizes(
    isa: str, memory_format: str, blocksize: tuple[int, int], density: float
) -> None:
    geometry = Geometry()
    for out_channels, in_channels in itertools.product(CHANNELS, CHANNELS):
        weight = make_conv2d_weight(out_channels, in_channels, geometry, blocksize, density)
        bias = torch.randn(out_channels)
        for size in IMAGES:
            input = torch.randn(2, in_channels, *size).contiguous(memory_format=FORMATS[memory_format])
            check(input, weight, geometry, bias)


@pytest.mark.parametrize("width", range(1, 35))
def test_every_width_fills_its_vectors(isa: str, width: int) -> None:
    for geometry in (Geometry(), Geometry((3, 3), (2, 2)), Geometry((1, 1), padding=(0, 0, 0, 0))):
        weight = make_conv2d_weight(24, 16, geometry, (8, 8), 0.5)
        for images in (1, 3):
            input = torch.randn(images, 16, 5, width)
            for memory_format in FORMATS.values():
                check(input.contiguous(memory_format=memory_format), weight, geometry, None, "relu")


@settings(max_examples=150)
@given(
    geometry=geometries,
    images=st.integers(0, 5),
    group_rows=st.integers(1, 3),
    group_channels=st.integers(1, 20),
    out_channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    blocksize=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0, 1),
    layout=st.sampled_from(sorted(layouts(torch.ones(1, 1, 1, 1)))),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_any_geometry_matches_the_reference(
    isa: str,
    geometry: Geometry,
    images: int,
    group_rows: int,
    group_channels: int,
    out_channels: int,
    size: tuple[int, int],
    blocksize: tuple[int, int],
    density: float,
    layout: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(geometry.fits(*size))
    torch.manual_seed(seed)
    if geometry.groups > 1:
        out_channels = geometry.groups * group_rows * blocksize[0]
    in_channels = geometry.groups * group_channels
    weight = make_conv2d_weight(out_channels, in_channels, geometry, blocksize, density, dtype)
    input = layouts(torch.randn(images, in_channels, *size, dtype=dtype))[layout]
    check(input, weight, geometry, torch.randn(out_channels), "relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_activation_and_dtype(
    isa: str, dtype: torch.dtype, activation: str | None, with_bias: bool
) -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(33, 20, geometry, (16, 16), 0.5, dtype)
    bias = torch.randn(33, dtype=dtype) if with_bias else None
    for size in ((8, 16), (5, 7)):
        input = torch.randn(2, 20, *size, dtype=dtype)
        for memory_format in FORMATS.values():
            check(input.contiguous(memory_format=memory_format), weight, geometry, bias, activation)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_inputs_of_any_layout_give_the_same_in_their_memory_format(
    isa: str, stride: int, images: int
) -> None:
    geometry = Geometry(stride=(stride, stride))
    weight = make_conv2d_weight(40, 24, geometry, (8, 8), 0.5)
    for name, input in layouts(torch.randn(images, 24, 9, 12)).items():
        output = check(input, weight, geometry)
        plain = F.conv2d(input, torch.randn(40, 24, 3, 3), None, stride, 1)
        assert output.stride() == plain.stride(), name
        assert torch.equal(output, run(input.contiguous(), weight, geometry)), name


def test_large_images_are_cut_right(isa: str) -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(32, 16, geometry, (16, 16), 0.3)
    for size in ((61, 64), (3, 700), (90, 45)):
        for input in (
            torch.randn(2, 16, *size),
            torch.randn(2, 16, *size).contiguous(memory_format=torch.channels_last),
        ):
            check(input, weight, geometry)


@pytest.mark.parametrize("activation", [None, "relu6", "gelu"])
@pytest.mark.parametrize("out_channels", [32, 40])
def test_outputs_larger_than_the_caches(isa: str, out_channels: int, activation: str | None) -> None:
    # From 4 MiB on whole lines of them are written past the caches.
    geometry = Geometry((1, 3), padding=(0, 0, 1, 1))
    weight = make_conv2d_weight(out_channels, 16, geometry, (16, 16), 0.5)
    input = torch.randn(2, 16, 150, 151).contiguous(memory_format=torch.channels_last)
    output = check(input, weight, geometry, torch.randn(out_channels), activation)
    assert output.numel() * output.element_size() >= 4 << 20


def test_no_images_give_an_empty_output() -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(9, 7, geometry, (4, 4), 1.0)
    assert run(torch.randn(0, 7, 5, 6), weight, geometry).shape == (0, 9, 5, 6)


def test_no_channels_leave_the_bias() -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(5, 0, geometry, (4, 4), 1.0)
    bias = torch.randn(5)
    output = run(torch.randn(2, 0, 3, 4), weight, geometry, bias)
    torch.testing.assert_close(output, bias[:, None, None].expand(2, 5, 3, 4))


def test_what_lies_outside_of_the_images_is_not_read(isa: str) -> None:
    # Around a slice of a larger tensor lies what would show in every output that read it.
    geometry = Geometry((5, 5), padding=(2, 2, 2, 2))
    weight = make_conv2d_weight(16, 8, geometry, (8, 8), 1.0)
    base = torch.full((4, 8, 13, 20), float("nan"))
    base[1:3, :, 2:11, 3:19] = torch.randn(2, 8, 9, 16)
    check(base[1:3, :, 2:11, 3:19], weight, geometry)


def test_relu_keeps_nan_and_other_groups_do_not_see_it(isa: str) -> None:
    geometry = Geometry(groups=2)
    weight = make_conv2d_weight(16, 16, geometry, (8, 8), 1.0)
    input = torch.randn(1, 16, 6, 6)
    input[0, 3, 0, 0] = float("nan")
    output = run(input, weight, geometry, None, "relu")
    assert bool(output[0, :8, :2, :2].isnan().all())
    assert int(output.isnan().sum()) == 8 * 4


def test_bits_do_not_depend_on_threads_or_on_other_images(isa: str) -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(64, 64, geometry, (16, 16), 0.2)
    threads = torch.get_num_threads()
    for input in (torch.randn(5, 64, 14, 14), torch.randn(5, 64, 7, 7), torch.randn(5, 64, 30, 33)):
        outputs = []
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                outputs.append(run(input, weight, geometry))
                channels_last = input.contiguous(memory_format=torch.channels_last)
                outputs.append(run(channels_last, weight, geometry))
        finally:
            torch.set_num_threads(threads)
        for output in outputs[1:]:
            assert torch.equal(output, outputs[0])
        assert torch.equal(run(input[3:4], weight, geometry), outputs[0][3:4])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str | None) -> None:
    geometry = Geometry((2, 3), (1, 2), (1, 0, 2, 1), (1, 2), groups=2)
    weight = make_conv2d_weight(8, 6, geometry, (4, 2), 0.6, torch.float64)
    arguments = (
        torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True),
        weight.packed_values.requires_grad_(),
        torch.randn(8, dtype=torch.float64, requires_grad=True),
    )

    def function(input: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return ops.block_sparse_conv2d(
            input,
            values,
            weight.crow_indices,
            weight.col_indices,
            bias,
            out_channels=8,
            activation=activation,
            **geometry.arguments(),
        )

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("name", ["block_sparse_conv2d", "block_sparse_conv2d_inference"])
@pytest.mark.parametrize("activation", ["none", *reference.ACTIVATIONS])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(name: str, activation: str, memory_format: torch.memory_format) -> None:
    geometry = Geometry(stride=(2, 1), groups=2)
    weight = make_conv2d_weight(16, 10, geometry, (8, 4), 0.5)
    needs_grad = name == "block_sparse_conv2d"
    values, *structure = parts(weight, torch.float32)
    torch.library.opcheck(
        getattr(torch.ops.fastprune, name).default,
        (
            torch.randn(2, 10, 7, 6).contiguous(memory_format=memory_format).requires_grad_(needs_grad),
            values.requires_grad_(needs_grad),
            *structure,
            torch.randn(16, requires_grad=needs_grad),
            16,
            *(geometry.positions() if needs_grad else (geometry.flat(),)),
            activation,
        ),
    )


@pytest.mark.parametrize(
    ("name", "value", "size"),
    [("kernel_size", (3,), 2), ("stride", (1, 1, 1), 2), ("padding", (1, 1), 4), ("dilation", (), 2)],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_counts_of_another_length_are_named(name: str, value: tuple, size: int, needs_grad: bool) -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(16, 8, geometry, (8, 8), 0.5)
    values, *structure = parts(weight, torch.float32)
    arguments = {"out_channels": 16, **geometry.arguments(), name: value}
    message = f"`{name}` must have {size} integers, got {len(value)}"
    with pytest.raises(ValueError, match=message):
        ops.block_sparse_conv2d(
            torch.randn(1, 8, 5, 5), values.requires_grad_(needs_grad), *structure, **arguments
        )


def test_the_flat_geometry_is_checked() -> None:
    geometry = Geometry()
    values, *structure = parts(make_conv2d_weight(16, 8, geometry, (8, 8), 0.5), torch.float32)
    op = torch.ops.fastprune.block_sparse_conv2d_inference
    with pytest.raises(ValueError, match="`geometry` must have 11 integers, got 10"):
        op(torch.randn(1, 8, 5, 5), values, *structure, None, 16, geometry.flat()[:-1], "none")
    flat = [0 if index == 3 else count for index, count in enumerate(geometry.flat())]
    with pytest.raises(ValueError, match="`stride` must be from 1"):
        op(torch.randn(1, 8, 5, 5), values, *structure, None, 16, flat, "none")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (torch.randn(1, 8, 5, 5), values, *structure)]
    with mode, pytest.raises(ValueError, match="`geometry` must have 11 integers"):
        op(*fakes, None, 16, geometry.flat()[:-1], "none")


def test_autocast_keeps_float32() -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(20, 30, geometry, (16, 8), 0.5)
    input = torch.randn(2, 30, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(
            input.bfloat16(), fp.BlockSparseTensor(*parts(weight, torch.bfloat16), weight.shape), geometry
        )
    assert output.dtype == torch.float32


def test_flops_are_those_of_the_kept_blocks() -> None:
    geometry = Geometry(stride=(2, 2))
    weight = make_conv2d_weight(32, 32, geometry, (16, 16), 0.5)
    with FlopCounterMode(display=False) as counter:
        run(torch.randn(3, 32, 8, 8), weight, geometry)
    assert counter.get_total_flops() == 2 * 3 * 4 * 4 * weight.packed_values.numel()


def test_transforms_take_the_dense_weight() -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(8, 8, geometry, (4, 4), 0.5)
    input, direction = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    output, tangent = torch.func.jvp(lambda x: run(x, weight, geometry), (input,), (direction,))
    torch.testing.assert_close(output, run(input, weight, geometry))
    torch.testing.assert_close(tangent, run(direction, weight, geometry))


def _change(**changes):
    weight = fp.BlockSparseTensor.from_dense(torch.ones(8, 36), (4, 4))
    arguments = {
        "input": torch.randn(2, 4, 5, 5),
        "packed_values": weight.packed_values,
        "crow_indices": weight.crow_indices,
        "col_indices": weight.col_indices,
        "bias": torch.randn(8),
        "out_channels": 8,
        **Geometry().arguments(),
    }
    return {**arguments, **changes}


INT = torch.int32
BAD_ARGUMENTS = {
    "input of three dimensions": ("input", _change(input=torch.randn(4, 5, 5))),
    "half input": ("dtype", _change(input=torch.randn(2, 4, 5, 5).half())),
    "no rows": ("input", _change(input=torch.randn(2, 4, 0, 5))),
    "image smaller than the kernel": ("input", _change(kernel_size=(8, 3))),
    "values of another dtype": ("packed_values", _change(packed_values=torch.ones(18, 4, 4).double())),
    "values of two dimensions": ("packed_values", _change(packed_values=torch.ones(18, 16))),
    "int64 crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 9, 18]))),
    "too few crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 18], dtype=INT))),
    "decreasing crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, -1, 18], dtype=INT))),
    "column out of range": ("col_indices", _change(kernel_size=(3, 2))),
    "duplicate column": ("col_indices", _change(col_indices=torch.zeros(18, dtype=INT))),
    "bias of another size": ("bias", _change(bias=torch.randn(7))),
    "negative out_channels": ("out_channels", _change(out_channels=-1)),
    "kernel of one number": ("kernel_size", _change(kernel_size=(3,))),
    "kernel of no rows": ("kernel_size", _change(kernel_size=(0, 3))),
    "enormous kernel": ("kernel_size", _change(kernel_size=(2**40, 3))),
    "stride 0": ("stride", _change(stride=(0, 1))),
    "negative padding": ("padding", _change(padding=(0, 0, -1, 0))),
    "padding of two numbers": ("padding", _change(padding=(1, 1))),
    "dilation 0": ("dilation", _change(dilation=(1, 0))),
    "no groups": ("groups", _change(groups=0)),
    "groups that do not divide": ("groups", _change(groups=3)),
    "groups that cut a block": ("groups", _change(groups=4)),
    "unknown activation": ("activation", _change(activation="tanh")),
    "values on another device": ("packed_values", _change(packed_values=torch.ones(18, 4, 4, device="meta"))),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        ops.block_sparse_conv2d(**arguments)
