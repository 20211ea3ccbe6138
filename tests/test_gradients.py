"""Accumulation, clipping and thresholds: the gradient of one large batch, and weights that do not move."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from helpers import Snapshot, classification_batches, masked_mlp, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def sgd(model, rate=0.1):
    return torch.optim.SGD(model.parameters(), rate)


def gradients_of(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("sizes", [(15, 8, 1), (1, 17, 129, 2), (5,)])
def test_accumulated_batches_give_the_gradient_of_one_batch_of_all_their_samples(sizes):
    model, batches = mlp(), classification_batches(sizes)
    whole = copy.deepcopy(model).double()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(whole(inputs.double()), targets).backward()
    accumulator = fp.GradientAccumulator(sgd(model), len(sizes))
    updates = [accumulator.backward(F.cross_entropy(model(x), y), weight=len(x)) for x, y in batches]
    assert updates == [False] * (len(sizes) - 1) + [True]
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-7)


def test_every_so_many_batches_make_a_step_and_a_flush_makes_one_of_the_rest():
    model, batches = mlp(), classification_batches((4, 4, 4, 4, 4))
    reference = copy.deepcopy(model).double()
    optimizer = sgd(reference)
    for part in (batches[:2], batches[2:4], batches[4:]):
        optimizer.zero_grad()
        inputs, targets = (torch.cat(tensors) for tensors in zip(*part, strict=True))
        F.cross_entropy(reference(inputs.double()), targets).backward()
        optimizer.step()
    accumulator = fp.GradientAccumulator(sgd(model), 2)
    updates = [accumulator.backward(F.cross_entropy(model(x), y)) for x, y in batches]
    assert updates == [False, True, False, True, False]
    assert accumulator.flush()
    assert not accumulator.flush()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_one_batch_a_step_is_the_plain_loop_bit_for_bit():
    model = mlp()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plain.parameters(), 0.01)
    accumulator = fp.GradientAccumulator(torch.optim.Adam(model.parameters(), 0.01))
    for x, y in classification_batches((15, 8, 1)):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        assert accumulator.backward(F.cross_entropy(model(x), y), weight=len(x))
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_the_norm_that_is_clipped_is_that_of_the_whole_step():
    model, batches = mlp(), classification_batches((15, 1))
    whole = copy.deepcopy(model).double()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    F.cross_entropy(whole(inputs.double()), targets).backward()
    norm = torch.cat([p.grad.flatten() for p in whole.parameters()]).norm()
    for limit, factor in ((float(norm) / 3, 1 / 3), (float(norm) * 3, 1.0)):
        accumulator = fp.GradientAccumulator(sgd(model, 0.0), 2, max_grad_norm=limit)
        for x, y in batches:
            accumulator.backward(F.cross_entropy(model(x), y), weight=len(x))
        for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found.grad.double(), expected.grad * factor, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_overflows_is_reported_where_it_is_clipped():
    model = mlp()
    before = copy.deepcopy(model)
    accumulator = fp.GradientAccumulator(sgd(model), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="the gradient became NaN or inf"):
        accumulator.backward(model(torch.randn(4, 7)).sum() * torch.tensor(float("inf")))
    for found, expected in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_a_scaler_leaves_the_gradient_as_it_was_and_skips_a_step_that_overflows(max_grad_norm):
    model = mlp()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    accumulator = fp.GradientAccumulator(sgd(model), 2, max_grad_norm=max_grad_norm, grad_scaler=scaler)
    expected = fp.GradientAccumulator(sgd(plain), 2, max_grad_norm=max_grad_norm)
    for x, y in classification_batches((15, 8, 1, 9)):
        updated = accumulator.backward(F.cross_entropy(model(x), y), weight=len(x))
        assert updated == expected.backward(F.cross_entropy(plain(x), y), weight=len(x))
    for found, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-7)
    assert scaler.get_scale() == 2.0**11  # it grew after two steps
    before = copy.deepcopy(model)
    accumulator.backward(model(torch.randn(4, 7)).sum() * 1e38)
    assert not accumulator.backward(model(torch.randn(4, 7)).sum())
    assert scaler.get_scale() == 2.0**10
    for found, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(found, other)


def test_a_sparse_gradient_is_accumulated():
    for sparse in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(9, 5, sparse=sparse))
        accumulator = fp.GradientAccumulator(sgd(model), 2)
        accumulator.backward(model(torch.tensor([1, 2])).square().mean(), weight=2)
        accumulator.backward(model(torch.tensor([2, 5, 8])).square().mean(), weight=3)
        if not sparse:
            expected = model[0].weight.detach().clone()
    torch.testing.assert_close(model[0].weight, expected)


THRESHOLDS = [{"local": 0.01}, {"global_": 0.05}, {"global_": 1e-4}, {"local": 0.01, "global_": 1e-4}]


def small_entries(model, local=None, global_=None):
    """Which entries of each gradient are below, by plain formulas in float64."""
    total = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()) ** 0.5
    return [
        (p.grad.double().abs() < (local or 0.0)) | torch.tensor(global_ is not None and total < global_)
        for p in model.parameters()
    ]


def backward(model, scale=1.0):
    x, y = classification_batches((15,))[0]
    model.zero_grad()
    (F.cross_entropy(model(x), y) * scale).backward()


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_small_gradients_become_zero_and_the_others_stay(thresholds, scale):
    model = mlp()
    backward(model, scale)
    before = gradients_of(model)
    small = small_entries(model, **thresholds)
    count = fp.zero_small_gradients_(model, **thresholds)
    assert int(count) == sum(int(entries.sum()) for entries in small)
    for parameter, gradient, entries in zip(model.parameters(), before, small, strict=True):
        assert torch.equal(parameter.grad, gradient.masked_fill(entries, 0.0))


def test_the_thresholds_of_these_tests_tell_gradients_apart():
    model = mlp()
    backward(model)
    for thresholds, expected in zip(THRESHOLDS, ("some", "none", "none", "some"), strict=True):
        entries = torch.cat([small.flatten() for small in small_entries(model, **thresholds)])
        assert ("some" if 0 < int(entries.sum()) < len(entries) else "none") == expected, thresholds
    backward(model, 0.01)
    assert all(bool(small.all()) for small in small_entries(model, global_=0.05))


def test_a_small_sparse_gradient_and_a_model_without_gradients():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    assert int(fp.zero_small_gradients_(model, local=1.0)) == 0
    model[0](torch.tensor([1, 3])).mul(torch.tensor([[1e-3, 1.0], [1.0, 1e-3]])).sum().backward()
    fp.zero_small_gradients_(model[0], local=0.1)
    expected = torch.zeros(4, 2)
    expected[1, 1] = expected[3, 0] = 1.0
    assert torch.equal(model[0].weight.grad.to_dense(), expected)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_weights_with_a_small_gradient_do_not_move_and_the_others_as_without_threshold(optimizer, thresholds):
    model = mlp()
    backward(model)
    chosen = OPTIMIZERS[optimizer](model.parameters())
    chosen.step()  # a momentum that would move them
    threshold = fp.GradientThreshold(chosen, **thresholds)
    for scale in (1.0, 0.01):
        backward(model, scale)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        small = small_entries(model, **thresholds)
        free = copy.deepcopy(model)
        for parameter, other in zip(model.parameters(), free.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        free_optimizer = OPTIMIZERS[optimizer](free.parameters())
        free_optimizer.load_state_dict(copy.deepcopy(chosen.state_dict()))
        free_optimizer.step()
        chosen.step()
        for parameter, other, old, entries in zip(
            model.parameters(), free.parameters(), before, small, strict=True
        ):
            assert torch.equal(parameter, torch.where(entries, old, other))
            assert bool((other != old)[entries].all())  # without the threshold they would have moved
    threshold.remove()
    backward(model, 1e-9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    chosen.step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_gradient_of_just_the_threshold_counts():
    for thresholds in ({"local": 0.25}, {"global_": 0.5}):
        model = nn.Sequential(nn.Linear(4, 1, bias=False))
        model[0].weight.grad = torch.full((1, 4), 0.25)  # of norm 1/2
        before = model[0].weight.detach().clone()
        assert int(fp.zero_small_gradients_(model, **thresholds)) == 0
        optimizer = sgd(model)
        fp.GradientThreshold(optimizer, **thresholds)
        optimizer.step()
        assert bool((model[0].weight != before).all())


def test_a_threshold_that_is_removed_leaves_no_hook():
    optimizer = sgd(mlp())
    threshold = fp.GradientThreshold(optimizer, local=0.1)
    assert optimizer._optimizer_step_pre_hooks
    threshold.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_parameter_without_a_gradient_is_left_alone_by_weight_decay():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    accumulator = fp.GradientAccumulator(torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5))
    x = torch.randn(4, 3)
    accumulator.backward((model[0](x) + model[1](x)).sum())
    before = model[1].weight.detach().clone()
    accumulator.backward(model[0](x).sum())
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("threshold", [{"local": 0.01}, {"global_": 0.1}], ids=str)
def test_a_threshold_reads_gradients_unscaled(fused, threshold):
    model = mlp()
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # which fused optimizers divide by in their step
    fp.GradientThreshold(optimizer, **threshold)
    for gradient, moves in ((0.005, False), (0.02, True)):
        optimizer.zero_grad()
        scaler.scale(gradient * sum(parameter.sum() for parameter in model.parameters())).backward()
        scaler.step(optimizer)
        scaler.update()
        for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
            assert bool((parameter != old).all()) == moves
            assert torch.equal(parameter, old) != moves


def test_a_threshold_works_within_distillation_and_masked_weights_stay_zero():
    student, _ = masked_mlp(0.5)
    zeros = student[0].weight == 0
    assert bool(zeros.any())
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    fp.GradientThreshold(optimizer, global_=1e9)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    loader = classification_batches((9, 4), (17,), 10)
    fp.distill(student, mlp(17, 33, 10), loader, epochs=1, optimizer=optimizer, progress=False)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert bool((student[0].weight[zeros] == 0).all())


def test_a_step_with_a_closure_is_refused():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    fp.GradientThreshold(optimizer, local=0.1)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="`optimizer` must step without a closure"):
        optimizer.step(lambda: model(torch.randn(4, 7)).sum())
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fp.GradientAccumulator(m), TypeError, "`optimizer` must be"),
        (lambda m: fp.GradientAccumulator(sgd(m), 0), ValueError, "`steps` must be"),
        (lambda m: fp.GradientAccumulator(sgd(m), 1.5), ValueError, "`steps` must be"),
        (lambda m: fp.GradientAccumulator(sgd(m), max_grad_norm=0), ValueError, "`max_grad_norm` must be"),
        (lambda m: fp.GradientAccumulator(sgd(m), grad_scaler=2.0), TypeError, "`grad_scaler` must be"),
        (lambda m: fp.GradientAccumulator(sgd(m)).backward(m[0].bias.sum(), 0), ValueError, "`weight` must"),
        (lambda m: fp.zero_small_gradients_(m), ValueError, "one of `local` and `global_`"),
        (lambda m: fp.zero_small_gradients_(m, local=-1.0), ValueError, "`local` must be"),
        (lambda m: fp.zero_small_gradients_(m, global_=float("nan")), ValueError, "`global_` must be"),
        (lambda m: fp.zero_small_gradients_(3, local=1.0), TypeError, "`model` must be"),
        (lambda m: fp.GradientThreshold(m, local=1.0), TypeError, "`optimizer` must be"),
        (lambda m: fp.GradientThreshold(sgd(m)), ValueError, "one of `local` and `global_`"),
        (lambda m: fp.GradientThreshold(sgd(m), local=True), ValueError, "`local` must be"),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    model = mlp()
    snapshot = Snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    snapshot.assert_unchanged()
