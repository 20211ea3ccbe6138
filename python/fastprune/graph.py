"""Tracing a model once, and running only the part of it that depends on one layer.

The prefix of a masked layer does not depend on the mask: its values are computed once per batch and
kept. The suffix is run again for each mask.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .batches import Batch
from .granularity import is_scorable
from .layers import has_forward_hooks

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
_IN_PLACE_FUNCTIONS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
    operator.setitem,
)  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # A masked layer's class is made by parametrize, outside torch.nn: it is a leaf all the same.
        return is_scorable(module) or super().is_leaf_module(module, qualified_name)


def _writes_in_place(node: fx.Node) -> bool:
    if node.kwargs.get("out") is not None:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return node.target in _IN_PLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__"))
    return False


class TracedModel:
    """A model as a graph of calls without side effects.

    Example:
        >>> traced = TracedModel.trace(model)
        >>> values = traced.run(batch)
        >>> logits = traced.run_suffix(values, traced.single_call(model.layer1), masked_output)

    """

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.model = model
        self.nodes = list(graph.nodes)
        self.output_node = self.nodes[-1]
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameter_names = list(inspect.signature(model.forward).parameters)
        self._suffixes: dict[fx.Node, list[fx.Node]] = {}
        self._uses: dict[fx.Node, set[int]] = {}

    @classmethod
    def trace(cls, model: nn.Module) -> TracedModel | None:
        """Return the traced model, or None where torch.fx cannot trace it or it writes in place.

        The trace freezes ``training`` flags as they are: switch to eval mode first.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = _Tracer().trace(model)
        except Exception:  # a model's own code runs here, and may fail on a proxy in any way
            return None
        for node in graph.nodes:
            if _writes_in_place(node):
                return None
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
        return cls(graph, model)

    @contextlib.contextmanager
    def _functional(self) -> Iterator[None]:
        """Switch off the modules that write into their input, which would corrupt kept values."""
        in_place = [module for module in self.model.modules() if getattr(module, "inplace", False) is True]
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in in_place:
                module.inplace = True  # type: ignore[assignment]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def single_call(self, module: nn.Module) -> fx.Node | None:
        """Return the node that calls a module with one argument, or None where that is not its only use.

        Its parameters may also be read (``F.linear(x, self.encoder.weight)``), or it may be called from
        within a module that the trace does not enter.
        """
        parts = {id(part) for part in (module, *module.parameters(), *module.buffers())}
        calls = [node for node in self.nodes if not parts.isdisjoint(self._used(node))]
        if len(calls) == 1 and self.module_of(calls[0]) is module:
            (node,) = calls
            return node if len(node.args) == 1 and not node.kwargs else None
        return None

    def _used(self, node: fx.Node) -> set[int]:
        """Ids of the modules and tensors of the model that a node uses."""
        if node not in self._uses:
            used: list[Any] = []
            if node.op == "call_module":
                used = list(self._modules[str(node.target)].modules())
            elif node.op == "get_attr":
                used = [operator.attrgetter(str(node.target))(self.model)]
            self._uses[node] = {id(part) for part in used}
        return self._uses[node]

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.model)
        return args[0]  # output

    def run(self, batch: Batch) -> dict[fx.Node, Any]:
        """Return the value of every node for a batch.

        Raises:
            TypeError: the batch does not fit the model's forward.

        """
        bound = inspect.signature(self.model.forward).bind(*batch.args, **batch.kwargs)
        bound.apply_defaults()
        values: dict[fx.Node, Any] = {}
        with self._functional():
            for node in self.nodes:
                if node.op == "placeholder":
                    values[node] = bound.arguments[str(node.target).lstrip("*")]
                else:
                    values[node] = self._evaluate(node, values)
        return values

    def _suffix(self, start: fx.Node) -> list[fx.Node]:
        if start not in self._suffixes:
            dependent = {start}
            suffix = []
            for node in self.nodes:
                if any(source in dependent for source in node.all_input_nodes):
                    dependent.add(node)
                    suffix.append(node)
            self._suffixes[start] = suffix
        return self._suffixes[start]

    def run_suffix(self, values: dict[fx.Node, Any], start: fx.Node, new_value: Tensor) -> Any:
        """Return the model's output with one node's value replaced."""
        suffix_values = _Overlay(values, start, new_value)
        with self._functional():
            for node in self._suffix(start):
                suffix_values[node] = self._evaluate(node, suffix_values)
        return suffix_values[self.output_node]

    def only_consumer(self, node: fx.Node) -> fx.Node | None:
        """Return the one node that uses a node's value, as its first argument, or None."""
        users = list(node.users)
        if len(users) == 1 and users[0].args and users[0].args[0] is node:
            return users[0]
        return None

    def batch_norm_of(self, node: fx.Node) -> fx.Node | None:
        """Return the batch norm that is the only consumer of a node's value, or None."""
        consumer = self.only_consumer(node)
        norm = self.module_of(consumer) if consumer is not None else None
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            return self.single_call(norm)
        return None

    def is_elementwise(self, node: fx.Node) -> bool:
        """Tell whether a node applies a known elementwise function to one input."""
        if node.op == "call_module":
            module = self.module_of(node)
            return isinstance(module, ELEMENTWISE_MODULES) and not has_forward_hooks(module)
        if len(node.all_input_nodes) != 1 or len(node.args) != 1:
            return False
        if node.op == "call_function":
            return node.target in ELEMENTWISE_FUNCTIONS
        return node.op == "call_method" and node.target in ELEMENTWISE_METHODS

    def run_chain(self, chain: list[fx.Node], value: Tensor) -> Tensor:
        """Apply a chain of elementwise nodes to a value."""
        with self._functional():
            for node in chain:
                value = self._evaluate(node, {node.all_input_nodes[0]: value})
        return value


class _Overlay(dict):
    """Values of the suffix in front of the kept values of the prefix, which stay untouched."""

    def __init__(self, values: dict[fx.Node, Any], start: fx.Node, new_value: Tensor) -> None:
        super().__init__({start: new_value})
        self._values = values

    def __missing__(self, node: fx.Node) -> Any:
        return self._values[node]
