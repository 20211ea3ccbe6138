"""RigL: which pieces are exchanged, by dense gradients, and what those that grow start from."""

from __future__ import annotations

import copy
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.regrowth import exchange
from helpers import classification_batches, mlp
from networks import SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread")


@hypothesis.given(st.integers(1, 40), st.floats(0, 1), st.floats(0.01, 0.99), st.integers(0, 99))
def test_an_exchange_drops_the_weakest_and_grows_the_largest_gradients(size, density, share, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(size, generator=generator) < density
    norms, gradients = (torch.randint(0, 4, (size,), generator=generator).double() for _ in range(2))
    protected = torch.rand(size, generator=generator) < 0.2
    new = exchange(keep, norms, gradients, protected, share)
    assert int(new.sum()) == int(keep.sum())
    assert bool(new[keep & protected].all())
    if keep.all():
        assert new.all()
        return
    kept = set(keep.nonzero().flatten().tolist())
    free = kept - set(protected.nonzero().flatten().tolist())
    candidates = sorted(free, key=lambda i: (float(norms[i]), i))
    count = min(int(share * len(kept) + 1e-9), len(candidates))
    left = kept - set(candidates[:count])
    wanted = sorted(set(range(size)) - left, key=lambda i: (-float(gradients[i]), i))
    assert set(new.nonzero().flatten().tolist()) == left | set(wanted[:count])


def test_a_share_that_rounding_puts_below_a_whole_number_is_that_number():
    assert 0.29 * 100 < 29
    keep = torch.arange(200) < 100
    norms, gradients = torch.arange(200.0), torch.arange(200.0)
    new = exchange(keep, norms, gradients, torch.zeros(200, dtype=torch.bool), 0.29)
    assert new.nonzero().flatten().tolist() == [*range(29, 100), *range(171, 200)]


def test_the_share_decays_by_a_cosine():
    rigl = fp.RigL(0.4, begin=100, end=1000, every=100)
    for step in (0, 100, 500, 900):
        assert rigl.share(step) == pytest.approx(0.2 * (1 + math.cos(math.pi * step / 1000)))
    assert rigl.share(0) == 0.4
    assert rigl.share(1000) == 0.0
    assert [step for step in range(1200) if rigl.is_update(step)] == list(range(100, 1001, 100))
    assert not fp.RigL(end=100).is_update(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"`fraction` must be a number in \(0, 1\), got 0.0"),
        ({"fraction": True}, "`fraction`"),
        ({"end": 0}, "`end` must be at least 1"),
        ({"end": 150}, "`every` must divide the 150 steps"),
        ({"begin": 300}, "`end` must be an integer of at least 300"),
    ],
)
def test_rigl_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        fp.RigL(**{"end": 200, **options})


def dense_gradients(model, names, batches):
    """Gradients of the loss for each whole weight, masked entries too, by autograd on plain parameters."""
    plain = fp.remove_masks_(copy.deepcopy(model))
    plain.zero_grad(set_to_none=True)
    for inputs, targets in batches:
        F.cross_entropy(plain(inputs), targets).backward()
    return {name: plain.get_submodule(name).weight.grad for name in names}


