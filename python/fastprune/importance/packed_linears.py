"""Linear layers of a traced model by the block-sparse kernel, for the length of one scoring.

A suffix is mostly products with whole weights. The kernel does them as fast as torch's dense one or faster
with all blocks kept, and skips the blocks that a mask has emptied; the weights are packed once for all masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import ops
from ..block_sparse import BlockSparseTensor
from ..graph import TracedModel
from ..node_ops import NodeOp, node_op

_BLOCKSIZE = (16, 16)

# Below these a call is no faster than torch's: measured over 16 to 10,000 samples, 16 to 3,072 features.
_FEWEST_WEIGHTS = 128 * 128
_FEWEST_SAMPLES = 64

# Of the memory budget, for all packed weights of a model.
_SHARE_OF_BUDGET = 0.1


class PackedLinears:
    """Packed weights of one model, whose traces they make faster.

    Which layers are packed depends on sizes alone, and the bits of a product do not depend on the other
    samples: what a mask does not change stays exactly as it was.

    Args:
        memory_budget: bytes that scoring may take.

    """

    def __init__(self, memory_budget: int) -> None:
        self._bytes_left = int(memory_budget * _SHARE_OF_BUDGET)
        self._packed: dict[int, BlockSparseTensor | None] = {}

    def speed_up(self, traced: TracedModel) -> None:
        """Let a traced model compute its large Linear layers by packed weights, as they are now."""
        constants = traced.constants()
        for node in traced.nodes:
            op = node_op(traced, node)
            if op is None or op.kind != "linear" or node in traced.replacements:
                continue
            if any(isinstance(operand, fx.Node) and operand not in constants for operand in op.operands):
                continue
            weight, bias = op.tensors(constants)
            assert weight is not None
            packed = self._pack(op, weight)
            if packed is not None and (bias is None or bias.dtype == torch.float32):
                traced.replacements[node] = _Linear(op.input, weight, packed, bias)

    def _pack(self, op: NodeOp, weight: Tensor) -> BlockSparseTensor | None:
        # A module under a mask makes its weight anew for each call: the module stands for it.
        key = id(weight) if op.module is None else id(op.module)
        if key not in self._packed:
            size = weight.numel() * weight.element_size()
            suits = weight.dtype == torch.float32 and not weight.is_cuda and weight.numel() >= _FEWEST_WEIGHTS
            packed = None
            if suits and size <= self._bytes_left:
                packed = BlockSparseTensor.from_dense(weight.detach(), _BLOCKSIZE)
                self._bytes_left -= size
            self._packed[key] = packed
        return self._packed[key]


class _Linear:
    """``F.linear`` with a packed weight; few samples take the dense one."""

    def __init__(
        self, input: fx.Node, weight: Tensor, packed: BlockSparseTensor, bias: Tensor | None
    ) -> None:
        self.input = input
        self.weight = weight
        self.packed = packed
        self.bias = bias

    def __call__(self, input: Tensor) -> Tensor:
        if input.numel() < _FEWEST_SAMPLES * input.shape[-1] or input.dtype != torch.float32:
            return F.linear(input, self.weight, self.bias)
        return ops.block_sparse_linear(
            input,
            self.packed.packed_values,
            self.packed.crow_indices,
            self.packed.col_indices,
            self.bias,
            out_features=len(self.weight),
        )
