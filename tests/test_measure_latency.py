"""measure_latency: what is timed, on which inputs, and how that becomes a table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.modules import BlockSparseConv2d, BlockSparseLinear, choice
from fastprune.modules import latency as latency_module
from helpers import Snapshot, masked_mlp, mlp
from networks import SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def timed(monkeypatch):
    """Puts a time of 100 for dense layers, and 10 plus the kept blocks for sparse ones, and lists them."""
    layers = []

    def layer_seconds(dense, sparse, inputs, device):
        layers.append((dense, sparse, inputs))
        scale = len(layers)  # as if the machine slowed down from one measurement to the next
        return 100.0 * scale, (10.0 + sparse.packed_values.shape[0]) * scale

    monkeypatch.setattr(latency_module, "layer_seconds", layer_seconds)
    monkeypatch.setattr(latency_module, "interleaved_medians", lambda functions, **options: [7.0])
    return layers


def test_each_layer_is_timed_at_each_density_on_the_inputs_it_gets(timed):
    model, x = mlp(17, 33, 10), torch.randn(6, 17)
    costs = fp.measure_latency(model, example_inputs=x, granularity=fp.Block(4, 4), densities=(1.0, 0.0, 0.5))
    assert list(costs) == ["0", "2"]
    assert costs.granularity == fp.Block(4, 4)
    assert [sparse.packed_values.shape[0] for _, sparse, _ in timed] == [0, 22, 45, 0, 14, 27]
    assert all(isinstance(sparse, BlockSparseLinear) and sparse.blocksize == (4, 4) for _, sparse, _ in timed)
    hidden = torch.relu(model[0](x))
    for index, (dense, sparse, inputs) in enumerate(timed):
        expected = x if index < 3 else hidden
        assert len(inputs) == 1
        assert torch.equal(inputs[0], expected)
        assert torch.equal(dense(expected), model[0 if index < 3 else 2](expected))
        assert sparse(expected).shape == dense(expected).shape


def test_sparse_times_keep_their_ratio_to_the_dense_ones_of_the_same_run(timed):
    costs = fp.measure_latency(
        mlp(17, 33, 10),
        example_inputs=torch.randn(6, 17),
        granularity=fp.Block(4, 4),
        densities=(0.0, 0.5, 1.0),
    )
    # Dense times of 100, 200, 300; ratios of 0.1, 0.32 and 0.55.
    assert costs["0"].dense_seconds == 200.0
    assert costs["0"].densities == (0.0, 22 / 45, 1.0)
    assert costs["0"].sparse_seconds == pytest.approx((20.0, 64.0, 110.0))


def test_blocks_are_kept_at_random_by_a_seed(timed):
    model, x = mlp(17, 33, 10), torch.randn(6, 17)
    for seed in (3, 3, 4):
        fp.measure_latency(model, example_inputs=x, granularity=fp.Block(4, 4), densities=(0.5,), seed=seed)
    patterns = [sparse.col_indices for _, sparse, _ in timed[::2]]
    assert torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[0], patterns[2])


def test_layers_that_stay_dense_and_layers_that_are_not_reached(timed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.conv = nn.Conv2d(8, 8, 1, groups=8)
            self.never = nn.Linear(8, 8)

        def forward(self, x):
            return self.conv(self.attention(x, x, x)[0].transpose(1, 2).unsqueeze(-1))

    costs = fp.measure_latency(Net(), example_inputs=torch.randn(3, 5, 8), granularity=fp.Block(4, 4))
    assert not timed
    assert dict(costs) == {
        "attention.out_proj": fp.LayerLatency(0.0),
        "conv": fp.LayerLatency(7.0),
        "never": fp.LayerLatency(0.0),
    }


def test_convolutions_several_inputs_and_a_choice_of_layers(timed):
    model = SmallConvNet()
    inputs = [torch.randn(4, 3, 7, 5), torch.randn(1, 3, 7, 5)]
    costs = fp.measure_latency(
        model, example_inputs=inputs, granularity=fp.Block(2, 2), include=nn.Conv2d, exclude="skip"
    )
    assert list(costs) == ["conv1", "conv2", "depthwise"]
    assert costs["depthwise"] == fp.LayerLatency(7.0)
    assert all(isinstance(sparse, BlockSparseConv2d) for _, sparse, _ in timed)
    assert all([len(x) for x in inputs] == [4, 1] for _, _, inputs in timed)
    assert costs["conv1"].densities[0] == 0.0
    assert costs["conv1"].densities[-1] == 1.0


def test_the_model_is_left_as_it_was_also_on_an_error(timed, monkeypatch):
    model, x = masked_mlp(0.5)
    model.train()
    model[1].eval()
    snapshot = Snapshot(model)
    fp.measure_latency(model, example_inputs=x, granularity=fp.Block(4, 4))
    snapshot.assert_unchanged()
    with pytest.raises(RuntimeError):
        fp.measure_latency(model, example_inputs=x[:, :5], granularity=fp.Block(4, 4))
    snapshot.assert_unchanged()


def test_layers_get_the_inputs_of_inference(timed):
    model = nn.Sequential(nn.Linear(17, 33), nn.Dropout(0.9), nn.Linear(33, 5)).train()
    x = torch.randn(6, 17)
    fp.measure_latency(model, example_inputs=x, granularity=fp.Block(4, 4), include="2")
    assert all(torch.equal(inputs[0], model[0](x)) for _, _, inputs in timed)
    assert timed


def test_sparse_convolutions_run_from_no_block_to_all(monkeypatch):
    calls = []

    def fake(functions, **options):
        calls.append([function()[0] for function in functions])
        return [2.0, 1.0, 4.0, 3.0]

    monkeypatch.setattr(choice, "interleaved_medians", fake)
    model = SmallConvNet()
    costs = fp.measure_latency(
        model,
        example_inputs=torch.randn(2, 3, 7, 5),
        granularity=fp.Block(2, 2),
        densities=(0.0, 1.0),
        include="conv?",
    )
    assert list(costs) == ["conv1", "conv2"]
    for (nothing, everything), bias in zip((calls[:2], calls[2:]), (None, model.conv2.bias), strict=True):
        for dense, sparse in (everything[:2], everything[2:]):
            torch.testing.assert_close(sparse, dense)
        for sparse in nothing[1::2]:
            expected = torch.zeros_like(sparse) if bias is None else bias.view(-1, 1, 1).expand_as(sparse)
            torch.testing.assert_close(sparse, expected)
    assert costs["conv1"].dense_seconds == 2.0
    assert costs["conv1"].sparse_seconds == (1.0, 1.0)


def test_real_times_are_taken_and_serve_a_budget(monkeypatch):
    calls = []

    def fake(functions, **options):
        calls.append([function() for function in functions])
        return [2.0, 1.0][: len(functions)]

    monkeypatch.setattr(choice, "interleaved_medians", fake)
    model, x = mlp(17, 33, 10), torch.randn(6, 17)
    costs = fp.measure_latency(model, example_inputs=x, granularity=fp.Block(4, 4), densities=(0.25, 1.0))
    assert len(calls) == 4
    dense, sparse = calls[1]  # all blocks kept
    torch.testing.assert_close(sparse[0], dense[0])
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4))
    masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))
    # With all blocks kept the sparse layers already take half of the time, so nothing has to go.
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0": 0, "2": 0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": fp.Unit()}, TypeError, r"`granularity` must be fp\.Block"),
        ({"densities": ()}, ValueError, "`densities` must hold at least one"),
        ({"densities": (1.5,)}, ValueError, "`densities` must be numbers in"),
        ({"densities": (True,)}, ValueError, "`densities`"),
        ({"example_inputs": "x"}, TypeError, "`example_inputs`"),
        ({"include": "decoder"}, ValueError, "`model` has no Linear or Conv2d layer that `include`"),
    ],
)
def test_measure_latency_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        fp.measure_latency(mlp(), **{"example_inputs": torch.randn(2, 7), **options})
