"""Which trace serves a model: stale ones are noticed, torch.export serves where torch.fx sees too little."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.batches import Batch
from fastprune.exported import MOST_EXPORTS, ExportedModel
from fastprune.graph import TracedModel
from fastprune.tracing import Traces
from helpers import assert_exact, brute_force, classification_batches, mlp
from networks import DataDependent, Encoder, TextClassifier

pytestmark = pytest.mark.usefixtures("one_thread")


def _batch(x):
    return Batch((x,), {}, None, len(x))


def _linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def test_a_trace_is_kept_until_the_modules_change():
    model = mlp().eval()
    graph = TracedModel.trace(model).graph
    assert TracedModel.trace(model).graph is graph
    model[1] = nn.Tanh()
    assert TracedModel.trace(model).graph is not graph
    again = TracedModel.trace(model).graph
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    assert TracedModel.trace(model).graph is not again


def test_an_export_is_kept_for_its_shapes_until_the_modules_change():
    model, batch = mlp().eval(), _batch(torch.randn(4, 7))
    graph = ExportedModel.export(model, batch).graph
    assert ExportedModel.export(model, _batch(torch.randn(4, 7))).graph is graph
    assert ExportedModel.export(model, _batch(torch.randn(3, 7))).graph is not graph
    model[1] = nn.Tanh()
    changed = ExportedModel.export(model, batch)
    assert changed.graph is not graph
    torch.testing.assert_close(changed.run(batch)[changed.output_node], model(*batch.args))


def test_only_the_latest_exports_are_kept():
    model = mlp().eval()
    batches = [_batch(torch.randn(size, 7)) for size in range(2, 3 + MOST_EXPORTS)]
    for batch in batches:
        ExportedModel.export(model, batch)
    assert [ExportedModel.is_kept(model, batch) for batch in batches] == [False] + [True] * MOST_EXPORTS


@pytest.mark.parametrize(
    "trace",
    [TracedModel.trace, lambda model: ExportedModel.export(model, _batch(torch.randn(4, 7)))],
    ids=["torch.fx", "torch.export"],
)
def test_a_kept_trace_does_not_keep_the_model(trace):
    model = mlp().eval()
    assert trace(model) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("traced_by", ["torch.fx", "torch.export"])
def test_a_number_that_changed_since_the_trace_is_noticed(traced_by):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head, self.scale = nn.Linear(7, 9), nn.Linear(9, 5), 1.0

        def forward(self, x):
            if traced_by == "torch.export" and x.shape[1] > 32:  # which torch.fx cannot follow
                raise ValueError("too many features")
            return self.head(torch.relu(self.layer(x)) * self.scale)

    model, loader = Scaled(), classification_batches()
    for scale in (1.0, -3.0):
        model.scale = scale
        scores = fp.score(model, loader, granularity=fp.Unit(), progress=False)
        assert_exact(scores["layer"], *brute_force(model, loader, "layer", fp.Unit()))


@pytest.mark.parametrize(
    ("make", "x"),
    [(Encoder, torch.randn(4, 6, 7)), (TextClassifier, torch.randint(0, 11, (4, 6)))],
    ids=["torch's encoder layer", "control flow"],
)
def test_torch_export_serves_what_torch_fx_does_not_see_into(make, x):
    model = make().eval()
    traces = Traces(model, _linears(model))
    with torch.no_grad():
        traced = traces.of(_batch(x))
        assert isinstance(traced, ExportedModel)
        assert traces.needs_equal_shapes
        assert traces.of(_batch(x)) is traced
        other = traces.of(_batch(x[:3]))
        assert isinstance(other, ExportedModel)
        assert other is not traced
        values = other.run(_batch(x[:3]))
        torch.testing.assert_close(values[other.output_node], model(x[:3]))


def test_a_layer_that_is_used_twice_is_no_single_call_of_an_export():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(7, 7), nn.Linear(7, 5)
            self.reads = nn.Linear(7, 7)

        def forward(self, x):
            x = self.layer(torch.relu(self.layer(x)))
            return self.head(self.reads(x) @ self.reads.weight)

    model, batch = Twice().eval(), _batch(torch.randn(4, 7))
    exported = ExportedModel.export(model, batch)
    assert exported.single_call(model.layer) is None
    assert exported.single_call(model.reads) is None
    assert exported.single_call(model.head) is not None


def test_a_model_without_a_trace_says_why():
    model = DataDependent().eval()
    traces = Traces(model, _linears(model))
    with torch.no_grad():
        assert traces.of(_batch(torch.randn(4, 7))) is None
    assert "torch.fx" in traces.problem


def test_parts_of_a_batch_are_compared_with_the_whole():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    x = torch.randn(6, 7)
    assert Traces(mlp().eval(), []).splits(_batch(x))
    assert not Traces(Centred().eval(), []).splits(_batch(x))
