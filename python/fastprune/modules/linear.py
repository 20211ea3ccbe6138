"""BlockSparseLinear: a Linear that multiplies only the kept blocks of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops, reference
from .._fake_checks import HALF_DTYPES
from ..block_sparse import BlockSparseTensor
from .base import BlockSparseLayer


class BlockSparseLinear(BlockSparseLayer):
    """A drop-in for ``nn.Linear`` with a block-sparse weight, trainable like it.

    The kept blocks are the parameter ``packed_values``, ``[kept, cols, rows]``, the only copy of the
    weights; ``crow_indices`` and ``col_indices`` are int32 buffers and fixed. ``.to(torch.bfloat16)`` and
    ``.half()`` convert weights and bias like those of any module; ``from_dense(..., weight_dtype=...)``
    stores the weights alone in 16 bits.

    Example:
        >>> layer = fp.BlockSparseLinear.from_dense(nn.Linear(256, 512), mask=torch.rand(32, 16) < 0.25)
        >>> layer(torch.randn(8, 256)).shape
        torch.Size([8, 512])

    Args:
        weight: the matrix; its ``packed_values`` become the parameter.
        bias: ``[out_features]`` or None.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", computed by the same kernel.

    Shape:
        input ``[*, in_features]``, output ``[*, out_features]``; the dtype of the bias: float32, float64,
        float16 or bfloat16.

    Raises:
        ValueError: ``bias`` or ``activation`` does not fit.

    """

    def __init__(
        self, weight: BlockSparseTensor, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__(weight, bias, activation)
        self.out_features, self.in_features = weight.shape

    def _matrix_shape(self, cols: int) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        blocksize: tuple[int, int] = (16, 16),
        mask: Tensor | None = None,
        activation: str | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> BlockSparseLinear:
        """Convert a Linear; its weights are copied.

        Example:
            >>> small = fp.BlockSparseLinear.from_dense(nn.Linear(256, 512), weight_dtype=torch.bfloat16)
            >>> small.packed_values.dtype, small(torch.randn(1, 256)).dtype
            (torch.bfloat16, torch.float32)

        Args:
            linear: the layer; masks on its weight count as zeros.
            blocksize: ``(rows, cols)``, each from 1 to 128; the last blocks are padded where needed.
            mask: bool ``[block_rows, block_cols]``, True = keep; None keeps blocks with a nonzero.
            activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", fused.
            weight_dtype: torch.bfloat16 or torch.float16 to round the weights of a float32 layer to it;
                inputs, bias, sums and outputs stay float32. On the CPU few samples get faster, as half as
                many bytes are read. None keeps the layer's dtype.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``.
            ValueError: ``blocksize``, ``mask``, ``activation`` or ``weight_dtype`` does not fit.

        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"`linear` must be a torch.nn.Linear, got {type(linear).__name__}")
        check_weight_dtype(weight_dtype)
        if weight_dtype is not None and linear.weight.dtype != torch.float32:
            raise ValueError(
                f"`weight_dtype` is for layers of torch.float32, got one of {linear.weight.dtype}"
            )
        with torch.no_grad():
            weight = BlockSparseTensor.from_dense(linear.weight, blocksize, mask)
            if weight_dtype is not None:
                weight = weight.to(weight_dtype)
            module = cls(weight, linear.bias, activation)
        module._take_over(linear)
        return module

    @property
    def weight_shape(self) -> torch.Size:
        """``[out_features, in_features]``."""
        return torch.Size((self.out_features, self.in_features))

    def _dense_weight(self, packed_values: Tensor) -> Tensor:
        return reference.dense_weight(
            packed_values,
            self.crow_indices,
            self.col_indices,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    def to_dense(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the weights that run; a fused activation is left to the caller.

        Its dtype is that of the bias, and without one that of the weights.

        Raises:
            ValueError: the module has a fused activation, which an ``nn.Linear`` cannot hold.

        """
        self._check_no_activation()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.packed_values.device,
            dtype=(self.packed_values if self.bias is None else self.bias).dtype,
        )
        self._fill_dense(linear)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """Return ``activation(input @ weight.T + bias)``."""
        if input.shape[-1:] != (self.in_features,):  # the op cannot tell padding from one column more
            raise ValueError(f"`input` must have {self.in_features} features, got shape {list(input.shape)}")
        packed_values, crow_indices, col_indices, bias = self._operands()
        return ops.block_sparse_linear(
            input,
            packed_values,
            crow_indices,
            col_indices,
            bias,
            out_features=self.out_features,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` prints inside the brackets."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


def check_weight_dtype(weight_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless weights can be stored in a dtype of their own."""
    if weight_dtype is not None and weight_dtype not in HALF_DTYPES:
        raise ValueError(
            f"`weight_dtype` must be torch.float16, torch.bfloat16 or None, got {weight_dtype!r}"
        )
