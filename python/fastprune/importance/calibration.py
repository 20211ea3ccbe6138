"""Calibration: what a criterion reads of a model and its data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from ..batches import Batch, Loss, OutputTransform, read_logits
from ..coupling import Coupled
from ..granularity import Granularity, Layer, ParameterTensor, is_scorable, weight_of
from ..graph import TracedModel
from ..masks import piece_mask_of
from .replacement import put_tensor

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One parameter that the pieces of a layer are made of.

    Example:
        >>> for part in calibration.parts("0"):
        ...     scores += part.sum(part.tensor.detach().double().abs())

    Attributes:
        module: the module that holds it.
        parameter: its name there, such as "weight".
        sum: sums a tensor of the parameter's shape over each piece.
        expand: spreads one entry per piece over the parameter.

    """

    module: nn.Module
    parameter: str
    sum: Callable[[Tensor], Tensor]
    expand: Callable[[Tensor], Tensor]

    @property
    def tensor(self) -> Tensor:
        """The parameter as the forward sees it, masked weights zero; gradients are those of this tensor."""
        tensor = getattr(self.module, self.parameter)
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def mask(self) -> Tensor | None:
        """The bool mask on the parameter, or None."""
        return piece_mask_of(self.module, self.parameter)


class Calibration:
    """A model in eval mode, the pieces of its layers, and the data a criterion may read.

    ``fp.score`` makes it and hands it to the criterion, any callable from a Calibration to one tensor of
    scores per layer, in the granularity's shape.

    Example:
        >>> def mean_gradient(calibration: fp.Calibration) -> dict[str, torch.Tensor]:
        ...     scores = {name: 0.0 for name in calibration.layers}
        ...     for batch in calibration.batches():
        ...         gradients, weight = calibration.gradients(batch)
        ...         for name in scores:
        ...             for part, gradient in zip(calibration.parts(name), gradients[name], strict=True):
        ...                 scores[name] += part.sum(gradient.double().abs())
        ...     return scores
        >>> fp.score(model, loader, criterion=mean_gradient)

    Attributes:
        model: in eval mode.
        layers: name to what is scored: layers, modules, or the owners of parameters.
        granularities: name to the granularity with what the layer adds to it.
        norms: layer name to the name of the batch norm whose channels go with its units.
        coupled: groups of layers whose units are masked together; the scores of a group are joined.
        traced: the model as a graph, where a criterion asked for it and torch.fx can trace it, or None.
        num_samples: samples that the last pass over ``batches()`` read.
        loss_sum: losses that ``loss`` and ``gradients`` have summed in that pass.
        total_weight: what ``loss_sum`` is divided by for the mean loss.
        weights: what the means of each layer are over; ``mean`` sets them to ``total_weight``.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        granularities: Mapping[str, Granularity],
        *,
        norms: Mapping[str, str],
        coupled: Coupled,
        traced: TracedModel | None,
        loss: Loss,
        output_transform: OutputTransform | None,
        read: Callable[[], Iterator[Batch]],
        num_batches: int | None,
        progress: bool,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.granularities = dict(granularities)
        self.norms = dict(norms)
        self.coupled = coupled
        self.traced = traced
        self.num_samples = 0
        self.loss_sum = 0.0
        self.total_weight = 0.0
        self.weights: dict[str, float] = {}
        self._loss = loss
        self._output_transform = output_transform
        self._read = read
        self._num_batches = num_batches
        self._show_progress = progress
        self._undo = contextlib.ExitStack()
        # What gradients are taken of, also while `masked` lets a module compute with something else.
        self._leaves: dict[tuple[int, str], Tensor] = {}
        self._parts = {name: tuple(self._parts_of(name)) for name in self.layers}

    def __enter__(self) -> Calibration:
        with contextlib.ExitStack() as undo:
            undo.callback(self._leaves.clear)
            for part in self._all_parts():
                self._leaves[id(part.module), part.parameter] = _take_gradients(undo, part)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return the parameters that the pieces of a layer are made of, the weight first.

        Weights alone for blocks, elements, inputs and heads; with the bias and the weight and bias of the
        batch norm for units; all parameters of the module for a whole layer.
        """
        return self._parts[name]

    def pieces(self, name: str) -> torch.Size:
        """Return the shape of a layer's scores."""
        granularity = self.granularities[name]
        return granularity.shape(weight_shape_of(self.layers[name], granularity, name))

    def zeros(self) -> dict[str, Tensor]:
        """Return a float64 zero for each piece, where the layer's parameters are."""
        return {
            name: torch.zeros(
                self.pieces(name), dtype=torch.float64, device=parts[0].tensor.device if parts else None
            )
            for name, parts in self._parts.items()
        }

    def progress(self, items: Iterable[Item], unit: str, total: int | None = None) -> Iterator[Item]:
        """Yield items behind the progress bar that the caller of ``fp.score`` may have switched off."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        return iter(tqdm(items, total=total, desc="criterion", unit=unit, disable=not self._show_progress))

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the loader, on the model's device; a second pass reads the loader again.

        Raises:
            TypeError: there is no loader, or it is an iterator and a second pass would be empty.

        """
        self.num_samples, self.loss_sum, self.total_weight = 0, 0.0, 0.0
        for batch in self.progress(self._read(), "batch", self._num_batches):
            self.num_samples += batch.size
            yield batch

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Return the sum of a batch's losses, float64 with a gradient, and the weight they are divided by.

        The mean loss is the sum of the first over the sum of the second.

        Raises:
            ValueError: the loss is NaN or inf; the message names a layer whose parameters are.

        """
        with torch.enable_grad():
            logits = read_logits(batch.fresh().call(self.model), self._output_transform)
            losses, weight = self._loss(logits, batch.targets, batch.size)
            total = losses.sum()
        if not bool(total.isfinite()):
            broken = next((f": layer '{name}' has such weights" for name in self._not_finite()), None)
            raise ValueError(f"the loss is NaN or inf{broken or ' for a batch of `loader`'}")
        self.loss_sum += float(total.detach())
        self.total_weight += weight
        return total, weight

    def gradients(self, batch: Batch) -> tuple[dict[str, list[Tensor]], float]:
        """Return the gradient of a batch's summed loss for each part of each layer, and its weight.

        Masked weights have a gradient of zero, and so has a parameter that the loss does not depend on.

        Raises:
            ValueError: the loss is NaN or inf, or has no gradient.

        """
        total, weight = self.loss(batch)
        return self.gradients_of(total), weight

    def gradients_of(self, total: Tensor) -> dict[str, list[Tensor]]:
        """Return the gradient of a loss for each part of each layer.

        Raises:
            ValueError: the loss has no gradient.

        """
        if not total.requires_grad:
            raise ValueError(
                "the loss has no gradient with respect to the scored parameters: the model, `loss_fn` or "
                "`output_transform` detaches it"
            )
        leaves = list(self._leaves.values())
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(self._leaves, found, strict=True))
        return {
            name: [gradients[id(part.module), part.parameter] for part in parts]
            for name, parts in self._parts.items()
        }

    def check_weight(self) -> float:
        """Return ``total_weight``.

        Raises:
            ValueError: it is 0, since every target was left out by ``ignore_index``.

        """
        if self.total_weight == 0:
            raise ValueError("the loss has no target to average over: all are `ignore_index`")
        return self.total_weight

    def mean(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over the loader divided by the weight of its losses.

        Raises:
            ValueError: every target was left out by ``ignore_index``.

        """
        total = self.check_weight()
        self.weights = dict.fromkeys(self.layers, total)
        return {name: layer / total for name, layer in sums.items()}

    @contextlib.contextmanager
    def masked(self, name: str, keep: Tensor) -> Iterator[None]:
        """Let the model compute with some pieces of a layer zero for a while; gradients pass the others.

        Args:
            name: the layer.
            keep: bool, in the shape of the layer's scores, False where a piece is masked.

        Raises:
            ValueError: a parameter is that of a recurrent layer, which reads a list of its own.

        """
        with contextlib.ExitStack() as undo:
            for part in self.parts(name):
                if isinstance(part.module, nn.RNNBase):
                    raise ValueError(
                        f"'{name}' belongs to a {type(part.module).__name__}, which no piece can be masked "
                        "in for a while: leave it out by `exclude`"
                    )
                kept = part.expand(keep)
                leaf = _leaf(torch.where(kept, part.tensor.detach(), 0.0), kept, part.mask)
                key = (id(part.module), part.parameter)
                undo.callback(self._leaves.__setitem__, key, self._leaves[key])
                original = part.module._parameters.get(part.parameter)
                holders = [(part.module, part.parameter)] if original is None else self._holders(original)
                for module, parameter in holders:
                    put_tensor(undo, module, parameter, leaf)
                self._leaves[key] = leaf
            yield

    def _holders(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        return [
            (module, name)
            for module in self.model.modules()
            for name, held in module._parameters.items()
            if held is parameter
        ]

    def _all_parts(self) -> Iterator[Part]:
        """Every parameter once, though several layers may have it."""
        seen = set()
        for parts in self._parts.values():
            for part in parts:
                key = (id(part.module), part.parameter)
                if key not in seen:
                    seen.add(key)
                    yield part

    def _not_finite(self) -> Iterator[str]:
        for name, parts in self._parts.items():
            if not all(bool(part.tensor.isfinite().all()) for part in parts):
                yield name

    def _parts_of(self, name: str) -> Iterator[Part]:
        module, granularity = self.layers[name], self.granularities[name]
        if isinstance(granularity, ParameterTensor):
            yield _whole(module, name.rpartition(".")[2])
        elif isinstance(granularity, Layer):
            for owner, parameter in _parameters_of(module):
                yield _whole(owner, parameter)
        else:
            shape = weight_shape_of(module, granularity, name)
            yield Part(
                module, "weight", granularity.sum_pieces, lambda pieces: granularity.expand(pieces, shape)
            )
            if granularity.masks_whole_units:
                owners: list[tuple[nn.Module, str]] = [(module, "bias")]
                if name in self.norms:
                    norm = self.model.get_submodule(self.norms[name])
                    owners += [(norm, "weight"), (norm, "bias")]
                for owner, parameter in owners:
                    if getattr(owner, parameter) is not None:
                        yield Part(
                            owner,
                            parameter,
                            lambda per_unit: granularity.sum_pieces(per_unit[:, None]),
                            lambda pieces: granularity.expand_units(pieces, shape[0]),
                        )


def weight_shape_of(module: nn.Module, granularity: Granularity, name: str) -> torch.Size:
    """Return the shape of what a layer's pieces are cut from: its weight, a parameter, or for a module of
    another kind the number of its parameters.
    """  # noqa: D205
    if isinstance(granularity, ParameterTensor):
        return getattr(module, name.rpartition(".")[2]).shape
    if is_scorable(module):
        return weight_of(module).shape
    return torch.Size([sum(getattr(owner, key).numel() for owner, key in _parameters_of(module))])


def _whole(module: nn.Module, parameter: str) -> Part:
    shape = getattr(module, parameter).shape
    return Part(module, parameter, lambda tensor: tensor.sum(), lambda pieces: pieces.expand(shape))


def _parameters_of(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every floating-point parameter of a module, masked or not: its owner and its name there, once."""
    seen: set[int] = set()
    inside: set[int] = set()
    for owner in module.modules():
        if id(owner) in inside:
            continue
        names = list(owner._parameters)
        if parametrize.is_parametrized(owner):
            inside.update(id(inner) for inner in owner.parametrizations.modules())  # type: ignore[union-attr]
            names = [*owner.parametrizations, *names]  # type: ignore[misc]
        for name in names:
            tensor = owner._parameters.get(name)
            if tensor is None and not parametrize.is_parametrized(owner, name):
                continue
            if tensor is not None and (id(tensor) in seen or not tensor.is_floating_point()):
                continue
            seen.add(id(tensor))
            yield owner, name


def _take_gradients(undo: contextlib.ExitStack, part: Part) -> Tensor:
    """Make a parameter, or what its parametrizations make of it, a leaf with a gradient, and return it."""
    if not parametrize.is_parametrized(part.module, part.parameter):
        tensor = part.tensor
        undo.callback(tensor.requires_grad_, tensor.requires_grad)
        return tensor.requires_grad_()
    leaf = _leaf(part.tensor.detach(), part.mask)
    put_tensor(undo, part.module, part.parameter, leaf)
    return leaf


def _leaf(tensor: Tensor, *masks: Tensor | None) -> Tensor:
    """The tensor with a gradient that is zero where a mask is False."""
    leaf = tensor.requires_grad_()
    for mask in masks:
        if mask is not None:
            leaf.register_hook(lambda gradient, mask=mask: torch.where(mask, gradient, 0.0))
    return leaf
