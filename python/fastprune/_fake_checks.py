"""What fake kernels check of their arguments, in the words of the real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

HALF_DTYPES = (torch.float16, torch.bfloat16)
"""The dtypes of 16 bits: products of them accumulate in float32."""

CUDA_DTYPES = (torch.float32, *HALF_DTYPES)
"""What the CUDA kernels of the products take."""


def check(condition: bool, message: str) -> None:
    """Raise ValueError with a message unless a condition holds."""
    if not condition:
        raise ValueError(message)


def check_floating(op: str, name: str, tensor: Tensor, half: bool = False) -> None:
    """Check that a product has a kernel for a tensor's dtype; ``half``: the CPU has one for 16 bits too."""
    cpu_dtypes = (torch.float32, torch.float64, *(HALF_DTYPES if half else ()))
    dtypes = CUDA_DTYPES if tensor.is_cuda else cpu_dtypes
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    check(tensor.dtype in dtypes, f"{op}: `{name}` must have dtype {names}, got {tensor.dtype}")
    check(tensor.dim() >= 1, f"{op}: `{name}` must have at least 1 dimension, got 0")


def check_activation(op: str, activation: str) -> None:
    """Check the name of an activation."""
    activations = ("none", *reference.ACTIVATIONS)
    check(activation in activations, f"{op}: `activation` must be one of {activations}, got '{activation}'")


def check_shapes(op: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Check that tensors have the shapes that go with their names."""
    for name, (tensor, shape) in expected.items():
        check(
            tuple(tensor.shape) == shape,
            f"{op}: `{name}` must have shape {list(shape)}, got {list(tensor.shape)}",
        )


def check_like(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Check that tensors have the device and the dtype of another."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check(
                tensor.device == like.device, f"{op}: `{name}` must be on {like.device}, got {tensor.device}"
            )
            check(
                tensor.dtype == like.dtype, f"{op}: `{name}` must have dtype {like.dtype}, got {tensor.dtype}"
            )


def is_mixed(input: Tensor, packed_values: Tensor) -> bool:
    """Tell whether weights of 16 bits meet float32, with which they are multiplied as float32."""
    return input.dtype == torch.float32 and packed_values.dtype in HALF_DTYPES
