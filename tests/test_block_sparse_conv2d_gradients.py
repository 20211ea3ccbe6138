"""The gradients of block_sparse_conv2d: every CPU kernel against the reference twin in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from block_sparse_cases import assert_matches
from conv2d_cases import CHANNELS, FORMATS, IMAGES, Geometry, geometries, layouts, make_conv2d_weight, parts
from fastprune import ops, reference


def input_gradient(
    grad_output: Tensor,
    weight: fp.BlockSparseTensor,
    geometry: Geometry,
    input_size: torch.Size,
    function=ops.block_sparse_conv2d_input_gradient,
) -> Tensor:
    return function(
        grad_output,
        *parts(weight, grad_output.dtype),
        input_size=tuple(input_size),
        **geometry.arguments(),
    )


def weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: fp.BlockSparseTensor,
    geometry: Geometry,
    function=ops.block_sparse_conv2d_weight_gradient,
) -> Tensor:
    return function(
        grad_output,
        input,
        weight.crow_indices,
        weight.col_indices,
        blocksize=weight.blocksize,
        **geometry.arguments(),
    )


def grad_output_of(input: Tensor, weight: fp.BlockSparseTensor, geometry: Geometry) -> Tensor:
    """Random gradients of the output that an input of this size has."""
    values = weight.packed_values.to(input.dtype)
    output = ops.block_sparse_conv2d(
        input,
        values,
        weight.crow_indices,
        weight.col_indices,
        out_channels=weight.shape[0],
        **geometry.arguments(),
    )
    return torch.randn_like(output)


def check(grad_output: Tensor, input: Tensor, weight: fp.BlockSparseTensor, geometry: Geometry) -> None:
    found = input_gradient(grad_output, weight, geometry, input.shape)
    wanted = input_gradient(
        grad_output.double(),
        weight,
        geometry,
        input.shape,
        reference.block_sparse_conv2d_input_gradient,
    )
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    assert_matches(found, wanted, weight.shape[0] * taps)
    values = weight_gradient(grad_output, input, weight, geometry)
    wanted = weight_gradient(
        grad_output.double(),
        input.double(),
        weight,
        geometry,
        reference.block_sparse_conv2d_weight_gradient,
    )
    assert_matches(values, wanted, grad_output.shape[0] * grad_output.shape[2] * grad_output.shape[3])


@pytest.mark.parametrize("blocksize", [(16, 16), (8, 8), (8, 1), (5, 3), (128, 128)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_they_match_the_reference_over_ugly_sizes(
    isa: str, memory_format: str, blocksize: tuple[int, int], density: float
) -> None:
    geometry = Geometry()
    for out_channels, in_channels in itertools.product(CHANNELS, (1, 17, 129)):
        weight = make_conv2d_weight(out_channels, in_channels, geometry, blocksize, density)
        for size in IMAGES:
            input = torch.randn(2, in_channels, *size).contiguous(memory_format=FORMATS[memory_format])
            check(grad_output_of(input, weight, geometry), input, weight, geometry)


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
    layout=st.tuples(*[st.sampled_from(sorted(layouts(torch.ones(1, 1, 1, 1))))] * 2),
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
    layout: tuple[str, str],
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(geometry.fits(*size))
    torch.manual_seed(seed)
    if geometry.groups > 1:
        out_channels = geometry.groups * group_rows * blocksize[0]
    in_channels = geometry.groups * group_channels
    weight = make_conv2d_weight(out_channels, in_channels, geometry, blocksize, density, dtype)
    input = torch.randn(images, in_channels, *size, dtype=dtype)
    grad_output = grad_output_of(input, weight, geometry)
    check(layouts(grad_output)[layout[0]], layouts(input)[layout[1]], weight, geometry)


@pytest.mark.parametrize("images", [1, 3, 70])
def test_every_number_of_images_fills_its_chunks(isa: str, images: int) -> None:
    for size in ((4, 4), (12, 15)):
        for geometry in (Geometry(), Geometry(stride=(2, 2))):
            weight = make_conv2d_weight(20, 12, geometry, (8, 8), 0.5)
            input = torch.randn(images, 12, *size)
            for memory_format in FORMATS.values():
                input = input.contiguous(memory_format=memory_format)
                check(grad_output_of(input, weight, geometry), input, weight, geometry)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_input_gradient_has_the_memory_format_of_the_outputs(stride: int) -> None:
    geometry = Geometry(stride=(stride, stride))
    weight = make_conv2d_weight(16, 24, geometry, (8, 8), 0.5)
    input = torch.randn(2, 24, 8, 6)
    grad_output = grad_output_of(input, weight, geometry)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = input_gradient(
            grad_output.contiguous(memory_format=memory_format), weight, geometry, input.shape
        )
        assert found.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bits_do_not_depend_on_threads(isa: str, memory_format: str) -> None:
    for geometry in (Geometry(), Geometry(stride=(2, 2))):
        weight = make_conv2d_weight(64, 48, geometry, (16, 16), 0.3)
        input = torch.randn(4, 48, 14, 14).contiguous(memory_format=FORMATS[memory_format])
        grad_output = grad_output_of(input, weight, geometry)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(
                    (
                        input_gradient(grad_output, weight, geometry, input.shape),
                        weight_gradient(grad_output, input, weight, geometry),
                    )
                )
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert torch.equal(result[0], results[0][0])
            assert torch.equal(result[1], results[0][1])


def test_no_images_give_zeros() -> None:
    geometry = Geometry()
    weight = make_conv2d_weight(9, 7, geometry, (4, 4), 1.0)
    grad_output, input = torch.randn(0, 9, 5, 5), torch.randn(0, 7, 5, 5)
    assert input_gradient(grad_output, weight, geometry, input.shape).shape == input.shape
    found = weight_gradient(grad_output, input, weight, geometry)
    assert torch.equal(found, torch.zeros_like(weight.packed_values))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_padding_stays_zero_where_gradients_are_not_finite(
    isa: str, memory_format: str, broken: float, stride: int
) -> None:
    geometry = Geometry((1, 1), (stride, stride), padding=(0, 0, 0, 0))
    weight = make_conv2d_weight(21, 19, geometry, (16, 16), 1.0)
    input, grad_output = (
        torch.full(size, broken).contiguous(memory_format=FORMATS[memory_format])
        for size in ((2, 19, 6, 6), (2, 21, 6 // stride, 6 // stride))
    )
    dense = fp.BlockSparseTensor(
        weight_gradient(grad_output, input, weight, geometry),
        weight.crow_indices,
        weight.col_indices,
        (32, 32),
    ).to_dense()
    assert not bool(dense[:21, :19].isfinite().any())
    assert float(dense[21:].abs().max()) == float(dense[:, 19:].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["input", "weight"])
def test_they_have_gradients_themselves(name: str) -> None:
    geometry = Geometry((2, 3), (1, 2), (1, 0, 2, 1), (1, 2), groups=2)
    weight = make_conv2d_weight(8, 6, geometry, (4, 2), 0.6, torch.float64)
    input = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    grad_output = grad_output_of(input, weight, geometry).requires_grad_()
    if name == "input":
        second = weight.packed_values.requires_grad_()

        def function(grad_output: Tensor, values: Tensor) -> Tensor:
            return ops.block_sparse_conv2d_input_gradient(
                grad_output,
                values,
                weight.crow_indices,
                weight.col_indices,
                input_size=tuple(input.shape),
                **geometry.arguments(),
            )
    else:
        second = input.requires_grad_()

        def function(grad_output: Tensor, input: Tensor) -> Tensor:
            return weight_gradient(grad_output, input, weight, geometry)

    assert torch.autograd.gradcheck(function, (grad_output, second))
    assert torch.autograd.gradgradcheck(function, (grad_output, second))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format: torch.memory_format) -> None:
    geometry = Geometry(stride=(2, 1), groups=2)
    weight = make_conv2d_weight(16, 10, geometry, (8, 4), 0.5)
    input = torch.randn(2, 10, 7, 6).contiguous(memory_format=memory_format)
    grad_output = grad_output_of(input, weight, geometry).requires_grad_()
    indices = (weight.crow_indices, weight.col_indices)
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_conv2d_input_gradient.default,
        (
            grad_output,
            weight.packed_values.requires_grad_(),
            *indices,
            list(input.shape),
            *geometry.positions(),
        ),
    )
    torch.library.opcheck(
        torch.ops.fastprune.block_sparse_conv2d_weight_gradient.default,
        (grad_output, input.requires_grad_(), *indices, 8, 4, *geometry.positions()),
    )


def test_flops_are_those_of_the_kept_blocks() -> None:
    geometry = Geometry(stride=(2, 2))
    weight = make_conv2d_weight(32, 32, geometry, (16, 16), 0.5)
    input = torch.randn(3, 32, 8, 8)
    grad_output = grad_output_of(input, weight, geometry)
    with FlopCounterMode(display=False) as counter:
        input_gradient(grad_output, weight, geometry, input.shape)
        weight_gradient(grad_output, input, weight, geometry)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 4 * weight.packed_values.numel()


def _change(**changes):
    weight = fp.BlockSparseTensor.from_dense(torch.ones(8, 36), (4, 4))
    arguments = {
        "grad_output": torch.randn(2, 8, 5, 5),
        "input": torch.randn(2, 4, 5, 5),
        "packed_values": weight.packed_values,
        "crow_indices": weight.crow_indices,
        "col_indices": weight.col_indices,
        "input_size": (2, 4, 5, 5),
        "blocksize": (4, 4),
        **Geometry().arguments(),
    }
    return {**arguments, **changes}


INT = torch.int32
BAD_FOR_BOTH = {
    "gradient of three dimensions": ("grad_output", _change(grad_output=torch.randn(8, 5, 5))),
    "gradient of another size": ("grad_output", _change(grad_output=torch.randn(2, 8, 5, 4))),
    "gradient of other images": ("grad_output", _change(grad_output=torch.randn(3, 8, 5, 5))),
    "half gradient": (
        "dtype",
        _change(
            grad_output=torch.ones(2, 8, 5, 5).half(),
            input=torch.ones(2, 4, 5, 5).half(),
            packed_values=torch.ones(18, 4, 4).half(),
        ),
    ),
    "int64 crow_indices": ("crow_indices", _change(crow_indices=torch.tensor([0, 9, 18]))),
    "gradient of other rows": ("crow_indices", _change(grad_output=torch.randn(2, 9, 5, 5))),
    "column out of range": (
        "col_indices",
        _change(col_indices=torch.arange(1, 10, dtype=INT).repeat(2)),
    ),
    "stride 0": ("stride", _change(stride=(0, 1))),
    "padding of two numbers": ("padding", _change(padding=(1, 1))),
    "groups that cut a block": ("groups", _change(groups=4)),
    "kernel larger than the image": ("input", _change(kernel_size=(8, 3))),
}
BAD_FOR_INPUT = {
    "values of another dtype": ("packed_values", _change(packed_values=torch.ones(18, 4, 4).double())),
    "another number of blocks": ("col_indices", _change(packed_values=torch.ones(3, 4, 4))),
    "size of three numbers": ("input_size", _change(input_size=(4, 5, 5))),
    "negative size": ("input_size", _change(input_size=(2, -4, 5, 5))),
}
BAD_FOR_WEIGHT = {
    "input of another dtype": ("input", _change(input=torch.randn(2, 4, 5, 5).double())),
    "input of three dimensions": ("input", _change(input=torch.randn(4, 5, 5))),
    "blocksize out of range": ("cols", _change(blocksize=(4, 0))),
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*BAD_FOR_BOTH.values(), *BAD_FOR_INPUT.values()],
    ids=[*BAD_FOR_BOTH, *BAD_FOR_INPUT],
)
def test_bad_arguments_of_the_input_gradient_are_named(name: str, arguments: dict) -> None:
    names = ("grad_output", "packed_values", "crow_indices", "col_indices", "input_size")
    names += tuple(Geometry().arguments())
    with pytest.raises(ValueError, match=name):
        ops.block_sparse_conv2d_input_gradient(**{key: arguments[key] for key in names})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*BAD_FOR_BOTH.values(), *BAD_FOR_WEIGHT.values()],
    ids=[*BAD_FOR_BOTH, *BAD_FOR_WEIGHT],
)
def test_bad_arguments_of_the_weight_gradient_are_named(name: str, arguments: dict) -> None:
    names = ("grad_output", "input", "crow_indices", "col_indices", "blocksize")
    names += tuple(Geometry().arguments())
    with pytest.raises(ValueError, match=name):
        ops.block_sparse_conv2d_weight_gradient(**{key: arguments[key] for key in names})
