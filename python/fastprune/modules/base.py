"""What block-sparse layers share: their tensors, and states that are checked before a kernel reads them."""

from __future__ import annotations

import abc
import weakref
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import reference
from .._dispatch import is_transformed, takes_registered_gradients
from ..block_sparse import BlockSparseTensor
from .resized import forget_moments

Parts = tuple[Tensor, Tensor, Tensor]


class RunningBlocks:
    """The blocks of a layer that run, of those that it keeps.

    Args:
        parts: ``packed_values``, ``crow_indices`` and ``col_indices`` of the layer.
        runs: bool ``[kept]``.

    """

    def __init__(self, parts: Parts, runs: Tensor) -> None:
        packed_values, crow_indices, col_indices = parts
        runs = runs.to(packed_values.device)
        counts = F.pad(runs.cumsum(0), (1, 0))[crow_indices.long()]
        self.indices = runs.nonzero()[:, 0]
        self.crow_indices = counts.to(torch.int32)
        self.col_indices = col_indices[runs]
        self._values: Tensor | None = None
        self._made_of: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without gathered values, which refer to the layer's."""
        return {**vars(self), "_values": None, "_made_of": ()}

    def parts(self, packed_values: Tensor) -> Parts:
        """Return what a kernel reads; values are gathered once, and again when the layer's have changed."""
        device = packed_values.device
        if self.indices.device != device:  # the layer has moved
            self.indices, self.crow_indices, self.col_indices = (
                tensor.to(device) for tensor in (self.indices, self.crow_indices, self.col_indices)
            )
        recorded = takes_registered_gradients() or is_transformed()
        if recorded or (torch.is_grad_enabled() and packed_values.requires_grad):
            # A step of an optimiser may follow, and fused ones leave the version as it is.
            self._values = None
            return packed_values[self.indices], self.crow_indices, self.col_indices
        if packed_values.is_inference():  # which count no changes
            return packed_values[self.indices], self.crow_indices, self.col_indices
        state = (packed_values.data_ptr(), packed_values._version, packed_values.dtype)
        owner, *made_of = self._made_of or (lambda: None,)
        if self._values is None or owner() is not packed_values or tuple(made_of) != state:
            with torch.inference_mode(False):  # later calls may need a gradient of the input
                self._values = packed_values.detach()[self.indices]
            # Not the address alone: that of a temporary weight is soon another's.
            self._made_of = (weakref.ref(packed_values), *state)
        return self._values, self.crow_indices, self.col_indices


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
        self._running: RunningBlocks | None = None

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
    def weight(self) -> Tensor:
        """The dense weight, made anew of all kept blocks, ``weight_shape``; gradients flow to them."""
        return self._dense_weight(self.packed_values)

    @abc.abstractmethod
    def _dense_weight(self, packed_values: Tensor) -> Tensor:
        """Return the dense weight that some values of the blocks make."""

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

    @property
    def running_density(self) -> float:
        """Share of the kept blocks that run, see :meth:`set_density`."""
        kept = self.packed_values.shape[0]
        return 1.0 if self._running is None or not kept else len(self._running.indices) / kept

    def set_density(self, density: float, scores: Tensor | None = None) -> None:
        """Run only the most important of the kept blocks from now on; none is lost.

        The layer computes as if the others were zero, at the speed of a layer without them. For inference
        the values of those that run are copied, once for each call; in training gradients reach them
        alone. A state dict holds all blocks and no density. Weights that are edited through ``.data``, which
        torch does not count as a change, are seen after the next forward with gradients or call of this.

        Example:
            >>> layer.set_density(0.5)
            >>> layer.running_density
            0.5

        Args:
            density: share of the kept blocks, in [0, 1]; 1 runs all.
            scores: ``[block_rows, block_cols]``, larger matters more; None for the sum of squares of a
                block's weights, as they are now. Equal blocks run in the order they are stored.

        Raises:
            ValueError: ``density`` is out of range, or ``scores`` have another shape or NaN.

        """
        check_running_density(density)
        self.run_blocks(top_share(self.block_importance(scores), density))

    def block_importance(self, scores: Tensor | None = None) -> Tensor:
        """Return the scores of the kept blocks, ``[kept]``, as :meth:`set_density` ranks them."""
        if scores is None:
            return self.packed_values.detach().double().square().sum((1, 2))
        rows, cols = self.crow_indices.numel() - 1, self._matrix_shape(self.blocksize[1])[1]
        grid = (rows, -(-cols // self.blocksize[1]))
        if tuple(scores.shape) != grid or bool(scores.isnan().any()):
            found = "NaN among them" if tuple(scores.shape) == grid else f"shape {list(scores.shape)}"
            raise ValueError(f"`scores` must be numbers of shape {list(grid)}, got {found}")
        scores = scores.to(self.col_indices.device)
        row = torch.repeat_interleave(torch.arange(rows, device=scores.device), self.crow_indices.diff())
        return scores[row, self.col_indices.long()]

    def run_blocks(self, runs: Tensor) -> None:
        """Run the kept blocks that are True in a bool ``[kept]``, and no others."""
        parts = (self.packed_values.detach(), self.crow_indices, self.col_indices)
        self._running = None if bool(runs.all()) else RunningBlocks(parts, runs)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the blocks that run, as a kernel reads them, and the bias."""
        # Attributes of modules are slow to read, 0.6 us each. A parametrized weight is no parameter of this
        # module; only then, and without a bias, is the slow way taken.
        parameters, buffers = self._parameters, self._buffers
        own, bias = parameters.get("packed_values"), parameters.get("bias")
        packed_values: Tensor = self.packed_values if own is None else own
        if bias is None:
            bias = self.bias
        if self._running is not None:
            return *self._running.parts(packed_values), bias
        return packed_values, buffers["crow_indices"], buffers["col_indices"], bias  # type: ignore[return-value]

    def _check_no_activation(self) -> None:
        if self.activation is not None:
            raise ValueError(f"to_dense would lose the fused activation '{self.activation}'")

    def _fill_dense(self, dense: nn.Linear | nn.Conv2d) -> None:
        """Write the weights, of the blocks that run, into a dense layer that goes into this one's place."""
        with torch.no_grad():
            values = self.packed_values
            if self._running is not None:
                indices = self._running.indices.to(values.device)
                values = torch.zeros_like(values).index_copy_(0, indices, values[indices])
            dense.weight.copy_(self._dense_weight(values))
            dense.weight.requires_grad_(self.packed_values.requires_grad)
            if self.bias is not None and dense.bias is not None:
                dense.bias.copy_(self.bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
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
            pairs = list(zip(parts[1:], (self.crow_indices, self.col_indices), strict=True))
            if self._running is not None and not all(_same(part, own) for part, own in pairs):
                self._running = None  # those were other blocks
            # The parameter and the buffers stay the same objects, as optimisers hold them.
            for name, part in zip(names, parts, strict=True):
                own = getattr(self, name)
                if part.shape != own.shape:
                    own.grad = None
                    own.data = torch.empty(part.shape, dtype=own.dtype, device=own.device)
                    forget_moments(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _describe(self) -> str:
        """What ``repr`` prints of the blocks."""
        text = f"bias={self.bias is not None}, blocksize={self.blocksize}, density={self.density:.3f}"
        if self._running is not None:
            text += f", running_density={self.running_density:.3f}"
        return text if self.activation is None else f"{text}, activation={self.activation}"


def _same(part: Tensor, own: Tensor) -> bool:
    return not own.is_meta and torch.equal(part.to(own.device), own)


def check_running_density(density: float) -> None:
    """Raise ValueError for what is no share of blocks."""
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 <= float(density) <= 1:
        raise ValueError(f"`density` must be a number in [0, 1], got {density!r}")


def top_share(importance: Tensor, share: float) -> Tensor:
    """Return True for the largest of some numbers, a share of them; of equal ones the first."""
    largest = torch.zeros(len(importance), dtype=torch.bool, device=importance.device)
    largest[importance.argsort(descending=True, stable=True)[: round(share * len(importance))]] = True
    return largest


def is_trainable(module: nn.Module, parameter: str) -> bool:
    """Tell whether a parameter is trained; a masked one is made from others, and under no_grad hides it."""
    if parametrize.is_parametrized(module, parameter):
        return any(part.requires_grad for part in module.parametrizations[parameter].parameters())  # type: ignore[union-attr, index]
    return bool(getattr(module, parameter).requires_grad)
