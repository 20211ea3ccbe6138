"""sparsify_ and compress on masks of every granularity, and on layers that are more than their weight."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastprune as fp


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 5))


def make_loader():
    torch.manual_seed(1)
    return [(torch.randn(16, 40), torch.randint(0, 5, (16,))) for _ in range(2)]


def masked(granularity, sparsity=0.5):
    model = make_model()
    scores = fp.score(model, make_loader(), granularity=granularity, progress=False)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity))


@pytest.mark.parametrize("policy", ["measured", "always"])
@pytest.mark.parametrize("granularity", [fp.Block(8, 8), fp.Unit(), fp.Element()], ids=str)
def test_masks_of_any_granularity_convert_to_the_same_outputs(granularity, policy):
    model = masked(granularity)
    input = torch.randn(9, 40)
    expected = model(input)
    fp.sparsify_(model, example_inputs=input, blocksize=(8, 8), policy=policy)
    torch.testing.assert_close(model(input), expected)
    assert "0 " in fp.explain(model)


def test_a_layer_with_a_hook_or_a_forward_of_its_own_stays_dense():
    model = masked(fp.Block(8, 8))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    original = model[2].forward
    model[2].forward = lambda input: original(input) + 1
    input = torch.randn(9, 40)
    expected = model(input)
    fp.sparsify_(model, example_inputs=input, blocksize=(8, 8), policy="always")
    torch.testing.assert_close(model(input), expected)
    assert fp.explain(model).count("hooks or a forward of its own") == 2


def test_a_model_converted_under_inference_mode_trains():
    model = masked(fp.Block(8, 8))
    with torch.inference_mode():
        fp.sparsify_(model, example_inputs=torch.randn(9, 40), blocksize=(8, 8), policy="always")
    model(torch.randn(9, 40)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("granularity", [fp.Unit(), fp.InputUnit()], ids=str)
def test_explain_tells_what_compress_pruned_though_it_stays_dense(granularity):
    loader = make_loader()
    result = fp.compress(make_model(), loader, loader, rounds=1, granularity=granularity, progress=False)
    text = fp.explain(result.model)
    assert "masks leave plain zeros" in text
    assert text.count("dense:") == 2


def test_numpy_numbers_are_as_good_as_python_ones(tmp_path):
    loader = make_loader()
    options = {"rounds": 1, "granularity": fp.Block(8, 8), "progress": False, "checkpoint_dir": tmp_path}
    first = fp.compress(make_model(), loader, loader, sparsity=np.float64(0.5), seed=np.int64(3), **options)
    again = fp.compress(make_model(), loader, loader, sparsity=0.5, seed=3, **options)
    assert first.history == again.history


@pytest.mark.parametrize("argument", ["train_loader", "val_loader"])
def test_an_iterator_is_refused_before_anything_runs(argument):
    loaders = {"train_loader": make_loader(), "val_loader": make_loader()}
    loaders[argument] = (batch for batch in make_loader())
    with pytest.raises(TypeError, match=f"`{argument}` is iterated several times"):
        fp.compress(make_model(), **loaders, rounds=1)


@pytest.mark.parametrize(
    ("argument", "value"), [("scope", "x"), ("criterion", "x"), ("temperature", 0), ("hard_label_weight", 2)]
)
def test_compress_checks_all_arguments_before_it_scores(monkeypatch, argument, value):
    module = sys.modules["fastprune.compress"]  # the attribute of the package is the function
    monkeypatch.setattr(module, "score", lambda *args, **kwargs: pytest.fail("scored"))
    loader = make_loader()
    with pytest.raises(ValueError, match=f"`{argument}`"):
        fp.compress(make_model(), loader, loader, **{argument: value})


def test_a_layer_that_is_emptied_is_told():
    scores = fp.score(make_model(), make_loader(), granularity=fp.Block(8, 8), progress=False)
    with pytest.warns(UserWarning, match="nothing is left of 0, 2"):
        scores.select(threshold=float("inf"))


def test_indices_that_are_no_structure_are_refused_when_loaded():
    layer = fp.BlockSparseLinear.from_dense(nn.Linear(40, 48), (8, 8))
    before = layer.col_indices.clone()
    state = layer.state_dict()
    state["col_indices"] = before + 900
    with pytest.raises(ValueError, match="no valid structure: `col_indices`"):
        layer.load_state_dict(state)
    assert torch.equal(layer.col_indices, before)


def test_a_model_that_cannot_be_written_to_is_refused_before_loading(tmp_path):
    model = make_model()
    model.register_buffer("expanded", torch.ones(1).expand(5))
    fp.save(model, tmp_path / "model.safetensors")
    fresh = make_model()
    fresh.register_buffer("expanded", torch.ones(1).expand(5))
    with torch.no_grad():
        fresh[0].weight.zero_()
    with pytest.raises(ValueError, match="'expanded' is an expanded tensor"):
        fp.load(tmp_path / "model.safetensors", fresh)
    assert not fresh[0].weight.any()


def test_frozen_layers_stay_frozen_through_save_and_load(tmp_path):
    model = fp.sparsify_(
        masked(fp.Block(8, 8)), example_inputs=torch.randn(2, 40), blocksize=(8, 8), policy="always"
    )
    fp.save(model, tmp_path / "model.safetensors")
    fresh = make_model().requires_grad_(False)
    fp.load(tmp_path / "model.safetensors", fresh)
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizer` must hold parameters of the model"):
        fp.distill(make_model(), make_model(), make_loader(), epochs=1, optimizer=optimizer)
