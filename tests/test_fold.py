"""Folding of batch norms in sparsify_: what goes, what stays, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.modules import fold as fold_module
from helpers import Snapshot
from networks import (
    DataDependent,
    MobileBlock,
    NormOverSteps,
    SamePadded,
    SharedNorm,
    SmallConvNet,
    SmallResNet,
    SmallVGG,
    StaticallyPadded,
    spoil_norm,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def mask(model, granularity=fp.Block(4, 4), **options):  # noqa: B008
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, **options)
    return fp.apply_masks_(model, scores.select(sparsity=0.5, scope="layer"))


def fold(model, x, **options):
    options = {"blocksize": (4, 4), "policy": "always", "fold_batch_norm": True, **options}
    return fp.sparsify_(model, example_inputs=x, **options)


def norms_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def notes(model, name):
    return next(line for line in fp.explain(model).splitlines() if line.startswith(f"{name} ")).split("  ")[
        -1
    ]


@pytest.mark.parametrize("make", [SmallConvNet, SmallResNet, MobileBlock, SmallVGG])
@pytest.mark.parametrize("policy", ["always", "none is faster"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_models_give_the_same_dense_or_sparse(fake_medians, make, policy, dtype):
    model = mask(make().to(dtype).eval(), fp.Block(2, 3))
    x = torch.randn(3, 3, *((9, 7) if make is MobileBlock else (7, 5)), dtype=dtype)
    expected = model(x)
    assert norms_of(model)
    fake_medians(lambda functions, **options: [1.0, 2.0, 1.0, 2.0][: len(functions)])
    fold(model, x, blocksize=(2, 3), policy="always" if policy == "always" else "measured")
    assert not norms_of(model)
    sparse = [m for m in model.modules() if isinstance(m, (fp.BlockSparseConv2d, fp.BlockSparseLinear))]
    assert bool(sparse) is (policy == "always")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(model(x), expected, **tolerance)
    for other in (x[:1], torch.cat([x, x])):
        assert model(other).shape == (len(other), 5)


def test_layers_without_masks_are_folded_too():
    model = SmallVGG().eval()
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    with pytest.warns(UserWarning, match="found no masked layer"):
        fold(model, x)
    assert not norms_of(model)
    assert type(model[0]) is nn.Conv2d
    assert model[0].bias.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert notes(model, "1") == "BatchNorm2d folded into 0"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2])
def test_norms_and_layers_with_and_without_parameters(affine, bias, dims):
    layer = nn.Linear(7, 9, bias=bias) if dims == 1 else nn.Conv2d(7, 9, 3, bias=bias)
    norm = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(9, affine=affine, eps=0.1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model = mask(nn.Sequential(layer, norm).double().eval())
    x = torch.randn(5, 7, *[6] * (2 * (dims - 1)), dtype=torch.float64)
    expected = model(x)
    fold(model, x)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("norm", [True, False])
def test_masked_units_and_their_norms_are_folded_as_they_are(norm):
    model = SmallConvNet().eval()
    x = torch.randn(2, 3, 7, 5)
    loader = [(x, torch.tensor([0, 1]))]
    scores = fp.score(model, loader, granularity=fp.Unit(norm=norm), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=0.4))
    expected = model(x)
    fold(model, x)
    assert not norms_of(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv", [SamePadded, StaticallyPadded])
def test_layers_that_pad_in_a_forward_of_their_own_are_folded(conv):
    model = mask(nn.Sequential(conv(3, 8, 3), spoil_norm(nn.BatchNorm2d(8)), nn.ReLU6()).eval())
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    fold(model, x)
    assert model[0].own_class is conv
    assert model[0].activation == "relu6"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class _DoublingConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class _DoublingNorm(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class _ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), spoil_norm(nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


class _NormFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = spoil_norm(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(self.norm(x))


class _ByItsSign(nn.Module):
    """Control flow that torch.fx cannot follow, and torch.export neither."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), spoil_norm(nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x if float(x.sum()) > 0 else -x


def _with_norm(conv, norm=None):
    return nn.Sequential(conv, spoil_norm(norm or nn.BatchNorm2d(4)))


def _hooked(model, index):
    model[index].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def _weight_normed():
    return _with_norm(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))


