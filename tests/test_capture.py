"""capture_outputs: what a layer put out, and no hook left behind."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import Snapshot, masked_mlp, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


class Shared(nn.Module):
    """A layer that is called twice, or not at all, and one that puts out something else than a tensor."""

    def __init__(self, output=lambda x: x):
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.odd = nn.Identity()
        self.odd.forward = output
        self.calls = 2

    def forward(self, x):
        for _ in range(self.calls):
            x = self.layer(x)
        self.odd(x)
        return x


def test_outputs_are_those_of_the_last_forward_and_gradients_flow_through_them():
    model, x = mlp(), torch.randn(6, 7)
    with fp.capture_outputs(model, ["0", "1"]) as outputs:
        assert outputs == {}
        for inputs in (torch.randn(3, 7), x):
            model(inputs)
            hidden = F.linear(inputs, model[0].weight, model[0].bias)
            assert list(outputs) == ["0", "1"]
            torch.testing.assert_close(outputs["0"], hidden)
            torch.testing.assert_close(outputs["1"], hidden.relu())
    outputs["1"].sum().backward()
    expected = (hidden.detach() > 0).double().T @ x.double()
    torch.testing.assert_close(model[0].weight.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_output_that_is_written_over_in_place_is_captured_before():
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True))
    x = torch.randn(6, 7)
    with fp.capture_outputs(model, "0") as outputs:
        model(x)
    expected = F.linear(x, model[0].weight, model[0].bias)
    assert bool((expected < 0).any())
    torch.testing.assert_close(outputs["0"], expected)
    outputs["0"].sum().backward()
    assert model[0].bias.grad.tolist() == pytest.approx([6.0] * 9)


def test_of_several_calls_the_last_counts_and_a_layer_that_is_not_called_is_missing():
    model, x = Shared(), torch.randn(6, 7)
    with fp.capture_outputs(model, ["layer"]) as outputs:
        output = model(x)
        assert torch.equal(outputs["layer"], output)
        model.calls = 0
        model(x)
        assert outputs == {}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (None, x, x + 1),
        lambda x: [x],
        lambda x: {"mask": None, "states": x},
        lambda x: collections.OrderedDict(states=x),
    ],
)
def test_of_a_structure_the_first_tensor_is_captured(wrap):
    model, x = Shared(wrap), torch.randn(6, 7)
    with fp.capture_outputs(model, ["odd"]) as outputs:
        assert torch.equal(model(x), outputs["odd"])


def test_an_output_without_a_tensor_is_refused_by_name():
    for output in (lambda x: 3, lambda x: (None,), lambda x: None):
        model = Shared(output)
        snapshot = Snapshot(model)
        with (
            pytest.raises(TypeError, match="layer 'odd' must put out a tensor"),
            fp.capture_outputs(model, ["odd"]),
        ):
            model(torch.randn(6, 7))
        snapshot.assert_unchanged()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_afterwards_and_ones_own_stay(error):
    model = mlp()
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(1))
    snapshot = Snapshot(model)

    def run():
        with fp.capture_outputs(model, ["0", "2"]):
            model(torch.randn(6, 7))
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    snapshot.assert_unchanged()
    assert calls == [1]


def test_a_name_that_the_model_has_not_is_refused_and_no_hook_stays():
    model = mlp()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="`names` must name layers of Sequential, got '7'"):
        fp.capture_outputs(model, ["0", "7"]).__enter__()
    snapshot.assert_unchanged()
    with pytest.raises(TypeError, match="`model` must be"):
        fp.capture_outputs(3, ["0"]).__enter__()


def test_masked_and_block_sparse_layers_are_captured_and_layers_that_torch_passes_by_too():
    model, x = masked_mlp(0.5)
    with fp.capture_outputs(model, ["0"]) as masked:
        model(x)
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always")
    with fp.capture_outputs(model, ["0"]) as sparse:
        model(x)
    torch.testing.assert_close(sparse["0"], masked["0"], rtol=1e-4, atol=1e-5)
    encoder = nn.TransformerEncoderLayer(12, 2, 15, batch_first=True).eval()  # whose fast path calls no layer
    with torch.no_grad(), fp.capture_outputs(encoder, ["linear1"]) as outputs:
        encoder(torch.randn(2, 5, 12))
    assert outputs["linear1"].shape == (2, 5, 15)
