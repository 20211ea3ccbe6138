"""compress(structure="units" or "both"): what is cut out, measured, resumed and returned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.unit_scores import score_units
from helpers import Snapshot, classification_batches
from networks import SmallResNet, TextClassifier
from shrink_cases import count, tiny_bert

pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]


def make():
    torch.manual_seed(0)
    return SmallResNet()


def data():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(3)
    ]


def compress(structure, directory=None, model=None, loader=None, **options):
    batches = data()
    options = {"sparsity": 0.6, "rounds": 3, "round_to": 1, "granularity": fp.Block(2, 2), **options}
    return fp.compress(
        model or make(),
        loader or batches,
        batches,
        structure=structure,
        criterion="magnitude",
        scope="layer",
        floor=fp.Floor(max_sparsity=0.9),
        checkpoint_dir=directory,
        progress=False,
        **options,
    )


def test_units_are_cut_out_in_every_round():
    model = make()
    before = Snapshot(model)
    result = compress("units", model=model)
    before.assert_unchanged()
    assert [entry["structure"] for entry in result.history] == ["units"] * 3
    assert [round(entry["target_sparsity"], 3) for entry in result.history] == [0.263, 0.457, 0.6]
    parameters = [entry["parameters"] for entry in result.history]
    assert count(model) > parameters[0] > parameters[1] > parameters[2] == count(result.model)
    small = result.model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.stem.out_channels) == (3, 3, 2)
    assert small.head.out_features == 5  # nobody had to leave it out
    accuracy = fp.evaluate(small, data(), loss_fn=None)["accuracy"]
    assert accuracy == pytest.approx(result.history[-1]["accuracy"])
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in small.modules())


def test_round_to_and_exclude_are_kept_to():
    result = compress("units", sparsity=0.7, round_to=3, exclude="stem")
    small = result.model
    assert (small.stem.out_channels, small.conv1.out_channels, small.conv2.out_channels) == (4, 3, 3)


def test_both_ends_at_the_sparsity_of_the_dense_weights():
    result = compress("both", sparsity=0.6, rounds=4)
    history = result.history
    assert [entry["structure"] for entry in history] == ["units", "units", "blocks", "blocks"]
    dense = {
        name: module for name, module in make().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    small = dict(result.model.named_modules())
    kept = sum(int((small[name].weight != 0).sum()) for name in dense)
    total = sum(module.weight.numel() for module in dense.values())
    assert history[-1]["sparsity"] == pytest.approx(1 - kept / total, abs=1e-9)
    assert 0.5 < history[-1]["sparsity"] <= 0.6
    assert any(isinstance(module, fp.BlockSparseConv2d) for module in small.values())
    assert small["conv1"].weight_shape[0] < 6


@pytest.mark.parametrize("budget", [fp.Budget(flops=0.5), fp.Budget(params=0.5), fp.Budget(bytes=0.5)])
@pytest.mark.parametrize("structure", ["units", "both"])
def test_budgets(structure, budget):
    result = compress(structure, sparsity=None, budget=budget, rounds=2)
    assert result.history[-1][f"target_{budget.cost}"] == 0.5
    assert result.history[-1]["parameters"] < 0.75 * count(make())


def test_batch_norms_are_folded_on_request():
    result = compress("units", fold_batch_norm=True)
    assert isinstance(result.model.norm1, nn.Identity)
    assert result.model.conv1.out_channels == 3


def test_the_largest_sparsity_is_searched_by_units():
    result = compress("units", sparsity=None, target="auto", max_accuracy_drop=1.0, tolerance=0.3, rounds=1)
    assert result.probes[-1]["holds"]
    assert result.model.conv1.out_channels < 6


class Stops:
    def __init__(self, loader, passes):
        self.loader, self.passes = loader, passes

    def __iter__(self):
        self.passes -= 1
        if self.passes < 0:
            raise KeyboardInterrupt
        return iter(self.loader)


@pytest.mark.parametrize("structure", ["units", "both"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_model(structure, fold, tmp_path):
    options = {"rounds": 4, "fold_batch_norm": fold}
    whole = compress(structure, **options)
    passes, stops = 0, 0
    while True:
        try:
            result = compress(structure, tmp_path, loader=Stops(data(), passes), **options)
        except KeyboardInterrupt:
            stops += 1
            passes += 2
            assert passes < 100
        else:
            break
    assert stops >= 2
    state = result.model.state_dict()
    assert state.keys() == whole.model.state_dict().keys()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for first, second in zip(result.history, whole.history, strict=True):
        for key in ("sparsity", "accuracy", "loss", "train_loss", "parameters", "structure"):
            assert first[key] == second[key]
    again = compress(structure, tmp_path, loader=Stops(data(), 1), **options)
    assert again.history == result.history
    for index, entry in enumerate(result.history):
        loaded = fp.load(tmp_path / f"round_{index:03d}_compressed.safetensors", make())
        if entry["structure"] == "units":
            assert count(loaded) == entry["parameters"]
    assert torch.equal(loaded(data()[0][0]), result.model(data()[0][0]))


def test_a_directory_of_another_structure_is_refused_and_an_old_one_is_not(tmp_path):
    compress("units", tmp_path / "units", rounds=1)
    with pytest.raises(ValueError, match=r"other arguments .*structure"):
        compress("blocks", tmp_path / "units", rounds=1)
    compress("blocks", tmp_path / "blocks", rounds=1)
    text = (tmp_path / "blocks" / "state.json").read_text()
    assert "structure" not in text
    assert "round_to" not in text


def test_attention_loses_heads_and_feed_forward_units():
    model, tokens = tiny_bert()
    batches = [{**tokens, "labels": torch.randint(0, 3, (4,))} for _ in range(2)]
    result = fp.compress(
        model, batches, batches, sparsity=0.5, rounds=1, structure="units", criterion="magnitude", round_to=1,
        scope="layer", exclude="bert.pooler.*", progress=False,
    )  # fmt: skip
    for layer in result.model.bert.encoder.layer:
        assert layer.attention.self.num_attention_heads == 2
        assert layer.intermediate.dense.out_features == 19
        assert layer.output.dense.out_features == 32
    assert sorted(result.history[0]["layers"]) == sorted(
        f"bert.encoder.layer.{index}.{name}"
        for index in range(2)
        for name in ("attention.output.dense", "intermediate.dense")
    )


def test_units_and_heads_are_ranked_together():
    model = TextClassifier().eval()
    x = torch.randint(0, 11, (4, 9))
    batches = [(x, torch.randint(0, 5, (4,)))]
    scores = score_units(model, batches, example_inputs=x, criterion="magnitude", progress=False)
    assert {name: type(scores.granularities[name]) for name in scores} == {
        "up": fp.Unit, "attention.out_proj": fp.Head,
    }  # fmt: skip
    apart = fp.score(model, batches, criterion="magnitude", granularity=fp.Head(), progress=False)
    assert torch.equal(scores["attention.out_proj"], apart["attention.out_proj"])
    lowest = min(float(layer.min()) for layer in scores.values())
    masks = scores.select(threshold=lowest + 1e-9)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 1


def test_scores_of_the_same_layer_or_of_another_criterion_are_not_joined():
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))
    batches = classification_batches()
    units = fp.score(model, batches, criterion="magnitude", granularity=fp.Unit(), include="0")
    inputs = fp.score(model, batches, criterion="magnitude", granularity=fp.InputUnit(), include="2")
    both = units | inputs
    assert list(both) == ["0", "2"]
    assert both.select(sparsity=0.5, scope="layer").granularity_of("2") == fp.InputUnit()
    assert both.total_cost("params") == 7 * 9 + 9 * 5
    network = make()
    coupled = fp.score(
        network, data(), criterion="magnitude", granularity=fp.Unit(coupled=True), exclude="head"
    )
    head = fp.score(network, data(), criterion="magnitude", granularity=fp.InputUnit(), include="head")
    assert coupled.coupled
    assert (coupled | head).coupled == (head | coupled).coupled == coupled.coupled
    with pytest.raises(ValueError, match="`other` must be scores of other layers, got '0' in both"):
        both | units
    with pytest.raises(ValueError, match="`other` must be of criterion 'magnitude', got 'random'"):
        units | fp.score(model, batches, criterion="random", granularity=fp.Unit(), include="2")
    with pytest.raises(TypeError, match="`other` must be ImportanceScores"):
        units | {}


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="`structure` must be 'blocks', 'units' or 'both', got 'heads'"):
        compress("heads")
    with pytest.raises(ValueError, match="`round_to` must be an integer"):
        compress("units", round_to=0)
    with pytest.raises(ValueError, match="`rounds` must be at least 2 for structure='both', got 1"):
        compress("both", rounds=1)
    with pytest.raises(ValueError, match="`budget` must be of flops, params or bytes"):
        compress("units", sparsity=None, budget=fp.Budget(latency=0.5))
    only_output = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    with pytest.raises(ValueError, match="no unit and no head of this model can be cut out"):
        compress("units", model=copy.deepcopy(only_output))
