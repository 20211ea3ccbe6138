"""BlockSparseTensor: a block-sparse matrix (BCSR) in the layout that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .granularity import check_blocksize


class BlockSparseTensor:
    """A block-sparse ``[out_features, in_features]`` matrix.

    ``values`` are the kept blocks in PyTorch's BSR order, ``[kept, rows, cols]``: a transposed view of
    ``packed_values``, ``[kept, cols, rows]``, the one copy in memory. Where a dimension does not divide by
    the block, the last block is padded with zeros.

    Example:
        >>> sparse = fp.BlockSparseTensor.from_dense(weight, blocksize=(16, 16))
        >>> torch.equal(sparse.to_dense(), weight)
        True

    Args:
        packed_values: ``[kept, cols, rows]``.
        crow_indices: ``[block_rows + 1]``, int32.
        col_indices: ``[kept]``, int32, increasing within a block row.
        shape: ``(out_features, in_features)``.

    Raises:
        ValueError: the parts are no valid structure; the message says what was expected.

    """

    def __init__(
        self, packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int]
    ) -> None:
        self.packed_values = packed_values
        self.crow_indices = crow_indices
        self.col_indices = col_indices
        self.shape = torch.Size(shape)
        self.validate()

    @classmethod
    def from_dense(
        cls, weight: Tensor, blocksize: tuple[int, int] = (16, 16), mask: Tensor | None = None
    ) -> BlockSparseTensor:
        """Keep the blocks of a dense matrix where ``mask`` is True, or that hold a nonzero.

        Args:
            weight: ``[out_features, in_features]``.
            blocksize: ``(rows, cols)``, each from 1 to 128.
            mask: bool ``[block_rows, block_cols]`` or None.

        Raises:
            TypeError: ``mask`` is no tensor.
            ValueError: ``weight`` is no matrix, or ``blocksize`` or ``mask`` does not fit.

        """
        check_blocksize(blocksize)
        if weight.dim() != 2:
            raise ValueError(
                f"`weight` must be a matrix [out_features, in_features], got shape {list(weight.shape)}"
            )
        rows, cols = blocksize
        block_rows, block_cols = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
        padding = (0, block_cols * cols - weight.shape[1], 0, block_rows * rows - weight.shape[0])
        blocks = F.pad(weight, padding).view(block_rows, rows, block_cols, cols).permute(0, 2, 3, 1)
        if mask is None:
            # NaN counts as nonzero, so a broken weight is not dropped unseen.
            mask = (blocks != 0).flatten(2).any(2)
        if not isinstance(mask, Tensor):
            raise TypeError(f"`mask` must be a bool tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool or tuple(mask.shape) != (block_rows, block_cols):
            raise ValueError(
                f"`mask` must be a bool tensor of shape [{block_rows}, {block_cols}], "
                f"got {mask.dtype} of shape {list(mask.shape)}"
            )
        mask = mask.to(weight.device)
        crow_indices = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        col_indices = mask.nonzero()[:, 1].to(torch.int32)
        return cls(blocks[mask].contiguous(), crow_indices, col_indices, tuple(weight.shape))

    @classmethod
    def from_torch_bsr(cls, matrix: Tensor) -> BlockSparseTensor:
        """Take over a ``torch.sparse_bsr`` matrix.

        Raises:
            ValueError: ``matrix`` is not a two-dimensional BSR tensor.

        """
        if matrix.layout != torch.sparse_bsr or matrix.dim() != 2:
            raise ValueError(f"`matrix` must be a 2-D torch.sparse_bsr tensor, got {matrix.layout}")
        return cls(
            matrix.values().transpose(1, 2).contiguous(),
            matrix.crow_indices().to(torch.int32),
            matrix.col_indices().to(torch.int32),
            tuple(matrix.shape),
        )

    @property
    def values(self) -> Tensor:
        """The kept blocks in BSR order, ``[kept, rows, cols]``: a view."""
        return self.packed_values.transpose(1, 2)

    @property
    def blocksize(self) -> tuple[int, int]:
        """``(rows, cols)`` of a block."""
        return self.packed_values.shape[2], self.packed_values.shape[1]

    @property
    def density(self) -> float:
        """Kept share of the blocks, padded ones counted like others."""
        blocks = (self.crow_indices.numel() - 1) * -(-self.shape[1] // self.blocksize[1])
        return self.packed_values.shape[0] / blocks if blocks else 1.0

    def to_dense(self) -> Tensor:
        """Return the dense ``[out_features, in_features]`` matrix, differentiable in the values."""
        return reference.dense_weight(
            self.packed_values,
            self.crow_indices,
            self.col_indices,
            out_features=self.shape[0],
            in_features=self.shape[1],
        )

    def to_torch_bsr(self) -> Tensor:
        """Return the matrix as ``torch.sparse_bsr``.

        Raises:
            ValueError: a dimension does not divide by the block, which torch's layout demands.

        """
        if self.shape[0] % self.blocksize[0] or self.shape[1] % self.blocksize[1]:
            raise ValueError(
                f"torch's BSR needs dimensions that divide by the block, got shape {list(self.shape)} "
                f"and blocksize {self.blocksize}"
            )
        return torch.sparse_bsr_tensor(
            self.crow_indices,
            self.col_indices,
            self.values.contiguous(),
            tuple(self.shape),
            check_invariants=False,  # validated already
        )

    def to(self, *args: object, **kwargs: object) -> BlockSparseTensor:
        """Return the matrix with another device or dtype; the indices keep theirs, int32."""
        values = self.packed_values.to(*args, **kwargs)  # type: ignore[call-overload]
        return BlockSparseTensor(
            values, self.crow_indices.to(values.device), self.col_indices.to(values.device), tuple(self.shape)
        )

    def validate(self) -> None:
        """Raise ValueError unless the parts are a structure that kernels may read."""
        values, crow, col = self.packed_values, self.crow_indices, self.col_indices
        if values.dim() != 3:
            raise ValueError(f"`packed_values` must be [kept, cols, rows], got shape {list(values.shape)}")
        check_blocksize(self.blocksize, "packed_values")
        for name, tensor in (("crow_indices", crow), ("col_indices", col)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(
                    f"`{name}` must be one-dimensional int32, got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != values.device:
                raise ValueError(f"`{name}` must be on {values.device}, got {tensor.device}")
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"`shape` must be (out_features, in_features), got {tuple(self.shape)}")
        block_rows = -(-self.shape[0] // self.blocksize[0])
        block_cols = -(-self.shape[1] // self.blocksize[1])
        kept = values.shape[0]
        if crow.numel() != block_rows + 1 or col.numel() != kept:
            raise ValueError(
                f"`crow_indices` and `col_indices` must have {block_rows + 1} and {kept} entries for shape "
                f"{list(self.shape)} and blocksize {self.blocksize}, got {crow.numel()} and {col.numel()}"
            )
        counts = crow[1:].long() - crow[:-1].long()  # int32 could wrap around
        if int(crow[0]) != 0 or int(crow[-1]) != kept or bool((counts < 0).any()):
            raise ValueError(f"`crow_indices` must not decrease, from 0 to {kept}, the number of kept blocks")
        if kept and (int(col.min()) < 0 or int(col.max()) >= block_cols):
            raise ValueError(f"`col_indices` must lie in [0, {block_cols})")
        row = torch.repeat_interleave(torch.arange(block_rows, device=crow.device), counts)
        position = row * max(block_cols, 1) + col.long()
        if bool((position[1:] <= position[:-1]).any()):
            raise ValueError("`col_indices` must increase within each block row, without duplicates")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and unpickle through the constructor, which validates."""
        parts = (self.packed_values, self.crow_indices, self.col_indices, tuple(self.shape))
        return BlockSparseTensor, parts

    def __repr__(self) -> str:
        return (
            f"BlockSparseTensor(shape={tuple(self.shape)}, blocksize={self.blocksize}, "
            f"kept={self.packed_values.shape[0]}, density={self.density:.3f}, "
            f"dtype={self.packed_values.dtype})"
        )


# torch.load without pickle's other powers takes it: the constructor trusts nothing.
torch.serialization.add_safe_globals([BlockSparseTensor])
