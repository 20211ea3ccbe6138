"""sparsify_ without a block size: which blocks it takes for which masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.modules import block_sizes, clear_layer_seconds
from fastprune.modules.block_sizes import block_sizes_for
from fastprune.modules.formats import Form

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_measured_before():
    clear_layer_seconds()
    yield
    clear_layer_seconds()


def masked(granularity, sparsity=0.9, layer=None):
    layer = nn.Linear(96, 80) if layer is None else layer
    model = nn.Sequential(layer, nn.ReLU())
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity)
    return fp.apply_masks_(model, scores.select(sparsity=sparsity))


@pytest.mark.parametrize(
    ("granularity", "size"),
    [
        (fp.Block(16, 16), (16, 16)),
        (fp.Block(32, 32), (16, 16)),
        (fp.Block(8, 8), (8, 8)),
        (fp.Block(8, 1), (8, 1)),
        (fp.Block(4, 1), (4, 1)),
        (fp.Block(16, 1), (8, 1)),
        (fp.Element(), (1, 1)),
    ],
)
def test_blocks_are_those_of_the_mask(granularity, size):
    model = masked(granularity)
    x = torch.randn(9, 96)
    expected = model(x)
    fp.sparsify_(model, example_inputs=x, policy="always")
    assert model[0].blocksize == size
    assert "sparse: policy='always', blocks of {}x{}".format(*size) in fp.explain(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_on_cuda_large_blocks_run_at_the_higher_rate(monkeypatch):
    monkeypatch.setattr(block_sizes, "_CPU_RATES", block_sizes._CUDA_RATES)
    for side, first in ((128, (64, 64)), (64, (64, 64)), (32, (32, 32)), (16, (16, 16)), (8, (16, 16))):
        torch.manual_seed(side)
        mask = torch.rand(1024 // side, 1024 // side) < 0.1
        assert block_sizes_for(mask.repeat_interleave(side, 0).repeat_interleave(side, 1))[0] == first


def test_a_mask_without_gaps_takes_the_largest_blocks_and_an_empty_one_too():
    assert block_sizes_for(torch.ones(33, 17, dtype=torch.bool))[0] == (16, 16)
    assert block_sizes_for(torch.zeros(33, 17, dtype=torch.bool))[0] == (16, 16)
    assert block_sizes_for(torch.zeros(0, 5, dtype=torch.bool))[0] == (16, 16)


def test_little_sparsity_of_single_weights_is_no_reason_for_small_blocks():
    torch.manual_seed(0)
    assert block_sizes_for(torch.rand(64, 64) > 0.3)[0] == (16, 16)
    assert block_sizes_for(torch.rand(64, 64) > 0.75)[0] == (1, 1)


@pytest.mark.parametrize("fastest", [(8, 8), (8, 1)])
def test_of_two_sizes_that_come_close_the_one_measured_faster_is_taken(fastest, monkeypatch):
    mask = torch.zeros(80, 96, dtype=torch.bool)
    mask.view(10, 8, 96)[::2, :, :] = True
    mask[:, 3::4] = False  # a quarter of the columns of what is left
    assert set(block_sizes_for(mask)) == {(8, 8), (8, 1)}
    seconds = {(8, 8): 1.0, (8, 1): 1.0, fastest: 0.5}
    monkeypatch.setattr(
        "fastprune.modules.convert.layer_seconds",
        lambda dense, sparse, inputs, device: (2.0, seconds[sparse.blocksize]),
    )
    monkeypatch.setattr(
        "fastprune.modules.convert.fastest_form", lambda *arguments: Form(True, torch.contiguous_format)
    )
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU())
    masks = fp.Masks({"0": mask}, fp.Element(), {"0": model[0].weight.shape})
    fp.apply_masks_(model, masks)
    fp.sparsify_(model, example_inputs=torch.randn(9, 96))
    assert model[0].blocksize == fastest
    assert "4.00x" in fp.explain(model)


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_of_single_weights(size):
    conv = nn.Conv2d(12, 10, size, padding=size // 2)
    model = masked(fp.Element(), layer=conv)
    x = torch.randn(2, 12, 7, 5)
    expected = model(x)
    fp.sparsify_(model, example_inputs=x, policy="always")
    assert model[0].blocksize == (1, 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_size_is_refused_by_name():
    with pytest.raises(ValueError, match="blocksize"):
        fp.sparsify_(masked(fp.Element()), example_inputs=torch.randn(2, 96), blocksize="largest")
