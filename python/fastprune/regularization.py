"""Penalties and constraints on pieces of weights, for any training loop.

Penalties are added to a loss; constraints, whose names end in ``_``, change weights in place after a step.
Both see weights as the forward does, so what a mask holds at zero costs nothing and stays as it is, and
both take block-sparse layers like the dense ones they stand for. Constraints leave frozen weights alone.
"""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .gradients import check_positive
from .granularity import Block, Element, Granularity, ParameterTensor, Unit, check_granularity, is_scorable
from .layers import Selection, check_model, select_parameters, selects
from .masks import PieceMask, piece_mask_of
from .modules import BlockSparseLayer


class _Weight(NamedTuple):
    """A weight that is cut into pieces, and the module that holds it."""

    name: str
    module: nn.Module
    parameter: str
    granularity: Granularity

    @property
    def stored(self) -> Tensor:
        """The parameter that an optimizer updates."""
        if isinstance(self.module, BlockSparseLayer) and self.parameter == "weight":
            return self.module.packed_values
        if parametrize.is_parametrized(self.module, self.parameter):
            chain = self.module.parametrizations[self.parameter]  # type: ignore[index]
            # Masks have one original; what has more is never written.
            return next(chain.parameters())  # type: ignore[union-attr]
        stored = self.module._parameters.get(self.parameter)
        if stored is None:
            raise ValueError(
                f"layer '{self.name}' has a {self.parameter} that is no parameter; "
                "torch.nn.utils.prune.remove makes it one again"
            )
        return stored

    @property
    def tensor(self) -> Tensor:
        """The weight as the forward sees it, dense, masked weights zero."""
        tensor = getattr(self.module, self.parameter)
        assert isinstance(tensor, Tensor)
        return tensor

    def norms(self, dense: Tensor) -> Tensor:
        """Return the L2 norm of each piece in float32 at least; the gradient of a piece of zeros is zero."""
        squares = self.granularity.sum_pieces(_at_least_float32(dense).square())
        # The root's gradient at zero is infinite, and would make every masked weight NaN.
        above = squares > 0
        return torch.where(above, torch.where(above, squares, 1.0).sqrt(), 0.0)

    def root_sizes(self, dense: Tensor) -> Tensor:
        """Return the square root of the number of weights in each piece."""
        dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
        return _root_sizes(self.granularity, dense.shape).to(dtype).to(dense.device)

    def scaled(self, dense: Tensor, factors: Tensor) -> Tensor:
        """Return the weight with each piece multiplied by a factor."""
        return _at_least_float32(dense) * self.granularity.expand(factors, dense.shape)

    def check_writable(self) -> None:
        """Raise ValueError where something else than a mask stands between what is stored and the weight."""
        if parametrize.is_parametrized(self.module, self.parameter):
            chain = self.module.parametrizations[self.parameter]  # type: ignore[index]
            if not all(isinstance(part, PieceMask) for part in chain):
                raise ValueError(
                    f"layer '{self.name}' has a {self.parameter} with parametrizations other than masks, "
                    "which cannot be set"
                )

    def write(self, weight: Tensor) -> None:
        """Store a dense weight; what a mask covers, and blocks that are not kept, stay as they are."""
        stored = self.stored
        weight = weight.to(stored.dtype)
        if isinstance(self.module, BlockSparseLayer) and self.parameter == "weight":
            # The transpose of what makes the dense weight of the blocks takes the blocks out of a dense one.
            with torch.enable_grad():
                (weight,) = torch.autograd.grad(self.tensor, stored, weight)
        else:
            mask = piece_mask_of(self.module, self.parameter)
            weight = weight if mask is None else torch.where(mask, weight, stored)
        stored.copy_(weight)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@functools.lru_cache(maxsize=1024)
def _root_sizes(granularity: Granularity, shape: torch.Size) -> Tensor:
    return granularity.sizes(shape).double().sqrt()


