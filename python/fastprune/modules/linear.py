"""BlockSparseLinear: a Linear that multiplies only the kept blocks of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ops, reference
from ..block_sparse import BlockSparseTensor


def _is_trainable(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter is trained; a masked one is made from others, and under no_grad hides it."""
    if parametrize.is_parametrized(module, parameter):
        return any(part.requires_grad for part in module.parametrizations[parameter].parameters())  # type: ignore[union-attr, index]
    return bool(getattr(module, parameter).requires_grad)


class BlockSparseLinear(nn.Module):
    """A drop-in for ``nn.Linear`` with a block-sparse weight, trainable like it.

    The kept blocks are the parameter ``packed_values``, ``[kept, cols, rows]``, the only copy of the
    weights; ``crow_indices`` and ``col_indices`` are int32 buffers and fixed.

    Example:
        >>> layer = fp.BlockSparseLinear.from_dense(nn.Linear(256, 512), mask=torch.rand(32, 16) < 0.25)
        >>> layer(torch.randn(8, 256)).shape
        torch.Size([8, 512])

    Args:
        weight: the matrix; its ``packed_values`` become the parameter.
        bias: ``[out_features]`` or None.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", computed by the same kernel.

    Shape:
        input ``[*, in_features]``, output ``[*, out_features]``; float32 or float64, on CUDA also
        float16 or bfloat16.

    Raises:
        ValueError: ``bias`` or ``activation`` does not fit.

    """

    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self, weight: BlockSparseTensor, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        if activation is not None and activation not in reference.ACTIVATIONS:
            expected = ", ".join(f"'{name}'" for name in reference.ACTIVATIONS)
            raise ValueError(f"`activation` must be None or one of {expected}, got {activation!r}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"`bias` must have shape [{self.out_features}], got {list(bias.shape)}")
        self.activation = activation
        self.packed_values = nn.Parameter(weight.packed_values.detach().contiguous())
        self.register_buffer("crow_indices", weight.crow_indices)
        self.register_buffer("col_indices", weight.col_indices)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        blocksize: tuple[int, int] = (16, 16),
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> BlockSparseLinear:
        """Convert a Linear; its weights are copied.

        Args:
            linear: the layer; masks on its weight count as zeros.
            blocksize: ``(rows, cols)``, each from 1 to 128; the last blocks are padded where needed.
            mask: bool ``[block_rows, block_cols]``, True = keep; None keeps blocks with a nonzero.
            activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", fused.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``.
            ValueError: ``blocksize``, ``mask`` or ``activation`` does not fit.

        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"`linear` must be a torch.nn.Linear, got {type(linear).__name__}")
        with torch.no_grad():
            weight = BlockSparseTensor.from_dense(linear.weight, blocksize, mask)
            module = cls(weight, linear.bias, activation)
        for name, part in (("weight", module.packed_values), ("bias", module.bias)):
            if part is not None:
                part.requires_grad_(_is_trainable(linear, name))
        return module.train(linear.training)

    @property
    def block_sparse_weight(self) -> BlockSparseTensor:
        """The weight as a :class:`BlockSparseTensor` that shares this module's memory."""
        return BlockSparseTensor(
            self.packed_values, self.crow_indices, self.col_indices, (self.out_features, self.in_features)
        )

    @property
    def weight(self) -> Tensor:
        """The dense ``[out_features, in_features]`` weight, made anew; gradients flow to the blocks."""
        return reference.dense_weight(
            self.packed_values,
            self.crow_indices,
            self.col_indices,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    @property
    def blocksize(self) -> tuple[int, int]:
        """``(rows, cols)`` of a block."""
        return self.packed_values.shape[2], self.packed_values.shape[1]

    @property
    def density(self) -> float:
        """Kept share of the blocks."""
        block_cols = -(-self.in_features // self.blocksize[1])
        blocks = (self.crow_indices.numel() - 1) * block_cols
        return self.packed_values.shape[0] / blocks if blocks else 1.0

    def to_dense(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weights; a fused activation is left to the caller.

        Raises:
            ValueError: the module has a fused activation, which an ``nn.Linear`` cannot hold.

        """
        if self.activation is not None:
            raise ValueError(f"to_dense would lose the fused activation '{self.activation}'")
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.packed_values.device,
            dtype=self.packed_values.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``activation(input @ weight.T + bias)``."""
        if input.shape[-1:] != (self.in_features,):  # the op cannot tell padding from one column more
            raise ValueError(f"`input` must have {self.in_features} features, got shape {list(input.shape)}")
        # Attributes of modules are slow to read, 0.6 us each. A parametrized weight is no parameter of this
        # module; only then, and without a bias, is the slow way taken.
        parameters, buffers = self._parameters, self._buffers
        packed_values, bias = parameters.get("packed_values"), parameters.get("bias")
        return ops.block_sparse_linear(
            input,
            self.packed_values if packed_values is None else packed_values,
            buffers["crow_indices"],  # type: ignore[arg-type]
            buffers["col_indices"],  # type: ignore[arg-type]
            self.bias if bias is None else bias,
            out_features=self.out_features,
            activation=self.activation,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over another pattern of blocks; refuse one that kernels must not read through."""
        names = ("packed_values", "crow_indices", "col_indices")
        if any(prefix + name in state_dict for name in names):
            # Where a part is missing, which torch reports, the others must fit the one that stays.
            parts = tuple(state_dict.get(prefix + name, getattr(self, name)) for name in names)
            packed_values, crow_indices, col_indices = parts
            try:
                BlockSparseTensor(
                    packed_values, crow_indices, col_indices, (self.out_features, self.in_features)
                )
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

    def extra_repr(self) -> str:
        """Return what ``repr`` prints inside the brackets."""
        activation = "" if self.activation is None else f", activation={self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={self.blocksize}, "
            f"density={self.density:.3f}{activation}"
        )
