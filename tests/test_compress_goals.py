"""compress to other goals than a sparsity: budgets, pieces that are chosen, and what the history says."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from compression import BLOCK, OPTIONS, assert_same_bits, task
from networks import SmallConvNet, SmallVGG

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")

run_module = importlib.import_module("fastprune.compression_run")
WITHOUT_SPARSITY = {key: value for key, value in OPTIONS.items() if key != "sparsity"}


def images():
    inputs = torch.randn(24, 3, 7, 5)
    return DataLoader(TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 0).long()), 12)


def linear_table(model, granularity):
    """Layers of one microsecond for each weight, dense or sparse."""
    layers = {
        name: fp.LayerLatency(module.weight.numel() * 1e-6, (0.0, 1.0), (0.0, module.weight.numel() * 1e-6))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return fp.LatencyTable(layers, granularity)


@pytest.mark.parametrize("cost", ["params", "bytes", "flops"])
def test_a_budget_is_reached_in_steps_of_the_same_share(cost):
    model, train, val = task()
    budget = fp.Budget(**{cost: 0.4})
    result = fp.compress(model, train, val, **WITHOUT_SPARSITY, budget=budget)
    targets = [entry[f"target_{cost}"] for entry in result.history]
    assert targets == pytest.approx([0.4 ** (1 / 3), 0.4 ** (2 / 3), 0.4])
    # The two layers' weights cost the same, each by itself, in all three.
    for entry, target in zip(result.history, targets, strict=True):
        assert 1 - target - 0.08 < entry["sparsity"] <= 1 - target + 1e-9
        assert "target_sparsity" not in entry


def test_a_budget_of_flops_counts_what_convolutions_cost_at_each_pixel():
    loader, model = images(), SmallConvNet()
    options = {**WITHOUT_SPARSITY, "rounds": 1, "granularity": fp.Block(2, 3), "criterion": "magnitude"}
    by_flops = fp.compress(model, loader, loader, **options, budget=fp.Budget(flops=0.5))
    by_params = fp.compress(model, loader, loader, **options, budget=fp.Budget(params=0.5))
    assert by_flops.history[-1]["layers"] != by_params.history[-1]["layers"]
    x = next(iter(loader))[0]
    figures = fp.compare(model, by_flops.model, loader, example_inputs=x)
    assert by_flops.history[-1]["flops"] == figures.compressed.flops
    pixels = {"conv1": 35, "conv2": 12, "skip": 12, "head": 1}  # the depthwise convolution stays dense
    removed = sum(
        by_flops.history[-1]["layers"][name] * model.get_submodule(name).weight.numel() * count
        for name, count in pixels.items()
    )
    # Blocks at the edges are padded.
    assert figures.dense.flops - figures.compressed.flops == pytest.approx(2 * len(x) * removed, rel=0.1)


def test_a_budget_of_latency_takes_the_costs_it_is_given():
    model, train, val = task()
    costs = linear_table(model, BLOCK)
    budget = fp.Budget(latency=0.5, costs=costs)
    result = fp.compress(model, train, val, **WITHOUT_SPARSITY, budget=budget)
    last = result.history[-1]
    assert last["target_latency"] == 0.5
    densities = {name: 1 - share for name, share in last["layers"].items()}
    seconds = sum(float(costs[name].seconds(density)) for name, density in densities.items())
    assert seconds <= 0.5 * costs.dense_seconds(costs) * 1.2
    assert last["sparsity"] > 0.4


def test_costs_of_a_budget_are_measured_once_and_kept(tmp_path, monkeypatch):
    model, train, val = task()
    measured = []

    def measure(model, *, granularity, include, exclude, **options):
        measured.append((granularity, include, exclude))
        return linear_table(model, granularity)

    monkeypatch.setattr(run_module, "measure_latency", measure)
    options = {**WITHOUT_SPARSITY, "budget": fp.Budget(latency=0.5), "include": nn.Linear, "exclude": "9"}
    expected = fp.compress(model, train, val, **options)
    assert measured == [(BLOCK, nn.Linear, "9")]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "distill", _stop)
        with pytest.raises(KeyboardInterrupt):
            fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    monkeypatch.setattr(run_module, "measure_latency", None)  # not again
    result = fp.compress(model, train, val, **options, checkpoint_dir=tmp_path)
    assert_same_bits(result.model, expected.model)


def _stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_block_size_is_chosen_in_the_first_round_and_kept(tmp_path, monkeypatch):
    model, train, val = task()
    auto = fp.AutoBlock(candidates=(fp.Block(2, 2), fp.Block(4, 4)), measure=linear_table)
    options = {**OPTIONS, "granularity": auto, "checkpoint_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "distill", _stop)
        with pytest.raises(KeyboardInterrupt):
            fp.compress(model, train, val, **options)
    chosen = auto.granularity
    assert chosen in auto.candidates
    auto.choose = None  # not again
    scored = []
    monkeypatch.setattr(
        run_module,
        "score",
        lambda *args, score=run_module.score, **kw: scored.append(kw) or score(*args, **kw),
    )
    result = fp.compress(model, train, val, **options)
    assert [options["granularity"] for options in scored] == [chosen, chosen]
    layer = result.model[0]
    assert isinstance(layer, fp.BlockSparseLinear)
    assert layer.blocksize == (chosen.rows, chosen.cols)


def test_auto_times_the_blocks_on_the_example_inputs_and_for_the_budget(monkeypatch):
    model, train, val = task()
    made = []

    class Recorded(fp.AutoBlock):
        def __init__(self, **options):
            super().__init__(**options, candidates=(BLOCK,), measure=linear_table)
            made.append(options)

    monkeypatch.setattr(importlib.import_module("fastprune.compress"), "AutoBlock", Recorded)
    monkeypatch.setattr(run_module, "measure_latency", lambda model, **options: linear_table(model, BLOCK))
    x, floor = torch.randn(3, 12), fp.Floor(max_sparsity=0.9)
    options = {**WITHOUT_SPARSITY, "granularity": "auto", "example_inputs": x, "floor": floor, "rounds": 1}
    fp.compress(model, train, val, **options, budget=fp.Budget(latency=0.3))
    assert made[-1] == {"example_inputs": x, "latency": 0.3, "floor": floor}
    fp.compress(model, train, val, **options, sparsity=0.5)
    assert made[-1]["latency"] == 0.5


def test_layers_floors_and_groups_reach_scoring_and_selection():
    model, train, val = task()
    result = fp.compress(model, train, val, **OPTIONS, exclude="3")
    assert set(result.history[-1]["layers"]) == {"0"}
    assert type(result.model[3]) is nn.Linear
    result = fp.compress(
        model, train, val, **OPTIONS, include=["0", "3"], floor={"3": fp.Floor(blocks_per_row=4)}
    )
    assert 0 < result.history[-1]["layers"]["3"] <= 4 / 17 + 1e-9  # one of the five blocks of a row
    result = fp.compress(model, train, val, **OPTIONS, scope=["0", "3"])
    for share in result.history[-1]["layers"].values():
        assert 0.4 <= share <= 0.6


def test_batch_norms_are_folded_in_what_is_returned_and_not_in_what_trains(tmp_path):
    inputs = torch.randn(24, 3, 4, 6)
    loader = DataLoader(TensorDataset(inputs, (inputs.mean((1, 2, 3)) > 0).long()), 12)
    torch.manual_seed(1)
    model = SmallVGG()
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert norms
    options = {**OPTIONS, "rounds": 2, "fold_batch_norm": True, "checkpoint_dir": tmp_path}
    result = fp.compress(model, loader, loader, **options)
    left = [
        module for module in result.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(left) < norms
    student = fp.load(tmp_path / "round_001.safetensors", SmallVGG())
    assert fp.evaluate(student, loader)["loss"] == pytest.approx(result.history[-1]["loss"], rel=1e-5)
    again = fp.compress(model, loader, loader, **options)
    assert_same_bits(again.model, result.model)


def test_the_history_counts_what_compare_counts():
    model, train, val = task()
    x = torch.randn(5, 12)
    result = fp.compress(model, train, val, **OPTIONS, example_inputs=x)
    figures = fp.compare(model, result.model, val, example_inputs=x)
    last = result.history[-1]
    for key in ("accuracy", "parameters", "bytes", "flops"):
        assert last[key] == getattr(figures.compressed, key), key
    assert (last["dense_latency_seconds"], last["latency_seconds"]) == (2.0, 1.0)
    flops = [entry["flops"] for entry in result.history]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < figures.dense.flops
    several = fp.compress(model, train, val, **{**OPTIONS, "rounds": 1}, example_inputs=[x, x, x[:1]])
    single = fp.compress(model, train, val, **{**OPTIONS, "rounds": 1}, example_inputs=torch.randn(11, 12))
    assert several.history[-1]["flops"] == single.history[-1]["flops"]


def test_each_round_can_be_loaded_as_it_would_be_returned(tmp_path):
    model, train, val = task()
    result = fp.compress(model, train, val, **OPTIONS, checkpoint_dir=tmp_path)
    for entry in result.history:
        path = tmp_path / f"round_{entry['round']:03d}_compressed.safetensors"
        loaded = fp.load(path, task()[0])
        assert isinstance(loaded[0], fp.BlockSparseLinear)
        assert fp.evaluate(loaded, val)["loss"] == pytest.approx(entry["loss"], rel=1e-5)
    assert_same_bits(loaded, result.model)
    scores = fp.ImportanceScores.load(tmp_path / "round_000_scores.safetensors")
    assert set(scores) == {"0", "3"}


def test_the_history_is_written_as_json_that_any_reader_takes(tmp_path):
    loader = [(torch.randn(8, 12), torch.randn(8, 2))]
    options = {**OPTIONS, "hard_label_weight": 1.0, "loss_fn": nn.MSELoss()}
    result = fp.compress(task()[0], loader, loader, **options)
    assert math.isnan(result.dense_accuracy)
    result.save_history(tmp_path / "history.json")

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    assert found == result.to_dict()
    assert found["dense_accuracy"] is None
    assert found["history"][2]["accuracy"] is None
    assert found["history"][2]["flops"] == result.history[2]["flops"]


def test_a_result_prints_its_rounds():
    model, train, val = task()
    result = fp.compress(model, train, val, **OPTIONS)
    lines = str(result).splitlines()
    assert len(lines) == 2 + 3
    assert f"{result.dense_accuracy:.2%}" in lines[1]
    for line, entry in zip(lines[2:], result.history, strict=True):
        assert f"{entry['sparsity']:.1%}" in line
        assert f"{entry['flops']:,}" in line
        assert "2.00x" in line


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.5}, TypeError, "`budget` must be a fastprune Budget"),
        (
            {"budget": fp.Budget(flops=0.5), "sparsity": 0.5},
            ValueError,
            "`budget` takes the place of `sparsity`",
        ),
        (
            {"budget": fp.Budget(flops=0.5), "target": "auto"},
            ValueError,
            "`budget` takes the place of `target`",
        ),
        ({"budget": fp.Budget(latency=0.5), "scope": "layer"}, ValueError, "`scope` must be 'global'"),
        ({"budget": fp.Budget(latency=0.5), "granularity": fp.Unit()}, ValueError, r"`budget` needs `costs`"),
        ({"target": 0.5}, ValueError, "`target` must be None or 'auto', got 0.5"),
        ({"target": "auto"}, ValueError, "`max_accuracy_drop` must be given"),
        (
            {"target": "auto", "max_accuracy_drop": 0.1, "tolerance": 0},
            ValueError,
            "`tolerance` must be a number",
        ),
        ({"granularity": "automatic"}, TypeError, "`granularity` must be"),
        ({"include": "nothing"}, ValueError, "no Linear or Conv2d layer"),
        ({"floor": 3}, TypeError, "`floor` must be an"),
        ({"floor": {"nothing": fp.Floor(units=1)}}, ValueError, "`floor`"),
        ({"scope": ["nothing"]}, ValueError, "`scope`"),
        ({"fold_batch_norm": "yes"}, ValueError, "`fold_batch_norm`"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused_before_anything_is_scored(
    monkeypatch, options, error, message
):
    model, train, val = task()
    monkeypatch.setattr(run_module, "score", None)
    with pytest.raises(error, match=message):
        fp.compress(model, train, val, **{**WITHOUT_SPARSITY, **options})
