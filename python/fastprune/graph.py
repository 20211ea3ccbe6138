"""A model as a graph of calls without side effects, and running only the part that depends on one node.

The prefix of a masked layer does not depend on the mask: its values are computed once per batch and
kept. The suffix is run again for each mask.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .batches import Batch
from .granularity import is_scorable

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}


class Replacement(Protocol):
    """A function that gives a node's value from that of its only input."""

    input: fx.Node

    def __call__(self, input: Tensor) -> Tensor:
        """Return the node's value."""


class Chain(Protocol):
    """Nodes, each but the last read by the next alone, that may be computed at once after a change."""

    nodes: tuple[fx.Node, ...]

    def updated(
        self, values: dict[fx.Node, Any], whole: dict[fx.Node, Any], partial: dict[fx.Node, Any]
    ) -> Tensor | None:
        """Return the last node's new value, or None where the nodes have to run one by one.

        Args:
            values: of all nodes, before the change.
            whole: node to its new value.
            partial: node to its new channels.

        """


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # A masked layer's class is made by parametrize, outside torch.nn: it is a leaf all the same.
        return is_scorable(module) or super().is_leaf_module(module, qualified_name)


class TracedModel:
    """A model as a graph of calls without side effects.

    Example:
        >>> traced = TracedModel.trace(model)
        >>> values = traced.run(batch)
        >>> logits = run_changed(traced, values, {traced.single_call(model.layer1): masked_output})

    """

    def __init__(self, graph: fx.Graph, model: nn.Module, constants: dict[str, Any] | None = None) -> None:
        self.graph = graph
        self.model = model
        self.nodes = list(graph.nodes)
        self.output_node = self.nodes[-1]
        self.node_ops: dict[fx.Node, Any] = {}  # filled by node_ops.py
        # Faster functions of a node's input, for as long as the model's weights stay as they are.
        self.replacements: dict[fx.Node, Replacement] = {}
        self.chains: dict[fx.Node, Chain] = {}  # by each of their nodes
        self._constants = constants or {}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._suffixes: dict[tuple[fx.Node, ...], list[fx.Node]] = {}
        self._last_read: dict[fx.Node, list[fx.Node]] = {}
        self._uses: dict[fx.Node, set[int]] = {}

    @classmethod
    def trace(cls, model: nn.Module) -> TracedModel | None:
        """Return the traced model, or None where torch.fx cannot trace it.

        The trace freezes ``training`` flags as they are: switch to eval mode first. It is kept as long as
        the model lives and has the same modules; what a trace cannot see, such as a number that a forward
        reads from an attribute, may have changed since, so compare what it gives with what the model gives
        and call ``forget`` if they differ.
        """
        modules = fingerprint(model)
        kept = _TRACES.get(model)
        if kept is None or kept[0] != modules:
            kept = (modules, *_trace(model))
            _TRACES[model] = kept
        _, graph, constants = kept
        return None if graph is None else cls(graph, model, constants)

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Let the next ``trace`` of a model trace it anew."""
        _TRACES.pop(model, None)

    @contextlib.contextmanager
    def functional(self) -> Iterator[None]:
        """Switch off the modules that write into their input, which would corrupt kept values."""
        in_place = [module for module in self.model.modules() if getattr(module, "inplace", False) is True]
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in in_place:
                module.inplace = True  # type: ignore[assignment]

    def module_name(self, node: fx.Node) -> str | None:
        """Return the name of the module that a node calls, or None."""
        return str(node.target) if node.op == "call_module" else None

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        name = self.module_name(node)
        return None if name is None else self._modules.get(name)

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

    def sole_module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that computes a node and nothing else, or None."""
        module = self.module_of(node)
        return module if module is not None and self.single_call(module) is node else None

    def _used(self, node: fx.Node) -> set[int]:
        """Ids of the modules and tensors of the model that a node uses."""
        if node not in self._uses:
            used: list[Any] = []
            if node.op == "call_module":
                used = list(self._modules[str(node.target)].modules())
                used += [tensor for module in used for tensor in module._parameters.values()]
            elif node.op == "get_attr":
                used = [self._attribute(str(node.target))]
            self._uses[node] = {id(part) for part in used}
        return self._uses[node]

    def _attribute(self, target: str) -> Any:
        if target in self._constants:
            return self._constants[target]
        return operator.attrgetter(target)(self.model)

    def evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Return the value of a node, given a function that returns those of its inputs."""
        if node in self.replacements:
            replacement = self.replacements[node]
            return replacement(value_of(replacement.input))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        return args[0]  # output

    def run(self, batch: Batch) -> dict[fx.Node, Any]:
        """Return the value of every node for a batch.

        Raises:
            TypeError: the batch does not fit the model's forward.

        """
        bound = inspect.signature(self.model.forward).bind(*batch.args, **batch.kwargs)
        bound.apply_defaults()
        values: dict[fx.Node, Any] = {}
        with self.functional():
            for node in self.nodes:
                if node.op == "placeholder":
                    values[node] = bound.arguments[str(node.target).lstrip("*")]
                else:
                    values[node] = self.evaluate(node, values.__getitem__)
        return values

    def constants(self) -> dict[fx.Node, Any]:
        """Return the values of the nodes that depend on the model's tensors alone."""
        values: dict[fx.Node, Any] = {}
        for node in self.nodes[:-1]:
            sources = node.all_input_nodes
            if self._reads_tensor(node):
                values[node] = self._tensor_of(node)
            elif sources and node.op != "call_module" and all(source in values for source in sources):
                values[node] = self.evaluate(node, values.__getitem__)
        return values

    def _reads_tensor(self, node: fx.Node) -> bool:
        return node.op == "get_attr"

    def _tensor_of(self, node: fx.Node) -> Any:
        return self._attribute(str(node.target))

    def suffix(self, *starts: fx.Node) -> list[fx.Node]:
        """Return the nodes that depend on one of some, in the order they run."""
        if starts not in self._suffixes:
            dependent = set(starts)
            suffix = []
            for node in self.nodes:
                if any(source in dependent for source in node.all_input_nodes):
                    dependent.add(node)
                    suffix.append(node)
            self._suffixes[starts] = suffix
        return self._suffixes[starts]

    def use_chains(self, chains: Iterable[Chain]) -> None:
        """Let changes run through chains of nodes."""
        self.chains = {node: chain for chain in chains for node in chain.nodes}
        self._last_read.clear()

    def last_read_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values nothing reads once a node has run, and the chain that it ends."""
        if not self._last_read:
            order = {node: index for index, node in enumerate(self.nodes)}
            for source in self.nodes:
                # What reads a value within a chain may do so when the chain ends.
                readers = [
                    self.chains[user].nodes[-1] if user in self.chains else user for user in source.users
                ]
                if readers:
                    self._last_read.setdefault(max(readers, key=order.__getitem__), []).append(source)
        return self._last_read.get(node, [])

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


# Model to the fingerprint it was traced with, the graph (None where that failed), and tensors that
# belong to the graph alone. The graph holds no reference to the model.
_Kept = tuple[tuple, fx.Graph | None, dict[str, Any]]
_TRACES: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> tuple:
    """Return what a trace of a model depends on: the modules, their classes, and the hooks on them."""
    return tuple(
        (name, id(module), type(module), *module._forward_hooks, *module._forward_pre_hooks)
        for name, module in model.named_modules(remove_duplicate=False)
    )


def _trace(model: nn.Module) -> tuple[fx.Graph | None, dict[str, Any]]:
    before = set(vars(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(model)
    except Exception:  # a model's own code runs here, and may fail on a proxy in any way
        return None, {}
    # Tensors that a forward makes from nothing are left on the model: they go with the graph.
    constants = {name: vars(model)[name] for name in vars(model).keys() - before}
    return (graph, constants) if _make_functional(graph, model) else (None, {})


def _make_functional(graph: fx.Graph, model: nn.Module) -> bool:
    """Replace calls that write into their first argument; False where one cannot be replaced.

    Who reads that argument later reads the call's result. That leaves out reads through another name of
    the same memory, which is why a trace is compared with its model before it is used.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.kwargs.get("out") is not None or node.target is operator.setitem:
            return False
        in_place = node.kwargs.get("inplace") is True
        if in_place:
            node.update_kwarg("inplace", False)
        elif node.op == "call_module":  # switched off while the graph runs
            in_place = getattr(model.get_submodule(str(node.target)), "inplace", False) is True
        elif node.op == "call_method" and _ends_in_place(str(node.target)):
            name = str(node.target)[:-1]
            if not callable(getattr(Tensor, name, None)):
                return False
            node.target, in_place = name, True
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            replacement = _IN_PLACE_OPERATORS.get(node.target)
            if replacement is None and _ends_in_place(name):
                replacement = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
                if replacement is None:
                    return False
            if replacement is not None:
                node.target, in_place = replacement, True
        if in_place and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            for user in [user for user in source.users if order[user] > order[node]]:
                user.replace_input_with(source, node)
    return True


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
