"""evaluate and compare: accuracy, parameters, bytes and FLOPs are counted right; latency is only reported."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune import metrics
from fastprune.batches import Batch
from fastprune.metrics import (
    converted_layers,
    count_bytes,
    count_flops,
    count_parameters,
    measure_costs,
)
from fastprune.modules.examples import example_batches
from helpers import Snapshot, classification_batches, masked_mlp, mlp
from networks import SharedLayer, SmallConvNet, WritesIntoInput

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick(monkeypatch):
    """Latencies that take no time."""

    def fake(functions, **options):
        for function in functions:
            function()
        return [3.0, 2.0]

    monkeypatch.setattr(metrics, "interleaved_medians", fake)


def test_accuracy_and_loss_are_means_over_samples_in_eval_mode():
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 5)).train()
    model[2].eval()
    batches = classification_batches((9, 4, 1))
    snapshot = Snapshot(model)
    figures = fp.evaluate(model, batches)
    snapshot.assert_unchanged()
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        assert figures["loss"] == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-5)
        assert figures["accuracy"] == int((model(x).argmax(1) == y).sum()) / 14


def test_regression_has_a_loss_and_no_accuracy():
    loader = [(torch.randn(4, 7), torch.randn(4, 5)), (torch.randn(1, 7), torch.randn(1, 5))]
    figures = fp.evaluate(mlp(), loader, loss_fn=nn.MSELoss())
    assert figures["loss"] > 0
    assert figures["accuracy"] != figures["accuracy"]


def test_binary_accuracy_is_that_of_the_sign():
    inputs = torch.tensor([[1.0], [-1.0], [2.0], [-3.0]])
    targets = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    figures = fp.evaluate(nn.Identity(), [(inputs, targets)], loss_fn=nn.BCEWithLogitsLoss())
    assert figures["accuracy"] == 0.5


def test_inputs_are_not_written_into(quick):
    batches = classification_batches((4, 2))
    inputs = [x.clone() for x, _ in batches]
    example = torch.randn(2, 7)
    before = example.clone()
    model = WritesIntoInput()
    assert fp.evaluate(model, batches) == fp.evaluate(model, batches)
    fp.compare(model, model, batches, example_inputs=example)
    assert all(torch.equal(x, y) for (x, _), y in zip(batches, inputs, strict=True))
    assert torch.equal(example, before)


def test_flags_come_back_after_an_error_in_the_loader():
    model = mlp().train()
    model[0].eval()
    snapshot = Snapshot(model)
    for loader, error in (
        ([], ValueError),
        ([1], TypeError),
        ([(torch.randn(2, 8), torch.zeros(2))], RuntimeError),
    ):
        with pytest.raises(error):
            fp.evaluate(model, loader)
        snapshot.assert_unchanged()


def test_what_is_no_module_is_refused_by_name():
    loader, x = classification_batches(), torch.randn(2, 7)
    with pytest.raises(TypeError, match="`model`"):
        fp.evaluate(None, loader)
    with pytest.raises(TypeError, match="`dense`"):
        fp.compare(None, mlp(), loader, example_inputs=x)
    with pytest.raises(TypeError, match="`compressed`"):
        fp.compare(mlp(), None, loader, example_inputs=x)


def test_parameters_are_counted_once_and_without_what_is_masked():
    model = mlp(17, 33, 10)
    dense = 17 * 33 + 33 + 33 * 10 + 10
    assert count_parameters(model) == dense
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4))
    masks = scores.select(sparsity=0.5)
    pruned = round(masks.sparsity() * (17 * 33 + 330))
    fp.apply_masks_(model, masks)
    assert count_parameters(model) == dense - pruned
    # Neither the padding of ragged blocks nor plain zeros are weights.
    sparse = fp.sparsify_(model, example_inputs=torch.randn(2, 17), blocksize=(4, 4), policy="always")
    assert count_parameters(sparse) == dense - pruned
    plain, _ = masked_mlp(0.5)
    left = count_parameters(plain)
    assert count_parameters(fp.remove_masks_(plain)) == left
    assert count_parameters(SharedLayer()) == 7 * 9 + 9 + 81 + 9 + 45 + 5


def test_masked_units_take_bias_and_norm_out_of_the_count():
    model = SmallConvNet()
    before = count_parameters(model)
    keep = torch.arange(6) > 1
    weight = model.conv1.weight.shape
    fp.apply_masks_(model, fp.Masks({"conv1": keep}, fp.Unit(), {"conv1": weight}, norms={"conv1": "norm1"}))
    assert count_parameters(model) == before - 2 * (27 + 2)


def test_tied_weights_with_zeros_are_subtracted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = 0
    assert count_parameters(model) == 12


def test_bytes_count_every_storage_once_indices_included():
    assert count_bytes(mlp()) == 4 * (63 + 9 + 45 + 5)
    assert count_bytes(mlp().double()) == 8 * (63 + 9 + 45 + 5)
    tied = nn.Sequential(nn.Embedding(5, 7), nn.Linear(7, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert count_bytes(tied) == 4 * 35
    sparse = fp.BlockSparseLinear.from_dense(nn.Linear(64, 64), mask=torch.eye(4, dtype=torch.bool))
    assert count_bytes(sparse) == 4 * (4 * 256 + 64) + 4 * (5 + 4)


def _example(*shape):
    x = torch.randn(shape)
    return Batch((x,), {}, None, shape[0])


def test_flops_of_skipped_blocks_are_left_out():
    assert count_flops(nn.Linear(64, 32), _example(5, 64)) == 2 * 5 * 64 * 32
    mask = torch.eye(4, dtype=torch.bool)
    sparse = fp.BlockSparseLinear.from_dense(nn.Linear(64, 64), mask=mask)
    assert count_flops(sparse, _example(5, 64)) == 2 * 5 * 4 * 256
    assert count_flops(sparse, _example(2, 3, 64)) == 2 * 6 * 4 * 256
    assert count_flops(nn.Conv2d(3, 8, 3), _example(2, 3, 5, 5)) == 2 * 2 * 9 * 27 * 8


@pytest.mark.parametrize("fast_path", [True, False])
def test_flops_of_an_encoder_are_counted_on_and_off_its_fast_path(fast_path):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        counted = count_flops(layer, _example(3, 5, 16))
        assert torch.backends.mha.get_fastpath_enabled() is fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    linears = 15 * (16 * 48 + 16 * 16 + 2 * 16 * 24)
    attention = 2 * 3 * 2 * 5 * 5 * 8
    assert counted == 2 * (linears + attention)


def test_compare_puts_both_models_side_by_side(quick):
    dense = mlp(17, 33, 10).train()
    compressed, x = masked_mlp(0.5)
    loader = classification_batches((9, 1), (17,), 10)
    snapshots = [Snapshot(dense), Snapshot(compressed)]
    comparison = fp.compare(dense, compressed, loader, example_inputs=x)
    for snapshot in snapshots:
        snapshot.assert_unchanged()
    assert comparison.dense.accuracy == fp.evaluate(dense, loader)["accuracy"]
    assert comparison.compressed.loss == fp.evaluate(compressed, loader)["loss"]
    assert comparison.pruning_rate == pytest.approx(
        1 - count_parameters(compressed) / count_parameters(dense)
    )
    assert comparison.speedup == 1.5
    assert comparison.batch_size == 6
    assert comparison.dense.flops == 2 * 6 * (17 * 33 + 330)
    figures = json.loads(json.dumps(comparison.to_dict()))
    assert figures["dense"]["parameters"] == 934
    table = str(comparison)
    for row in (
        "accuracy",
        "loss",
        "parameters",
        "bytes",
        "FLOPs (batch 6)",
        "latency",
        "pruning rate",
        "1.50x",
    ):
        assert row in table, row


def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(quick):
    model, loader, x = mlp(), classification_batches(), torch.randn(3, 7)
    for example in (x, (x,), {"input": x}):
        comparison = fp.compare(model, model, loader, example_inputs=example)
        assert comparison.batch_size == 3
        assert comparison.dense == comparison.compressed or comparison.speedup == 1.5
    for example in (None, [x], 3):
        with pytest.raises(TypeError, match="`example_inputs` must be a tensor, a tuple or a dict"):
            fp.compare(model, model, loader, example_inputs=example)


def test_flags_come_back_after_an_example_that_does_not_fit(quick):
    dense, compressed = mlp().train(), mlp().train()
    snapshots = [Snapshot(dense), Snapshot(compressed)]
    with pytest.raises(RuntimeError):
        fp.compare(dense, compressed, classification_batches(), example_inputs=torch.randn(2, 8))
    for snapshot in snapshots:
        snapshot.assert_unchanged()


def test_costs_are_those_in_eval_mode_and_change_no_batch_norm(quick):
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.5)).train()
    modes = []
    model[2].register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    snapshot = Snapshot(model)
    measure_costs([model], example_batches(torch.randn(3, 7), torch.device("cpu")))
    snapshot.assert_unchanged()
    assert set(modes) == {False}


def test_the_real_latency_is_measured_for_both():
    comparison = fp.compare(mlp(), mlp(), classification_batches(), example_inputs=torch.randn(2, 7))
    assert comparison.dense.latency_seconds > 0
    assert comparison.compressed.latency_seconds > 0


def test_converted_layers_are_listed_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(fp.BlockSparseLinear.from_dense(nn.Linear(4, 4))))
    assert converted_layers(model) == {"1.0": model[1][0]}
    layer = fp.BlockSparseConv2d.from_dense(nn.Conv2d(4, 4, 3))
    assert converted_layers(nn.Sequential(layer)) == {"0": layer}


def _pruned_conv():
    """A convolution of which 20 of its 36 blocks are kept, with padding in each tap and in the last rows."""
    conv = nn.Conv2d(5, 7, 3, padding=1)
    keep = torch.zeros(2, 18, dtype=torch.bool)
    keep[0, :10] = keep[1, 8:] = True
    return fp.BlockSparseConv2d.from_dense(conv, (4, 4), keep)


def test_convolutions_count_the_kept_blocks_alone():
    layer = _pruned_conv()
    # A tap has a block of four channels and one of the fifth; rows are four, and three.
    assert count_parameters(layer) == 5 * 4 * 5 + 5 * 3 * 5 + 7
    assert count_bytes(layer) == 4 * (20 * 16 + 7) + 4 * (3 + 20)
    assert count_flops(layer, _example(2, 5, 7, 5)) == 2 * 2 * 7 * 5 * 20 * 16
    model = nn.Sequential(layer.to_dense())
    assert count_parameters(model) == count_parameters(layer)
    assert count_bytes(model) == 4 * (5 * 7 * 9 + 7)


def test_compare_counts_a_converted_network(quick):
    dense = SmallConvNet()
    model = copy.deepcopy(dense)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 3))
    masks = scores.select(sparsity=0.5)
    fp.apply_masks_(model, masks)
    x = torch.randn(2, 3, 7, 5)
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 3), policy="always")
    loader = classification_batches((3, 1), (3, 7, 5), 5)
    comparison = fp.compare(dense, model, loader, example_inputs=x)
    pruned = sum(
        int((~masks.granularity.expand(masks[name], weight)).sum())
        for name, weight in masks.weight_shapes.items()
    )
    assert comparison.dense.parameters - comparison.compressed.parameters == pruned
    assert comparison.compressed.flops < comparison.dense.flops
    assert set(converted_layers(model)) == {"conv1", "conv2", "skip", "head"}
