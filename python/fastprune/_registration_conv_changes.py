"""What torch must know of ablate_conv2d and updated_conv2d: shapes, gradients and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._fake_checks import check, check_activation, check_like, check_shapes
from ._registration_conv import _check_geometry, _check_images, _output_size


def _empty_channels_last(like: Tensor, *leading: int) -> Tensor:
    images, channels, height, width = like.shape
    return like.new_empty(*leading, images, height, width, channels).movedim(-1, -3)


def _ablate_conv2d_fake(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    pieces: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    op = "ablate_conv2d"
    check_activation(op, activation)
    for name, tensor in (("output", output), ("input", input), ("weight", weight)):
        _check_images(op, name, tensor)
    check_like(op, output, input=input, weight=weight)
    check(pieces.dim() == 2, f"{op}: `pieces` must have 2 dimensions, got {list(pieces.shape)}")
    _check_geometry(op, weight.shape[2:], stride, padding, dilation)
    size = _output_size(op, input.shape[2:], weight.shape[2:], stride, padding, dilation)
    check_shapes(
        op,
        output=(output, (input.shape[0], weight.shape[0], *size)),
        weight=(weight, (output.shape[1], input.shape[1], *weight.shape[2:])),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return _empty_channels_last(output, pieces.shape[0])


def _ablate_conv2d_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _ablate_conv2d_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, pieces = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output, input, weight = leaves
        masked = reference.ablate_conv2d(
            output,
            input,
            weight,
            pieces,
            stride=ctx.stride,
            padding=ctx.padding,
            dilation=ctx.dilation,
            activation=None if ctx.activation == "none" else ctx.activation,
        )
        gradients = torch.autograd.grad(masked, leaves, grad, allow_unused=True)
    return (*gradients, None, None, None, None, None)


def _updated_conv2d_fake(
    known: Tensor,
    input: Tensor,
    new_input: Tensor,
    winograd_weight: Tensor,
    addend: Tensor | None,
    new_addend: Tensor | None,
    padding: list[int],
    activation: str,
) -> Tensor:
    op = "updated_conv2d"
    check_activation(op, activation)
    for name, images in (("known", known), ("input", input)):
        _check_images(op, name, images)
    check_like(
        op,
        known,
        input=input,
        new_input=new_input,
        winograd_weight=winograd_weight,
        addend=addend,
        new_addend=new_addend,
    )
    check(
        (addend is None) == (new_addend is None),
        f"{op}: `new_addend` must be given with `addend`, and only with it",
    )
    _check_geometry(op, (3, 3), (1, 1), padding, (1, 1))
    size = _output_size(op, input.shape[2:], (3, 3), (1, 1), padding, (1, 1))
    shape = (input.shape[0], known.shape[1], *size)
    panels = -(-known.shape[1] // 16)
    check_shapes(
        op,
        known=(known, shape),
        new_input=(new_input, tuple(input.shape)),
        winograd_weight=(winograd_weight, (36, panels, input.shape[1], 16)),
    )
    for name, summand in (("addend", addend), ("new_addend", new_addend)):
        if summand is not None:
            check_shapes(op, **{name: (summand, shape)})
    return _empty_channels_last(known)


def _updated_conv2d_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.padding, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _updated_conv2d_backward(ctx: Any, grad: Tensor) -> tuple:
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        updated = reference.updated_conv2d(
            *leaves,  # type: ignore[arg-type]
            padding=ctx.padding,
            activation=None if ctx.activation == "none" else ctx.activation,
        )
        given = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(updated, given, grad))
    return (*(None if leaf is None else next(gradients) for leaf in leaves), None, None)


for _name, _fake, _backward, _setup in (
    ("ablate_conv2d", _ablate_conv2d_fake, _ablate_conv2d_backward, _ablate_conv2d_setup),
    ("updated_conv2d", _updated_conv2d_fake, _updated_conv2d_backward, _updated_conv2d_setup),
):
    torch.library.register_fake(f"fastprune::{_name}", _fake)
    torch.library.register_autograd(f"fastprune::{_name}", _backward, setup_context=_setup)
    for _device in ("cpu", "cuda"):
        # What measures losses is float32 also where autocast would have it coarser.
        torch.library.register_autocast(f"fastprune::{_name}", _device, torch.float32)
