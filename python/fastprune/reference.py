"""Plain-torch twins of every op: slow, differentiable, and the definition of correct.

Run in float64 they are what the tests compare the kernels with. Each takes the arguments of its
twin in :mod:`fastprune.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_weight(
    packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor, *, out_features: int, in_features: int
) -> Tensor:
    """Return the dense ``[out_features, in_features]`` weight of a packed block-sparse one.

    Args:
        packed_values: ``[kept, cols, rows]``, each block transposed.
        crow_indices: ``[block_rows + 1]``.
        col_indices: ``[kept]``.
        out_features: rows of the result; padded rows are cut off.
        in_features: columns of the result; padded columns are cut off.

    """
    _, cols, rows = packed_values.shape
    block_rows = crow_indices.numel() - 1
    block_cols = -(-in_features // cols)
    row_indices = torch.repeat_interleave(
        torch.arange(block_rows, device=crow_indices.device),
        (crow_indices[1:] - crow_indices[:-1]).long(),
        output_size=packed_values.shape[0],
    )
    blocks = packed_values.new_zeros(block_rows * block_cols, cols, rows)
    blocks = blocks.index_copy(0, row_indices * block_cols + col_indices.long(), packed_values)
    dense = blocks.view(block_rows, block_cols, cols, rows).permute(0, 3, 1, 2)
    return dense.reshape(block_rows * rows, block_cols * cols)[:out_features, :in_features]


def block_sparse_linear(
    input: Tensor,
    packed_values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str | None = None,
) -> Tensor:
    """Return ``activation(input @ weight.T + bias)`` through the dense weight."""
    weight = dense_weight(
        packed_values, crow_indices, col_indices, out_features=out_features, in_features=input.shape[-1]
    )
    output = F.linear(input, weight, bias)
    return F.relu(output) if activation == "relu" else output


def ablated_cross_entropy(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    pieces: Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return the summed change of the cross-entropy for each masked piece, one at a time."""
    dtype = torch.promote_types(logits.dtype, torch.float64)
    logits, hidden, weight = logits.to(dtype), hidden.to(dtype), weight.to(dtype)
    original = F.cross_entropy(logits, targets, reduction="none")
    deltas = []
    for row_begin, row_end, col_begin, col_end in pieces.tolist():
        update = hidden[:, col_begin:col_end] @ weight[row_begin:row_end, col_begin:col_end].T
        masked = logits - F.pad(update, (row_begin, logits.shape[1] - row_end))
        delta = F.cross_entropy(masked, targets, reduction="none") - original
        if sample_weight is not None:
            delta = torch.where(sample_weight != 0, delta * sample_weight.to(dtype), 0.0)
        deltas.append(delta.sum())
    return torch.stack(deltas) if deltas else logits.new_zeros(0)
