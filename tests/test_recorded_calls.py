"""What torch.compile, torch.export, torch.jit and autocast make of converted layers; optimizers and sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")


def linear():
    torch.manual_seed(0)
    mask = torch.rand(8, 8) < 0.3
    return fp.BlockSparseLinear.from_dense(nn.Linear(32, 32), (4, 4), mask), torch.randn(5, 32)


def conv():
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 16, 3, padding=1)
    mask = torch.rand(fp.Block(4, 4).shape(dense.weight.shape)) < 0.3
    return fp.BlockSparseConv2d.from_dense(dense, (4, 4), mask), torch.randn(2, 8, 5, 5)


LAYERS = {
    "linear": (linear, "fastprune.block_sparse_linear"),
    "conv": (conv, "fastprune.block_sparse_conv2d"),
}


def compiled_targets(function, *inputs):
    """What a compiled call computes, and the functions in its graph."""
    targets = []

    def backend(graph, examples):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)(*inputs), targets


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_a_compiled_call_is_the_op(kind, mode):
    make, name = LAYERS[kind]
    layer, x = make()
    with mode():
        found, targets = compiled_targets(layer, x)
        torch.testing.assert_close(found, layer(x))
    assert [target.partition(".default")[0].removesuffix("_inference") for target in targets] == [name]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_strict_export_holds_the_op(kind):
    make, name = LAYERS[kind]
    layer, x = make()
    graph = torch.export.export(layer, (x,), strict=True).graph
    assert name in " ".join(str(node.target) for node in graph.nodes)


def test_transforms_within_a_compiled_function_take_the_dense_way():
    layer, x = linear()

    def columns(x):
        return torch.vmap(layer)(x)

    found, targets = compiled_targets(columns, x)
    torch.testing.assert_close(found, layer(x))
    assert not any("fastprune" in target for target in targets)

    def tangent(x):
        return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(compiled_targets(tangent, x)[0], tangent(x))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_trace_with_gradients_passes_its_check(kind, activation):
    layer, x = LAYERS[kind][0]()
    layer.activation = activation
    traced = torch.jit.trace(layer, x)
    assert LAYERS[kind][1].replace(".", "::") in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_trains_a_convolution_behind_a_dense_one(compiled):
    layer, _ = conv()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer)
    x = torch.randn(2, 3, 5, 5)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(x)
        assert output.dtype == torch.float32
        output.square().mean().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    expected(x).square().mean().backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0.1, atol=0.02)


class WritesInPlace(nn.Module):
    """An activation whose result is read where its input was."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        self.act(y)
        return y


def test_an_activation_in_place_comes_back_in_place(tmp_path):
    model, x = WritesInPlace().eval(), torch.randn(2, 8, 5, 5)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=0.5))
    expected = model(x)
    fp.sparsify_(model, example_inputs=x, policy="always", blocksize=(4, 4), fold_batch_norm=True)
    fp.save(model, tmp_path / "model.safetensors")
    loaded = fp.load(tmp_path / "model.safetensors", WritesInPlace()).eval()
    for converted in (model, loaded):
        assert isinstance(converted.act, nn.Identity)
        fp.to_dense_(converted)
        torch.testing.assert_close(converted(x), expected)
        assert converted.act.inplace


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-3),
    ],
)
@pytest.mark.parametrize(("before", "after"), [(0.1, 0.9), (0.9, 0.1)])
def test_an_optimizer_goes_on_after_a_state_of_another_size(optimizer, before, after):
    torch.manual_seed(0)
    layer, other = (
        fp.BlockSparseLinear.from_dense(nn.Linear(64, 64), (4, 4), torch.rand(16, 16) < density)
        for density in (before, after)
    )
    x = torch.randn(5, 64)
    going, fresh = optimizer(layer.parameters()), optimizer(other.parameters())
    layer(x).square().sum().backward()
    going.step()
    going.zero_grad()
    bias = copy.deepcopy(going.state[layer.bias])
    layer.load_state_dict(other.state_dict())
    going.state[layer.bias].clear()  # of which moments are kept: here as in a fresh optimizer
    for _ in range(3):
        for model, steps in ((layer, going), (other, fresh)):
            model(x).square().sum().backward()
            steps.step()
            steps.zero_grad()
    for found, expected in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert bias


def test_moments_that_came_with_the_state_are_kept():
    torch.manual_seed(0)
    layer, other = (
        fp.BlockSparseLinear.from_dense(nn.Linear(64, 64), (4, 4), torch.rand(16, 16) < density)
        for density in (0.2, 0.8)
    )
    x = torch.randn(5, 64)
    steps = torch.optim.Adam(other.parameters(), lr=1e-3)
    other(x).square().sum().backward()
    steps.step()
    resumed = torch.optim.Adam(layer.parameters(), lr=1e-3)
    layer.load_state_dict(other.state_dict())
    resumed.load_state_dict(copy.deepcopy(steps.state_dict()))  # which shares its tensors
    for model, optimizer in ((layer, resumed), (other, steps)):
        model.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.packed_values, other.packed_values)
