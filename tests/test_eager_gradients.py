"""Eager calls with gradients: those of the registered op, which is what a recorded call holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp

LINEAR = (lambda: nn.Linear(37, 50), fp.BlockSparseLinear, "block_sparse_linear", (9, 37))
CONVOLUTION = (
    lambda: nn.Conv2d(20, 24, 3, stride=2, padding=1),
    fp.BlockSparseConv2d,
    "block_sparse_conv2d",
    (2, 20, 9, 7),
)


def make(make_dense, kind, activation: str | None) -> nn.Module:
    torch.manual_seed(0)
    dense = make_dense()
    rows, columns = -(-dense.weight.shape[0] // 8), -(-dense.weight.shape[1] // 8)
    taps = dense.weight[0, 0].numel()
    return kind.from_dense(dense, (8, 8), torch.rand(rows, taps * columns) < 0.6, activation=activation)


def gradients(layer: nn.Module, input: torch.Tensor, order: int) -> list[torch.Tensor]:
    sources = [input, *layer.parameters()]
    total = layer(input).square().sum()
    for _ in range(order):
        first = torch.autograd.grad(total, sources, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
    return [total, *torch.autograd.grad(total, sources)]


@pytest.mark.parametrize("order", [0, 1], ids=["gradients", "gradients of gradients"])
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
@pytest.mark.parametrize("case", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_they_have_the_bits_of_the_registered_op(monkeypatch, case, activation, order) -> None:
    make_dense, kind, _, shape = case
    layer, input = make(make_dense, kind, activation), torch.randn(shape, requires_grad=True)
    eager = gradients(layer, input, order)
    for module in (fp.ops, fp.ops_conv):
        monkeypatch.setattr(module, "takes_registered_gradients", lambda: True)
    registered = gradients(layer, input, order)
    assert eager[1].count_nonzero() > 0
    for ours, theirs in zip(eager, registered, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_recorded_calls_hold_one_op(case) -> None:
    make_dense, kind, name, shape = case
    layer, input = make(make_dense, kind, None), torch.randn(shape)
    exported = torch.export.export(layer, (input,)).graph
    assert [node.name for node in exported.nodes if name in str(node.target)] != []
    traced = torch.jit.trace(layer, (input,), check_trace=False)
    assert f"fastprune::{name}(" in str(traced.inlined_graph)
    assert "^" not in str(traced.inlined_graph)  # no Python function, which no file could hold


@pytest.mark.parametrize("case", [LINEAR, CONVOLUTION], ids=["linear", "convolution"])
def test_weights_alone_or_inputs_alone(case) -> None:
    make_dense, kind, _, shape = case
    layer, input = make(make_dense, kind, "relu"), torch.randn(shape, requires_grad=True)
    layer(input).sum().backward()
    wanted = [input.grad, *(parameter.grad for parameter in layer.parameters())]
    layer.zero_grad()
    layer(input.detach()).sum().backward()
    for parameter, gradient in zip(layer.parameters(), wanted[1:], strict=True):
        assert torch.equal(parameter.grad, gradient)
    layer.zero_grad()
    layer.requires_grad_(False)
    input.grad = None
    layer(input).sum().backward()
    assert torch.equal(input.grad, wanted[0])
    assert all(parameter.grad is None for parameter in layer.parameters())
