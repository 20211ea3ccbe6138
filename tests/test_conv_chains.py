"""Changes through chains of nodes: which there are, and that they give what the nodes one by one give."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune import ops
from fastprune.batches import Batch
from fastprune.channel_changes import ChannelChange, run_changed
from fastprune.conv_chains import find_chains
from fastprune.exported import ExportedModel
from fastprune.graph import TracedModel
from fastprune.importance.packed_layers import PackedLayers
from helpers import assert_exact, brute_force
from networks import spoil_norm

pytestmark = pytest.mark.usefixtures("one_thread")


class ChainNet(nn.Module):
    """Two residual blocks, and convolutions with and without norm, sum, activation, stride and bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = (
            nn.Conv2d(3, 32, 5, padding=2, bias=False),
            nn.BatchNorm2d(32, affine=False),
        )
        self.conv1, self.norm1 = nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48)
        self.conv2, self.norm2 = nn.Conv2d(48, 48, 3, padding="same"), nn.BatchNorm2d(48)
        self.shortcut, self.shortcut_norm = nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.down, self.inner = (
            nn.Conv2d(48, 40, 3, stride=2, padding=1),
            nn.Conv2d(40, 40, 3, padding=(2, 1)),
        )
        self.wide = nn.Conv2d(40, 40, 3, padding=(0, 1))
        self.last, self.head = nn.Conv2d(40, 33, 3, padding=1, bias=False), nn.Linear(33, 5)
        for norm in (self.norm1, self.norm2, self.shortcut_norm):
            spoil_norm(norm)
        with torch.no_grad():  # enough for deltas to be measured
            for layer in (self.conv1, self.conv2, self.down, self.inner, self.wide, self.last, self.head):
                layer.weight.mul_(3)
        self.stem_norm.running_mean.normal_(std=0.3)
        self.stem_norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        x = F.relu(y + self.shortcut_norm(self.shortcut(x)), inplace=True)
        x = F.gelu(self.down(x))
        x = self.last(torch.tanh(x + self.wide(torch.relu(self.inner(x)))))
        return self.head(F.silu(x).mean((2, 3)))


def images(size=3, height=11, width=13):
    return [(torch.randn(size, 3, height, width), torch.randint(0, 5, (size,)))]


