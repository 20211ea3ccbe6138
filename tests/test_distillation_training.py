"""distill with schedulers, accumulation, clipping, mixed precision, penalties and constraints."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import fastprune as fp
from distillation_steps import assert_same_weights, divergence, reference_steps, sgd
from helpers import Snapshot, classification_batches, masked_mlp, mlp
from networks import SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread", "sparse_is_faster")


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_accumulated_batches_step_as_one_batch_of_all_their_samples(steps):
    student, teacher, batches = mlp(), mlp(), classification_batches((15, 1, 8, 2, 3))
    windows = [batches[begin : begin + steps] for begin in range(0, 5, steps)]
    expected = reference_steps(student, teacher, windows)
    fp.distill(student, teacher, batches, epochs=1, optimizer=sgd, accumulation_steps=steps, progress=False)
    assert_same_weights(student, expected)


@pytest.mark.parametrize(
    "loss_fn",
    [None, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5, 2.0, 3.0]), ignore_index=2)],
    ids=["plain", "weighted"],
)
def test_targets_that_are_left_out_or_weigh_more_count_over_the_whole_window(loss_fn):
    student, teacher = mlp(), mlp()
    batches = classification_batches((6, 5, 4))
    for (_, y), left_out in zip(batches, (5, 0, 2), strict=True):
        y[:left_out] = -100 if loss_fn is None else 2
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    expected, double = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    logits = expected(x.double())
    hard = (
        F.cross_entropy(logits, y)
        if loss_fn is None
        else F.cross_entropy(logits, y, loss_fn.weight.double(), ignore_index=2)
    )
    loss = hard / 2 + divergence(logits, double(x.double())) / 2
    loss.backward()
    optimizer.step()
    history = fp.distill(
        student,
        teacher,
        batches,
        epochs=1,
        optimizer=sgd,
        accumulation_steps=3,
        loss_fn=loss_fn,
        progress=False,
    )
    assert_same_weights(student, expected)
    assert history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_penalty_counts_once_for_each_step_and_a_constraint_runs_after_it():
    student, teacher, batches = mlp(), mlp(), classification_batches((6, 5, 4))
    seen = []

    def penalty(model):
        return 0.1 * sum(parameter.square().sum() for parameter in model.parameters())

    def after_step(model):
        assert not torch.is_grad_enabled()
        seen.append(model)

    expected = reference_steps(
        student, teacher, [batches[:2], batches[2:]], lambda model, loss: loss + penalty(model)
    )
    options = {"accumulation_steps": 2, "penalty": penalty, "after_step": after_step}
    fp.distill(student, teacher, batches, epochs=1, optimizer=sgd, progress=False, **options)
    assert_same_weights(student, expected)
    assert seen == [student, student]


def test_gradients_are_clipped_to_the_norm():
    student, teacher, batches = mlp(), mlp(), classification_batches((6, 5, 4))
    before = [parameter.detach().clone() for parameter in student.parameters()]
    options = {"max_grad_norm": 1e-3, "accumulation_steps": 3, "optimizer": sgd}
    fp.distill(student, teacher, batches, epochs=1, progress=False, **options)
    moved = torch.cat([(p - old).flatten() for p, old in zip(student.parameters(), before, strict=True)])
    assert float(moved.double().norm().detach()) == pytest.approx(0.1 * 1e-3, rel=1e-2)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_scheduler_steps_once_each_epoch_or_once_each_update(interval):
    rates = {"epoch": [0.1, 0.05, 0.025], "step": [0.1, 0.025, 0.00625]}[interval]
    student, batches = mlp(), classification_batches((6, 5, 4))
    seen, made = [], []

    def scheduler(optimizer):
        made.append(optimizer)
        return lr_scheduler.StepLR(optimizer, 1, 0.5)

    def after_step(model):
        seen.append(made[0].param_groups[0]["lr"])

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that steps before its optimizer
        fp.distill(
            student,
            mlp(),
            batches,
            epochs=3,
            optimizer=sgd,
            scheduler=scheduler,
            scheduler_interval=interval,
            accumulation_steps=2,
            after_step=after_step,
            progress=False,
        )
    expected = [rates[0]] * 2 + [rates[1]] * 2 + [rates[2]] * 2
    if interval == "step":
        expected = [0.1 * 0.5**step for step in range(6)]
    assert seen == pytest.approx(expected)
    assert len(made) == 1


def test_a_scheduler_of_ones_own_optimizer_and_one_that_reads_the_loss():
    student = mlp()
    optimizer = torch.optim.SGD(student.parameters(), 1e-9)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5, eps=0.0)
    batches = classification_batches((6, 5))
    history = fp.distill(
        student, mlp(), batches, epochs=3, optimizer=optimizer, scheduler=plateau, progress=False
    )
    assert optimizer.param_groups[0]["lr"] == 0.25e-9
    assert plateau.best == pytest.approx(history[0]["loss"])


def test_in_mutual_mode_a_function_makes_a_scheduler_for_each_optimizer():
    made = []

    def scheduler(optimizer):
        made.append(lr_scheduler.StepLR(optimizer, 1, 0.1))
        return made[-1]

    options = {"optimizer": sgd, "scheduler": scheduler, "mode": "mutual", "progress": False}
    fp.distill(mlp(), mlp(), classification_batches((6, 5)), epochs=2, **options)
    assert [s.get_last_lr() for s in made] == [[pytest.approx(1e-3)]] * 2
    assert made[0].optimizer is not made[1].optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["one_way", "mutual"])
def test_mixed_precision_computes_in_half_and_keeps_weights_and_losses_in_float32(dtype, mode):
    student, teacher, batches = mlp(), mlp(), classification_batches((15, 8, 1))
    plain = copy.deepcopy(student), copy.deepcopy(teacher)
    seen = []
    for model in (student, teacher):
        model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def soft_loss(ours, theirs):
        seen.extend([ours.dtype, theirs.dtype])
        return fp.distillation_loss(ours, theirs)

    options = {"epochs": 2, "mode": mode, "optimizer": sgd, "features": {"1": "1"}, "progress": False}
    history = fp.distill(
        student, teacher, batches, autocast_dtype=dtype, soft_loss=soft_loss, max_grad_norm=10.0, **options
    )
    expected = fp.distill(*plain, batches, **options)
    assert set(seen) == {dtype}
    assert history[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.02)
    assert history[-1]["loss"] != expected[-1]["loss"]
    for model, other in zip((student, teacher), plain, strict=True):
        for found, parameter in zip(model.parameters(), other.parameters(), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, parameter, rtol=0.05, atol=0.01)


def test_a_float16_gradient_that_would_vanish_is_scaled():
    x, y = torch.randn(4, 7), torch.zeros(4, dtype=torch.long)
    student = mlp()
    before = student[0].weight.detach().clone()

    def tiny(logits, targets):
        return logits.float().sum() * 1e-9  # a gradient that is 0 in float16

    options = {"hard_label_weight": 1.0, "loss_fn": tiny, "optimizer": lambda p: torch.optim.SGD(p, 1e8)}
    fp.distill(student, mlp(), [(x, y)], epochs=1, autocast_dtype=torch.float16, progress=False, **options)
    assert bool((student[0].weight != before).any())


def test_a_step_that_a_scaler_skips_moves_neither_weights_nor_scheduler(monkeypatch):
    class Overflowing(torch.amp.GradScaler):
        def __init__(self, device):
            super().__init__(device, init_scale=2.0**127, backoff_factor=2.0**-110)

    monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    seen, schedulers = [], []

    def scheduler(optimizer):
        schedulers.append(lr_scheduler.StepLR(optimizer, 1, 0.5))
        return schedulers[-1]

    fp.distill(
        mlp(),
        mlp(),
        classification_batches((4, 4, 4)),
        epochs=1,
        optimizer=sgd,
        scheduler=scheduler,
        scheduler_interval="step",
        after_step=seen.append,
        autocast_dtype=torch.float16,
        progress=False,
    )
    assert len(seen) == 2
    assert schedulers[0].get_last_lr() == [0.1 * 0.5**2]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


def masked_conv_net():
    model = SmallConvNet()
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4), exclude="depthwise")
    return fp.apply_masks_(model, scores.select(sparsity=0.5, scope="layer")), torch.randn(4, 3, 7, 5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("sparse", [False, True])
def test_masked_weights_are_exactly_zero_after_each_step(optimizer, network, sparse):
    model, x = masked_mlp(0.5) if network == "mlp" else masked_conv_net()
    teacher = mlp(17, 20, 10) if network == "mlp" else SmallConvNet()
    layers = {"mlp": ["0", "2"], "conv": ["conv1", "conv2", "skip", "head"]}[network]
    features = {"mlp": {"0": "0"}, "conv": {"conv1": "conv1", "norm2": "norm2"}}[network]
    if sparse:
        fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always")
        kinds = {type(model.get_submodule(name)) for name in layers}
        assert kinds <= {fp.BlockSparseLinear, fp.BlockSparseConv2d}
    zeros = {name: model.get_submodule(name).weight == 0 for name in layers}
    assert all(bool(mask.any()) and not bool(mask.all()) for mask in zeros.values())
    before = {name: model.get_submodule(name).weight.detach().clone() for name in layers}
    steps = []

    def after_step(trained):
        fp.clamp_weights_(trained, 0.01, 2.0)  # zero is not in the range
        fp.max_norm_(trained, 3.0)
        for name in layers:
            weight = trained.get_submodule(name).weight
            assert bool((weight[zeros[name]] == 0).all()), name
            assert bool(weight.isfinite().all()), name
        steps.append(1)

    loader = classification_batches((9, 4, 2), x.shape[1:], 10 if network == "mlp" else 5)
    fp.distill(
        model,
        teacher,
        loader,
        epochs=2,
        optimizer=OPTIMIZERS[optimizer],
        scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        features=features,
        accumulation_steps=2,
        max_grad_norm=1.0,
        autocast_dtype=torch.bfloat16,
        penalty=lambda m: 1e-4 * fp.group_lasso_penalty(m, fp.Block(4, 4)),
        after_step=after_step,
        soft_loss="mse",
        progress=False,
    )
    assert len(steps) == 4
    for name in layers:
        weight = model.get_submodule(name).weight.detach()
        assert bool((weight != before[name])[~zeros[name]].any()), name


@pytest.mark.parametrize("soft_loss", ["kl", "mse", lambda ours, theirs: (ours - theirs).abs().mean()])
def test_the_soft_loss_is_the_one_that_was_chosen(soft_loss):
    student, teacher, batches = mlp(), mlp(), classification_batches((6, 5))
    functions = {"kl": divergence, "mse": lambda ours, theirs: (ours - theirs.detach()).square().mean()}
    function = functions[soft_loss] if isinstance(soft_loss, str) else soft_loss
    expected = copy.deepcopy(student).double()
    double = copy.deepcopy(teacher).double()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    for x, _ in batches:
        optimizer.zero_grad()
        function(expected(x.double()), double(x.double()).detach()).backward()
        optimizer.step()
    options = {"hard_label_weight": 0.0, "soft_loss": soft_loss, "optimizer": sgd}
    fp.distill(student, teacher, batches, epochs=1, progress=False, **options)
    assert_same_weights(student, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"soft_loss": "l1"}, ValueError, "`soft_loss` must be"),
        ({"soft_loss": nn.MSELoss}, ValueError, "`soft_loss` must be"),
        ({"soft_loss": lambda ours, theirs: ours - theirs}, ValueError, "`soft_loss` must give a scalar"),
        ({"penalty": 1e-4}, TypeError, "`penalty` must be a function"),
        ({"penalty": lambda model: 3.0}, ValueError, "`penalty` must give a scalar tensor, got float"),
        ({"after_step": "clamp"}, TypeError, "`after_step` must be a function"),
        ({"features": {"7": "1"}}, ValueError, "`features` must name layers of Sequential, got '7'"),
        ({"features": {"1": "layer"}}, ValueError, "`features` must name layers of Sequential, got 'layer'"),
        ({"features": "1"}, TypeError, "`features` must map names"),
        ({"feature_weight": float("nan")}, ValueError, "`feature_weight` must be"),
        ({"features": {"1": "1"}, "feature_weight": -1.0}, ValueError, "`feature_weight` must be"),
        ({"accumulation_steps": 0}, ValueError, "`accumulation_steps` must be"),
        ({"max_grad_norm": -1.0}, ValueError, "`max_grad_norm` must be"),
        ({"autocast_dtype": torch.float32}, ValueError, "`autocast_dtype` must be"),
        ({"autocast_dtype": "bfloat16"}, ValueError, "`autocast_dtype` must be"),
        ({"scheduler": "cosine"}, TypeError, "`scheduler` must be"),
        ({"scheduler": lambda optimizer: 3}, TypeError, "`scheduler` must be"),
        ({"scheduler": "other"}, ValueError, "`scheduler` must be one of the optimizer"),
        ({"scheduler_interval": "batch"}, ValueError, "`scheduler_interval` must be"),
        (
            {"scheduler": lr_scheduler.ReduceLROnPlateau, "scheduler_interval": "step"},
            ValueError,
            "`scheduler_interval` must be 'epoch' for a ReduceLROnPlateau",
        ),
        ({"optimizer": torch.optim.LBFGS}, TypeError, "`optimizer` must .* needs no closure, got LBFGS"),
        ({"optimizer": "lbfgs"}, TypeError, "`optimizer` must .* needs no closure, got LBFGS"),
    ],
)
def test_a_wrong_argument_is_named_and_the_models_are_unchanged(arguments, error, message):
    student, teacher = mlp(), mlp()
    if arguments.get("scheduler") == "other":
        arguments = {"scheduler": lr_scheduler.StepLR(torch.optim.SGD(mlp().parameters(), 0.1), 1)}
    if arguments.get("optimizer") == "lbfgs":
        arguments = {"optimizer": torch.optim.LBFGS(student.parameters())}
    snapshots = [Snapshot(student), Snapshot(teacher)]
    with pytest.raises(error, match=message):
        fp.distill(student, teacher, classification_batches((4,)), epochs=1, progress=False, **arguments)
    for snapshot in snapshots:
        snapshot.assert_unchanged()
