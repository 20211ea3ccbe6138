"""BlockSparseConv2d: a Conv2d that multiplies only the kept blocks of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ..block_sparse import BlockSparseTensor
from ..granularity import check_blocksize, check_count, weight_as_taps
from .base import BlockSparseLayer
from .own_forward import OwnForward, has_own_forward

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return ``(height, width)`` of an argument that may be one integer for both."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"`{name}` must be one or two integers of at least {least}, got {value!r}")
    return pair


def _sides(
    padding: Any, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return the padding of the sides top, bottom, left, right; "same" puts an odd pixel at the end."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        top, left = (d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True))
        bottom = dilation[0] * (kernel_size[0] - 1) - top
        return top, bottom, left, dilation[1] * (kernel_size[1] - 1) - left
    if isinstance(padding, str):
        raise ValueError(f"`padding` must be integers, 'same' or 'valid', got {padding!r}")
    height, width = _pair("padding", padding, 0)
    return height, height, width, width


def cuts_groups(out_channels: int, groups: int, rows: int) -> bool:
    """Tell whether blocks of so many rows reach over two groups, which the kernel does not serve."""
    return groups > 1 and out_channels // groups % rows != 0


class BlockSparseConv2d(BlockSparseLayer):
    """A drop-in for ``nn.Conv2d`` with a block-sparse weight, trainable like it.

    The weight is seen as the matrix ``[out_channels, kernel_height * kernel_width * padded]``: taps
    row-major, channels innermost, padded in each tap to the next multiple of the block's columns. The kept
    blocks are the parameter ``packed_values``, ``[kept, cols, rows]``, the only copy of the weights;
    ``crow_indices`` and ``col_indices`` are int32 buffers and fixed.

    Example:
        >>> conv = nn.Conv2d(64, 128, 3, padding=1)
        >>> layer = fp.BlockSparseConv2d.from_dense(conv, mask=torch.rand(8, 9 * 4) < 0.25)
        >>> layer(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 128, 28, 28])

    Args:
        weight: the matrix; its ``packed_values`` become the parameter.
        bias: ``[out_channels]`` or None.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", computed by the same kernel.
        in_channels: of the images.
        kernel_size: in pixels, as stride, padding and dilation: an integer or ``(height, width)``.
        stride: as in ``nn.Conv2d``, and so are all that follow.
        padding: integers, "same" or "valid".
        dilation: between the taps.
        groups: of channels; above 1, ``out_channels / groups`` must be a multiple of the block's rows.
        padding_mode: "zeros", "reflect", "replicate" or "circular"; all but the first copy the input.

    Attributes:
        channels_last: whether the input is brought into that memory format first, as torch's own layer does
            with a channels-last weight; False computes in the format of the input. The output has it too.

    Shape:
        input ``[images, in_channels, height, width]`` or ``[in_channels, height, width]``, output likewise
        with ``out_channels``; float32 or float64. On CUDA float32, float16 or bfloat16; float64 is computed
        through the dense weight.

    Raises:
        ValueError: an argument does not fit; the message names it.

    """

    def __init__(
        self,
        weight: BlockSparseTensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        in_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(weight, bias, activation)
        for name, count in (("in_channels", in_channels), ("groups", groups)):
            check_count(count, name)
        if padding_mode not in _PADDING_MODES:
            expected = ", ".join(f"'{mode}'" for mode in _PADDING_MODES)
            raise ValueError(f"`padding_mode` must be one of {expected}, got {padding_mode!r}")
        self.in_channels, self.out_channels = in_channels, weight.shape[0]
        if in_channels % groups or self.out_channels % groups:
            raise ValueError(
                f"`groups` must divide the channels, {in_channels} and {self.out_channels}, got {groups}"
            )
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        self._sides = _sides(padding, self.kernel_size, self.dilation)
        if padding == "same" and self.stride != (1, 1):
            raise ValueError(f"`padding` 'same' needs a `stride` of 1, got {self.stride}")
        self.padding = padding if isinstance(padding, str) else (self._sides[0], self._sides[2])
        self.channels_last = False
        self._own_forward: OwnForward | None = None
        self._check_groups(*self.blocksize)
        expected_shape = self._matrix_shape(self.blocksize[1])
        if tuple(weight.shape) != expected_shape:
            raise ValueError(
                f"`weight` must be a matrix of shape {list(expected_shape)} for {in_channels} channels in "
                f"{groups} groups, kernel size {self.kernel_size} and blocks of {self.blocksize[1]} columns, "
                f"got {list(weight.shape)}"
            )

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        blocksize: tuple[int, int] = (16, 16),
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> BlockSparseConv2d:
        """Convert a Conv2d; its weights are copied.

        A subclass with a forward of its own, such as one that pads its input like TensorFlow, keeps that
        forward; it may do whatever it likes to its input, and must return what ``F.conv2d`` gives.

        Args:
            conv: the layer; masks on its weight count as zeros.
            blocksize: ``(rows, cols)``, each from 1 to 128; the last blocks, and the last channels of each
                tap, are padded where needed.
            mask: bool, the shape of ``fp.Block(*blocksize).shape(conv.weight.shape)``, True = keep; None
                keeps blocks with a nonzero.
            activation: None, "relu", "relu6", "gelu", "gelu_tanh" or "silu", fused.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``.
            ValueError: ``blocksize``, ``mask`` or ``activation`` does not fit, or ``conv`` has a forward of
                its own and other parameters than weight and bias.

        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"`conv` must be a torch.nn.Conv2d, got {type(conv).__name__}")
        check_blocksize(blocksize)
        with torch.no_grad():
            taps = weight_as_taps(conv.weight)
            matrix = F.pad(taps, (0, -taps.shape[2] % blocksize[1])).flatten(1)
            weight = BlockSparseTensor.from_dense(matrix, blocksize, mask)
            module = cls.like(conv, weight, conv.bias, activation)
        module._take_over(conv)
        return module

    @classmethod
    def like(
        cls,
        conv: nn.Conv2d | BlockSparseConv2d,
        weight: BlockSparseTensor,
        bias: Tensor | None,
        activation: str | None,
    ) -> BlockSparseConv2d:
        """Return a layer with the geometry and the forward of another, and with parameters of its own.

        Raises:
            ValueError: the parameters do not fit.

        """
        module = cls(
            weight,
            bias,
            activation,
            in_channels=conv.in_channels,
            kernel_size=conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            padding_mode=conv.padding_mode,
        )
        if isinstance(conv, BlockSparseConv2d):
            module._own_forward = conv._own_forward
        elif has_own_forward(conv):
            module._own_forward = OwnForward(conv)
        return module

    def _matrix_shape(self, cols: int) -> tuple[int, int]:
        taps = self.kernel_size[0] * self.kernel_size[1]
        return self.out_channels, taps * -(-(self.in_channels // self.groups) // cols) * cols

    def _check_groups(self, rows: int, cols: int) -> None:
        if cuts_groups(self.out_channels, self.groups, rows):
            raise ValueError(
                f"`blocksize` must have rows that divide the {self.out_channels // self.groups} output "
                f"channels of a group, got {rows} x {cols}"
            )

    def _check_structure(self, packed_values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> None:
        super()._check_structure(packed_values, crow_indices, col_indices)
        self._check_groups(packed_values.shape[2], packed_values.shape[1])

    @property
    def own_class(self) -> type[nn.Conv2d] | None:
        """The subclass of ``nn.Conv2d`` whose forward the layer keeps, or None for torch's own."""
        return None if self._own_forward is None else self._own_forward.dense_class

    @property
    def weight_shape(self) -> torch.Size:
        """``[out_channels, in_channels / groups, *kernel_size]``."""
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def _dense_weight(self, packed_values: Tensor) -> Tensor:
        return reference.dense_conv2d_weight(
            packed_values,
            self.crow_indices,
            self.col_indices,
            out_channels=self.out_channels,
            in_channels=self.in_channels,
            kernel_size=self.kernel_size,
            groups=self.groups,
        )

    def to_dense(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the weights that run; a fused activation is left to the caller.

        A layer that came from a subclass with a forward of its own gives a layer of that class.

        Raises:
            ValueError: the module has a fused activation, which an ``nn.Conv2d`` cannot hold.

        """
        self._check_no_activation()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            self.packed_values.device,
            self.packed_values.dtype,
        )
        self._fill_dense(conv)
        if self._own_forward is not None:
            conv = self._own_forward.dense_module(conv)
        return conv

    def forward(self, input: Tensor) -> Tensor:
        """Return ``activation(conv2d(input, weight, bias))``."""
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"`input` must have shape [images, {self.in_channels}, height, width] or "
                f"[{self.in_channels}, height, width], got {list(input.shape)}"
            )
        if self._own_forward is not None:
            like = self.packed_values.new_empty(1).expand(self.weight_shape)
            return self._own_forward(input, like, self.bias, self.training, self._own_convolve)
        sides = self._sides
        if self.padding_mode != "zeros":
            top, bottom, left, right = sides
            input = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
            sides = (0, 0, 0, 0)
        return self._convolve(input, self.stride, sides, self.dilation)

    def _own_convolve(self, input: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        """Compute the call of F.conv2d that a forward of its own class makes."""
        dilation = _pair("dilation", dilation, 1)
        sides = _sides(padding, self.kernel_size, dilation)
        return self._convolve(input, _pair("stride", stride, 1), sides, dilation)

    def _convolve(
        self,
        input: Tensor,
        stride: tuple[int, int],
        sides: tuple[int, int, int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        if input.dim() == 3:
            return self._convolve(input.unsqueeze(0), stride, sides, dilation).squeeze(0)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        packed_values, crow_indices, col_indices, bias = self._operands()
        return ops.block_sparse_conv2d(
            input,
            packed_values,
            crow_indices,
            col_indices,
            bias,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=stride,
            padding=sides,
            dilation=dilation,
            groups=self.groups,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` prints inside the brackets, in the order of ``nn.Conv2d``."""
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        parts.append(f"stride={self.stride}")
        if self.padding not in ((0, 0), "valid"):
            parts.append(f"padding={self.padding}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        if self.own_class is not None:
            parts.append(f"forward of {self.own_class.__name__}")
        return ", ".join([*parts, self._describe()])
