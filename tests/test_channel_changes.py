"""A change of some channels gives what the same change of the whole value gives, from every node on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastprune.batches import Batch
from fastprune.channel_changes import ChannelChange, run_changed
from fastprune.exported import ExportedModel
from fastprune.graph import TracedModel
from fastprune.node_ops import node_op
from helpers import mlp
from networks import MobileBlock, ResidualInPlace, SmallConvNet, SmallResNet, TextClassifier

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {
    "mlp": (mlp, (4, 7)),
    "residual": (lambda: ResidualInPlace("method"), (4, 7)),
    "convolutions": (SmallConvNet, (4, 3, 7, 5)),
    "residual convolutions": (SmallResNet, (4, 3, 9, 8)),
    "mobile": (MobileBlock, (4, 3, 9, 8)),
    "text": (TextClassifier, None),
}


def _traced(name, export):
    make, shape = NETWORKS[name]
    model = make().double().eval()
    x = torch.randint(0, 11, (4, 6)) if shape is None else torch.randn(shape, dtype=torch.float64)
    batch = Batch((x,), {}, None, 4)
    traced = ExportedModel.export(model, batch) if export else TracedModel.trace(model)
    return traced, traced.run(batch)


@pytest.mark.parametrize(
    ("name", "export"),
    [(name, export) for name in NETWORKS for export in (False, True) if export or name != "text"],
)
def test_some_channels_give_what_the_whole_value_gives(name, export):
    torch.manual_seed(0)
    traced, values = _traced(name, export)
    kinds = set()
    with torch.no_grad():
        for node in traced.nodes[:-1]:
            value = values[node]
            if node.op in ("placeholder", "get_attr") or not isinstance(value, Tensor) or value.dim() < 2:
                continue
            if not value.is_floating_point() or value.shape[0] != 4:
                continue
            kinds |= {op.kind for user in node.users if (op := node_op(traced, user)) is not None}
            for dim in {1, value.dim() - 1}:
                size = value.shape[dim]
                for begin, end in ((0, 1), (size // 2, size), (0, size)):
                    channels = value.narrow(dim, begin, end - begin)
                    change = ChannelChange(dim, begin, end, torch.randn_like(channels))
                    found = run_changed(traced, values, {node: change})
                    wanted = run_changed(traced, values, {node: change.applied_to(value)})
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    # Without these no rule would have been taken.
    assert {"linear", "elementwise"} <= kinds
    if "conv" in name or name == "mobile":
        assert {"conv", "batch_norm"} <= kinds


def test_a_change_of_few_channels_does_not_run_the_next_layer(monkeypatch):
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5)).eval()
    traced = TracedModel.trace(model)
    values = traced.run(Batch((torch.randn(4, 7),), {}, None, 4))
    calls, forward = [], nn.Linear.forward

    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    node = traced.single_call(model[0])
    change = ChannelChange(1, 2, 4, torch.zeros(4, 2))
    with torch.no_grad():
        changed = run_changed(traced, values, {node: change})
        assert calls == []
        whole = run_changed(traced, values, {node: change.applied_to(values[node])})
        assert calls == [model[2]]
    torch.testing.assert_close(changed, whole)
