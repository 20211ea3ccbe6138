"""ablate_conv2d: outputs under masked pieces against the reference twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablation_cases import in_double
from conv_changes_cases import Case, channels_last, on_several_threads
from fastprune import ops, reference

CASES = [
    Case(1, 1, 1, 1, 1),
    Case(2, 15, 17, 9, 7),
    Case(3, 5, 33, 17, 15, stride=(2, 1)),
    Case(2, 17, 15, 15, 13, (5, 3), (3, 2), (2, 0, 1, 3), (2, 3)),
    Case(1, 129, 151, 3, 2, (1, 1), padding=(0, 0, 0, 0)),
    Case(2, 4, 48, 6, 129, (1, 4), padding=(0, 0, 3, 0)),
]


def pieces_of(case: Case) -> Tensor:
    """Channels by themselves, blocks of one tap, all of it, and nothing of it."""
    taps, channels = case.kernel[0] * case.kernel[1], case.in_channels
    pieces = [[c, c + 1, 0, taps] for c in range(min(channels, 4))]
    pieces += [[c, min(c + 16, channels), t, t + 1] for t in range(taps) for c in range(0, channels, 16)]
    pieces += [[0, channels, 0, taps], [0, channels, taps // 2, taps], [0, 0, 0, taps], [0, channels, 1, 1]]
    return torch.tensor(pieces, dtype=torch.int32)


def arguments_of(case: Case) -> dict:
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_matches_the_reference(isa: str, case: Case, dtype: torch.dtype, activation: str | None) -> None:
    problem = [tensor.to(dtype) for tensor in case.problem()]
    pieces = pieces_of(case)
    options = {**arguments_of(case), "activation": activation}
    masked = ops.ablate_conv2d(*problem, pieces, **options)
    wanted = reference.ablate_conv2d(*in_double(problem), pieces, **options)
    assert masked.dtype == dtype
    assert masked.movedim(2, 4).is_contiguous()
    products = case.in_channels * case.kernel[0] * case.kernel[1]
    bound = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * products**0.5 * 8
    torch.testing.assert_close(masked.double(), wanted, rtol=bound, atol=bound)
    empty = masked[-2:]
    before = problem[0] if activation is None else problem[0].relu()
    assert torch.equal(empty, before.expand_as(empty))


@pytest.mark.parametrize("activation", ["relu6", "gelu", "gelu_tanh", "silu"])
def test_activations(isa: str, activation: str) -> None:
    case = CASES[1]
    problem, pieces = case.problem(), pieces_of(case)
    options = {**arguments_of(case), "activation": activation}
    wanted = reference.ablate_conv2d(*in_double(problem), pieces, **options)
    masked = ops.ablate_conv2d(*problem, pieces, **options)
    torch.testing.assert_close(masked.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_masked_piece_is_a_masked_weight() -> None:
    case = Case(2, 6, 5, 8, 9, stride=(1, 2), dilation=(2, 1), padding=(2, 2, 1, 0))
    output, input, weight = in_double(case.problem())
    piece = torch.tensor([[2, 4, 1, 7]], dtype=torch.int32)
    masked_weight = weight.clone()
    masked_weight.flatten(2)[:, 2:4, 1:7] = 0
    bias = output - case.convolve(input, weight)
    masked = ops.ablate_conv2d(output, input, weight, piece, **arguments_of(case))
    torch.testing.assert_close(masked[0], case.convolve(input, masked_weight) + bias)


def test_nan_stays_in_its_image_and_where_its_pixel_is_read(isa: str) -> None:
    case = Case(3, 6, 19, 9, 8)
    output, input, weight = case.problem()
    input[1, 2, 4, 4] = torch.nan
    masked = ops.ablate_conv2d(
        output, input, weight, torch.tensor([[2, 4, 0, 9]], dtype=torch.int32), padding=(1, 1, 1, 1)
    )[0]
    assert bool(masked[1, :, 3:6, 3:6].isnan().all())
    assert int(masked.isnan().sum()) == 19 * 9


def test_sliced_and_channels_last_inputs_give_the_same() -> None:
    case = Case(4, 20, 33, 7, 9)
    output, input, weight = case.problem()
    pieces, options = pieces_of(case), arguments_of(case)
    plain = ops.ablate_conv2d(output, input, weight, pieces, **options)
    wide = channels_last(torch.cat([output, output], dim=1))[:, 33:]
    for other in (
        (channels_last(output), channels_last(input), channels_last(weight)),
        (wide, torch.stack([input, input], dim=1).flatten(0, 1)[::2], weight.mT.contiguous().mT),
    ):
        assert torch.equal(ops.ablate_conv2d(*other, pieces, **options), plain)
    rows = ops.ablate_conv2d(wide[:, 3:20], input, weight[3:20], pieces, **options)
    assert torch.equal(rows, plain[:, :, 3:20])
    apart = torch.stack([pieces, pieces], dim=1)[:, 0]
    assert torch.equal(ops.ablate_conv2d(output, input, weight, apart, **options), plain)


def test_bits_do_not_depend_on_threads_or_on_the_other_images(isa: str) -> None:
    case = Case(9, 33, 70, 15, 17)
    problem, pieces, options = case.problem(), pieces_of(case), arguments_of(case)
    first, *others = on_several_threads(lambda: ops.ablate_conv2d(*problem, pieces, **options))
    for other in others:
        assert torch.equal(other, first)
    output, input, weight = problem
    assert torch.equal(ops.ablate_conv2d(output[4:6], input[4:6], weight, pieces, **options), first[:, 4:6])


def test_no_pieces_no_images_and_no_channels() -> None:
    case = Case(2, 4, 3, 5, 6)
    output, input, weight = case.problem()
    pieces, options = pieces_of(case), arguments_of(case)
    assert ops.ablate_conv2d(output, input, weight, pieces[:0], **options).shape == (0, 2, 3, 5, 6)
    assert ops.ablate_conv2d(output[:0], input[:0], weight, pieces, **options).shape[1] == 0
    assert ops.ablate_conv2d(output[:, :0], input, weight[:0], pieces, **options).shape[2] == 0
    none = torch.zeros(1, 4, dtype=torch.int32)
    assert torch.equal(ops.ablate_conv2d(output, input[:, :0], weight[:, :0], none, **options)[0], output)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_opcheck_and_gradients(activation: str | None) -> None:
    case = Case(2, 3, 4, 5, 4, stride=(2, 1))
    leaves = [tensor.requires_grad_() for tensor in in_double(case.problem())]
    pieces = pieces_of(case)[::5]
    geometry = (case.stride, case.padding, case.dilation)
    op = torch.ops.fastprune.ablate_conv2d.default
    torch.library.opcheck(op, (*leaves, pieces, *geometry, activation or "none"))
    options = {**arguments_of(case), "activation": activation}
    assert torch.autograd.gradcheck(lambda *tensors: ops.ablate_conv2d(*tensors, pieces, **options), leaves)


def _change(**changes):
    output, input, weight = Case(3, 4, 5, 6, 7).problem()
    pieces = torch.tensor([[0, 2, 0, 9]], dtype=torch.int32)
    tensors = {"output": output, "input": input, "weight": weight, "pieces": pieces}
    return {**tensors, "padding": (1, 1, 1, 1), **changes}


BAD_ARGUMENTS = {
    "output of three dimensions": ("output", _change(output=torch.randn(5, 6, 7))),
    "half output": ("output", _change(output=torch.randn(3, 5, 6, 7).half())),
    "output of another height": ("output", _change(output=torch.randn(3, 5, 5, 7))),
    "output of another width": ("output", _change(output=torch.randn(3, 5, 6, 6))),
    "input of other images": ("input", _change(input=torch.randn(2, 4, 6, 7))),
    "input in double": ("input", _change(input=torch.randn(3, 4, 6, 7).double())),
    "weight of other outputs": ("weight", _change(weight=torch.randn(4, 4, 3, 3))),
    "weight of other inputs": ("weight", _change(weight=torch.randn(5, 3, 3, 3))),
    "weight of two dimensions": ("weight", _change(weight=torch.randn(5, 4))),
    "int64 pieces": ("pieces", _change(pieces=torch.zeros(1, 4, dtype=torch.int64))),
    "pieces of three numbers": ("pieces", _change(pieces=torch.zeros(1, 3, dtype=torch.int32))),
    "channels out of range": ("pieces", _change(pieces=torch.tensor([[0, 5, 0, 1]], dtype=torch.int32))),
    "a negative channel": ("pieces", _change(pieces=torch.tensor([[-1, 4, 0, 1]], dtype=torch.int32))),
    "channels reversed": ("pieces", _change(pieces=torch.tensor([[2, 1, 0, 1]], dtype=torch.int32))),
    "taps out of range": ("pieces", _change(pieces=torch.tensor([[0, 4, 0, 10]], dtype=torch.int32))),
    "taps reversed": ("pieces", _change(pieces=torch.tensor([[0, 4, 2, 1]], dtype=torch.int32))),
    "a negative tap": ("pieces", _change(pieces=torch.tensor([[0, 4, -1, 1]], dtype=torch.int32))),
    "a second piece out of range": (
        "pieces",
        _change(pieces=torch.tensor([[0, 4, 0, 9], [0, 5, 0, 9]], dtype=torch.int32)),
    ),
    "padding of two numbers": ("padding", _change(padding=(1, 1))),
    "no stride": ("stride", _change(stride=(0, 1))),
    "an unknown activation": ("activation", _change(activation="tanh")),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        ops.ablate_conv2d(**arguments)