def _weights_of(
    model: nn.Module, granularity: Granularity, include: Selection, exclude: Selection
) -> list[_Weight]:
    """Return what a granularity cuts: Linear and Conv2d weights, dense or block-sparse, or all parameters.

    Tied weights count once.
    """
    check_granularity(granularity)
    if isinstance(granularity, Unit) and granularity.coupled:
        raise ValueError("`granularity` must cut each layer by itself, got Unit(coupled=True)")
    weights, seen = [], set()
    if isinstance(granularity, ParameterTensor):
        for name, module in select_parameters(model, include, exclude).items():
            parameter = name.rpartition(".")[2]
            blocks = isinstance(module, BlockSparseLayer) and parameter == "packed_values"
            weights.append(_Weight(name, module, "weight" if blocks else parameter, granularity))
        return weights
    taken = selects(include, exclude)
    for name, module in check_model(model).named_modules():
        if not (is_scorable(module) or isinstance(module, BlockSparseLayer)) or not taken(name, module):
            continue
        own = granularity.for_layer(name, module, model)
        if own is None:
            continue
        weight = _Weight(name, module, "weight", own)
        if id(weight.stored) not in seen:
            seen.add(id(weight.stored))
            weights.append(weight)
    if not weights:
        raise ValueError(
            f"`model` has no layer with pieces of {granularity} that `include` and `exclude` leave"
        )
    return weights


def l1_penalty(
    model: nn.Module,
    granularity: Granularity = Element(),  # noqa: B008  frozen
    *,
    include: Selection = None,
    exclude: Selection = None,
) -> Tensor:
    """Return ``sum |w|`` over the weights that are cut into pieces.

    A sum over single weights is the same for all pieces: the granularity says which weights count, all
    parameters with ``ParameterTensor()``, the output projections of attention with ``Head()``, and the
    weights of Linear and Conv2d layers else.

    Example:
        >>> loss = F.cross_entropy(model(x), y) + 1e-5 * fp.l1_penalty(model)
        >>> slimming = fp.l1_penalty(model, fp.ParameterTensor(), include=nn.BatchNorm2d, exclude="*.bias")

    Args:
        model: masked, block-sparse or dense.
        granularity: what a piece is.
        include: module types, name globs or predicates, see :func:`score`.
        exclude: the same, for what is left out.

    Returns:
        A float32 scalar (float64 where a weight is), differentiable in the weights.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: no weight is left.

    Source: Tibshirani 1996, "Regression shrinkage and selection via the lasso", section 2; on the scales of
    batch norms, as in the second example, Liu et al. 2017, "Learning efficient convolutional networks
    through network slimming", equation 1.

    """
    weights = _weights_of(model, granularity, include, exclude)
    return _total([_at_least_float32(weight.tensor).abs().sum() for weight in weights])


def group_lasso_penalty(
    model: nn.Module,
    granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
    *,
    include: Selection = None,
    exclude: Selection = None,
) -> Tensor:
    """Return ``sum over pieces of sqrt(n) * ||w||_2``, n weights to a piece: it draws whole pieces to zero.

    The padding of ragged blocks does not count in n. The bias and batch norm of a unit are no part of it,
    as in the criterion "magnitude". The gradient of a piece of zeros is zero.

    Example:
        >>> loss = F.cross_entropy(model(x), y) + 1e-4 * fp.group_lasso_penalty(model, fp.Block(16, 16))

    Args:
        model: masked, block-sparse or dense.
        granularity: what a piece is; ``Unit(coupled=True)`` is refused.
        include: module types, name globs or predicates, see :func:`score`.
        exclude: the same, for what is left out.

    Returns:
        A float32 scalar (float64 where a weight is), differentiable in the weights.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: no weight is left, or the granularity couples layers.

    Source: Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables",
    equation 2.1 with the weights sqrt(n) of section 2.1; for filters and channels of networks, Wen et al.
    2016, "Learning structured sparsity in deep neural networks", section 3.1.

    """
    weights = _weights_of(model, granularity, include, exclude)
    penalties = []
    for weight in weights:
        dense = weight.tensor
        penalties.append((weight.norms(dense) * weight.root_sizes(dense)).sum())
    return _total(penalties)


def _constrained(
    model: nn.Module, granularity: Granularity, include: Selection, exclude: Selection
) -> list[_Weight]:
    """Return the weights that are trained, after checking that all of them can be written."""
    weights = [w for w in _weights_of(model, granularity, include, exclude) if w.stored.requires_grad]
    for weight in weights:
        weight.check_writable()
    return weights


def _total(penalties: list[Tensor]) -> Tensor:
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()


