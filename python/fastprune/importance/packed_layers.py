"""Large layers of a traced model by faster functions, for the length of one scoring.

A suffix is mostly products with whole weights. The block-sparse kernels skip the blocks that a mask has
emptied; Linear layers take them in any case, since with all blocks kept they are as fast as torch's product
or faster, convolutions only where half of the blocks are gone. All others run in channels-last format, which
is torch's faster one. The weights are packed once for all masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import ops
from ..block_sparse import BlockSparseTensor
from ..conv_chains import ConvChain, find_chains
from ..granularity import Block, weight_as_taps
from ..graph import Replacement, TracedModel
from ..node_ops import ConvOp, NodeOp, node_op

_BLOCKSIZE = (16, 16)

# Below these a call is no faster than torch's: measured over 16 to 10,000 samples, 16 to 3,072 features.
_FEWEST_WEIGHTS = 128 * 128
_FEWEST_SAMPLES = 64

# A convolution whose output is channels-last saves those behind it the conversion.
_FEWEST_CONVOLUTION_WEIGHTS = 1024

# Of the blocks of a convolution, for the block-sparse kernel to be worth it in any shape.
_LARGEST_DENSITY = 0.5

# Below this density a convolution on the block-sparse kernel is faster than Winograd's with all blocks.
_LARGEST_SPARSE_DENSITY = 0.25

# Of the memory budget, for all packed weights of a model, and for those of Winograd's algorithm.
_SHARE_OF_BUDGET = 0.1
_WINOGRAD_SHARE_OF_BUDGET = 0.15


class PackedLayers:
    """Packed weights of one model, whose traces they make faster.

    Which layers are packed depends on sizes and masks alone, and the bits of a product do not depend on the
    other samples: what a mask does not change stays exactly as it was.

    Args:
        memory_budget: bytes that scoring may take.

    """

    def __init__(self, memory_budget: int) -> None:
        self._bytes_left = int(memory_budget * _SHARE_OF_BUDGET)
        self._winograd_bytes_left = int(memory_budget * _WINOGRAD_SHARE_OF_BUDGET)
        # With what they were made from, which stays alive, so that nothing else gets its id.
        self._packed: dict[int, tuple[BlockSparseTensor | Tensor | None, object]] = {}
        self._transformed: dict[tuple[int, ...], tuple[Callable[[], Tensor] | None, tuple[object, ...]]] = {}

    def speed_up(self, traced: TracedModel) -> None:
        """Let a traced model compute its large layers by packed weights, as they are now."""
        constants = traced.constants()
        for node in traced.nodes:
            op = node_op(traced, node)
            if op is None or op.kind not in ("linear", "conv") or node in traced.replacements:
                continue
            if any(isinstance(operand, fx.Node) and operand not in constants for operand in op.operands):
                continue
            weight, bias = op.tensors(constants)
            assert weight is not None
            packed = self._pack(op, weight)
            if packed is not None and (bias is None or bias.dtype == torch.float32):
                traced.replacements[node] = _replacement(op, weight, packed, bias)
        chains = find_chains(traced, constants)
        for chain in chains:
            self._transform(traced, chain)
        traced.use_chains(chains)

    def _transform(self, traced: TracedModel, chain: ConvChain) -> None:
        """Let a chain compute changes of a whole input by Winograd's algorithm, if that fits and gains."""
        conv = traced.replacements.get(chain.nodes[0])
        if not isinstance(conv, (_Convolution, _SparseConvolution)) or chain.winograd_bytes == 0:
            return
        if isinstance(conv, _SparseConvolution) and conv.packed.density <= _LARGEST_SPARSE_DENSITY:
            return
        key = tuple(map(id, chain.sources))
        if key not in self._transformed:
            fits = chain.winograd_bytes <= self._winograd_bytes_left
            # Made when the first change of a whole input comes: before the scored layers none does.
            self._transformed[key] = (functools.cache(chain.transform) if fits else None, chain.sources)
            self._winograd_bytes_left -= chain.winograd_bytes if fits else 0
        winograd, _ = self._transformed[key]
        if winograd is not None:
            chain.use(winograd)

    def _pack(self, op: NodeOp, weight: Tensor) -> BlockSparseTensor | Tensor | None:
        # A module under a mask makes its weight anew for each call: the module stands for it.
        source: object = weight if op.module is None else op.module
        key = id(source)
        if key not in self._packed:
            size = weight.numel() * weight.element_size()
            fewest = _FEWEST_CONVOLUTION_WEIGHTS if isinstance(op, ConvOp) else _FEWEST_WEIGHTS
            suits = weight.dtype == torch.float32 and not weight.is_cuda and weight.numel() >= fewest
            packed = None
            if suits and size <= self._bytes_left:
                packed = _packed_convolution(op, weight) if isinstance(op, ConvOp) else _blocks_of(weight)
                self._bytes_left -= size if packed is not None else 0
            self._packed[key] = packed, source
        return self._packed[key][0]


def _blocks_of(matrix: Tensor) -> BlockSparseTensor:
    return BlockSparseTensor.from_dense(matrix.detach(), _BLOCKSIZE)


def _packed_convolution(op: ConvOp, weight: Tensor) -> BlockSparseTensor | Tensor | None:
    """The kept blocks if they are few, else the weight in channels-last format; None for groups."""
    if op.groups != 1 or weight.dim() != 4:
        return None
    counts = Block(*_BLOCKSIZE).sum_pieces(weight.detach().abs())
    if int((counts != 0).sum()) > _LARGEST_DENSITY * counts.numel():
        return weight.detach().contiguous(memory_format=torch.channels_last)
    return _blocks_of(F.pad(weight_as_taps(weight), (0, -weight.shape[1] % _BLOCKSIZE[1])).flatten(1))


def _replacement(
    op: NodeOp, weight: Tensor, packed: BlockSparseTensor | Tensor, bias: Tensor | None
) -> Replacement:
    if not isinstance(op, ConvOp):
        assert isinstance(packed, BlockSparseTensor)
        return _Linear(op.input, weight, packed, bias)
    if isinstance(packed, BlockSparseTensor):
        return _SparseConvolution(op, weight, packed, bias)
    return _Convolution(op, packed, bias)


class _Convolution:
    """``F.conv2d`` in channels-last format, which what it gives passes on to the layers behind."""

    def __init__(self, op: ConvOp, weight: Tensor, bias: Tensor | None) -> None:
        self.input = op.input
        self.op = op
        self.weight = weight
        self.bias = bias

    def __call__(self, input: Tensor) -> Tensor:
        return self.op.convolve(input, self.weight, self.bias, 1)


class _SparseConvolution:
    """``F.conv2d`` with the kept blocks of a weight; an image without a batch dimension takes all."""

    def __init__(self, op: ConvOp, weight: Tensor, packed: BlockSparseTensor, bias: Tensor | None) -> None:
        self.input = op.input
        self.op = op
        self.weight = weight
        self.packed = packed
        self.bias = bias

    def __call__(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or input.dtype != torch.float32:
            return self.op.convolve(input, self.weight, self.bias, 1)
        kernel_size = (self.weight.shape[2], self.weight.shape[3])
        left, right, top, bottom = self.op.sides(kernel_size)
        return ops.block_sparse_conv2d(
            input,
            self.packed.packed_values,
            self.packed.crow_indices,
            self.packed.col_indices,
            self.bias,
            out_channels=len(self.weight),
            kernel_size=kernel_size,
            stride=self.op.strides,
            padding=(top, bottom, left, right),
            dilation=self.op.dilations,
        )


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
