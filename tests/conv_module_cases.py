"""What the tests of BlockSparseConv2d share: layers beside the dense ones that they must equal."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fastprune as fp

CHANNELS = (1, 3, 15, 17, 33)
IMAGES = ((1, 1), (7, 5), (15, 17))
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "sliced channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


def make_pair(conv, block=(4, 4), density=0.5, activation=None):
    """A block-sparse layer and the masked dense one that it must equal."""
    mask = torch.rand(fp.Block(*block).shape(conv.weight.shape)) < density
    sparse = fp.BlockSparseConv2d.from_dense(conv, block, mask, activation)
    with torch.no_grad():
        conv.weight *= fp.Block(*block).expand(mask, conv.weight.shape)
    return conv, sparse, mask


def conv2d(*sizes, dtype=torch.float64, kind=nn.Conv2d, **options):
    return kind(*sizes, **options).to(dtype)


def assert_same(sparse, dense, x):
    """Output and all gradients are those of the dense layer."""
    mine, other = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    output, expected = sparse(mine), dense(other)
    torch.testing.assert_close(output, expected)
    factor = torch.randn_like(expected)
    (output * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    kept = sparse.weight.detach() != 0
    gradient = fp.BlockSparseConv2d.from_dense(
        with_weight(dense, torch.where(kept, dense.weight.grad, 0.0)), sparse.blocksize, kept_blocks(sparse)
    )
    torch.testing.assert_close(sparse.packed_values.grad, gradient.packed_values.detach())


def with_weight(conv, weight):
    other = copy.deepcopy(conv)
    other.weight.data = weight
    return other


def kept_blocks(sparse):
    return fp.Block(*sparse.blocksize).sum_pieces((sparse.weight != 0).long()) > 0
