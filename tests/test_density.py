"""set_density: which blocks run, what that computes, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(dtype=torch.float32, blocksize=(4, 8)):
    """13 x 43: the last blocks are padded; one row of blocks is empty, one full."""
    mask = torch.rand(4, 6) < 0.5
    mask[1], mask[2] = False, True
    if blocksize != (4, 8):
        mask = None
    return fp.BlockSparseLinear.from_dense(nn.Linear(43, 13).to(dtype), blocksize, mask)


def conv(dtype=torch.float32):
    dense = nn.Conv2d(10, 8, 3, padding=1, groups=2).to(dtype)
    mask = torch.rand(fp.Block(2, 4).shape(dense.weight.shape)) < 0.5
    return fp.BlockSparseConv2d.from_dense(dense, (2, 4), mask)


LAYERS = {"linear": (linear, (5, 43)), "conv": (conv, (3, 10, 7, 5))}


def grid_of(layer):
    """Which blocks of its grid a layer keeps, and their sums of squares."""
    weight = layer.weight.detach().double()
    return fp.Block(*layer.blocksize).sum_pieces(weight.square())


def expected(layer, x, kept_blocks):
    """What the dense layer gives with all but some blocks of its grid masked."""
    dense = copy.deepcopy(layer).to_dense().double()
    with torch.no_grad():
        dense.weight *= fp.Block(*layer.blocksize).expand(kept_blocks, dense.weight.shape)
    return dense(x.double())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("by_scores", [False, True])
def test_the_most_important_blocks_run(kind, density, by_scores):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    squares = grid_of(layer)
    scores = torch.rand(squares.shape, dtype=torch.float64) if by_scores else None
    ranked = squares if scores is None else scores
    count = round(density * len(layer.packed_values))
    order = torch.where(squares > 0, ranked, -1.0).flatten().argsort(descending=True)
    runs = torch.zeros(squares.numel(), dtype=torch.bool)
    runs[order[:count]] = True
    reference = expected(layer, x, runs.view(squares.shape))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.set_density(density, scores)
    assert layer.running_density == count / len(layer.packed_values)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x).double(), reference, rtol=1e-4, atol=1e-5)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("kind", LAYERS)
def test_all_blocks_run_again(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    assert layer.running_density == 1.0
    layer.set_density(0.5)
    assert f"running_density={layer.running_density:.3f}" in repr(layer)
    assert not torch.equal(layer(x), before)
    layer.set_density(1.0)
    assert torch.equal(layer(x), before)
    assert "running_density" not in repr(layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_only_what_runs_is_multiplied(kind, monkeypatch):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    layer.set_density(0.5)
    seen = []
    name = f"block_sparse_{'linear' if kind == 'linear' else 'conv2d'}"
    kernel = getattr(ops, name)

    def watch(x, values, *rest, **options):
        seen.append(values)
        return kernel(x, values, *rest, **options)

    monkeypatch.setattr(ops, name, watch)
    with torch.no_grad():
        layer(x)
        layer(x)
    assert len(seen[0]) == round(0.5 * len(layer.packed_values))
    assert seen[0] is seen[1]  # gathered once


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_what_runs_alone(kind):
    make, shape = LAYERS[kind]
    layer, x = make(torch.float64), torch.randn(shape, dtype=torch.float64)
    layer.set_density(0.5)
    importance = layer.block_importance()
    runs = torch.zeros(len(importance), dtype=torch.bool)
    runs[importance.argsort(descending=True)[: round(0.5 * len(importance))]] = True
    layer(x).square().sum().backward()
    touched = layer.packed_values.grad.abs().sum((1, 2)) > 0
    assert torch.equal(touched, runs)


@pytest.mark.parametrize("change", ["in place", "data", "optimizer"])
def test_weights_that_change_are_read_anew(change):
    layer, x = linear(), torch.randn(5, 43)
    layer.set_density(0.5)
    ranked = layer.block_importance().sort(descending=True).values
    runs = grid_of(layer) >= ranked[round(0.5 * len(ranked)) - 1]
    with torch.no_grad():
        layer(x)
        if change == "in place":
            layer.packed_values.mul_(2)
        elif change == "data":
            layer.packed_values.data = layer.packed_values.data * 3
    if change == "optimizer":
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(x).sum().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected(layer, x, runs), rtol=1e-4, atol=1e-5)


def test_a_density_survives_conversion_and_copies():
    layer, x = linear(), torch.randn(5, 43)
    layer.set_density(0.5)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    layer.double()
    torch.testing.assert_close(layer(x.double()), before.double(), rtol=1e-4, atol=1e-5)
    assert layer.running_density < 1


def test_what_runs_moves_with_the_layer():
    layer = linear()
    layer.set_density(0.5)
    running = layer.running_density
    layer.to("meta")
    assert {part.device.type for part in layer._operands()[:3]} == {"meta"}
    assert layer.running_density == running


def test_a_state_of_other_blocks_runs_whole_and_of_the_same_as_before():
    layer, other, x = linear(), linear(), torch.randn(5, 43)
    other.set_density(0.5)
    state = other.state_dict()
    other.load_state_dict(state)
    assert other.running_density < 1
    other.load_state_dict(layer.state_dict())
    assert other.running_density == 1.0
    assert torch.equal(other(x), layer(x))


def test_an_exported_layer_runs_what_it_ran():
    layer, x = linear(), torch.randn(5, 43)
    layer.set_density(0.5)
    program = torch.export.export(layer.eval(), (x,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), layer(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.rest = conv(), linear(), nn.Linear(3, 4)


def kept(model):
    return {name: len(getattr(model, name).packed_values) for name in ("conv", "linear")}


def test_a_model_runs_the_same_share_of_each_layer():
    model = Net()
    assert fp.set_density(model, 0.5) is model
    for name, count in kept(model).items():
        assert getattr(model, name).running_density == round(0.5 * count) / count


def test_a_model_ranks_the_blocks_of_all_layers_together():
    model = Net()
    with torch.no_grad():
        model.conv.packed_values.mul_(100)
    fp.set_density(model, 0.5, scope="global")
    counts = kept(model)
    running = {name: round(getattr(model, name).running_density * counts[name]) for name in counts}
    assert sum(running.values()) == round(0.5 * sum(counts.values()))
    assert running["conv"] == min(counts["conv"], sum(running.values()))


def test_scores_choose_and_layers_without_scores_run_whole():
    model = Net()
    scores = {"linear": torch.rand(grid_of(model.linear).shape)}
    twin = copy.deepcopy(model.linear)
    fp.set_density(model, 0.25, scores)
    twin.set_density(0.25, scores["linear"])
    x = torch.randn(4, 43)
    assert torch.equal(model.linear(x), twin(x))
    assert model.conv.running_density == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear().set_density(1.5), "`density` must be a number in .0, 1., got 1.5"),
        (lambda: linear().set_density(True), "`density`"),
        (lambda: linear().set_density("half"), "`density`"),
        (lambda: linear().set_density(0.5, torch.ones(3)), r"`scores` .* \[4, 6\], got shape \[3\]"),
        (lambda: linear().set_density(0.5, torch.full((4, 6), torch.nan)), "NaN"),
        (lambda: fp.set_density(nn.Linear(3, 3), 0.5), "no block-sparse layer"),
        (lambda: fp.set_density(Net(), -0.1), "`density`"),
        (lambda: fp.set_density(Net(), 0.5, scope="row"), "`scope`"),
        (lambda: fp.set_density(Net(), 0.5, {"other": torch.ones(1)}), "other"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_error_leaves_the_model_as_it_was():
    model = Net()
    fp.set_density(model, 0.5)
    before = {name: getattr(model, name).running_density for name in kept(model)}
    scores = {"conv": torch.ones(grid_of(model.conv).shape), "linear": torch.ones(3)}
    with pytest.raises(ValueError, match="scores"):
        fp.set_density(model, 0.25, scores)
    assert {name: getattr(model, name).running_density for name in kept(model)} == before


def half(kind="linear"):
    make, shape = LAYERS[kind]
    layer = make()
    layer.set_density(0.5)
    return layer, torch.randn(shape)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_an_optimizer_are_seen_after_inference(optimizer, fused):
    layer, x = half()
    steps = optimizer(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            before = layer(x)
        layer(x).square().sum().backward()
        steps.step()
        with torch.no_grad():
            after = layer(x)
        torch.testing.assert_close(after, layer(x).detach())
        assert not torch.equal(after, before)


def test_weights_that_are_lent_for_a_call_are_read_anew():
    layer, x = half()
    size = layer.packed_values.shape
    with torch.no_grad():
        for value in range(6):
            lent = {"packed_values": torch.full(size, float(value)), "bias": torch.zeros(13)}
            found = torch.func.functional_call(layer, lent, (torch.ones(1, 43),))
            assert float(found.sum()) == pytest.approx(value * float(layer_ones(layer)), rel=1e-5)
            del lent
        own = layer(x)
        layer._running._values = None
        assert torch.equal(layer(x), own)


def layer_ones(layer):
    """How many weights of the dense shape run."""
    ones = copy.deepcopy(layer)
    nn.init.ones_(ones.packed_values)
    return ones.to_dense().weight.sum()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dense_layer_has_the_weights_that_run(kind):
    layer, x = half(kind)
    found = layer(x)
    torch.testing.assert_close(layer.to_dense()(x), found, rtol=1e-4, atol=1e-5)
    model = fp.to_dense_(nn.Sequential(layer))
    torch.testing.assert_close(model(x), found, rtol=1e-4, atol=1e-5)


def test_gradients_of_inputs_flow_after_a_call_in_inference_mode():
    layer, x = half()
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_dense().weight.sum(0).expand(5, 43), rtol=1e-4, atol=1e-5)


def test_transforms_and_traces_of_a_layer_with_a_density():
    layer, x = half()
    weights = torch.randn(3, *layer.packed_values.shape)
    with torch.no_grad():
        layer(x)

        def call(values):
            return torch.func.functional_call(layer, {"packed_values": values}, (x,))

        torch.testing.assert_close(torch.vmap(call)(weights), torch.stack([call(w) for w in weights]))
        traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(traced(x), layer(x))


def test_copies_and_files_hold_no_gathered_values(tmp_path):
    layer, x = half()
    with torch.no_grad():
        found = layer(x)
        for other in (copy.deepcopy(layer), torch_saved(layer, tmp_path / "layer.pt")):
            assert other._running._values is None
            assert torch.equal(other(x), found)
            assert other.running_density == layer.running_density


def torch_saved(layer, path):
    torch.save(layer, path)
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("with_density", [False, True])
def test_a_state_is_assigned_to_a_layer_without_memory(kind, with_density):
    make, shape = LAYERS[kind]
    layer = make()
    empty = copy.deepcopy(layer)
    if with_density:
        empty.set_density(0.5)
    empty = empty.to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(shape)
    assert torch.equal(empty(x), layer(x))
