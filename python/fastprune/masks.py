"""Masks: which pieces of which layers stay, the budgets they are to meet, and how they are put on a model."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .granularity import Granularity, Layer, ParameterTensor, check_granularity
from .latency import LatencyTable
from .layers import check_model

_COSTS = ("flops", "params", "bytes", "latency")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may remain of a model's scored layers, as a fraction of one cost; exactly one is given.

    Example:
        >>> masks = scores.select(budget=fp.Budget(flops=0.4))     # keep 40 % of the multiply-adds
        >>> costs = fp.measure_latency(model, example_inputs=x)
        >>> masks = scores.select(budget=fp.Budget(latency=0.5, costs=costs))      # twice as fast

    Args:
        flops: of the multiply-adds.
        params: of the weights.
        bytes: of the memory that the weights take.
        latency: of the time that the dense layers take, as ``costs`` says.
        costs: what each layer takes at each density, for ``latency``; :func:`compress` measures it where it
            is None, ``select`` needs it.

    Raises:
        TypeError: ``costs`` is no :class:`LatencyTable`.
        ValueError: not exactly one fraction is given, it is not in (0, 1], or there are ``costs`` without
            ``latency``.

    """

    flops: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    costs: LatencyTable | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in _COSTS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"Budget needs exactly one of {', '.join(_COSTS)}, got {given or 'none'}")
        (name, value) = next(iter(given.items()))
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) <= 1.0:
            raise ValueError(f"Budget `{name}` must be a fraction in (0, 1], got {value!r}")
        if self.costs is not None and not isinstance(self.costs, LatencyTable):
            raise TypeError(f"Budget `costs` must be an fp.LatencyTable, got {type(self.costs).__name__}")
        if self.latency is None and self.costs is not None:
            raise ValueError(f"Budget `costs` are for `latency`, got costs with {name}={value}")

    @property
    def cost(self) -> str:
        """The name of the cost that is given."""
        return next(name for name in _COSTS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of it that may remain."""
        return float(getattr(self, self.cost))


class Masks(Mapping[str, Tensor]):
    """A bool tensor per layer, one entry per piece, True = keep.

    Args:
        masks: layer name to bool tensor in the granularity's shape.
        granularity: what a piece is.
        weight_shapes: layer name to the weight's shape, by which masks of another model are recognised.
        norms: layer name to the batch norm whose channels go with the layer's units.
        granularities: layer name to the granularity with what that layer adds, such as a number of
            heads; None where all are ``granularity`` itself.

    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        granularity: Granularity,
        weight_shapes: Mapping[str, torch.Size],
        norms: Mapping[str, str] | None = None,
        granularities: Mapping[str, Granularity] | None = None,
    ) -> None:
        self.granularity = check_granularity(granularity)
        self._granularities = dict(granularities or {})
        self.weight_shapes = {name: torch.Size(shape) for name, shape in weight_shapes.items()}
        self.norms = dict(norms or {})
        self._masks = dict(masks)
        for name, mask in self._masks.items():
            if name not in self.weight_shapes:
                raise ValueError(f"`weight_shapes` must name each layer of `masks`, '{name}' is missing")
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask of layer '{name}' must be a tensor, got {type(mask).__name__}")
            expected = self.granularity_of(name).shape(self.weight_shapes[name])
            if mask.dtype != torch.bool or mask.shape != expected:
                raise ValueError(
                    f"mask of layer '{name}' must be bool of shape {list(expected)}, "
                    f"got {mask.dtype} of shape {list(mask.shape)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def granularity_of(self, name: str) -> Granularity:
        """Return the granularity of one layer, with what the layer adds to it."""
        return self._granularities.get(name, self.granularity)

    def sparsity(self, name: str | None = None) -> float:
        """Return the pruned share of the real weights of one layer, or of all layers."""
        kept = total = 0
        for layer in [name] if name is not None else self:
            sizes = self.granularity_of(layer).sizes(self.weight_shapes[layer])
            total += int(sizes.sum())
            kept += int(sizes[self[layer].cpu()].sum())
        return 1.0 - kept / total if total else 0.0

    def __repr__(self) -> str:
        rows = "\n".join(f"  {name}: {self.sparsity(name):.1%} pruned" for name in self)
        return f"Masks({self.granularity}, {self.sparsity():.1%} pruned\n{rows}\n)"


class PieceMask(nn.Module):
    """The parametrization that holds masked entries at exactly zero under any optimiser."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the tensor with masked entries zero, and no gradient for them."""
        return torch.where(self.mask, tensor, 0.0)


def piece_mask_of(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """Return the bool mask on a module's parameter, or None."""
    if not parametrize.is_parametrized(module, parameter):
        return None
    for parametrization in module.parametrizations[parameter]:  # type: ignore[index]
        if isinstance(parametrization, PieceMask):
            return parametrization.mask
    return None


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch makes one class for each parametrized module, but a deep copy shares it, and parametrizing one of
    them, or taking that back, would break the other.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        body = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, body)


def set_piece_mask(module: nn.Module, parameter: str, mask: Tensor) -> None:
    """Put a mask on a parameter, or in the place of the one that is there."""
    tensor = getattr(module, parameter)
    # In the memory format of the parameter, so that the masked one has it too.
    mask = torch.empty_like(tensor, dtype=torch.bool, requires_grad=False).copy_(mask)
    existing = piece_mask_of(module, parameter)
    if existing is not None:
        existing.copy_(mask)
        return
    _own_class(module)
    training = module.training
    parametrize.register_parametrization(module, parameter, PieceMask(mask))
    module.train(training)


def mask_targets(model: nn.Module, masks: Masks) -> list[tuple[nn.Module, str, Tensor]]:
    """Return every (module, parameter, mask) that the masks touch, after checking that they fit the model.

    Raises:
        TypeError: ``masks`` are no Masks.
        ValueError: the masks are of another model.

    """
    check_model(model)
    if not isinstance(masks, Masks):
        raise TypeError(f"`masks` must be fastprune Masks, got {type(masks).__name__}")
    modules = dict(model.named_modules())
    targets = []
    for name, mask in masks.items():
        granularity = masks.granularity_of(name)
        module_name, parameter = name, "weight"
        if isinstance(granularity, ParameterTensor):
            module_name, _, parameter = name.rpartition(".")
        elif isinstance(granularity, Layer):
            raise ValueError(
                "`masks` are of whole layers, which no mask on a weight can take out: replace the layers "
                "that are False in `masks` by torch.nn.Identity where shapes agree"
            )
        module = modules.get(module_name)
        weight = getattr(module, parameter, None)
        if module is None or not isinstance(weight, Tensor):
            raise ValueError(
                f"`masks` are of another model: it has no layer '{module_name}' with a {parameter}"
            )
        shape = masks.weight_shapes[name]
        if weight.shape != shape:
            raise ValueError(
                f"`masks` are of another model: layer '{module_name}' must have a {parameter} of shape "
                f"{list(shape)}, got {list(weight.shape)}"
            )
        targets.append((module, parameter, granularity.expand(mask, shape).contiguous()))
        if granularity.masks_whole_units:
            units = granularity.expand_units(mask, shape[0])
            owners = [module]
            if name in masks.norms:
                norm = modules.get(masks.norms[name])
                if norm is None or getattr(norm, "num_features", None) != shape[0]:
                    raise ValueError(
                        f"`masks` are of another model: it has no batch norm '{masks.norms[name]}' "
                        f"of {shape[0]} channels"
                    )
                targets.append((norm, "weight", units))
                owners.append(norm)
            targets += [(owner, "bias", units) for owner in owners]
    targets = [target for target in targets if getattr(target[0], target[1]) is not None]
    for module, parameter, _ in targets:
        if module._parameters.get(parameter) is None and not parametrize.is_parametrized(module, parameter):
            raise ValueError(
                f"`model` has a {type(module).__name__} whose {parameter} is no parameter and takes no mask: "
                "to_dense() takes a converted layer back, torch.nn.utils.prune.remove one that torch prunes"
            )
    return targets


@torch.inference_mode(False)
def apply_masks_(model: nn.Module, masks: Masks) -> nn.Module:
    """Mask a model in place and return it: masked weights are exactly zero, and stay so in training.

    Each weight gets a ``torch.nn.utils.parametrize`` parametrization; the values under a mask are kept,
    so a later call with other masks replaces these. Units take their bias and batch-norm channel along.

    Example:
        >>> fp.apply_masks_(model, scores.select(sparsity=0.5))

    Raises:
        TypeError: ``masks`` are no Masks.
        ValueError: the masks are of another model; the model is left as it was.

    """
    for module, parameter, mask in mask_targets(model, masks):
        set_piece_mask(module, parameter, mask)
    return model


def add_masks_(model: nn.Module, masks: Masks) -> nn.Module:
    """Mask a model as :func:`apply_masks_` does, but for weights that its masks cut out of kept pieces.

    Those stay zero: masks of single weights, say, under masks of blocks.
    """
    mask_targets(model, masks)
    modules, finer = dict(model.named_modules()), []
    for name in masks:
        granularity = masks.granularity_of(name)
        owner, _, own_name = name.rpartition(".")
        is_parameter = isinstance(granularity, ParameterTensor)
        module, parameter = modules[owner if is_parameter else name], own_name if is_parameter else "weight"
        before = piece_mask_of(module, parameter)
        if before is not None:
            kept = granularity.sum_pieces(before.float()) > 0
            cut = granularity.expand(kept.cpu(), masks.weight_shapes[name]).to(before.device) & ~before
            finer.append((module, parameter, cut))
    apply_masks_(model, masks)
    for module, parameter, cut in finer:
        after = piece_mask_of(module, parameter)
        assert after is not None
        after.logical_and_(~cut)
    return model


def remove_masks_(model: nn.Module) -> nn.Module:
    """Take the masks off a model in place and return it: plain parameters with plain zeros remain.

    Another parametrization of a masked parameter, such as weight norm, goes with its mask, with a warning:
    it would make the zeros anew.
    """
    for name, module in list(check_model(model).named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for parameter in list(module.parametrizations):
            if piece_mask_of(module, parameter) is not None:
                others = [type(part).__name__ for part in _others(module, parameter)]
                if others:
                    warnings.warn(
                        f"fastprune: {', '.join(others)} of '{name}.{parameter}' goes with its mask: "
                        "a plain parameter remains",
                        stacklevel=2,
                    )
                _own_class(module)
                parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
    return model


def _others(module: nn.Module, parameter: str) -> list[nn.Module]:
    """Return the parametrizations of a parameter that are no masks."""
    chain = module.parametrizations[parameter]  # type: ignore[index]
    return [part for part in chain if not isinstance(part, PieceMask)]


def _take_mask(module: nn.Module, parameter: str) -> None:
    """Take a mask, and nothing else, off a parameter; what it hid is back."""
    if _others(module, parameter):
        chain = module.parametrizations[parameter]  # type: ignore[index]
        for index in reversed(range(len(chain))):
            if isinstance(chain[index], PieceMask):
                del chain[index]  # type: ignore[union-attr]
    else:
        _own_class(module)
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)


@contextlib.contextmanager
def masks_back_on_error(model: nn.Module) -> Iterator[None]:
    """Give a model the masks that it has back if the block raises, and leave no trace of others."""
    before = {(module, parameter): mask.clone() for module, parameter, mask in _piece_masks(model)}
    forms = {module: (type(module), list(module._parameters)) for module in model.modules()}
    try:
        yield
    except BaseException:
        for module, parameter, mask in _piece_masks(model):
            if (module, parameter) in before:
                mask.copy_(before[module, parameter])
            else:
                _take_mask(module, parameter)
        for module, (kind, names) in forms.items():
            module.__class__ = kind
            for name in names:  # in the order in which optimisers number them
                module._parameters[name] = module._parameters.pop(name)
        raise


def _piece_masks(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, parameter, mask)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for parameter in module.parametrizations  # type: ignore[union-attr]
        if (mask := piece_mask_of(module, parameter)) is not None
    ]


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return the sparsity, or raise ValueError unless it is in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"`{name}` must be a number in [0, 1), got {sparsity!r}")
    return float(sparsity)


def check_scope(scope: str) -> None:
    """Raise ValueError unless the scope is "global" or "layer"."""
    if scope not in ("global", "layer"):
        raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}")
