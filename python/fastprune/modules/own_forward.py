"""Subclasses of nn.Conv2d with a forward of their own, most of which pad their input as TensorFlow does.

Their forward runs as it is, with a stand-in for the weight: it answers questions about its shape, and
when ``F.conv2d`` is called with it, the convolution is computed by whoever made it. So whatever a forward
does to its input before that call is kept, for inputs of every size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

# What computes the convolution: from the input, stride, padding and dilation that F.conv2d gets.
Convolve = Callable[[Tensor, Any, Any, Any], Tensor]


class _WeightStandIn:
    """What a forward sees in the place of its weight: F.conv2d takes it, no other function does."""

    def __init__(self, like: Tensor, bias: Tensor | None, groups: int, convolve: Convolve) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.bias = bias
        self.groups = groups
        self.convolve = convolve
        self.output: Tensor | None = None

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.conv2d:
            return NotImplemented
        return _convolve(*args, **(kwargs or {}))


def _convolve(
    input: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Compute F.conv2d, or refuse a call that has not the weight, the bias and the groups of the layer."""
    if not isinstance(weight, _WeightStandIn) or bias is not weight.bias or weight.output is not None:
        return NotImplemented
    if groups != weight.groups or input.shape[-3] != weight.shape[1] * groups:
        return NotImplemented
    weight.output = weight.convolve(input, stride, padding, dilation)
    return weight.output


class OwnForward:
    """The forward of a subclass of nn.Conv2d, apart from its parameters.

    Args:
        conv: the layer; what it holds beside its parameters is shared.

    Raises:
        ValueError: the layer has other parameters or buffers than weight and bias.

    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self.dense_class: type[nn.Conv2d] = parametrize.type_before_parametrizations(conv)
        others = {name for name, _ in (*conv.named_parameters(), *conv.named_buffers())}
        others = {name for name in others if name not in ("weight", "bias") and not _is_parametrization(name)}
        if others:
            raise ValueError(
                f"`conv` is a {self.dense_class.__name__}, whose own forward can be kept only if it has no "
                f"parameters but weight and bias, got {sorted(others)}"
            )
        self.groups = conv.groups
        modules = {name: module for name, module in conv._modules.items() if not _is_parametrization(name)}
        self.attributes = {**vars(conv), "_parameters": {}, "_buffers": {}, "_modules": modules}

    def __call__(
        self, input: Tensor, like: Tensor, bias: Tensor | None, training: bool, convolve: Convolve
    ) -> Tensor:
        """Return what the forward gives where F.conv2d with its weight is computed by ``convolve``.

        Args:
            input: the layer's.
            like: a tensor with shape, dtype and device of the weight.
            bias: the layer's bias, which ``convolve`` adds.
            training: the layer's flag.
            convolve: computes the convolution.

        Raises:
            TypeError: the forward does anything else with its weight, or with the convolution's output.

        """
        weight = _WeightStandIn(like, bias, self.groups, convolve)
        conv = self._instance()
        vars(conv).update(weight=weight, bias=bias, training=training)
        refusal = (
            f"the forward of {self.dense_class.__name__} must give what F.conv2d with its weight gives, and "
            "do nothing else with its weight"
        )
        try:
            output = conv.forward(input)
        except AttributeError as error:
            if error.obj is weight:
                raise TypeError(refusal) from error
            raise
        if output is not weight.output:
            raise TypeError(refusal)
        return output

    def dense_module(self, conv: nn.Conv2d) -> nn.Conv2d:
        """Return a layer of the class, with the parameters and the flag of another layer."""
        own = copy.deepcopy(self)._instance()
        vars(own).update(_parameters=conv._parameters, training=conv.training)
        return own

    def _instance(self) -> nn.Conv2d:
        conv = object.__new__(self.dense_class)
        vars(conv).update(self.attributes)
        return conv


def _is_parametrization(name: str) -> bool:
    return name.split(".")[0] == "parametrizations"


def has_own_forward(conv: nn.Conv2d) -> bool:
    """Tell whether a convolution's class has a forward of its own."""
    kind = type(conv)
    plain = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return not plain or "forward" in vars(conv) or "_conv_forward" in vars(conv)


@torch.no_grad()
def only_pads(conv: nn.Conv2d, inputs: list[Tensor]) -> bool:
    """Tell whether a forward, on some inputs, does nothing but change the input of its convolution."""
    weight, bias = conv.weight, conv.bias

    def convolve(input: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        return F.conv2d(input, weight, bias, stride, padding, dilation, conv.groups)

    try:
        forward = OwnForward(conv)
        for input in inputs:
            forward(input, weight, bias, conv.training, convolve)
    except Exception:  # the forward of a class of the user's may do anything with what is no tensor
        return False
    return True
