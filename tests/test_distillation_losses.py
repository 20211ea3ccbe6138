"""The losses of distillation: each against its formula in float64, features against projections by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.distillation_losses import ChannelProjection
from helpers import mlp

pytestmark = pytest.mark.usefixtures("one_thread")

distillation_loss = fp.distillation_loss


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (1, 151)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_mean_divergence_times_the_temperature_squared(shape, temperature):
    student, teacher = torch.randn(shape), torch.randn(shape)
    p = F.softmax(teacher.double() / temperature, 1)
    q = F.softmax(student.double() / temperature, 1)
    expected = (p * (p.log() - q.log())).sum(1).mean() * temperature**2
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-6)


def test_a_high_temperature_keeps_the_size_of_the_gradient():
    teacher = torch.randn(8, 5)
    sizes = []
    for temperature in (20.0, 80.0):
        student = torch.zeros(8, 5, requires_grad=True)
        distillation_loss(student, teacher, temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_a_single_logit_is_the_log_odds_of_two_classes(shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    p, q = torch.sigmoid(teacher.double() / 2), torch.sigmoid(student.double() / 2)
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(
        float(divergence.mean() * 4), rel=1e-5
    )


def test_logits_in_float64_are_compared_in_float64_and_halves_in_float32():
    student, teacher = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    p, q = F.softmax(teacher / 3, 1), F.softmax(student / 3, 1)
    expected = (p * (p / q).log()).sum(1).mean() * 9
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), expected, rtol=1e-13, atol=0)
    for dtype in (torch.float16, torch.bfloat16):
        for loss in (distillation_loss, fp.logit_mse_loss):
            halves = [student.to(dtype), teacher.to(dtype)]
            assert loss(*halves).dtype == torch.float32
            torch.testing.assert_close(loss(*halves), loss(*(h.float() for h in halves)), rtol=0, atol=0)


def test_a_temperature_that_is_not_above_zero_is_refused():
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`temperature` must be above 0"):
            distillation_loss(torch.randn(2, 3), torch.randn(2, 3), temperature)


@pytest.mark.parametrize("shape", [(6, 5), (6,), (6, 1), (6, 5, 3), (1, 151)])
def test_the_loss_on_logits_is_their_mean_squared_difference(shape):
    student = torch.randn(shape, requires_grad=True)
    teacher = torch.randn(shape)
    difference = student.detach().double() - teacher.double()
    loss = fp.logit_mse_loss(student, teacher)
    assert loss.item() == pytest.approx(float((difference**2).sum()) / difference.numel(), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(
        student.grad.double(), 2 * difference / difference.numel(), rtol=1e-5, atol=1e-7
    )


def test_at_a_high_temperature_the_divergence_is_half_the_squared_difference_of_centred_logits():
    student, teacher = torch.randn(2, 9, 5, dtype=torch.float64).unbind()
    difference = (student - teacher) - (student - teacher).mean(1, keepdim=True)
    expected = (difference**2).mean() / 2
    torch.testing.assert_close(distillation_loss(student, teacher, 1e4), expected, rtol=1e-3, atol=0)


def test_logits_of_other_shapes_are_refused():
    for loss in (distillation_loss, fp.logit_mse_loss):
        with pytest.raises(ValueError, match="`teacher` must give outputs of the student's shape"):
            loss(torch.randn(4, 5), torch.randn(4, 1))


def squared_error(ours, theirs):
    return float(((ours.detach().double() - theirs.detach().double()) ** 2).mean())


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 3), (6, 9, 5, 7), (1, 151)])
def test_features_of_equal_shapes_have_the_mean_squared_error_and_no_projection(shape):
    ours = {"a": torch.randn(shape, requires_grad=True), "b": torch.randn(shape)}
    theirs = {"x": torch.randn(shape), "y": torch.randn(shape)}
    loss_fn = fp.FeatureLoss({"a": "x", "b": "y"})
    loss = loss_fn(ours, theirs)
    expected = squared_error(ours["a"], theirs["x"]) + squared_error(ours["b"], theirs["y"])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert list(loss_fn.parameters()) == []
    loss.backward()
    torch.testing.assert_close(
        ours["a"].grad, 2 * (ours["a"].detach() - theirs["x"]) / theirs["x"].numel(), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "equation"),
    [
        ((6, 9), (6, 15), "ni,oi->no"),
        ((6, 3, 9), (6, 3, 17), "nli,oi->nlo"),
        ((6, 9, 3), (6, 17, 3), "nil,oi->nol"),
        ((6, 9, 5, 7), (6, 1, 5, 7), "nihw,oi->nohw"),
        ((6, 5, 7, 9), (6, 5, 7, 15), "nhwi,oi->nhwo"),
        ((2, 9, 3, 5, 7), (2, 4, 3, 5, 7), "nidhw,oi->nodhw"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_of_other_widths_are_projected_channel_by_channel(
    student_shape, teacher_shape, equation, dtype
):
    ours, theirs = torch.randn(student_shape, dtype=dtype), torch.randn(teacher_shape, dtype=dtype)
    loss_fn = fp.FeatureLoss([("a", "x")])
    (weight, bias) = loss_fn.make_projections({"a": ours}, {"x": theirs})
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dim = next(d for d in range(len(student_shape)) if student_shape[d] != teacher_shape[d])
    assert list(weight.shape) == [teacher_shape[dim], student_shape[dim]]
    projected = torch.einsum(equation, ours.double(), weight.detach().double())
    shape = [1] * len(teacher_shape)
    shape[dim] = -1
    expected = squared_error(projected + bias.detach().double().view(shape), theirs)
    loss = loss_fn({"a": ours}, {"x": theirs})
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert bool((weight.grad != 0).any())
    assert bool((bias.grad != 0).any())
    assert loss_fn.make_projections({"a": ours}, {"x": theirs}) == []
    assert [id(p) for p in loss_fn.parameters()] == [id(weight), id(bias)]


def test_a_1x1_convolution_is_the_linear_map_of_the_channels():
    projection = ChannelProjection(9, 5, dim=1)
    features = torch.randn(2, 9, 3, 7)
    linear = projection.linear(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(projection(features), linear, rtol=1e-5, atol=1e-6)


def test_features_in_half_precision_are_compared_in_float32():
    ours, theirs = ({"a": torch.randn(129, 151).to(torch.bfloat16)} for _ in range(2))
    loss = fp.FeatureLoss({"a": "a"})(ours, theirs)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(squared_error(ours["a"], theirs["a"]), rel=1e-5)


def test_no_gradient_flows_to_the_teacher():
    ours, theirs = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    fp.FeatureLoss({"a": "x"})({"a": ours}, {"x": theirs}).backward()
    assert theirs.grad is None
    assert ours.grad is not None


def test_ones_own_projection_and_loss_take_the_place_of_the_defaults():
    ours, theirs = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 4, 4)
    own = nn.Conv2d(3, 5, 2, stride=2)
    loss_fn = fp.FeatureLoss({"a": "x"}, projections={"a": own}, loss_fn=F.l1_loss)
    expected = F.l1_loss(own(ours), theirs)
    assert torch.equal(loss_fn({"a": ours}, {"x": theirs}), expected)
    assert set(loss_fn.parameters()) == set(own.parameters())
    with pytest.raises(
        ValueError, match=r"the projection gives shape \[4, 5, 4, 4\], expected \[4, 6, 4, 4\]"
    ):
        loss_fn({"a": ours}, {"x": torch.randn(4, 6, 4, 4)})


def test_a_layer_may_learn_from_several_and_keeps_a_projection_for_each():
    ours, theirs = {"a": torch.randn(4, 3)}, {"x": torch.randn(4, 5), "y": torch.randn(4, 5)}
    loss_fn = fp.FeatureLoss([("a", "x"), ("a", "y")])
    loss_fn(ours, theirs)
    assert [list(p.shape) for p in loss_fn.parameters()] == [[5, 3], [5], [5, 3], [5]]
    assert loss_fn.student_layers == ["a"]
    assert loss_fn.teacher_layers == ["x", "y"]
    assert not any(isinstance(module, ChannelProjection) for module in copy.deepcopy(mlp()).modules())


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [((4, 3, 8, 8), (4, 5, 4, 4)), ((4, 3), (5, 3)), ((4, 3), (4, 3, 1)), ((4, 3, 3), (4, 5, 5))],
)
def test_features_that_no_projection_brings_together_are_refused(student_shape, teacher_shape):
    loss_fn = fp.FeatureLoss({"a": "x"})
    with pytest.raises(ValueError, match="`features` pair 'a' with 'x': a projection needs features that"):
        loss_fn({"a": torch.randn(student_shape)}, {"x": torch.randn(teacher_shape)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": {}}, ValueError, "`features` must name at least one pair"),
        ({"features": "layer"}, TypeError, "`features` must map names"),
        ({"features": 3}, TypeError, "`features` must map names"),
        ({"features": [("a", "x", "y")]}, TypeError, "`features` must hold pairs"),
        ({"features": {"a": 1}}, TypeError, "`features` must hold pairs"),
        ({"features": [("a", "x"), ("a", "x")]}, ValueError, "each pair of layers once"),
        ({"features": {"a": "x"}, "loss_fn": "mse"}, TypeError, "`loss_fn` must be callable"),
        ({"features": {"a": "x"}, "loss_fn": nn.MSELoss}, TypeError, "`loss_fn` must be callable"),
        ({"features": {"a": "x"}, "projections": {"a": 3}}, TypeError, "`projections` must hold"),
        ({"features": {"a": "x"}, "projections": {"b": nn.ReLU()}}, ValueError, "`projections` must name"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fp.FeatureLoss(**arguments)


def test_features_that_were_not_captured_are_named():
    loss_fn = fp.FeatureLoss({"a": "x"})
    with pytest.raises(
        ValueError, match="`features` names the student's layer 'a', which its forward did not"
    ):
        loss_fn({}, {"x": torch.randn(4, 3)})
    with pytest.raises(
        ValueError, match="`features` names the teacher's layer 'x', which its forward did not"
    ):
        loss_fn({"a": torch.randn(4, 3)}, {})