@pytest.mark.parametrize("granularity", [fp.Block(4, 3), fp.Element(), fp.InputUnit()], ids=str)
@pytest.mark.parametrize("make", [lambda: mlp(17, 33, 5), SmallConvNet], ids=["mlp", "conv"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.filterwarnings("ignore:fastprune. nothing is left")
def test_pieces_grow_where_the_dense_gradient_is_largest(make, granularity, micro_batches):
    model = make()
    shape = (17,) if isinstance(model, nn.Sequential) else (3, 7, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    rigl = fp.RigL(0.6, end=9, every=3)
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.5),
        scope="layer",
        granularity=granularity,
        regrowth=rigl,
        optimizer=optimizer,
        exclude="depthwise",
    )
    exchanged = 0
    for step in range(1, 8):
        batches = classification_batches((9,) * micro_batches, shape)
        before = dict(pruner.masks)
        expected_gradients = dense_gradients(model, before, batches)
        optimizer.zero_grad()
        for inputs, targets in batches:
            F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        with torch.no_grad():
            model(inputs)  # what is run without gradients does not count
        weights = {name: model.get_submodule(name).weight.detach().clone() for name in before}
        originals = {
            name: model.get_submodule(name).parametrizations.weight.original.detach().clone()
            for name in before
        }
        pruner.step()
        for name, keep in before.items():
            new = pruner.masks[name]
            if not rigl.is_update(step):
                assert torch.equal(new, keep)
                continue
            own, size = pruner.masks.granularity_of(name), weights[name].shape
            norms, gradients = (
                own.sum_pieces(tensor.double() ** 2).sqrt()
                for tensor in (weights[name], expected_gradients[name])
            )
            nothing = torch.zeros_like(keep)
            expected = exchange(keep, norms, gradients, nothing, rigl.share(step))
            assert torch.equal(new, expected)
            exchanged += int((new != keep).sum())
            grown = own.expand(new & ~keep, size).bool()
            original = model.get_submodule(name).parametrizations.weight.original
            assert not original[grown].any()
            assert torch.equal(original[~grown], originals[name][~grown])
            assert not optimizer.state[original]["momentum_buffer"][grown].any()
            assert not model.get_submodule(name).weight[~own.expand(new, size).bool()].any()
    assert exchanged > 2


def test_what_has_grown_learns():
    model = mlp(17, 33, 5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.7),
        scope="layer",
        granularity=fp.Block(4, 4),
        regrowth=fp.RigL(0.5, end=100, every=1),
        optimizer=optimizer,
    )
    (inputs, targets), *_ = classification_batches((15,), (17,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    before = pruner.masks["0"]
    step()
    pruner.step()
    grown = fp.Block(4, 4).expand(pruner.masks["0"] & ~before, model[0].weight.shape)
    assert grown.any()
    assert not model[0].weight[grown].any()
    step()
    assert bool((model[0].weight[grown] != 0).any())


def test_floors_hold_while_pieces_are_exchanged():
    model = mlp(17, 33, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.8),
        granularity=fp.Block(4, 4),
        floor=fp.Floor(blocks_per_row=1),
        regrowth=fp.RigL(0.9, end=20, every=1),
    )
    for inputs, targets in classification_batches((9,) * 10, (17,)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        pruner.step()
        assert all(bool(mask.any(1).all()) for mask in pruner.masks.values())


def test_an_exchange_without_a_backward_pass_says_so():
    model = mlp(17, 33, 5)
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.5),
        granularity=fp.Element(),
        regrowth=fp.RigL(end=10, every=1),
    )
    model(torch.randn(2, 17))
    with pytest.raises(RuntimeError, match="`regrowth` needs gradients"):
        pruner.step()


def test_layers_that_are_frozen_keep_their_pieces():
    model = mlp(17, 33, 5)
    model[0].weight.requires_grad_(False)
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.5),
        granularity=fp.Element(),
        scope="layer",
        regrowth=fp.RigL(end=10, every=1),
    )
    before = dict(pruner.masks)
    model(torch.randn(2, 17)).square().sum().backward()
    pruner.step()
    assert torch.equal(pruner.masks["0"], before["0"])
    assert not torch.equal(pruner.masks["2"], before["2"])


def test_heads_are_exchanged():
    model = nn.Sequential(nn.Linear(12, 5))
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.5),
        granularity=fp.Head(4),
        include="0",
        regrowth=fp.RigL(0.9, end=9, every=1),
    )
    before = pruner.masks["0"]
    assert int(before.sum()) == 2
    # The gradient is that of the inputs: largest in a head that is removed, and none in the others.
    grown = int((~before).nonzero()[1])
    inputs = torch.zeros(3, 12)
    inputs[:, 3 * grown : 3 * grown + 3] = 1.0
    norms = model[0].weight.detach().view(5, 4, 3).norm(dim=(0, 2))
    weakest = int(norms.where(before, torch.inf).argmin())
    model(inputs).sum().backward()
    pruner.step()
    expected = before.clone()
    expected[weakest], expected[grown] = False, True
    assert torch.equal(pruner.masks["0"], expected)


def test_a_floor_holds_for_pieces_whose_weights_are_zero():
    model = mlp(17, 33, 5)
    with torch.no_grad():
        model[0].weight[:4] = 0.0
        model[0].bias[:4] = -9.0  # behind the ReLU no gradient reaches them
    pruner = fp.Pruner(
        model,
        schedule=fp.OneShotSchedule(0.6),
        scope="layer",
        granularity=fp.Block(4, 4),
        floor=fp.Floor(blocks_per_row=1),
        regrowth=fp.RigL(0.5, end=20, every=1),
    )
    state = pruner.state_dict()
    state["masks"]["0"][0] = torch.arange(5) == 0  # as a grown block that has not moved yet
    pruner.load_state_dict(state)
    ((inputs, targets),) = classification_batches((9,), (17,))
    F.cross_entropy(model(inputs), targets).backward()
    pruner.step()
    assert pruner.masks["0"][0].tolist() == [True, False, False, False, False]


def test_gradients_are_watched_in_the_step_before_an_exchange_alone():
    model = mlp(17, 33, 5)
    options = {"schedule": fp.OneShotSchedule(0.5), "granularity": fp.Block(4, 4)}
    pruner = fp.Pruner(model, **options, regrowth=fp.RigL(end=4, every=2))
    watched = []
    for _ in range(6):
        watched.append(sum(len(module._forward_hooks) for module in model.modules()))
        for inputs, targets in classification_batches((9,), (17,)):
            F.cross_entropy(model(inputs), targets).backward()
        pruner.step()
    assert watched == [0, 2, 0, 2, 0, 0]
