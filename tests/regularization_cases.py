"""What the tests of penalties and of constraints share: models of each kind, and their weights by pieces."""

from __future__ import annotations

import torch
from torch import nn

import fastprune as fp
from helpers import masked_mlp, mlp, pieces_of
from networks import SmallConvNet

GRANULARITIES = (
    fp.Element(), fp.Block(4, 4), fp.Block(16, 3), fp.Block(1, 1), fp.Unit(), fp.Unit(group_size=5),
    fp.InputUnit(), fp.Layer(),
)  # fmt: skip


def networks(kind):
    """A model of a kind, with ragged blocks, and an input for it."""
    if kind == "dense":
        return mlp(17, 33, 10), torch.randn(6, 17)
    model, x = masked_mlp(0.5)
    if kind == "block_sparse":
        fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always")
    elif kind != "masked":
        model, x = SmallConvNet(), torch.randn(4, 3, 7, 5)
        scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4), exclude="depthwise")
        fp.apply_masks_(model, scores.select(sparsity=0.5, scope="layer"))
        if kind == "block_sparse_conv":
            fp.sparsify_(model, example_inputs=x, blocksize=(4, 4), policy="always")
    return model, x


KINDS = ("dense", "masked", "block_sparse", "masked_conv", "block_sparse_conv")


def layers_of(model):
    kinds = (nn.Linear, nn.Conv2d, fp.BlockSparseLinear, fp.BlockSparseConv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def weights_of(model):
    return {name: layer.weight.detach().double() for name, layer in layers_of(model).items()}


def pieces(granularity, layer):
    shape = layer.weight.shape
    if isinstance(granularity, fp.Layer):
        return [torch.ones(shape, dtype=torch.bool)]
    if isinstance(granularity, fp.InputUnit):
        granularity = fp.InputUnit(getattr(layer, "groups", 1))
    return list(pieces_of(granularity, shape))


def by_pieces(granularity, layer, function):
    """Put function(weights of a piece) in the place of each piece, in float64."""
    result = layer.weight.detach().double().clone()
    for piece in pieces(granularity, layer):
        result[piece] = function(result[piece])
    return result