@torch.no_grad()
def soft_threshold_(
    model: nn.Module,
    amount: float,
    granularity: Granularity = Block(16, 16),  # noqa: B008  frozen
    *,
    include: Selection = None,
    exclude: Selection = None,
) -> nn.Module:
    """Shrink each piece's norm in place by ``amount * sqrt(n)``, and make it exactly zero below that.

    ``w <- max(0, 1 - amount * sqrt(n) / ||w||_2) * w``: the proximal operator of :func:`group_lasso_penalty`
    (with ``Element()`` of :func:`l1_penalty`). After a step of SGD without the penalty, with the learning
    rate times the penalty's weight as ``amount``, it minimises the penalised loss, and reaches zeros,
    which the penalty's gradient only comes near.

    Example:
        >>> optimizer.step()
        >>> fp.soft_threshold_(model, lr * 1e-4, fp.Block(16, 16))

    Args:
        model: masked, block-sparse or dense.
        amount: above 0.
        granularity: what a piece is; ``Unit(coupled=True)`` is refused.
        include: module types, name globs or predicates, see :func:`score`.
        exclude: the same, for what is left out.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``amount`` is not above 0, no weight is left, or the granularity couples layers.

    Source: Parikh and Boyd 2014, "Proximal algorithms", sections 4.2 (proximal gradient) and 6.5.4 (sums
    of norms).

    """
    check_positive(amount, "amount")
    for weight in _constrained(model, granularity, include, exclude):
        dense = weight.tensor
        norms = weight.norms(dense)
        shrinkage = amount * weight.root_sizes(dense) / norms.clamp(min=_tiny(norms))
        weight.write(weight.scaled(dense, (1.0 - shrinkage).clamp(min=0.0)))
    return model


@torch.no_grad()
def max_norm_(
    model: nn.Module,
    max_norm: float,
    granularity: Granularity = Unit(),  # noqa: B008  frozen
    *,
    include: Selection = None,
    exclude: Selection = None,
) -> nn.Module:
    """Scale each piece whose L2 norm is above ``max_norm`` down to it, in place.

    ``w <- w * min(1, max_norm / ||w||_2)``; for units, w is what comes in, without the bias.

    Example:
        >>> optimizer.step()
        >>> fp.max_norm_(model, 3.0)

    Args:
        model: masked, block-sparse or dense.
        max_norm: above 0.
        granularity: what a piece is; ``Unit(coupled=True)`` is refused.
        include: module types, name globs or predicates, see :func:`score`.
        exclude: the same, for what is left out.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``max_norm`` is not above 0, no weight is left, or the granularity couples layers.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting",
    section 5.1.

    """
    check_positive(max_norm, "max_norm")
    for weight in _constrained(model, granularity, include, exclude):
        dense = weight.tensor
        norms = weight.norms(dense)
        factors = torch.where(norms > max_norm, max_norm / norms.clamp(min=_tiny(norms)), 1.0)
        weight.write(weight.scaled(dense, factors))
    return model


def _tiny(norms: Tensor) -> float:
    return torch.finfo(norms.dtype).tiny


@torch.no_grad()
def clamp_weights_(
    model: nn.Module,
    minimum: float,
    maximum: float,
    *,
    granularity: Granularity = Element(),  # noqa: B008  frozen
    include: Selection = None,
    exclude: Selection = None,
) -> nn.Module:
    """Bring weights into ``[minimum, maximum]`` in place; masked ones stay zero, whatever the range.

    Example:
        >>> optimizer.step()
        >>> fp.clamp_weights_(model, -0.01, 0.01)
        >>> fp.clamp_weights_(model, 0.0, 1.0, granularity=fp.ParameterTensor(), include="*.bias")

    Args:
        model: masked, block-sparse or dense.
        minimum: -inf for no bound below.
        maximum: at least ``minimum``; inf for no bound above.
        granularity: which weights, as in :func:`l1_penalty`: those of Linear and Conv2d layers, or with
            ``ParameterTensor()`` all parameters.
        include: module types, name globs or predicates, see :func:`score`.
        exclude: the same, for what is left out.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the range is empty, or no weight is left.

    Source: Arjovsky et al. 2017, "Wasserstein GAN", algorithm 1.

    """
    for name, value in (("minimum", minimum), ("maximum", maximum)):
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
            raise ValueError(f"`{name}` must be a number, got {value!r}")
    if minimum > maximum:
        raise ValueError(f"`minimum` must not be above `maximum`, got {minimum} and {maximum}")
    for weight in _constrained(model, granularity, include, exclude):
        weight.write(weight.tensor.clamp(minimum, maximum))
    return model
