"""What torch must know of the ablation ops besides their kernels: shapes, gradients and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as _library  # loads the schemas this module registers for
from . import reference
from ._fake_checks import check, check_activation, check_shapes


def _ablated_cross_entropy_fake(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    sample_weight: Tensor | None,
) -> Tensor:
    op = "ablated_cross_entropy"
    check(logits.dim() == 2, f"{op}: `logits` must have 2 dimensions, got {list(logits.shape)}")
    check_shapes(
        op,
        hidden=(hidden, (logits.shape[0], weight.shape[1])),
        weight=(weight, (logits.shape[1], hidden.shape[1])),
        targets=(targets, (logits.shape[0],)),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return logits.new_empty(pieces.shape[0], dtype=torch.float64)


def _ablated_cross_entropy_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ablated_cross_entropy_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, targets, pieces, sample_weight = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        logits, hidden, weight = leaves
        deltas = reference.ablated_cross_entropy(logits, hidden, weight, targets, pieces, sample_weight)
        gradients = torch.autograd.grad(deltas, leaves, grad, allow_unused=True)
    return (*gradients, None, None, None)


def _ablated_mlp_cross_entropy_fake(
    logits: Tensor,
    input: Tensor,
    pre_activation: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    activation: str,
    sample_weight: Tensor | None,
) -> Tensor:
    op = "ablated_mlp_cross_entropy"
    check_activation(op, activation)
    for name, tensor in (("logits", logits), ("input", input), ("pre_activation", pre_activation)):
        check(tensor.dim() == 2, f"{op}: `{name}` must have 2 dimensions, got {list(tensor.shape)}")
    samples, classes = logits.shape
    hidden = pre_activation.shape[1]
    check_shapes(
        op,
        input=(input, (samples, input.shape[1])),
        pre_activation=(pre_activation, (samples, hidden)),
        first_weight=(first_weight, (hidden, input.shape[1])),
        second_weight=(second_weight, (classes, hidden)),
        targets=(targets, (samples,)),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return logits.new_empty(pieces.shape[0], dtype=torch.float64)


def _ablated_mlp_cross_entropy_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation, sample_weight = inputs
    ctx.save_for_backward(*tensors, sample_weight)


def _ablated_mlp_cross_entropy_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, targets, pieces, sample_weight = ctx.saved_tensors
    activation = None if ctx.activation == "none" else ctx.activation
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        logits, input, before, first, second = leaves
        deltas = reference.ablated_mlp_cross_entropy(
            logits, input, before, first, second, targets, pieces, activation, sample_weight
        )
        gradients = torch.autograd.grad(deltas, leaves, grad, allow_unused=True)
    return (*gradients, None, None, None, None)


def _ablate_linear_fake(output: Tensor, input: Tensor, weight: Tensor, pieces: Tensor) -> Tensor:
    op = "ablate_linear"
    for name, tensor in (("output", output), ("input", input), ("pieces", pieces)):
        check(tensor.dim() == 2, f"{op}: `{name}` must have 2 dimensions, got {list(tensor.shape)}")
    check_shapes(
        op,
        input=(input, (output.shape[0], input.shape[1])),
        weight=(weight, (output.shape[1], input.shape[1])),
        pieces=(pieces, (pieces.shape[0], 4)),
    )
    return output.new_empty(pieces.shape[0], *output.shape)


def _ablate_linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ablate_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    *tensors, pieces = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output, input, weight = leaves
        masked = reference.ablate_linear(output, input, weight, pieces)
        gradients = torch.autograd.grad(masked, leaves, grad)
    return (*gradients, None)


for _name, _fake, _backward, _setup in (
    (
        "ablated_cross_entropy",
        _ablated_cross_entropy_fake,
        _ablated_cross_entropy_backward,
        _ablated_cross_entropy_setup,
    ),
    (
        "ablated_mlp_cross_entropy",
        _ablated_mlp_cross_entropy_fake,
        _ablated_mlp_cross_entropy_backward,
        _ablated_mlp_cross_entropy_setup,
    ),
    ("ablate_linear", _ablate_linear_fake, _ablate_linear_backward, _ablate_linear_setup),
):
    torch.library.register_fake(f"fastprune::{_name}", _fake)
    torch.library.register_autograd(f"fastprune::{_name}", _backward, setup_context=_setup)
    for _device in ("cpu", "cuda"):
        # What measures losses is float32 also where autocast would have it coarser.
        torch.library.register_autocast(f"fastprune::{_name}", _device, torch.float32)