def traced_and_values(model, export=False, budget=1 << 30, inputs=None):
    batch = Batch((images()[0][0] if inputs is None else inputs,), {}, None, 3)
    traced = ExportedModel.export(model, batch) if export else TracedModel.trace(model)
    PackedLayers(budget).speed_up(traced)
    return traced, traced.run(batch)


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that were called."""
    seen = []

    def watch(name):
        kernel = getattr(ops, name)

        def spy(*args, **kwargs):
            seen.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)

    for name in ("updated_conv2d", "ablate_conv2d"):
        watch(name)
    return seen


@pytest.mark.parametrize("export", [False, True])
def test_chains_end_where_a_rule_ends_or_a_value_is_read_twice(export):
    traced, _ = traced_and_values(ChainNet().eval(), export)
    chains = find_chains(traced, traced.constants())
    lengths = [len(chain.nodes) for chain in chains]
    # stem, conv1: norm and activation; conv2: a sum too; shortcut: the sum is taken; down: an activation;
    # inner: another; wide: a sum, and the kernels have no tanh; last: an activation.
    assert lengths == [3, 3, 4, 2, 2, 2, 2, 2]
    assert [chain.scale is None for chain in chains] == [False] * 4 + [True] * 4
    assert len({node for chain in chains for node in chain.nodes}) == sum(lengths)


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize("budget", [1 << 30, 1 << 20, 1])
def test_changes_of_any_node_are_those_of_the_nodes_one_by_one(export, budget, calls):
    torch.manual_seed(0)
    model = ChainNet().eval()
    with torch.no_grad():
        traced, values = traced_and_values(model, export, budget)
        for node in traced.nodes[:-1]:
            value = values[node]
            if node.op in ("placeholder", "get_attr") or not isinstance(value, Tensor) or value.dim() != 4:
                continue
            channels = value.shape[1]
            for begin, end in ((0, 1), (channels // 2, channels), (0, channels)):
                part = value[:, begin:end]
                new = torch.where(torch.rand_like(part) < 0.5, part, torch.randn_like(part))
                change = ChannelChange(1, begin, end, new)
                for changes in ({node: change}, {node: change.applied_to(value)}):
                    found = run_changed(traced, values, changes)
                    chains, traced.chains = traced.chains, {}
                    wanted = run_changed(traced, values, changes)
                    traced.chains = chains
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # Transformed weights take 0.2 MB and more; without them changes of a few channels still go at once.
    assert ("updated_conv2d" in calls) == (budget == 1 << 30)
    assert ("ablate_conv2d" in calls) == (budget > 1)


@pytest.mark.parametrize(
    "granularity",
    [fp.Unit(), fp.Unit(group_size=40), fp.Unit(norm=False), fp.InputUnit(), fp.Block(16, 16)],
    ids=str,
)
def test_deltas_are_exact(granularity, calls):
    torch.manual_seed(1)
    model, batches = ChainNet(), images()
    scores = fp.score(model, batches, granularity=granularity, exclude="head", progress=False)
    assert {"updated_conv2d", "ablate_conv2d"} <= set(calls)
    for layer in scores:
        norm = scores.norms.get(layer)
        expected, loss = brute_force(model, batches, layer, granularity, norm=norm, max_pieces=5)
        assert_exact(scores[layer], expected, loss)


def test_coupled_units_begin_within_a_chain(calls):
    torch.manual_seed(2)
    model, batches = ChainNet(), images()
    scores = fp.score(
        model, batches, granularity=fp.Unit(coupled=True), include=("conv2", "shortcut"), progress=False
    )
    assert calls
    expected, loss = brute_force(
        model, batches, "conv2", fp.Unit(), norm="norm2", also=("shortcut", "shortcut_norm"), max_pieces=5
    )
    assert_exact(scores["conv2"], expected, loss)


def assert_chains_change_nothing(traced, values, changes):
    """Compare a run of changes with one without chains."""
    with torch.no_grad():
        found = run_changed(traced, values, changes)
        traced.use_chains([])
        wanted = run_changed(traced, values, changes)
    assert not torch.allclose(found, values[traced.output_node], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_change_within_a_chain_holds_whatever_reaches_it():
    torch.manual_seed(4)
    model = ChainNet().eval()
    with torch.no_grad():
        traced, values = traced_and_values(model)
    first, second = (traced.single_call(norm) for norm in (model.norm1, model.norm2))
    own = ChannelChange(1, 5, 30, torch.zeros_like(values[second][:, 5:30]))
    changes = {first: torch.randn_like(values[first]), second: own}
    assert_chains_change_nothing(traced, values, changes)


def test_a_value_is_kept_until_the_chain_that_reads_it_ends():
    class ReadTwice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 32, 5, padding=2), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            y = self.conv(x)
            z = torch.tanh(x)  # reads x after the convolution, and before what follows it
            return (F.relu(y) + z).mean((2, 3))

    torch.manual_seed(5)
    model = ReadTwice().eval()
    with torch.no_grad():
        traced, values = traced_and_values(model)
    node = traced.single_call(model.stem)
    assert_chains_change_nothing(traced, values, {node: torch.randn_like(values[node])})


def test_a_chain_does_not_run_its_convolution(monkeypatch):
    model = ChainNet().eval()
    with torch.no_grad():
        traced, values = traced_and_values(model)
        node = traced.single_call(model.norm1)
        dense, shapes = F.conv2d, []

        def spy(input, weight, *args):
            shapes.append(tuple(weight.shape))
            return dense(input, weight, *args)

        monkeypatch.setattr(F, "conv2d", spy)
        run_changed(traced, values, {node: torch.randn_like(values[node])})
    # Only the convolution of stride 2 runs again; conv2, inner, wide and last are changes of what is known.
    assert shapes == [(40, 48, 3, 3)]


def test_values_are_let_go_when_nothing_reads_them_any_more():
    layers = [nn.Linear(6, 6) for _ in range(8)]
    model = nn.Sequential(*layers).eval()
    traced = TracedModel.trace(model)
    values = traced.run(Batch((torch.randn(4, 6),), {}, None, 4))
    outputs, alive = [], []

    def watch(module, args, output):
        outputs.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in outputs))

    for layer in layers:
        layer.register_forward_hook(watch)
    with torch.no_grad():
        run_changed(traced, values, {traced.single_call(layers[0]): torch.randn(4, 6)})
    assert len(alive) == 7
    assert max(alive) == 2


def test_an_emptied_convolution_keeps_the_block_sparse_kernel(calls):
    torch.manual_seed(3)
    model = ChainNet()
    masks = fp.score(model, None, criterion="magnitude", include=("conv2", "wide"), progress=False)
    fp.apply_masks_(model, masks.select(sparsity=0.9, scope="layer"))
    traced, values = traced_and_values(model.eval())
    node = traced.single_call(model.norm1)
    with torch.no_grad():
        run_changed(traced, values, {node: torch.randn_like(values[node])})
    assert calls == ["updated_conv2d"] * 2  # of `inner` and `last`


def test_small_images_would_waste_most_of_a_tile(calls):
    model = ChainNet().eval()
    with torch.no_grad():
        traced, values = traced_and_values(model, inputs=torch.randn(3, 3, 2, 2))
        node = traced.single_call(model.norm1)
        run_changed(traced, values, {node: torch.randn_like(values[node])})
    assert calls == []


@pytest.mark.parametrize(("layer", "transformed"), [("last", 0), ("inner", 1), ("conv1", 3)])
def test_weights_are_transformed_once_and_only_behind_what_is_scored(layer, transformed, monkeypatch):
    found = []
    original = ops.winograd_weight

    def count(weight):
        found.append(weight.shape)
        return original(weight)

    monkeypatch.setattr(ops, "winograd_weight", count)
    model = ChainNet().eval()
    fp.score(model, images() + images(2), granularity=fp.Unit(), include=[layer], progress=False)
    assert len(found) == transformed
