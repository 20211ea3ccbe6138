"""Pruner: masks that follow a schedule in a training loop, hold against optimisers, and survive a kill."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import Snapshot, classification_batches, masked_mlp, mlp
from networks import SmallConvNet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastprune. nothing is left"),
]

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, momentum=0.5),
}


class Loop:
    """A training loop over fixed batches that can be stopped, written down and gone on with."""

    def __init__(self, optimizer="adamw", with_optimizer=False, make=lambda: mlp(17, 33, 5), **options):
        torch.manual_seed(7)
        self.model = make()
        shape = (17,) if isinstance(self.model, nn.Sequential) else (3, 7, 5)
        self.batches = classification_batches((9, 8, 15, 1), shape)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        if with_optimizer:
            options["optimizer"] = self.optimizer
        if options.get("loader") == "batches":
            options["loader"] = self.batches
        self.pruner = fp.Pruner(self.model, **{"granularity": fp.Block(4, 4), **options})

    def run(self, steps, after=None):
        self.model.train()
        for step in range(self.pruner.steps, steps):
            inputs, targets = self.batches[step % len(self.batches)]
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs), targets).backward()
            self.optimizer.step()
            self.pruner.step()
            if after is not None:
                after(self)
        return self

    def state(self):
        parts = (self.model, self.optimizer, self.pruner)
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in parts], buffer)
        return buffer.getvalue()

    def load(self, state, order=(0, 1, 2)):
        states = torch.load(io.BytesIO(state), weights_only=True)
        for index in order:
            (self.model, self.optimizer, self.pruner)[index].load_state_dict(states[index])
        return self


def assert_same_bits(first, second):
    for mine, other in ((first.model, second.model), (first.optimizer, second.optimizer)):
        for left, right in zip(
            torch.utils._pytree.tree_leaves(mine.state_dict()),
            torch.utils._pytree.tree_leaves(other.state_dict()),
            strict=True,
        ):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    assert first.pruner.steps == second.pruner.steps
    assert first.pruner.masks.keys() == second.pruner.masks.keys()
    for name, mask in first.pruner.masks.items():
        assert torch.equal(mask, second.pruner.masks[name])


def effective(model, name="0"):
    return model.get_submodule(name).weight.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", [fp.Block(4, 4), fp.Unit(), fp.Element()], ids=str)
def test_pieces_go_as_the_schedule_says_and_no_optimiser_brings_them_back(optimizer, granularity):
    schedule = fp.CubicSchedule(0.8, begin=2, end=10, every=4)
    removed = []

    def check(loop):
        pruner = loop.pruner
        last = max((step for step in range(pruner.steps + 1) if schedule.is_update(step)), default=None)
        target = 0.0 if last is None else schedule.at(last)
        assert target - 0.06 < pruner.sparsity() <= target + 1e-9
        for name, mask in pruner.masks.items():
            keep = pruner.masks.granularity_of(name).expand(mask, pruner.masks.weight_shapes[name])
            assert not effective(loop.model, name)[~keep].any()
            assert bool((effective(loop.model, name)[keep] != 0).all())
        if removed:
            for name, mask in pruner.masks.items():
                assert not bool((mask & ~removed[-1][name]).any())
        removed.append(dict(pruner.masks))

    loop = Loop(optimizer, schedule=schedule, granularity=granularity).run(14, check)
    assert len(removed) == 14
    original = loop.model[0].parametrizations.weight.original
    keep = granularity.expand(loop.pruner.masks["0"], original.shape)
    assert bool((original[~keep] != 0).any())  # what lies under a mask may move: it is never read


def test_each_update_is_a_selection_from_fresh_scores():
    loop = Loop(schedule=fp.LinearSchedule(0.6, end=6, every=3), criterion="loss_delta", loader="batches")
    for steps, target in ((3, 0.3), (6, 0.6)):
        loop.run(steps - 1)
        by_hand, optimizer = copy.deepcopy((loop.model, loop.optimizer))
        inputs, targets = loop.batches[(steps - 1) % 4]
        optimizer.zero_grad()
        F.cross_entropy(by_hand(inputs), targets).backward()
        optimizer.step()
        scores = fp.score(by_hand, loop.batches, granularity=fp.Block(4, 4), progress=False)
        expected = scores.select(sparsity=target)
        loop.run(steps)
        for name, mask in loop.pruner.masks.items():
            assert torch.equal(mask, expected[name])


def test_the_model_keeps_its_parameters_keys_modes_and_gradients():
    model, x = mlp(17, 33, 5), torch.randn(4, 17)
    model[1].eval()
    expected, parameters = model(x), {id(parameter) for parameter in model.parameters()}
    pruner = fp.Pruner(model, schedule=fp.LinearSchedule(0.5, end=2), granularity=fp.Block(4, 4))
    assert torch.equal(model(x), expected)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    keys = list(model.state_dict())
    model(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    pruner.step()
    assert list(model.state_dict()) == keys
    assert not model[1].training
    assert model[0].training
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert "steps=1" in repr(pruner)
    assert pruner.sparsity() == pruner.masks.sparsity() > 0.2


def test_one_shot_prunes_at_once_or_after_a_warm_up():
    assert Loop(schedule=fp.OneShotSchedule(0.5)).pruner.sparsity() == pytest.approx(0.5, abs=0.03)
    loop = Loop(schedule=fp.OneShotSchedule(0.5, begin=3)).run(2)
    assert loop.pruner.sparsity() == 0.0
    assert loop.run(3).pruner.sparsity() == pytest.approx(0.5, abs=0.03)


def test_masks_that_a_model_has_are_kept():
    model, _ = masked_mlp(0.5)
    weight = model[0].weight.detach().clone()
    pruner = fp.Pruner(model, schedule=fp.LinearSchedule(0.75, end=2), granularity=fp.Block(4, 4))
    assert torch.equal(model[0].weight, weight)
    assert pruner.sparsity() == pytest.approx(0.5, abs=0.03)
    before = dict(pruner.masks)
    pruner.step()
    pruner.step()
    assert pruner.sparsity() == pytest.approx(0.75, abs=0.03)
    assert all(not bool((pruner.masks[name] & ~before[name]).any()) for name in before)


CONFIGURATIONS = {
    "cubic": {"schedule": fp.CubicSchedule(0.7, begin=1, end=9, every=2)},
    "loss deltas": {
        "schedule": fp.LinearSchedule(0.6, end=8, every=4),
        "criterion": "loss_delta",
        "loader": "batches",
    },
    "units of convolutions": {
        "schedule": fp.ExponentialSchedule(0.5, end=8, every=4),
        "make": SmallConvNet,
        "granularity": fp.Unit(),
        "exclude": "depthwise",
        "floor": fp.Floor(units=2),
    },
    "random": {
        "schedule": fp.LinearSchedule(0.5, end=8, every=2),
        "removed": "random",
        "with_optimizer": True,
        "seed": 5,
    },
    "mean": {"schedule": fp.LinearSchedule(0.5, end=8, every=2), "removed": "mean"},
    "rigl": {
        "schedule": fp.OneShotSchedule(0.6),
        "regrowth": fp.RigL(0.5, end=12, every=2),
        "with_optimizer": True,
    },
    "rigl while it gets sparser": {
        "schedule": fp.CubicSchedule(0.7, end=9, every=3),
        "regrowth": fp.RigL(0.5, end=12, every=2),
        "granularity": fp.Element(),
        "optimizer": "sgd",
    },
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_killed_loop_goes_on_to_the_same_bits(kind):
    options = CONFIGURATIONS[kind]
    whole, states = Loop(**options), []
    whole.run(13, lambda loop: states.append(loop.state()))
    for killed in (0, 1, 6, 7, 11):
        order = (0, 1, 2) if killed % 2 else (2, 1, 0)
        assert_same_bits(Loop(**options).load(states[killed], order).run(13), whole)


def test_the_state_of_a_pruner_alone_puts_its_masks_on():
    loop = Loop(schedule=fp.LinearSchedule(0.5, end=4)).run(4)
    other = Loop(schedule=fp.LinearSchedule(0.5, end=4))
    other.pruner.load_state_dict(loop.pruner.state_dict())
    for name in loop.pruner.masks:
        zeros = effective(loop.model, name) == 0
        assert zeros.any()
        assert torch.equal(effective(other.model, name) == 0, zeros)


def test_an_error_at_step_zero_leaves_the_model_alone():
    def fails(calibration):
        raise KeyboardInterrupt

    for granularity in (fp.Block(4, 4), fp.Unit()):
        model = mlp()
        snapshot = Snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            fp.Pruner(model, schedule=fp.OneShotSchedule(0.5), criterion=fails, granularity=granularity)
        snapshot.assert_unchanged()


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    loop = Loop(schedule=fp.LinearSchedule(0.5, end=4)).run(3)
    state, snapshot = loop.pruner.state_dict(), Snapshot(loop.model)
    other = Loop(schedule=fp.LinearSchedule(0.5, end=4), make=lambda: nn.Sequential(nn.Linear(17, 5)))
    smaller = Loop(schedule=fp.LinearSchedule(0.5, end=4), make=lambda: mlp(17, 21, 5))
    for wrong, message in (
        (Loop(schedule=fp.LinearSchedule(0.6, end=4)).pruner.state_dict(), "other arguments: schedule"),
        (
            Loop(schedule=fp.LinearSchedule(0.5, end=4), granularity=fp.Unit()).pruner.state_dict(),
            "other arguments: granularity",
        ),
        (other.pruner.state_dict(), "of another model"),
        (smaller.pruner.state_dict(), "mask of layer '0' must be bool of shape"),
        ({"steps": 3}, "`state` must be what Pruner.state_dict gave"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.pruner.load_state_dict(wrong)
        snapshot.assert_unchanged()
        assert loop.pruner.steps == 3
    loop.pruner.load_state_dict(state)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("criterion", "random"),
        ("scope", "layer"),
        ("floor", fp.Floor(max_sparsity=0.9)),
        ("cost", "bytes"),
        ("removed", "random"),
        ("regrowth", fp.RigL(end=4, every=1)),
        ("seed", 1),
    ],
)
def test_the_state_of_a_pruner_with_another_argument_is_refused(argument, value):
    options = {"schedule": fp.LinearSchedule(0.5, end=4)}
    other = Loop(**options, **{argument: value})
    with pytest.raises(ValueError, match=f"a pruner with other arguments: {argument}$"):
        Loop(**options).pruner.load_state_dict(other.pruner.state_dict())


def test_who_writes_into_a_state_changes_no_pruner():
    loop = Loop(schedule=fp.OneShotSchedule(0.5))
    before = loop.pruner.masks["0"].clone()
    state = loop.pruner.state_dict()
    state["masks"]["0"].zero_()
    assert torch.equal(loop.pruner.masks["0"], before)
    loop.pruner.load_state_dict(state)
    state["masks"]["0"].fill_(True)
    assert not loop.pruner.masks["0"].any()


@pytest.mark.parametrize("removed", ["random", "mean"])
def test_pieces_that_are_overwritten_learn_on_and_do_not_go_again(removed):
    schedule = fp.LinearSchedule(0.6, end=3)
    loop = Loop("sgd", schedule=schedule, removed=removed, with_optimizer=True)
    before, gone = effective(loop.model).clone(), ~loop.pruner.masks["0"]
    assert not any("parametrizations" in key for key in loop.model.state_dict())
    for step in (1, 2, 3):
        by_hand, optimizer = copy.deepcopy((loop.model, loop.optimizer))
        loop.run(step)
        mask = loop.pruner.masks["0"]
        assert not bool((mask & gone).any())
        new = ~mask & ~gone
        assert new.any()
        gone = ~mask
        # A step of SGD by hand says what all the others are, those that were overwritten before included.
        inputs, targets = loop.batches[step - 1]
        optimizer.zero_grad()
        F.cross_entropy(by_hand(inputs), targets).backward()
        optimizer.step()
        momentum = loop.optimizer.state[loop.model[0].weight]["momentum_buffer"]
        where = fp.Block(4, 4).expand(new, before.shape)
        assert not momentum[where].any()
        assert momentum[~where].any()
        assert torch.equal(effective(loop.model)[~where], effective(by_hand)[~where])
        assert bool((effective(loop.model)[where] != effective(by_hand)[where]).all())
    assert loop.pruner.sparsity() == pytest.approx(0.6, abs=0.05)
    assert bool((effective(loop.model) != before).any())
    last = effective(loop.model).clone()
    loop.run(4)
    where = fp.Block(4, 4).expand(gone, last.shape)
    assert bool((effective(loop.model)[where] != last[where]).any())


def test_random_weights_follow_the_seed():
    options = {"schedule": fp.LinearSchedule(0.6, end=3), "removed": "random"}
    first, second = Loop(**options).run(3), Loop(**options).run(3)
    assert_same_bits(first, second)
    other = Loop(**options, seed=1).run(3)
    assert not torch.equal(effective(first.model), effective(other.model))


def test_a_floor_and_the_layers_that_are_named_hold():
    loop = Loop(
        schedule=fp.LinearSchedule(0.95, end=2), floor=fp.Floor(blocks_per_row=1), include="0", scope="layer"
    )
    with pytest.warns(UserWarning, match="floors keep 0 above what was asked for"):
        loop.run(2)
    assert list(loop.pruner.masks) == ["0"]
    assert bool(loop.pruner.masks["0"].any(1).all())
    assert bool((loop.model[2].weight != 0).all())


@pytest.mark.parametrize("calls", [1, 2])
def test_a_step_that_an_error_ends_can_be_called_again(calls):
    fails = [False] * calls + [True, False, False]

    def magnitude(calibration):
        if fails.pop(0):
            raise KeyboardInterrupt
        return fp.criteria.Magnitude()(calibration)

    options = {"schedule": fp.LinearSchedule(0.6, end=3)}
    loop, whole = Loop(criterion=magnitude, **options), Loop(criterion="magnitude", **options).run(3)
    with pytest.raises(KeyboardInterrupt):
        loop.run(3)
    assert loop.pruner.steps == calls
    loop.pruner.step()
    assert loop.pruner.steps == calls + 1
    assert_same_bits(loop.run(3), whole)


def test_flops_are_pruned_where_they_are_asked_for():
    loop = Loop(
        schedule=fp.LinearSchedule(0.5, end=2),
        cost="flops",
        loader="batches",
        make=SmallConvNet,
        granularity=fp.Unit(),
    ).run(2)
    scores = fp.score(loop.model, loop.batches, criterion="magnitude", granularity=fp.Unit())
    left = total = 0.0
    for name, mask in loop.pruner.masks.items():
        costs = scores.weight_uses[name] * fp.Unit().sizes(scores.weight_shapes[name])
        left, total = left + float(costs[mask].sum()), total + float(costs.sum())
    assert 0.5 <= left / total < 0.6
    assert abs(loop.pruner.sparsity() - 0.5) > 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "cubic"}, TypeError, "`schedule` must be a fastprune Schedule, got str"),
        ({"cost": "latency"}, ValueError, "`cost` must be one of"),
        ({"removed": "median"}, ValueError, "`removed` must be 'zero', 'random' or 'mean'"),
        ({"granularity": "auto"}, TypeError, "`granularity` must be"),
        (
            {"criterion": "taylor"},
            TypeError,
            "`loader` must be an iterable of batches for criterion 'taylor'",
        ),
        ({"criterion": "size"}, ValueError, "`criterion` must be one of"),
        ({"loader": iter([])}, TypeError, "`loader` is iterated several times"),
        ({"optimizer": 0.1}, TypeError, r"`optimizer` must be a torch\.optim\.Optimizer, got float"),
        ({"regrowth": 0.3}, TypeError, r"`regrowth` must be an fp\.RigL, got float"),
        (
            {"regrowth": fp.RigL(end=5, every=5), "granularity": fp.Unit()},
            ValueError,
            r"`regrowth` needs fp\.Block",
        ),
        ({"regrowth": fp.RigL(end=5, every=5), "removed": "mean"}, ValueError, "`regrowth` needs removed='z"),
        ({"floor": fp.Floor(units=1)}, ValueError, "Floor `units` needs"),
        ({"floor": {"9": fp.Floor(units=1)}}, ValueError, "`floor` has '9', which matches no layer"),
        ({"include": "9"}, ValueError, "`include`"),
    ],
)
def test_a_pruner_names_what_is_wrong_and_leaves_the_model_alone(options, error, message):
    model = mlp()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        fp.Pruner(model, **{"schedule": fp.OneShotSchedule(0.5), **options})
    snapshot.assert_unchanged()
