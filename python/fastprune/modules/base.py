"""What block-sparse layers share: their tensors, and states that are checked before a kernel reads them."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import reference
from ..block_sparse import BlockSparseTensor


class BlockSparseLayer(nn.Module, abc.ABC):
    """A layer whose weight, seen as a matrix, is block-sparse.

    The kept blocks are the parameter ``packed_values``, ``[kept, cols, rows]``, the only copy of the
    weights; ``crow_indices`` and ``col_indices`` are int32 buffers and fixed.

    Args:
        weight: the matrix; its ``packed_values`` become the parameter.
        bias: one for each row of the matrix, or None.
        activation: the name of an activation that the kernel computes, or None.

    Raises:
        ValueError: ``bias`` or ``activation`` does not fit.

    """

    packed_values: Tensor
    crow_indices: Tensor
    col_indices: Tensor

    def __init__(self, weight: BlockSparseTensor, bias: Tensor | None, activation: str | None) -> None:
        super().__init__()
        if activation is not None and activation not in reference.ACTIVATIONS:
            expected = ", ".join(f"'{name}'" for name in reference.ACTIVATIONS)
            raise ValueError(f"`activation` must be None or one of {expected}, got {activation!r}")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"`bias` must have shape [{weight.shape[0]}], got {list(bias.shape)}")
        self.activation = activation
        self.packed_values = nn.Parameter(weight.packed_values.detach().contiguous())
        self.register_buffer("crow_indices", weight.crow_indices)
        self.register_buffer("col_indices", weight.col_indices)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @abc.abstractmethod
    def _matrix_shape(self, cols: int) -> tuple[int, int]:
        """Shape of the matrix that the weight is seen as, in blocks of ``cols`` columns."""

    def _check_structure(self, packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> None:
        """Raise ValueError for parts that are no structure of this layer's size."""
        cols = packed_values.shape[1] if packed_values.dim() == 3 else 1
        BlockSparseTensor(packed_values, crow_indices, col_indices, self._matrix_shape(max(cols, 1)))

    @property
    @abc.abstractmethod
    def weight_shape(self) -> torch.Size:
        """Shape of the dense weight."""

    @property
    @abc.abstractmethod
    def weight(self) -> Tensor:
        """The dense weight, made anew; gradients flow to the blocks."""

    @property
    def block_sparse_weight(self) -> BlockSparseTensor:
        """The weight as a :class:`BlockSparseTensor` that shares this module's memory."""
        return BlockSparseTensor(
            self.packed_values, self.crow_indices, self.col_indices, self._matrix_shape(self.blocksize[1])
        )

    @property
    def blocksize(self) -> tuple[int, int]:
        """``(rows, cols)`` of a block."""
        return self.packed_values.shape[2], self.packed_values.shape[1]

    @property
    def density(self) -> float:
        """Kept share of the blocks."""
        cols = self.blocksize[1]
        blocks = (self.crow_indices.numel() - 1) * -(-self._matrix_shape(cols)[1] // cols)
        return self.packed_values.shape[0] / blocks if blocks else 1.0

    def _check_no_activation(self) -> None:
        if self.activation is not None:
            raise ValueError(f"to_dense would lose the fused activation '{self.activation}'")

    def _fill_dense(self, dense: nn.Linear | nn.Conv2d) -> None:
        """Write the weights into a dense layer that goes into this one's place."""
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if dense.bias is not None:
                dense.bias.copy_(self.bias)  # type: ignore[arg-type]
        dense.train(self.training)

    def _take_over(self, dense: nn.Module) -> None:
        """Take over the flags of the dense layer that this one came from."""
        for name, part in (("weight", self.packed_values), ("bias", self.bias)):
            if part is not None:
                part.requires_grad_(is_trainable(dense, name))
        self.train(dense.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over another pattern of blocks; refuse one that kernels must not read through."""
        names = ("packed_values", "crow_indices", "col_indices")
        if any(prefix + name in state_dict for name in names):
            # Where a part is missing, which torch reports, the others must fit the one that stays.
            parts = tuple(state_dict.get(prefix + name, getattr(self, name)) for name in names)
            try:
                self._check_structure(*parts)
            except ValueError as error:
                raise ValueError(
                    f"the state of '{prefix.rstrip('.')}' is no valid structure: {error}"
                ) from error
            # The parameter and the buffers stay the same objects, as optimisers hold them.
            for name, part in zip(names, parts, strict=True):
                own = getattr(self, name)
                if part.shape != own.shape:
                    own.grad = None
                    own.data = torch.empty(part.shape, dtype=own.dtype, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _describe(self) -> str:
        """What ``repr`` prints of the blocks."""
        text = f"bias={self.bias is not None}, blocksize={self.blocksize}, density={self.density:.3f}"
        return text if self.activation is None else f"{text}, activation={self.activation}"


def is_trainable(module: nn.Module, parameter: str) -> bool:
    """Tell whether a parameter is trained; a masked one is made from others, and under no_grad hides it."""
    if parametrize.is_parametrized(module, parameter):
        return any(part.requires_grad for part in module.parametrizations[parameter].parameters())  # type: ignore[union-attr, index]
    return bool(getattr(module, parameter).requires_grad)
