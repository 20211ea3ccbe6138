"""AutoBlock: the block size is chosen by loss at a latency, from injected times and exact losses."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.granularity import GranularityRule
from fastprune.modules import choice
from fastprune.modules import latency as latency_module
from helpers import Snapshot, classification_batches, masked_mlp, mlp

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastprune. nothing is left"),
]

BLOCKS = (fp.Block(2, 2), fp.Block(4, 4), fp.Block(8, 8))


def task():
    return mlp(17, 33, 5), classification_batches((15, 8, 1), (17,))


def proportional(overheads):
    """Times of kept share plus an overhead of each block size; the layers take 1 s dense."""

    def measure(model, block):
        overhead = overheads[block]
        latency = fp.LayerLatency(1.0, (0.0, 1.0), (overhead, 1.0 + overhead))
        return fp.LatencyTable({"0": latency, "2": latency}, block)

    return measure


def expected_loss_deltas(model, loader, latency, measure):
    """Loss deltas of all candidates by hand: scores, masks, and the loss of a masked copy."""
    deltas = {}
    for block in BLOCKS:
        scores = fp.score(model, loader, granularity=block, progress=False)
        masks = scores.select(budget=fp.Budget(latency=latency, costs=measure(model, block)))
        masked = fp.apply_masks_(mlp(17, 33, 5), masks)
        for layer, source in zip(masked[::2], model[::2], strict=True):
            layer.parametrizations.weight.original.data.copy_(source.weight)
            layer.bias.data.copy_(source.bias)
        deltas[block] = fp.evaluate(masked, loader)["loss"] - fp.evaluate(model, loader)["loss"]
    return deltas


def test_the_block_size_that_loses_least_at_the_wanted_latency_wins():
    model, loader = task()
    measure = proportional(dict.fromkeys(BLOCKS, 0.05))
    auto = fp.AutoBlock(latency=0.6, candidates=BLOCKS, measure=measure)
    scores = fp.score(model, loader, granularity=auto, progress=False)
    expected = expected_loss_deltas(model, loader, 0.6, measure)
    assert [entry.granularity for entry in auto.report] == list(BLOCKS)
    for entry in auto.report:
        assert entry.loss_delta == pytest.approx(expected[entry.granularity], rel=1e-4, abs=1e-7)
        assert entry.latency <= 0.6
        assert 0.3 < entry.sparsity < 0.6
    assert auto.granularity == min(BLOCKS, key=expected.__getitem__)
    assert scores.granularity == auto.granularity == auto.costs.granularity
    alone = fp.score(model, loader, granularity=auto.granularity, progress=False)
    assert all(torch.equal(scores[name], alone[name]) for name in alone)
    assert "chosen" in repr(auto)
    assert repr(auto).count("Block(rows") == 3


def test_small_blocks_that_run_slower_have_to_lose_more_and_give_way():
    model, loader = task()
    overheads = {BLOCKS[0]: 0.59, BLOCKS[1]: 0.0, BLOCKS[2]: 0.3}
    measure = proportional(overheads)
    auto = fp.AutoBlock(latency=0.6, candidates=BLOCKS, measure=measure)
    fp.score(model, loader, granularity=auto, progress=False)
    assert auto.granularity == BLOCKS[1]
    sparsities = [entry.sparsity for entry in auto.report]
    assert sparsities[0] > sparsities[2] > sparsities[1]


def test_block_sizes_that_miss_the_latency_lose_to_those_that_do_not_and_else_the_fastest_wins():
    model, loader = task()
    for overheads, expected in (((0.7, 0.8, 0.4), 2), ((0.7, 0.65, 0.9), 1), ((0.7, 0.7, 0.7), 0)):
        measure = proportional(dict(zip(BLOCKS, overheads, strict=True)))
        auto = fp.AutoBlock(latency=0.5, candidates=BLOCKS, measure=measure)
        fp.score(model, loader, granularity=auto, criterion="magnitude", progress=False)
        assert auto.granularity == BLOCKS[expected]


def test_the_loss_is_that_of_the_samples_that_are_scored():
    model, loader = task()
    measure = proportional(dict.fromkeys(BLOCKS, 0.0))
    reports = []
    for batches, samples in ((loader, 15), (loader[:1], None), (loader, None)):
        auto = fp.AutoBlock(candidates=BLOCKS, measure=measure)
        fp.score(model, batches, granularity=auto, max_samples=samples, progress=False)
        reports.append(auto.report)
    assert reports[0] == reports[1] != reports[2]


def test_floors_hold_for_every_candidate():
    model, loader = task()
    measure = proportional(dict.fromkeys(BLOCKS, 0.0))
    auto = fp.AutoBlock(latency=0.2, candidates=BLOCKS, measure=measure, floor=fp.Floor(max_sparsity=0.5))
    fp.score(model, loader, granularity=auto, criterion="magnitude")
    assert all(entry.sparsity <= 0.5 for entry in auto.report)
    assert all(entry.latency > 0.2 for entry in auto.report)


def test_auto_measures_on_the_first_batch_and_passes_all_options_on(monkeypatch):
    seen = []

    def layer_seconds(dense, sparse, inputs, device):
        seen.append((sparse.blocksize, [x.clone() for x in inputs]))
        return 1.0, 0.1

    monkeypatch.setattr(latency_module, "layer_seconds", layer_seconds)
    model = mlp(17, 33, 5)
    data = TensorDataset(torch.randn(40, 17), torch.randint(0, 5, (40,)))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    state = torch.get_rng_state(), random.getstate()
    options = {
        "include": "0",
        "criterion": "taylor",
        "loss_fn": nn.CrossEntropyLoss(reduction="none"),
        "output_transform": lambda output: output * 2,
        "max_samples": 11,
        "progress": False,
    }
    scores = fp.score(model, loader, granularity="auto", **options)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert {size for size, _ in seen} == {(8, 8), (16, 16), (32, 32)}
    assert all(torch.equal(inputs[0], seen[0][1][0]) for _, inputs in seen)
    assert all(len(inputs) == 1 and inputs[0].shape == (8, 17) for _, inputs in seen)
    assert list(scores) == ["0"]
    assert scores.criterion == "taylor"
    assert scores.num_samples == 11
    alone = fp.score(model, loader, granularity=scores.granularity, **options)
    assert torch.equal(scores["0"], alone["0"])


def test_example_inputs_are_measured_where_they_are_given(monkeypatch):
    shapes = []

    def fake(functions, **options):
        shapes.append([tuple(part.shape) for part in functions[0]()])
        return [2.0, 1.0][: len(functions)]

    monkeypatch.setattr(choice, "interleaved_medians", fake)
    model, loader = task()
    auto = fp.AutoBlock(example_inputs=[torch.randn(3, 17), torch.randn(2, 17)], candidates=BLOCKS[1:2])
    fp.score(model, loader, granularity=auto, criterion="magnitude")
    assert shapes[0] == [(3, 33), (2, 33)]
    assert auto.granularity == BLOCKS[1]


def test_the_model_is_left_as_it_was_and_a_masked_one_keeps_its_masks():
    model, _ = masked_mlp(0.5)
    loader = classification_batches(shape=(17,), classes=10)
    measure = proportional(dict.fromkeys(BLOCKS, 0.0))
    snapshot = Snapshot(model)
    auto = fp.AutoBlock(candidates=BLOCKS, measure=measure, latency=0.4)
    scores = fp.score(model, loader, granularity=auto, criterion="magnitude")
    snapshot.assert_unchanged()
    masks = scores.select(budget=fp.Budget(latency=0.4, costs=auto.costs))
    for name, pruned in scores.pruned.items():
        assert not bool(masks[name][pruned].any())


def test_wrong_arguments_are_named():
    model, loader = task()
    measure = proportional(dict.fromkeys(BLOCKS, 0.0))
    for options, error, message in (
        ({"latency": 0.0}, ValueError, "`latency` must be a fraction"),
        ({"candidates": ()}, ValueError, "`candidates` must hold at least one"),
        ({"candidates": (fp.Unit(),)}, TypeError, r"`candidates` must be fp\.Block"),
    ):
        with pytest.raises(error, match=message):
            fp.AutoBlock(**options)
    auto = fp.AutoBlock(candidates=BLOCKS, measure=measure)
    with pytest.raises(TypeError, match="`loader` must be an iterable of batches for granularity 'auto'"):
        fp.score(model, None, granularity=auto, criterion="magnitude")
    with pytest.raises(TypeError, match="`loader` is iterated several times"):
        fp.score(model, iter(loader), granularity=auto)
    with pytest.raises(TypeError, match="`granularity` must be"):
        fp.score(model, loader, granularity="blocks")
    assert GranularityRule.named == {"auto": fp.AutoBlock}
