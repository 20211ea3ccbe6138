"""Models that have masks already, or parametrizations of their own: what they lose, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastprune as fp
from fastprune.checkpoints import describe
from fastprune.masks import piece_mask_of

pytestmark = [pytest.mark.usefixtures("one_thread", "sparse_is_faster")]

BLOCK = fp.Block(8, 8)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def batches():
    torch.manual_seed(1)
    x = torch.randn(64, 32)
    return [(x[:32], (x[:32, 0] > 0).long()), (x[32:], (x[32:, 0] > 0).long())]


def masked(granularity, sparsity):
    model = make()
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, progress=False)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity))


def zeros(model):
    return {
        name: piece_mask_of(module)
        for name, module in model.named_modules()
        if piece_mask_of(module) is not None
    }


def assert_still_zero(before, model):
    for name, mask in before.items():
        weight = model.get_submodule(name).weight
        assert not bool(weight[~mask].any()), name


OPTIONS = {"criterion": "magnitude", "progress": False}


@pytest.mark.parametrize("granularity", [BLOCK, fp.Unit()], ids=str)
def test_a_run_of_a_masked_model_is_read_again_and_goes_on(granularity, tmp_path):
    model = masked(granularity, 0.3)
    options = {
        "sparsity": 0.75,
        "rounds": 2,
        "granularity": granularity,
        "checkpoint_dir": tmp_path,
        **OPTIONS,
    }
    first = fp.compress(model, batches(), batches(), **options)
    again = fp.compress(model, batches(), batches(), **options)
    assert again.history == first.history
    state = again.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("granularity", [BLOCK, fp.Element(), fp.Unit()], ids=str)
def test_what_is_pruned_stays_so_under_goals_below_it(granularity):
    model = masked(granularity, 0.5)
    before = {name: mask.clone() for name, mask in zeros(model).items()}
    scores = fp.score(model, None, granularity=granularity, **OPTIONS)
    selected = scores.select(sparsity=0.1)
    for name, mask in before.items():
        expanded = selected.granularity_of(name).expand(selected[name], mask.shape)
        assert not bool((expanded & ~mask).any()), name
    pruner = fp.Pruner(model, schedule=fp.CubicSchedule(0.8, end=10), granularity=granularity)
    present = pruner.sparsity()
    assert present == pytest.approx(0.5, abs=0.02)
    for _ in range(10):
        pruner.step()
        assert pruner.sparsity() >= present - 1e-9
        assert_still_zero(before, model)
    assert pruner.sparsity() == pytest.approx(0.8, abs=0.02)
    result = fp.compress(
        masked(granularity, 0.6),
        batches(),
        batches(),
        sparsity=0.7,
        rounds=3,
        granularity=granularity,
        **OPTIONS,
    )
    shares = [entry["sparsity"] for entry in result.history]
    assert shares[0] == pytest.approx(0.6, abs=0.02)
    assert shares == sorted(shares)


def test_single_weights_stay_zero_under_masks_of_blocks():
    model = masked(fp.Element(), 0.5)
    before = {name: mask.clone() for name, mask in zeros(model).items()}
    pruner = fp.Pruner(model, schedule=fp.LinearSchedule(0.5, begin=0, end=2), granularity=BLOCK)
    assert_still_zero(before, model)
    pruner.step()
    pruner.step()
    assert_still_zero(before, model)
    assert pruner.sparsity() == pytest.approx(0.5, abs=0.03)
    other = masked(fp.Element(), 0.5)
    fp.prune_(other, None, schedule=fp.OneShotSchedule(0.4), granularity=BLOCK, **OPTIONS)
    assert_still_zero(before, other)
    result = fp.compress(
        masked(fp.Element(), 0.5), batches(), batches(), sparsity=0.4, rounds=1, granularity=BLOCK, **OPTIONS
    )
    assert_still_zero(before, result.model)


def test_an_iterator_of_layers_is_read_once():
    result = fp.compress(
        make(),
        batches(),
        batches(),
        sparsity=0.5,
        rounds=2,
        granularity=BLOCK,
        exclude=iter(["4"]),
        **OPTIONS,
    )
    assert set(result.history[-1]["layers"]) == {"0", "2"}
    model = make()
    pruner = fp.Pruner(
        model, schedule=fp.LinearSchedule(0.5, end=1), granularity=BLOCK, include=(name for name in ["0"])
    )
    pruner.step()
    assert list(pruner.masks) == ["0"]
    schedule = fp.LinearSchedule(0.5, end=2)
    masks = fp.prune_(make(), None, schedule=schedule, granularity=BLOCK, exclude=iter(["4"]), **OPTIONS)
    assert list(masks) == ["0", "2"]


def test_a_set_is_described_alike_in_every_process():
    assert describe({"stem", "encoder.*", "head"}) == ["encoder.*", "head", "stem"]
    assert describe(frozenset([nn.Linear, nn.Conv2d])) == ["Conv2d", "Linear"]


class Fails:
    """Batches, until a pass that raises."""

    def __init__(self, passes):
        self.passes = passes

    def __iter__(self):
        self.passes -= 1
        if self.passes < 0:
            raise RuntimeError("the disk is gone")
        return iter(batches())


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_an_error_leaves_a_norm_of_ones_own_and_no_mask(norm):
    model = make()
    norm(model[0])
    model.eval()
    names, weight = list(model.state_dict()), model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        fp.prune_(
            model,
            Fails(2),
            schedule=fp.LinearSchedule(0.5, end=4),
            granularity=fp.Element(),
            criterion="taylor",
            progress=False,
        )
    assert list(model.state_dict()) == names
    assert torch.equal(model[0].weight, weight)
    assert piece_mask_of(model[0]) is None
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[2])


def test_a_norm_of_ones_own_goes_with_its_mask_and_says_so():
    model = make()
    parametrizations.weight_norm(model[0])
    scores = fp.score(model, None, granularity=BLOCK, **OPTIONS)
    fp.apply_masks_(model, scores.select(sparsity=0.5))
    weight = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"_WeightNorm of '0\.weight' goes with its mask"):
        fp.remove_masks_(model)
    assert torch.equal(model[0].weight, weight)
    assert not parametrize.is_parametrized(model[0])


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("structure", ["blocks", "units"])
def test_what_cannot_be_saved_or_cut_is_found_out_before_the_scoring(structure, tmp_path):
    model = make()
    parametrizations.weight_norm(model[0])
    options = {"sparsity": 0.5, "granularity": BLOCK, "exclude": "0", "structure": structure, **OPTIONS}
    directory = tmp_path if structure == "blocks" else None
    loader = Fails(2)  # example inputs and one batch may be read, no scores
    with pytest.raises(
        ValueError, match="layer '0' has a parametrization of 'weight' that is no fastprune mask"
    ):
        fp.compress(model, loader, batches(), checkpoint_dir=directory, **options)
    extra = nn.Sequential(Extra(32, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=r"the state '0\._extra_state' is no tensor"):
        fp.compress(
            extra, loader, batches(), checkpoint_dir=tmp_path, sparsity=0.5, granularity=BLOCK, **OPTIONS
        )
    assert not list(tmp_path.iterdir())


def test_masks_and_scores_are_made_in_inference_mode():
    model, loader = make(), batches()
    with torch.inference_mode():
        scores = fp.score(model, loader, criterion="taylor", granularity=BLOCK, progress=False)
        fp.apply_masks_(model, scores.select(sparsity=0.5))
    x, y = loader[0]
    F.cross_entropy(model(x), y).backward()
    assert copy.deepcopy(model)[0].parametrizations.weight.original.grad is None
    assert model[0].parametrizations.weight.original.grad is not None


def test_frozen_layers_stay_frozen_on_the_way_there_and_back():
    model = masked(BLOCK, 0.5)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    flags = {
        name.replace("parametrizations.weight.original", "weight"): p.requires_grad
        for name, p in model.named_parameters()
    }
    fp.sparsify_(model, example_inputs=batches()[0][0], policy="always", blocksize=(8, 8))
    fp.to_dense_(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_a_frozen_part_that_both_models_hold_runs_as_the_teachers():
    backbone = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8)).requires_grad_(False)
    student, teacher = nn.Sequential(backbone, nn.Linear(8, 2)), nn.Sequential(backbone, nn.Linear(8, 2))
    teacher.eval()
    mean = backbone[1].running_mean.clone()
    fp.distill(student, teacher, batches(), epochs=1, progress=False)
    assert torch.equal(backbone[1].running_mean, mean)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens).mean(1)).tanh())


def test_a_tied_parameter_is_left_out_where_whole_parameters_are_scored():
    tokens, targets = torch.randint(0, 11, (20, 3)), torch.randint(0, 11, (20,))
    with pytest.warns(
        UserWarning, match=r"'embedding\.weight' is left out: it is tied to \['head\.weight'\]"
    ):
        scores = fp.score(Tied(), [(tokens, targets)], granularity=fp.ParameterTensor(), progress=False)
    assert list(scores) == ["hidden.weight", "hidden.bias"]


@pytest.mark.parametrize("options", [{"removed": "random"}, {"regrowth": fp.RigL(every=1, end=4)}], ids=str)
def test_a_weight_of_several_tensors_is_refused_before_the_training(options):
    model = make()
    parametrizations.weight_norm(model[2])
    schedule = fp.LinearSchedule(0.5, begin=2, end=4)
    with pytest.raises(ValueError, match="the weight of a Linear is made of several tensors"):
        fp.Pruner(model, schedule=schedule, granularity=BLOCK, **options)
    assert piece_mask_of(model[0]) is None
    fp.Pruner(model, schedule=schedule, granularity=BLOCK)
