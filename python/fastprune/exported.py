"""Tracing by torch.export, for models that torch.fx cannot follow.

Slower to trace than torch.fx (a second or more) and bound to the shapes and the arguments it has seen, but it
runs through control flow on arguments and shapes, and what it gives writes to nothing.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .batches import Batch
from .graph import TracedModel, fingerprint

_aten = torch.ops.aten
_LAYER_TARGETS = {
    _aten.linear.default,
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten.batch_norm.default,
}


# Each shape of inputs takes a second and more to export.
MOST_EXPORTS = 8


class _Export(NamedTuple):
    """What is kept of an exported program: nothing that refers to the model."""

    graph: fx.Graph
    out_spec: pytree.TreeSpec
    user_inputs: list[str]
    lifted: dict[str, str]  # placeholder to the name of a parameter or buffer
    tensors: dict[str, Any]  # placeholder to a tensor of the graph's own


# Model to the fingerprint it was exported with, and the exports by what `shapes_of` gives, the latest last.
_EXPORTS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, dict[tuple, _Export | None]]] = (
    weakref.WeakKeyDictionary()
)


class ExportedModel(TracedModel):
    """A model as the graph that torch.export makes of it.

    Example:
        >>> exported = ExportedModel.export(model, batch)
        >>> values = exported.run(batch)

    """

    def __init__(self, export: _Export, model: nn.Module) -> None:
        super().__init__(export.graph, model)
        self._out_spec = export.out_spec
        self._user_inputs = export.user_inputs
        self._lifted = export.lifted
        self._tensors = export.tensors

    @classmethod
    def export(cls, model: nn.Module, batch: Batch) -> ExportedModel | None:
        """Return the exported model, or None where torch.export fails.

        What was exported is kept as long as the model lives and has the same modules. As with
        ``TracedModel.trace``, compare what it gives with what the model gives and call ``forget`` if they
        differ.
        """
        modules, shapes = fingerprint(model), shapes_of(batch)
        kept = _EXPORTS.get(model)
        if kept is None or kept[0] != modules:
            kept = _EXPORTS[model] = (modules, {})
        exports = kept[1]
        if shapes not in exports:
            while len(exports) >= MOST_EXPORTS:
                del exports[next(iter(exports))]
            exports[shapes] = _export(model, batch)
        export = exports[shapes]
        return None if export is None else cls(export, model)

    @staticmethod
    def is_kept(model: nn.Module, batch: Batch) -> bool:
        """Tell whether ``export`` would give what an earlier call has exported."""
        kept = _EXPORTS.get(model)
        return kept is not None and kept[0] == fingerprint(model) and shapes_of(batch) in kept[1]

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Let the next ``export`` of a model export it anew."""
        _EXPORTS.pop(model, None)

    @contextlib.contextmanager
    def functional(self) -> Iterator[None]:
        """Do nothing: the graph calls no modules."""
        yield

    def run(self, batch: Batch) -> dict[fx.Node, Any]:
        """Return the value of every node for a batch with the shapes of the one that was exported."""
        inputs = dict(zip(self._user_inputs, pytree.tree_leaves((batch.args, batch.kwargs)), strict=True))
        values: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op != "placeholder":
                values[node] = self.evaluate(node, values.__getitem__)
            elif node.name in inputs:
                values[node] = inputs[node.name]
            else:
                values[node] = self._tensor_of(node)
        return values

    def _reads_tensor(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and (node.name in self._tensors or node.name in self._lifted)

    def _tensor_of(self, node: fx.Node) -> Any:
        if node.name in self._tensors:
            return self._tensors[node.name]
        return self._attribute(self._lifted[node.name])

    def evaluate(self, node: fx.Node, value_of: Any) -> Any:
        """Return the value of a node; the output has the structure of the model's."""
        value = super().evaluate(node, value_of)
        return pytree.tree_unflatten(value, self._out_spec) if node is self.output_node else value

    def module_name(self, node: fx.Node) -> str | None:
        """Return the name of the layer that a node computes, or None."""
        return _module_path(node) if node.target in _LAYER_TARGETS else None

    def single_call(self, module: nn.Module) -> fx.Node | None:
        """Return the node that computes a layer, or None where that is not the only use of its tensors."""
        names = {name for name, known in self._modules.items() if known is module}
        calls = [node for node in self.nodes if self.module_name(node) in names]
        if len(calls) != 1:
            return None
        owned = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        for node in self.nodes:
            lifted = self._lifted.get(node.name) if node.op == "placeholder" else None
            if lifted is not None and id(self._attribute(lifted)) in owned:
                paths = [_module_path(user) or "" for user in node.users]
                if not all(path.split(".parametrizations")[0] in names for path in paths):
                    return None
        return calls[0]

    def sole_module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that computes a node and nothing else, or None."""
        module = self._modules.get(_module_path(node) or "")
        names = {name for name, known in self._modules.items() if known is module}
        computed = [other for other in self.nodes if not names.isdisjoint(_module_paths(other))]
        return module if module is not None and computed == [node] else None


def _export(model: nn.Module, batch: Batch) -> _Export | None:
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, batch.args, batch.kwargs, strict=False)
            program = program.run_decompositions({})
    except Exception:  # a model's own code runs here, and may fail on a fake tensor in any way
        return None
    if any(node.op == "get_attr" for node in program.graph.nodes):
        return None  # control flow with branches of its own
    _join_batch_norms(program.graph)
    signature = program.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    return _Export(
        program.graph,
        program.call_spec.out_spec,
        list(signature.user_inputs),
        {**signature.inputs_to_parameters, **signature.inputs_to_buffers},
        {name: program.constants[target] for name, target in constants.items()},
    )


def _join_batch_norms(graph: fx.Graph) -> None:
    """Put one node with one output in the place of the batch norm that gives its statistics as well."""
    for node in list(graph.nodes):
        if node.target is not _aten._native_batch_norm_legit_no_training.default:
            continue
        outputs = list(node.users)
        if not all(user.target is operator.getitem and user.args[1] == 0 for user in outputs):
            continue
        *tensors, momentum, eps = node.args
        with graph.inserting_before(node):
            joined = graph.call_function(_aten.batch_norm.default, (*tensors, False, momentum, eps, False))
        joined.meta = dict(node.meta)
        for output in outputs:
            output.replace_all_uses_with(joined)
            graph.erase_node(output)
        graph.erase_node(node)


def _module_path(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else None


def _module_paths(node: fx.Node) -> list[str]:
    """Names of the modules in whose forward a node is; torch.export numbers further calls as name@1."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).split("@")[0] for path, _ in stack.values()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's log lines about what it cannot export from the user."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def shapes_of(batch: Batch) -> tuple:
    """Return what an exported graph is bound to: the structure, shapes and dtypes of a batch's inputs."""
    leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs))
    return spec, tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )
