"""Eval mode that leaves no trace."""

from __future__ import annotations

import contextlib

import torch
from torch import nn


def outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """Leave ``torch.inference_mode`` for a while: gradients need it, and else grad mode is not touched."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


class EvalMode:
    """Eval mode for a while; flags, attributes, buffers and gradients come back, whatever happens.

    Example:
        >>> with EvalMode(model):
        ...     model(inputs)

    """

    def __init__(self, model: nn.Module) -> None:
        self.attributes = [(module, dict(vars(module))) for module in model.modules()]
        self.buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.gradients = [(tensor, tensor.grad, tensor.requires_grad) for tensor in model.parameters()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()
        for tensor, _, _ in self.gradients:
            tensor.grad = None  # a backward of somebody's own criterion would add to it

    def __exit__(self, *error: object) -> None:
        for module, attributes in self.attributes:
            # A forward may keep what it computes, and a trace leaves its own tensors on the model.
            vars(module).update(attributes)
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
        for tensor, gradient, requires_grad in self.gradients:
            tensor.grad = gradient
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        for module, name, buffer, before in self.buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):  # a forward that counts its calls, say
                buffer.copy_(before)
