"""What the nodes of a traced graph compute, whatever form the call has: module, function or method.

A module is taken for torch's own only if its class adds no forward and no hook watches it.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .graph import TracedModel
from .layers import has_forward_hooks, is_plain
from .reference import ACTIVATIONS

# act(x)[i] depends on x[i] alone, in eval mode.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU,
    nn.Mish, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid,
    nn.Identity, nn.Dropout,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = (
    F.relu, torch.relu, F.relu6, F.gelu, F.silu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid, F.leaky_relu,
    F.elu, F.selu, F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh,
)  # fmt: skip
ELEMENTWISE_METHODS = ("relu", "tanh", "sigmoid")

_aten = torch.ops.aten
# The same of several tensors, and with numbers beside them.
_ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul,
    torch.div, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default,
}  # fmt: skip
_ATEN_ELEMENTWISE = {
    _aten.relu.default, _aten.gelu.default, _aten.silu.default, _aten.tanh.default, _aten.sigmoid.default,
    _aten.hardtanh.default, _aten.hardswish.default, _aten.hardsigmoid.default, _aten.leaky_relu.default,
    _aten.elu.default, _aten.erf.default, _aten.exp.default, _aten.pow.Tensor_Scalar, _aten.clone.default,
    _aten.dropout.default,
}  # fmt: skip
_ELEMENTWISE_TARGETS = {*ELEMENTWISE_FUNCTIONS, *_ARITHMETIC, *_ATEN_ELEMENTWISE, F.dropout}
_ELEMENTWISE_METHODS = {*ELEMENTWISE_METHODS, "add", "sub", "mul", "div"}

_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOL_FUNCTIONS = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, _aten.max_pool2d.default, _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
}  # fmt: skip
_MEAN_FUNCTIONS = {torch.mean, _aten.mean.dim}
_BEHIND_CHANNELS = ((2, 3), (-1, -2), (-2, -1), (3, 2))


@dataclasses.dataclass(frozen=True)
class NodeOp:
    """One operation of a graph.

    Attributes:
        kind: "elementwise", "batch_norm", "channelwise", "flatten", "linear" or "conv".
        traced: the graph's owner.
        input: the node of the tensor it is applied to.
        module: the module it calls, or None.
        operands: what else it reads, in the order of ``F.batch_norm``, ``F.linear`` or ``F.conv2d``: nodes
            and constants, where there is no module.

    """

    kind: str
    traced: TracedModel
    input: fx.Node
    module: nn.Module | None = None
    operands: tuple[Any, ...] = ()
    eps: float = 0.0

    def tensors(self, values: dict[fx.Node, Any]) -> tuple[Tensor | None, ...]:
        """Return weight and bias, or running mean, running variance, weight and bias."""
        if self.module is not None:
            names = ("weight", "bias")
            if self.kind == "batch_norm":
                names = ("running_mean", "running_var", *names)  # type: ignore[assignment]
            return tuple(getattr(self.module, name) for name in names)
        return tuple(
            values[operand] if isinstance(operand, fx.Node) else operand for operand in self.operands
        )


@dataclasses.dataclass(frozen=True)
class ConvOp(NodeOp):
    """A convolution of images with zeros as padding."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def strides(self) -> tuple[int, int]:
        """The stride as ``(height, width)``."""
        return _pair(self.stride)

    @property
    def dilations(self) -> tuple[int, int]:
        """The dilation as ``(height, width)``."""
        return _pair(self.dilation)

    def sides(self, kernel_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the padding left, right, top and bottom, as ``F.pad`` takes them."""
        if self.padding == "valid":
            return (0, 0, 0, 0)
        if self.padding == "same":
            vertical, horizontal = (
                step * (size - 1) for step, size in zip(self.dilations, kernel_size, strict=True)
            )
            left, top = horizontal // 2, vertical // 2
            return (left, horizontal - left, top, vertical - top)
        top, left = _pair(self.padding)
        return (left, left, top, top)

    def convolve(self, images: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Return the convolution of other channels, with its own stride, padding and dilation."""
        return F.conv2d(images, weight, bias, self.stride, self.padding, self.dilation, groups)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def node_op(traced: TracedModel, node: fx.Node) -> NodeOp | None:
    """Return what a node computes, or None where it is nothing that channels travel through."""
    known = traced.node_ops
    if node not in known:
        known[node] = _node_op(traced, node)
    return known[node]


def _node_op(traced: TracedModel, node: fx.Node) -> NodeOp | None:
    if not node.args or not isinstance(node.args[0], fx.Node):
        # A number may stand before the tensor: 2 * x.
        if node.op == "call_function" and node.target in _ARITHMETIC and node.all_input_nodes:
            return NodeOp("elementwise", traced, node.all_input_nodes[0])
        return None
    source = node.args[0]
    if node.op == "call_module":
        module = traced.module_of(node)
        plain_call = len(node.args) == 1 and not node.kwargs
        return _module_op(traced, source, module) if module is not None and plain_call else None
    if node.op == "call_method":
        return _method_op(traced, node, source)
    return _function_op(traced, node, source) if node.op == "call_function" else None


def _module_op(traced: TracedModel, source: fx.Node, module: nn.Module) -> NodeOp | None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if not is_plain(module):
            return None
        if isinstance(module, nn.Linear):
            return NodeOp("linear", traced, source, module)
        if module.padding_mode != "zeros":
            return None
        return ConvOp(
            "conv",
            traced,
            source,
            module,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
        )
    if has_forward_hooks(module):
        return None
    if type(module) in ELEMENTWISE_MODULES:
        return NodeOp("elementwise", traced, source, module)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        if module.running_mean is None or type(module).forward is not nn.BatchNorm2d.forward:
            return None
        return NodeOp("batch_norm", traced, source, module, eps=module.eps)
    if type(module) in _POOL_MODULES and not getattr(module, "return_indices", False):
        return NodeOp("channelwise", traced, source, module)
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return NodeOp("flatten", traced, source, module)
    return None


def _method_op(traced: TracedModel, node: fx.Node, source: fx.Node) -> NodeOp | None:
    if node.target in _ELEMENTWISE_METHODS:
        return NodeOp("elementwise", traced, source)
    if node.target == "mean":
        return _mean_op(traced, node, source)
    if node.target == "flatten" and tuple(node.args[1:]) in ((1,), (1, -1)) and not node.kwargs:
        return NodeOp("flatten", traced, source)
    return None


def _mean_op(traced: TracedModel, node: fx.Node, source: fx.Node) -> NodeOp | None:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    behind = isinstance(dims, (tuple, list)) and tuple(dims) in _BEHIND_CHANNELS
    return NodeOp("channelwise", traced, source) if behind else None


def _function_op(traced: TracedModel, node: fx.Node, source: fx.Node) -> NodeOp | None:
    target, arguments = node.target, (*node.args, None, None, None)
    if target in _ELEMENTWISE_TARGETS:
        return NodeOp("elementwise", traced, source)
    if target in _POOL_FUNCTIONS and not node.kwargs.get("return_indices", False):
        return NodeOp("channelwise", traced, source)
    if target in _MEAN_FUNCTIONS:
        return _mean_op(traced, node, source)
    if target is torch.flatten and tuple(node.args[1:]) in ((1,), (1, -1)) and not node.kwargs:
        return NodeOp("flatten", traced, source)
    if target is _aten.view.default and isinstance(node.args[1], (tuple, list)) and len(node.args[1]) == 2:
        return NodeOp("flatten", traced, source)  # if the shapes say so
    if target is _aten.flatten.using_ints and tuple(node.args[1:]) in ((1,), (1, -1)):
        return NodeOp("flatten", traced, source)
    if target in (F.linear, _aten.linear.default) and not node.kwargs:
        return NodeOp("linear", traced, source, operands=arguments[1:3])
    if target is _aten.batch_norm.default and not node.args[5]:
        weight, bias, mean, variance, _, _, eps = node.args[1:8]
        return NodeOp("batch_norm", traced, source, operands=(mean, variance, weight, bias), eps=eps)  # type: ignore[arg-type]
    if target in (_aten.conv2d.default, _aten.conv2d.padding) and not node.kwargs:
        defaults = (None, None, None, 1, 0, 1, 1)
        filled = (*node.args, *defaults[len(node.args) :])
        return ConvOp(
            "conv",
            traced,
            source,
            operands=filled[1:3],
            stride=filled[3],
            padding=filled[4],
            dilation=filled[5],
            groups=int(filled[6]),  # type: ignore[arg-type]
        )
    return None


def is_elementwise(traced: TracedModel, node: fx.Node) -> bool:
    """Tell whether a node applies an elementwise function to one input and nothing else."""
    op = node_op(traced, node)
    return op is not None and op.kind == "elementwise" and len(node.all_input_nodes) == 1


ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", _aten.relu.default: "relu", F.relu6: "relu6",
    F.silu: "silu", _aten.silu.default: "silu", F.gelu: "gelu", _aten.gelu.default: "gelu",
}  # fmt: skip


def fused_activation(traced: TracedModel, node: fx.Node) -> str | None:
    """Return the name under which the kernels know the activation of a node; "none" for no activation.

    None for any other function.
    """
    if not is_elementwise(traced, node):
        return None
    module = traced.module_of(node)
    if node.op == "call_module":
        if isinstance(module, (nn.Identity, nn.Dropout)):
            return "none"
        name = ACTIVATION_MODULES.get(type(module))
        approximate = getattr(module, "approximate", "none")
    else:
        name = "relu" if node.target == "relu" else _ACTIVATION_FUNCTIONS.get(node.target)
        approximate = node.kwargs.get("approximate", "none")
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name


def computes_activation(module: nn.Module, name: str) -> bool:
    """Tell whether a module gives for a tensor the values of an activation and nothing else."""
    if type(module) in ACTIVATION_MODULES:
        return True
    if has_forward_hooks(module) or next(module.parameters(), None) is not None:
        return False
    x = torch.linspace(-8.0, 8.0, 65)
    try:
        output = module(x)
    except Exception:  # another forward may ask for anything
        return False
    return isinstance(output, Tensor) and torch.allclose(output, ACTIVATIONS[name](x), atol=1e-6)
