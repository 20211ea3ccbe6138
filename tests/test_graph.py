"""TracedModel: what it refuses to trace, and that a suffix is the forward with one value replaced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprune.batches import Batch
from fastprune.channel_changes import run_changed
from fastprune.graph import TracedModel
from fastprune.node_ops import ELEMENTWISE_FUNCTIONS, ELEMENTWISE_METHODS, ELEMENTWISE_MODULES, is_elementwise
from helpers import masked_mlp, mlp
from networks import (
    DataDependent,
    PartOfEncoder,
    ResidualInPlace,
    SharedLayer,
    SharedNorm,
    SmallConvNet,
    TiedAutoencoder,
    TwoInputs,
    WritesIntoInput,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _batch(*args, **kwargs):
    return Batch(args, kwargs, None, 4)


def test_what_cannot_be_traced_gives_none():
    assert TracedModel.trace(DataDependent()) is None


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (mlp, (4, 7)),
        (lambda: ResidualInPlace("module"), (4, 7)),
        (lambda: ResidualInPlace("functional"), (4, 7)),
        (lambda: ResidualInPlace("method"), (4, 7)),
        (lambda: ResidualInPlace("aliased"), (4, 7)),
        (WritesIntoInput, (4, 7)),
        (SmallConvNet, (4, 3, 7, 5)),
        (SharedLayer, (4, 7)),
        (TiedAutoencoder, (4, 7)),
        (lambda: masked_mlp(0.5, (2, 2), (7, 9, 5))[0], (4, 7)),
    ],
)
def test_a_trace_gives_what_the_model_gives_and_every_suffix_gives_it_again(make, shape):
    model = make().eval()
    traced = TracedModel.trace(model)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x.clone())
        values = traced.run(_batch(x))
        torch.testing.assert_close(values[traced.output_node], expected, rtol=0, atol=0)
        before = {node: value.clone() for node, value in values.items()}
        for node in traced.nodes[:-1]:
            again = run_changed(traced, values, {node: values[node].clone()})
            torch.testing.assert_close(again, expected, rtol=0, atol=0)
    for node, value in before.items():
        assert torch.equal(values[node], value), node


def test_a_suffix_runs_with_the_replaced_value_and_only_what_depends_on_it():
    model = ResidualInPlace("module").eval()
    calls = []
    for name in ("first", "second", "head"):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.append(name))
    traced = TracedModel.trace(model)
    with torch.no_grad():
        values = traced.run(_batch(torch.randn(4, 7)))
        calls.clear()
        node = traced.single_call(model.second)
        output = run_changed(traced, values, {node: torch.zeros(4, 9)})
        assert calls == ["head"]
        hidden = F.relu(values[traced.single_call(model.first)])
        torch.testing.assert_close(output, model.head(F.gelu(hidden)))


def test_in_place_modules_are_switched_back_also_after_an_error():
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Linear(9, 5))
    traced = TracedModel.trace(model.eval())
    with torch.no_grad():
        traced.run(_batch(torch.randn(4, 7)))
        assert model[1].inplace
        with pytest.raises(RuntimeError):
            traced.run(_batch(torch.randn(4, 8)))
    assert model[1].inplace
    assert model[2].inplace


def test_inputs_are_bound_by_position_keyword_or_default():
    model = TwoInputs().eval()
    traced = TracedModel.trace(model)
    left, right = torch.randn(4, 7), torch.randn(4, 4)
    with torch.no_grad():
        expected = model(left, right)["logits"]
        for batch in (_batch(left, right), _batch(left, right=right), _batch(right=right, left=left)):
            assert torch.equal(traced.run(batch)[traced.output_node]["logits"], expected)
        with pytest.raises(TypeError):
            traced.run(_batch(right=right))


def test_a_module_has_a_single_call_only_if_that_is_its_only_use():
    def single(model, name):
        model.eval()
        return TracedModel.trace(model).single_call(model.get_submodule(name)) is not None

    assert single(mlp(), "0")
    assert single(masked_mlp()[0], "0")
    assert single(SharedLayer(), "stem")
    assert not single(SharedLayer(), "layer")
    assert single(TiedAutoencoder(), "head")
    assert not single(TiedAutoencoder(), "encoder")
    assert not single(PartOfEncoder(), "encoder.linear1")
    assert single(PartOfEncoder(), "stem")

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    assert not single(Unused(), "unused")


def test_a_batch_norm_belongs_to_a_layer_if_neither_has_another_use():
    model = SmallConvNet().eval()
    traced = TracedModel.trace(model)
    norm = traced.batch_norm_of(traced.single_call(model.conv1))
    assert norm.target == "norm1"
    assert traced.batch_norm_of(traced.single_call(model.skip)) is None
    shared = SharedNorm().eval()
    traced = TracedModel.trace(shared)
    assert traced.batch_norm_of(traced.single_call(shared.first)) is None

    class TwoConsumers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(7, 9), nn.BatchNorm1d(9)

        def forward(self, x):
            z = self.layer(x)
            return self.norm(z) + z

    model = TwoConsumers().eval()
    traced = TracedModel.trace(model)
    assert traced.batch_norm_of(traced.single_call(model.layer)) is None


@pytest.mark.parametrize("kind", ELEMENTWISE_MODULES, ids=lambda kind: kind.__name__)
def test_every_module_called_elementwise_is(kind):
    _check_elementwise(kind().eval())


@pytest.mark.parametrize("function", ELEMENTWISE_FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_called_elementwise_is(function):
    _check_elementwise(function)


@pytest.mark.parametrize("method", ELEMENTWISE_METHODS)
def test_every_method_called_elementwise_is(method):
    _check_elementwise(lambda x: getattr(x, method)())


def _check_elementwise(function):
    x = torch.randn(5, 9, dtype=torch.float64) * 4
    changed = torch.rand(5, 9) < 0.5
    other = torch.where(changed, torch.randn(5, 9, dtype=torch.float64) * 4, x)
    result, again = function(x.clone()), function(other.clone())
    assert result.shape == x.shape
    torch.testing.assert_close(again[~changed], result[~changed], rtol=1e-14, atol=0)
    torch.testing.assert_close(function(x[2:3, 3:4].clone()), result[2:3, 3:4], rtol=1e-14, atol=0)


def test_elementwise_nodes_are_recognised_in_every_form_and_others_are_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hooked = nn.ReLU()
            self.hooked.register_forward_hook(lambda module, inputs, output: output.flip(1))
            self.act, self.softmax, self.prelu = nn.GELU(), nn.Softmax(1), nn.PReLU(3)

        def forward(self, x):
            elementwise = [
                self.act(x),
                F.relu(x),
                torch.sigmoid(x),
                x.tanh(),
                F.gelu(x, approximate="tanh"),
                x + 1,
                2 - x,
            ]
            others = [
                self.softmax(x),
                self.prelu(x),
                self.hooked(x),
                x + self.act(x),
                x.sum(1),
                torch.maximum(x, x * 2),
            ]
            return elementwise, others

    traced = TracedModel.trace(Net().eval())
    elementwise, others = traced.output_node.args[0]
    assert [is_elementwise(traced, node) for node in elementwise] == [True] * len(elementwise)
    assert [is_elementwise(traced, node) for node in others] == [False] * len(others)
