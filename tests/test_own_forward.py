"""Subclasses of nn.Conv2d that pad in a forward of their own: it is kept, or refused if it does more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from conv_module_cases import IMAGES, assert_same, conv2d, make_pair
from fastprune.modules.own_forward import has_own_forward, only_pads
from networks import SamePadded, StaticallyPadded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kind", [SamePadded, StaticallyPadded])
def test_a_subclass_keeps_the_padding_of_its_own_forward(kind, stride, size):
    dense, sparse, _ = make_pair(conv2d(5, 9, 3, stride=stride, kind=kind))
    assert_same(sparse, dense, torch.randn(2, 5, *size, dtype=torch.float64))
    assert f"forward of {kind.__name__}" in repr(sparse)
    back = sparse.to_dense()
    assert type(back) is kind
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    assert torch.equal(back(x), dense(x))


def test_an_activation_is_fused_behind_a_forward_of_its_own():
    dense, sparse, _ = make_pair(conv2d(5, 9, 3, kind=SamePadded), activation="relu6")
    x = 9 * torch.randn(2, 5, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), F.relu6(dense(x)))


class _Scaled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class _Standardized(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class _Twice(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(F.conv2d(input, self.weight, self.bias), self.weight, self.bias)


class _WithoutBias(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight)


class _Transposed(nn.Conv2d):
    def forward(self, input):
        return F.conv_transpose2d(input, self.weight, self.bias)


class _OneGroup(nn.Conv2d):
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__(2 * in_channels, 2 * out_channels, kernel_size, groups=2)

    def forward(self, input):
        return F.conv2d(input[:, : self.weight.shape[1]], self.weight, self.bias)


class _SumOfWeights(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input * torch.sum(self.weight), self.weight, self.bias)


@pytest.mark.parametrize("kind", [_Scaled, _Standardized, _Twice, _WithoutBias, _SumOfWeights, _Transposed])
def test_a_forward_that_does_more_than_change_the_input_is_refused_when_it_runs(kind):
    sparse = fp.BlockSparseConv2d.from_dense(kind(5, 5, 3))
    with pytest.raises(TypeError):
        sparse(torch.randn(2, 5, 7, 5))


def test_a_call_with_other_groups_is_refused_when_it_runs():
    sparse = fp.BlockSparseConv2d.from_dense(_OneGroup(4, 4, 3), (4, 4))
    with pytest.raises(TypeError):
        sparse(torch.randn(2, 8, 7, 5))


class _Narrow(nn.Conv2d):
    def forward(self, input):
        return super().forward(input[:, :4])


def test_a_forward_that_drops_channels_is_refused_when_it_runs():
    sparse = fp.BlockSparseConv2d.from_dense(_Narrow(5, 5, 3), (4, 8))
    with pytest.raises(TypeError):
        sparse(torch.randn(2, 5, 7, 5))


class _WithGain(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, input):
        return super().forward(input * self.gain)


def test_a_forward_with_parameters_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"`conv` is a _WithGain, .* got \['gain'\]"):
        fp.BlockSparseConv2d.from_dense(_WithGain(5, 9, 3))


@pytest.mark.parametrize("kind", [nn.Conv2d, SamePadded, StaticallyPadded])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_forwards_that_only_change_the_input_are_told(kind, mode):
    conv = kind(5, 5, 3, padding=1, padding_mode=mode)
    assert has_own_forward(conv) is (kind is not nn.Conv2d)
    assert only_pads(conv, [torch.randn(2, 5, 7, 5), torch.randn(5, 7, 5)])


@pytest.mark.parametrize(
    "kind", [_Scaled, _Standardized, _Twice, _WithoutBias, _SumOfWeights, _Transposed, _WithGain, _OneGroup]
)
def test_forwards_that_do_more_are_told(kind):
    conv = kind(5, 5, 3)
    assert has_own_forward(conv)
    assert not only_pads(conv, [torch.randn(2, conv.in_channels, 9, 9)])


def test_a_forward_of_an_instance_is_its_own_and_does_more():
    conv = nn.Conv2d(5, 5, 3)
    original = conv.forward
    conv.forward = lambda input: original(input) + 1
    assert has_own_forward(conv)
    assert not only_pads(conv, [torch.randn(2, 5, 7, 5)])


def test_a_forward_that_fails_on_its_input_does_more():
    assert not only_pads(SamePadded(5, 5, 3), [torch.randn(7, 5)])


@pytest.mark.parametrize("kind", [SamePadded, StaticallyPadded])
def test_it_exports_with_the_forward_that_it_keeps(kind):
    _, sparse, _ = make_pair(conv2d(5, 9, 3, stride=2, kind=kind))
    x = torch.randn(2, 5, 7, 5, dtype=torch.float64)
    exported = torch.export.export(sparse.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), sparse(x))


def test_it_compiles_with_the_forward_that_it_keeps():
    dense, sparse, _ = make_pair(conv2d(5, 9, 3, stride=2, kind=SamePadded))
    x = torch.randn(2, 5, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(sparse, backend="aot_eager")(x), dense(x))
