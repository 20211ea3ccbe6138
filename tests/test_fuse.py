"""Activations that block-sparse layers take over in sparsify_: which do, and which stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from networks import SmallVGG

pytestmark = pytest.mark.usefixtures("one_thread")


def mask(model, granularity=fp.Block(4, 4), **options):  # noqa: B008
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, **options)
    return fp.apply_masks_(model, scores.select(sparsity=0.5, scope="layer"))


def fuse(model, x, **options):
    options = {"blocksize": (4, 4), "policy": "always", "fold_batch_norm": True, **options}
    return fp.sparsify_(model, example_inputs=x, **options)


@pytest.mark.parametrize(
    ("make", "name"), [(nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.SiLU, "silu"), (nn.GELU, "gelu")]
)
def test_activations_behind_swapped_layers_are_fused(make, name):
    model = mask(SmallVGG(make).eval())
    x = 3 * torch.randn(2, 3, 7, 5)
    expected = model(x)
    fuse(model, x)
    assert [model[index].activation for index in (0, 3, 6, 11, 14)] == [name, name, name, "relu", None]
    assert all(type(model[index]) is nn.Identity for index in (1, 2, 4, 5, 7, 8, 12, 13))
    assert f"{make.__name__} folded into 0" in fp.explain(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_activations_behind_dense_layers_stay():
    model = mask(SmallVGG().eval(), include=["3"])
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    fuse(model, x)
    assert type(model[2]) is nn.ReLU
    assert type(model[5]) is nn.Identity
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_fused_where_the_model_stays_dense(fake_medians):
    seconds = iter([])

    def fake(functions, **options):
        nonlocal seconds
        if len(functions) > 1:
            return [2.0, 1.0, 2.0, 1.0][: len(functions)]
        value = next(seconds, None)
        if value is None:
            seconds = iter([2.0, 1.0, 2.0])
            return [1.0]
        return [value]

    fake_medians(fake)
    model = mask(SmallVGG().eval())
    x = torch.randn(2, 3, 7, 5)
    expected = model(x)
    fuse(model, x, policy="measured")
    assert type(model[0]) is nn.Conv2d
    assert type(model[2]) is nn.ReLU
    assert "the whole model is slower" in fp.explain(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class _Activations(nn.Module):
    """Activations that no layer may take over: shared, read twice, hooked, or functions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.shared, self.hooked, self.relu = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.hooked.register_forward_hook(lambda module, inputs, output: output + 1)

    def forward(self, x):
        x = self.shared(self.second(self.shared(self.first(x))))
        x = self.hooked(self.third(x))
        y = self.fourth(x)
        return F.relu(self.relu(y) + y)


def test_activations_that_others_need_stay():
    model = mask(_Activations(), fp.Block(4, 2))
    x = torch.randn(2, 4, 5, 7)
    expected = model(x)
    fuse(model, x, blocksize=(4, 2))
    assert all(layer.activation is None for layer in (model.first, model.second, model.third, model.fourth))
    assert type(model.shared) is type(model.relu) is nn.ReLU
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class _Module(nn.Module):
    """An activation as Hugging Face writes them: a module around a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class _Pair(nn.Module):
    """What gives a tensor and something else."""

    def forward(self, x):
        return F.gelu(x), None


class _Exported(nn.Module):
    """Two Linears and an activation behind a branch that torch.fx cannot follow and torch.export can."""

    def __init__(self, activation, calls=1):
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(9, 13), nn.Linear(13, 13), activation
        self.calls = calls

    def forward(self, x):
        if x.shape[0] > 1:
            x = self.first(x)
        for _ in range(self.calls):
            x = self.activation(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.second(x)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (F.relu, "relu"),
    ],
)
def test_activations_in_modules_of_others_are_fused_where_the_model_is_exported(function, name):
    model = mask(_Exported(_Module(function)).eval())
    x = 3 * torch.randn(5, 9)
    expected = model(x)
    fuse(model, x)
    assert (model.first.activation, model.second.activation) == (name, None)
    assert type(model.activation) is nn.Identity
    assert "_Module folded into first" in fp.explain(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def hooked():
    module = _Module(F.gelu)
    module.register_forward_hook(lambda module, inputs, output: None)
    return module


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda: _Module(F.gelu), 2),  # called again on what it gave
        (lambda: _Module(lambda x: F.gelu(2 * x)), 1),
        (lambda: _Module(lambda x: F.gelu(x) + 1), 1),
        (lambda: _Module(F.softplus), 1),
        (_Pair, 1),
        (hooked, 1),
    ],
)
def test_modules_that_do_more_than_one_activation_stay(make, calls):
    model = mask(_Exported(make(), calls).eval())
    x = torch.randn(5, 9)
    expected = model(x)
    activation = model.activation
    fuse(model, x)
    assert model.first.activation is None
    assert model.activation is activation
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_saved_model_loads_with_the_activation_in_its_layer(tmp_path):
    model = mask(_Exported(_Module(F.gelu)).eval())
    x = torch.randn(5, 9)
    fuse(model, x)
    fp.save(model, tmp_path / "model.safetensors")
    loaded = fp.load(tmp_path / "model.safetensors", _Exported(_Module(F.gelu)).eval())
    assert type(loaded.activation) is nn.Identity
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match=r"activation.* must be a batch norm or activation"):
        fp.load(tmp_path / "model.safetensors", _Exported(_Module(F.silu)).eval())
    with pytest.raises(ValueError, match=r"activation.* must be a batch norm or activation"):
        fp.load(tmp_path / "model.safetensors", _Exported(nn.Linear(13, 13)).eval())
