"""updated_conv2d: sums after a change against torch's convolution in float64."""

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
    Case(3, 33, 16, 4, 4),
    Case(2, 17, 129, 6, 5, padding=(0, 1, 2, 0)),
    Case(5, 64, 70, 8, 15, padding=(0, 0, 0, 0)),
    Case(1, 151, 65, 13, 12),
    Case(5, 49, 33, 9, 10),  # 45 tiles in two chunks: 22 and 23
    Case(2, 4, 3, 2, 3, padding=(3, 2, 4, 5)),
]


def change_of(case: Case, addends: bool = True) -> tuple[Tensor, ...]:
    """What is known, the input before and after, the weight, and two addends."""
    known, input, weight = case.problem()
    new_input = torch.where(torch.rand_like(input) < 0.5, input, torch.randn_like(input))
    summands = (torch.randn_like(known), torch.randn_like(known)) if addends else ()
    return (known, input, new_input, weight, *summands)


def call(case: Case, problem, **options) -> Tensor:
    known, input, new_input, weight, *addends = problem
    return ops.updated_conv2d(
        known, input, new_input, ops.winograd_weight(weight), *addends, padding=case.padding, **options
    )


def by_torch(case: Case, problem) -> Tensor:
    known, input, new_input, weight, *addends = in_double(problem)
    result = known + case.convolve(new_input - input, weight)
    return result + (addends[1] - addends[0]) if addends else result


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("addends", [False, True])
def test_matches_torch(isa: str, case: Case, dtype: torch.dtype, addends: bool) -> None:
    problem = [tensor.to(dtype) for tensor in change_of(case, addends)]
    updated = call(case, problem)
    assert updated.dtype == dtype
    assert updated.movedim(1, 3).is_contiguous()
    # The transforms multiply by up to 8 and cancel again: a digit more than a plain sum of products loses.
    bound = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * (9 * case.in_channels) ** 0.5 * 30
    torch.testing.assert_close(updated.double(), by_torch(case, problem), rtol=bound, atol=bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_matches_torch(case: Case) -> None:
    problem = in_double(change_of(case))
    known, input, new_input, weight, *addends = problem
    transformed = reference.winograd_weight(weight)
    updated = reference.updated_conv2d(known, input, new_input, transformed, *addends, padding=case.padding)
    torch.testing.assert_close(updated, by_torch(case, problem))


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "gelu_tanh", "silu"])
def test_activations(isa: str, activation: str) -> None:
    case = CASES[1]
    problem = change_of(case)
    updated = call(case, problem, activation=activation)
    wanted = reference.ACTIVATIONS[activation](by_torch(case, problem))
    torch.testing.assert_close(updated.double(), wanted, rtol=1e-3, atol=1e-3)


def test_what_does_not_change_keeps_its_bits(isa: str) -> None:
    case = Case(3, 33, 40, 11, 13)
    known, input, _, weight, addend, _ = change_of(case)
    new_input = input.clone()
    new_input[1, :, 5, 6] += 1  # of one image, in one pixel
    updated = call(case, (known, input, new_input, weight, addend, addend), activation="relu")
    assert torch.equal(updated[[0, 2]], known.relu()[[0, 2]])
    # The tiles of 4x4 outputs whose patches hold the pixel are those of rows 4 to 7 and columns 4 to 7.
    elsewhere = torch.ones(11, 13, dtype=torch.bool)
    elsewhere[4:8, 4:8] = False
    assert torch.equal(updated[1, :, elsewhere], known.relu()[1, :, elsewhere])
    assert not torch.equal(updated[1], known.relu()[1])