STAYS = {
    "read twice": (_ReadTwice, "norm", "no Linear or Conv2d alone is in front of it"),
    "first": (_NormFirst, "norm", "no Linear or Conv2d alone is in front of it"),
    "no trace": (_ByItsSign, "norm", "torch.fx cannot trace it"),
    "hook on the layer": (
        lambda: _hooked(_with_norm(nn.Conv2d(3, 4, 1)), 0), "1", "the layer in front of it has hooks"
    ),
    "hook on the norm": (
        lambda: _hooked(_with_norm(nn.Conv2d(3, 4, 1)), 1), "1", "it has hooks or a forward of its own"
    ),
    "a layer's own forward": (lambda: _with_norm(_DoublingConv(3, 4, 1)), "1", "the layer in front of it"),
    "a norm's own forward": (
        lambda: _with_norm(nn.Conv2d(3, 4, 1), _DoublingNorm(4)), "1", "it has hooks or a forward of its own"
    ),
    "a parametrization": (_weight_normed, "1", "the weight of the layer in front of it has"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAYS)
def test_norms_that_cannot_be_folded_stay_and_say_why(kind):
    make, name, reason = STAYS[kind]
    model = make().eval()
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    with pytest.warns(UserWarning, match="found no masked layer"):
        fold(model, x)
    assert isinstance(model.get_submodule(name), nn.BatchNorm2d)
    assert notes(model, name).startswith(f"not folded: {reason}")
    assert torch.equal(model(x), expected)


def test_a_norm_without_statistics_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.warns(UserWarning, match="found no masked layer"):
        fold(model, torch.randn(2, 3, 7, 5))
    assert notes(model, "1") == "not folded: it has no running statistics"


def test_a_shared_norm_and_a_norm_over_steps_stay():
    reasons = (
        "no Linear or Conv2d alone is in front of it",
        "its channels are not the outputs of the layer in front of it",
    )
    for model, reason in zip((SharedNorm().eval(), NormOverSteps().eval()), reasons, strict=True):
        mask(model)
        x = torch.randn(3, 7)
        expected = model(x)
        fold(model, x)
        assert isinstance(model.norm, nn.BatchNorm1d)
        assert notes(model, "norm") == f"not folded: {reason}"
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_behind_a_layer_stays():
    model = mask(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Conv2d(4, 4, 1), nn.Identity()))
    fold(model.eval(), torch.randn(2, 3, 7, 5))
    assert type(model[1]) is nn.Dropout
    assert model[0].activation is None
    assert model[2].activation is None


def test_an_interrupt_while_outputs_are_compared_leaves_the_model_as_it_was(monkeypatch):
    def interrupted(output, expected):
        raise KeyboardInterrupt

    monkeypatch.setattr(fold_module, "_agree", interrupted)
    model = mask(SmallVGG())
    snapshot = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        fold(model, torch.randn(2, 3, 7, 5))
    snapshot.assert_unchanged()


class _TwoWays(nn.Module):
    """A norm that only some inputs reach."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), spoil_norm(nn.BatchNorm2d(4))

    def forward(self, x, plain=False):
        x = self.conv(x)
        return x if plain else self.norm(x)


def test_what_would_change_the_outputs_of_another_example_is_taken_back():
    model = _TwoWays().eval()
    x = torch.randn(2, 3, 7, 5)
    snapshot = Snapshot(model)
    with pytest.warns(UserWarning, match="found no masked layer"):
        fold(model, [x, (x, True)])
    assert model.norm._fastprune_note == "not folded: the model would give something else"
    del model.norm._fastprune_note
    snapshot.assert_unchanged()


def test_a_model_that_no_trace_follows_is_converted_without_folding():
    model = mask(DataDependent())
    x = torch.randn(3, 7)
    expected = model(x)
    fold(model, x)
    assert isinstance(model.layer, fp.BlockSparseLinear)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_flags_and_frozen_parameters_survive():
    model = mask(SmallVGG())
    model.train()
    model[1].eval()
    model[3].parametrizations.weight.original.requires_grad_(False)
    frozen = model[11].bias
    frozen.requires_grad_(False)
    flags = [module.training for module in model]
    fold(model, torch.randn(4, 3, 7, 5))
    assert [module.training for module in model] == flags
    assert model[0].packed_values.requires_grad
    assert model[0].bias.requires_grad
    assert not model[3].packed_values.requires_grad
    assert not model[11].bias.requires_grad


def test_without_being_asked_nothing_is_folded():
    model = mask(SmallVGG().eval())
    fold(model, torch.randn(2, 3, 7, 5), fold_batch_norm=False)
    assert len(norms_of(model)) == 4
    assert model[0].activation is None
    assert "folded" not in fp.explain(model)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_what_is_no_flag_is_refused(value):
    model = mask(SmallVGG())
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="`fold_batch_norm` must be True or False"):
        fold(model, torch.randn(2, 3, 7, 5), fold_batch_norm=value)
    snapshot.assert_unchanged()


def test_inputs_that_the_model_refuses_leave_it_as_it_was():
    model = mask(SmallVGG())
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError):
        fold(model, [torch.randn(2, 3, 7, 5), torch.randn(2, 4, 7, 5)])
    snapshot.assert_unchanged()


def test_a_folded_model_copies_whole():
    model = mask(SmallVGG().eval())
    x = torch.randn(2, 3, 7, 5)
    fold(model, x)
    duplicate = copy.deepcopy(model)
    assert fp.explain(duplicate) == fp.explain(model)
    assert torch.equal(duplicate(x), model(x))
