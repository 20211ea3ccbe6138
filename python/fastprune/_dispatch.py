"""How the functions of ops compute a call: by a kernel, with or without autograd, or by plain torch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import _library
from ._fake_checks import CUDA_DTYPES, HALF_DTYPES

_warned: set[str] = set()


@torch.compiler.assume_constant_result  # torch.compile looks on from under a transform of its own
def is_transformed() -> bool:
    """Tell whether a torch.func transform or forward-mode differentiation is under way: ops serve neither."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether autograd follows a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def takes_registered_gradients() -> bool:
    """Tell whether a call is recorded, and must be one op: by torch.compile, torch.export or torch.jit.trace.

    Else a torch.autograd.Function around the op without gradients does the same in less time.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def runs_dense(values: Tensor) -> bool:
    """Tell whether a block-sparse layer with these values is computed through its dense weight."""
    lacking = _library.cuda_kernels_unavailable_reason() is not None
    return values.is_cuda and (lacking or values.dtype not in CUDA_DTYPES)


def lacks_cuda_kernel(op: str, tensor: Tensor, supported: bool) -> bool:
    """Tell whether a CUDA tensor must take the way of `reference`, and say so once for each op and reason."""
    if not tensor.is_cuda:
        return False
    reason = _library.cuda_kernels_unavailable_reason()
    if reason is None and supported:
        return False
    message = f"fastprune: {op} runs as plain torch operations on CUDA: " + (
        f"CUDA kernels are {reason}" if reason is not None else f"it has no CUDA kernel for {tensor.dtype}"
    )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
    return True


def autocast_as_torch(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast casts the arguments of ``F.linear``: where the first is on CUDA, and not float64."""
    first = tensors[0]
    if first is None or not first.is_cuda or not torch.is_autocast_enabled("cuda"):
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_convolution(
    input: Tensor, packed_values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the arguments of a block-sparse convolution for autocast, on the CPU to its kernel's float32."""
    if input.is_cuda:
        return autocast_as_torch(input, packed_values, bias)  # type: ignore[return-value]
    if not torch.is_autocast_enabled("cpu"):
        return input, packed_values, bias
    return _to_float32(input), _to_float32(packed_values), None if bias is None else _to_float32(bias)


def autocast_linear(
    input: Tensor, packed_values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the arguments of a block-sparse linear layer for autocast.

    On CUDA like those of ``F.linear``. On the CPU float32 is faster and more exact than what autocast would
    cast to: weights of 32 bits stay so, and those of 16 bits are read as they are.
    """
    if input.is_cuda:
        return autocast_as_torch(input, packed_values, bias)  # type: ignore[return-value]
    if not torch.is_autocast_enabled("cpu"):
        return input, packed_values, bias
    half = packed_values.dtype in HALF_DTYPES
    if half and all(t is None or t.dtype == packed_values.dtype for t in (input, bias)):
        return input, packed_values, bias
    values = packed_values if half else _to_float32(packed_values)
    return _to_float32(input), values, None if bias is None else _to_float32(bias)


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
