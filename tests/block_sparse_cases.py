"""What the tests of block_sparse_linear and of its gradients share: weights, sizes and tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

import fastprune as fp

HALF = (torch.bfloat16, torch.float16)
# Relative and absolute errors of rounding to them: half a unit in the last place, half the smallest number.
ROUNDING = {torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25)}
SIZES = (1, 15, 17, 129, 151)
BLOCKSIZES = ((16, 16), (32, 32), (8, 8), (8, 1), (1, 8), (64, 4), (5, 3), (128, 128), (1, 1), (48, 16))


def make_weight(
    out_features: int,
    in_features: int,
    blocksize: tuple[int, int],
    density: float,
    dtype: torch.dtype = torch.float32,
) -> fp.BlockSparseTensor:
    rows, cols = blocksize
    grid = (-(-out_features // rows), -(-in_features // cols))
    mask = torch.rand(grid) < density
    return fp.BlockSparseTensor.from_dense(
        torch.randn(out_features, in_features, dtype=dtype), blocksize, mask=mask
    )


def assert_matches(output: Tensor, wanted: Tensor, terms: int) -> None:
    assert output.shape == wanted.shape
    # Rounding of a sum of products of standard normals, added one after the other: each addition rounds
    # a partial sum that grows like a root, so the errors together grow like the number of terms. Where
    # the terms are alike, as those of expanded inputs, the sum grows like their number, and its errors too.
    unit = 1e-15 if output.dtype == torch.float64 else 4e-7
    tolerance = unit * max(8 * max(terms, 1) ** 0.5, 0.6 * terms)
    relative, absolute = ROUNDING.get(output.dtype, (0.0, 0.0))
    torch.testing.assert_close(output.double(), wanted, rtol=unit + relative, atol=tolerance + absolute)