def test_small_changes_of_large_values_are_exact_in_themselves(isa: str) -> None:
    case = Case(2, 64, 48, 8, 8)
    known, input, new_input, weight = change_of(case, addends=False)
    zeros = torch.zeros_like(known)
    # float32 holds differences of neighbouring numbers exactly.
    before = input * 1000
    after = before + new_input * 0.1
    updated = call(case, (zeros, before, after, weight))
    wanted = case.convolve(after.double() - before.double(), weight.double())
    assert float((updated - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())


def test_nan_stays_in_its_image(isa: str) -> None:
    case = Case(3, 6, 19, 9, 8)
    problem = change_of(case)
    problem[2][1, 2, 4, 4] = torch.nan
    updated = call(case, problem)
    assert bool(updated[1, :, 3:6, 3:6].isnan().all())
    assert not bool(updated[[0, 2]].isnan().any())


def test_nan_of_an_earlier_call_is_gone(isa: str, one_thread: None) -> None:
    large, small = Case(9, 33, 150, 15, 17), CASES[1]
    known, input, new_input, weight, *_ = change_of(large)
    assert bool(call(large, (known, input, new_input * torch.nan, weight)).isnan().all())
    # Threads keep their memory; pixels outside of the images are read from it.
    assert not bool(call(small, change_of(small)).isnan().any())


def test_sliced_and_channels_last_inputs_give_the_same() -> None:
    case = Case(4, 20, 33, 7, 9)
    problem = change_of(case)
    plain = call(case, problem)
    known, input, new_input, weight, addend, new_addend = problem
    sliced = (
        channels_last(known),
        channels_last(torch.cat([input, input], dim=1))[:, 20:],
        torch.stack([new_input, new_input], dim=1).flatten(0, 1)[::2],
        channels_last(weight),
        addend.mT.contiguous().mT,
        channels_last(new_addend),
    )
    assert torch.equal(call(case, sliced), plain)
    transformed = ops.winograd_weight(weight)
    apart = torch.stack([transformed, torch.zeros_like(transformed)], dim=-1)[..., 0]
    tensors = (known, input, new_input, apart, addend, new_addend)
    assert torch.equal(ops.updated_conv2d(*tensors, padding=case.padding), plain)


def test_bits_do_not_depend_on_threads_or_on_the_other_images(isa: str) -> None:
    case = Case(9, 33, 150, 15, 17)
    problem = change_of(case)
    first, *others = on_several_threads(lambda: call(case, problem))
    for other in others:
        assert torch.equal(other, first)
    known, input, new_input, weight, *addends = problem
    some = (*(t[4:6] for t in (known, input, new_input)), weight, *(t[4:6] for t in addends))
    assert torch.equal(call(case, some), first[4:6])


def test_no_images_and_no_channels() -> None:
    case = Case(2, 4, 3, 5, 6)
    known, input, new_input, weight, *_ = change_of(case)
    none = (known[:0], input[:0], new_input[:0], weight)
    assert call(case, none).shape == (0, 3, 5, 6)
    assert call(case, (known[:, :0], input, new_input, weight[:0])).shape == (2, 0, 5, 6)
    assert torch.equal(call(case, (known, input[:, :0], new_input[:, :0], weight[:, :0])), known)


@pytest.mark.parametrize("addends", [False, True])
def test_opcheck_and_gradients(addends: bool) -> None:
    case = Case(2, 3, 4, 5, 4)
    known, input, new_input, weight, *rest = in_double(change_of(case, addends))
    leaves = [t.requires_grad_() for t in (known, input, new_input, ops.winograd_weight(weight), *rest)]
    arguments = (*leaves, *([] if addends else [None, None]), case.padding, "silu")
    torch.library.opcheck(torch.ops.fastprune.updated_conv2d.default, arguments)
    options = {"padding": case.padding, "activation": "silu"}
    assert torch.autograd.gradcheck(lambda *tensors: ops.updated_conv2d(*tensors, **options), leaves)


def _change(**changes):
    known, input, new_input, weight, addend, new_addend = change_of(Case(3, 4, 5, 6, 7))
    tensors = {"known": known, "input": input, "new_input": new_input}
    tensors |= {"winograd_weight": ops.winograd_weight(weight), "addend": addend, "new_addend": new_addend}
    return {**tensors, "padding": (1, 1, 1, 1), **changes}


BAD_ARGUMENTS = {
    "known of three dimensions": ("known", _change(known=torch.randn(5, 6, 7))),
    "half known": ("known", _change(known=torch.randn(3, 5, 6, 7).half())),
    "known of another height": (
        "known",
        _change(known=torch.randn(3, 5, 5, 7), addend=None, new_addend=None),
    ),
    "known of another width": (
        "known",
        _change(known=torch.randn(3, 5, 6, 6), addend=None, new_addend=None),
    ),
    "input of other images": ("input", _change(input=torch.randn(2, 4, 6, 7))),
    "input in double": ("input", _change(input=torch.randn(3, 4, 6, 7).double())),
    "new input of another size": ("new_input", _change(new_input=torch.randn(3, 4, 6, 6))),
    "a plain weight": ("winograd_weight", _change(winograd_weight=torch.randn(5, 4, 3, 3))),
    "weight of 35 points": ("winograd_weight", _change(winograd_weight=torch.randn(35, 1, 4, 16))),
    "weight in panels of 15": ("winograd_weight", _change(winograd_weight=torch.randn(36, 1, 4, 15))),
    "weight in double": ("winograd_weight", _change(winograd_weight=torch.randn(36, 1, 4, 16).double())),
    "weight of other outputs": ("winograd_weight", _change(winograd_weight=torch.randn(36, 2, 4, 16))),
    "weight of other inputs": ("winograd_weight", _change(winograd_weight=torch.randn(36, 1, 5, 16))),
    "one addend": ("new_addend", _change(new_addend=None)),
    "only the new addend": ("new_addend", _change(addend=None)),
    "addend of another size": ("addend", _change(addend=torch.randn(3, 5, 6, 6))),
    "new addend of another size": ("new_addend", _change(new_addend=torch.randn(3, 5, 1, 7))),
    "padding of two numbers": ("padding", _change(padding=(1, 1))),
    "an unknown activation": ("activation", _change(activation="tanh")),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        ops.updated_conv2d(**arguments)


def test_only_weights_of_nine_taps_are_transformed() -> None:
    with pytest.raises(ValueError, match="`weight` must have shape"):
        ops.winograd_weight(torch.randn(4, 4, 1, 1))
