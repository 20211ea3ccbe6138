"""to_dense_: plain layers that compute the same, and the exporters that need them."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import fastprune as fp
from helpers import Snapshot, masked_mlp, mlp
from networks import SamePadded, SmallResNet, SmallVGG
from shrink_cases import magnitude_masks

pytestmark = [pytest.mark.usefixtures("one_thread", "sparse_is_faster")]


def sparse_vgg(activation=nn.ReLU, conv=nn.Conv2d, **options):
    model = SmallVGG(activation, conv).eval()
    x = torch.randn(3, 3, 4, 6)
    fp.apply_masks_(model, magnitude_masks(model, x, fp.Block(4, 4)))
    return fp.sparsify_(model, example_inputs=x, policy="always", blocksize=(4, 4), **options), x


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, lambda: nn.GELU("tanh")])
@pytest.mark.parametrize("fold", [False, True])
def test_the_model_computes_the_same_with_plain_layers(activation, fold):
    model, x = sparse_vgg(activation, fold_batch_norm=fold)
    expected = model(x)
    dense = fp.to_dense_(model)
    assert dense is model
    assert not any(
        isinstance(module, (fp.BlockSparseLinear, fp.BlockSparseConv2d)) for module in dense.modules()
    )
    torch.testing.assert_close(dense(x), expected)
    assert isinstance(dense[0], nn.Conv2d)
    assert type(dense[2]) is type(activation())
    assert float((dense[3].weight == 0).float().mean()) > 0.3


def test_an_activation_without_a_place_stands_behind_its_layer():
    model = nn.Sequential(fp.BlockSparseLinear.from_dense(nn.Linear(17, 9), (4, 4), activation="relu"))
    x = torch.randn(4, 17)
    expected = model(x)
    fp.to_dense_(model)
    assert [type(module) for module in model[0]] == [nn.Linear, nn.ReLU]
    torch.testing.assert_close(model(x), expected)


def test_subclasses_dense_models_and_flags():
    model, x = sparse_vgg(conv=SamePadded)
    expected = model(x)
    model.train()
    fp.to_dense_(model)
    assert isinstance(model[0], SamePadded)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(x), expected)
    plain = mlp()
    before = Snapshot(plain)
    fp.to_dense_(plain)
    before.assert_unchanged()


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="`model` must be"):
        fp.to_dense_("model")
    layer = fp.BlockSparseLinear.from_dense(nn.Linear(17, 9), (4, 4))
    with pytest.raises(ValueError, match=r"must not be a BlockSparseLinear itself"):
        fp.to_dense_(layer)


def _shrunk():
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    model, x = SmallResNet().eval(), torch.randn(3, 3, 16, 16)
    masks = magnitude_masks(model, x, fp.Unit(coupled=True), exclude="head")
    return fp.shrink(model, masks, x), x


def _sparse():
    model, x = masked_mlp()
    return fp.sparsify_(model, example_inputs=x, policy="always", blocksize=(4, 4)), x


def _both():
    model, x = _shrunk()
    fp.apply_masks_(model, magnitude_masks(model, x, fp.Block(2, 2)))
    return (
        fp.sparsify_(model, example_inputs=x, policy="always", blocksize=(2, 2), fold_batch_norm=True),
        x,
    )


@pytest.mark.parametrize("make", [_shrunk, _sparse, _both])
def test_torch_export_and_onnx_take_the_dense_form(make):
    pytest.importorskip("onnxscript", reason="needs pip install onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs pip install onnxruntime")
    model, x = make()
    expected = model(x).detach()
    dense = fp.to_dense_(copy.deepcopy(model).eval())
    exported = torch.export.export(dense, (x,))
    torch.testing.assert_close(exported.module()(x).detach(), expected)
    written = io.BytesIO()
    torch.onnx.export(exported, dynamo=True, verbose=False).save(written)
    session = runtime.InferenceSession(written.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-5)
