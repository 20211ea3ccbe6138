"""Choosing layers, modules or parameters of a model by type, name glob or predicate."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .granularity import Granularity, Layer, ParameterTensor, is_scorable

Selector = str | type | Callable[[str, nn.Module], bool]
Selection = Selector | Iterable[Selector] | None


def reusable(selection: Selection) -> Selection:
    """Return a selection that can be read several times: the entries of an iterator as a list."""
    return list(selection) if isinstance(selection, Iterator) else selection


def _selectors(selection: Selection, argument: str) -> list[Selector]:
    if selection is None:
        return []
    single = isinstance(selection, (str, type)) or callable(selection) or not isinstance(selection, Iterable)
    selectors: list[Any] = [selection] if single else list(selection)  # type: ignore[arg-type]
    for selector in selectors:
        known = isinstance(selector, (str, type)) or callable(selector)
        if not known or isinstance(selector, nn.Module):
            raise TypeError(
                f"`{argument}` must be module types, name globs or predicates (name, module) -> bool, "
                f"got {selector!r}"
            )
    return selectors


def _matches(selectors: list[Selector], name: str, module: nn.Module) -> bool:
    for selector in selectors:
        if isinstance(selector, str):
            matched = fnmatch.fnmatchcase(name, selector)
        elif isinstance(selector, type):
            matched = isinstance(module, selector)
        else:
            matched = bool(selector(name, module))
        if matched:
            return True
    return False


def selects(include: Selection = None, exclude: Selection = None) -> Callable[[str, nn.Module], bool]:
    """Return a predicate that tells whether a selection takes a module of a name; None excludes nothing.

    Raises:
        TypeError: a selector is of no known kind.

    """
    included, excluded = _selectors(include, "include"), _selectors(exclude, "exclude")

    def taken(name: str, module: nn.Module) -> bool:
        return (include is None or _matches(included, name, module)) and not _matches(excluded, name, module)

    return taken


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether hooks may change what goes into a module or comes out of it."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def is_plain(module: nn.Module) -> bool:
    """Tell whether a layer computes what torch's Linear or Conv2d does: no forward of its own, no hooks."""
    forward = nn.Linear.forward if isinstance(module, nn.Linear) else nn.Conv2d.forward
    own = type(module).forward is not forward or "forward" in vars(module)
    return not own and not has_forward_hooks(module)


def check_model(model: object, name: str = "model") -> nn.Module:
    """Return the model, or raise TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(model).__name__}")
    return model


def select_layers(
    model: nn.Module, include: Selection = None, exclude: Selection = None, stacklevel: int = 3
) -> dict[str, nn.Module]:
    """Return the Linear and Conv2d layers of a model by name, in the model's order.

    Left out, with a warning, are a layer whose weight is tied to another module (a mask on one of them
    would not reach the other), and one whose weight a hook makes anew in each forward (nn.utils.prune).

    Raises:
        TypeError: ``model`` is no module, or a selector is of no known kind.
        ValueError: nothing is left.

    """
    check_model(model)
    included, excluded = _selectors(include, "include"), _selectors(exclude, "exclude")
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(name)
    layers = {}
    for name, module in model.named_modules():
        if not is_scorable(module):
            continue
        if include is not None and not _matches(included, name, module):
            continue
        if _matches(excluded, name, module):
            continue
        reason = None
        if not parametrize.is_parametrized(module, "weight"):
            tied = owners.get(id(module.weight), set()) - {name}
            if tied:
                reason = f"its weight is tied to {sorted(tied)}"
            elif module._parameters.get("weight") is None:
                reason = "its weight is no parameter; torch.nn.utils.prune.remove makes it one again"
        if reason is not None:
            warnings.warn(f"fastprune: layer '{name}' is left out: {reason}", stacklevel=stacklevel)
            continue
        layers[name] = module
    if not layers:
        raise ValueError(
            "`model` has no Linear or Conv2d layer"
            + (" that `include` and `exclude` leave" if include is not None or exclude is not None else "")
        )
    return layers


def select_modules(model: nn.Module, include: Selection, exclude: Selection = None) -> dict[str, nn.Module]:
    """Return the modules of any kind that a selection names, in the model's order.

    Left out are the model itself, containers that are never called (ModuleList, ModuleDict), and what
    parametrizations are made of.

    Example:
        >>> select_modules(model, "encoder.layers.?")

    Raises:
        TypeError: ``model`` is no module, or a selector is of no known kind.
        ValueError: nothing is left.

    """
    included, excluded = _selectors(include, "include"), _selectors(exclude, "exclude")
    modules = {
        name: module
        for name, module in check_model(model).named_modules()
        if name
        and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and not _is_in_parametrization(name)
        and _matches(included, name, module)
        and not _matches(excluded, name, module)
    }
    if not modules:
        raise ValueError("`model` has no module that `include` and `exclude` leave")
    return modules


def select_parameters(
    model: nn.Module, include: Selection = None, exclude: Selection = None
) -> dict[str, nn.Module]:
    """Return the module that holds each floating-point parameter, by the parameter's name.

    Names are those that the model has without masks ("0.weight"); a tied parameter counts once, under its
    first name. Globs match the parameter's name, types its module, predicates get both.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), exclude="*.bias"))
        ['0.weight', '1.weight']

    Raises:
        TypeError: ``model`` is no module, or a selector is of no known kind.
        ValueError: nothing is left.

    """
    included, excluded = _selectors(include, "include"), _selectors(exclude, "exclude")
    owners: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for prefix, module in check_model(model).named_modules():
        if _is_in_parametrization(prefix):
            continue
        held: dict[str, Any] = {}
        if parametrize.is_parametrized(module):
            held = {key: getattr(chain, "original", None) for key, chain in module.parametrizations.items()}
        held |= module._parameters
        for own_name, parameter in held.items():
            if parameter is None or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{own_name}" if prefix else own_name
            if include is not None and not _matches(included, name, module):
                continue
            if not _matches(excluded, name, module):
                owners[name] = module
    if not owners:
        raise ValueError(
            "`model` has no parameter"
            + (" that `include` and `exclude` leave" if include is not None or exclude is not None else "")
        )
    return owners


def _is_in_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Return the first name of each parameter that several modules hold, and its other names."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            if parameter is not None and not _is_in_parametrization(prefix):
                names.setdefault(id(parameter), []).append(f"{prefix}.{own_name}" if prefix else own_name)
    return {first: others for first, *others in names.values() if others}


def select_scored(
    model: nn.Module, granularity: Granularity, include: Selection = None, exclude: Selection = None
) -> tuple[dict[str, nn.Module], dict[str, Granularity]]:
    """Return what a granularity scores of a model, by name, and the granularity of each layer.

    Modules of any kind for ``Layer`` with ``include``, the owners of parameters for ``ParameterTensor``,
    Linear and Conv2d layers for all others.

    Raises:
        TypeError: ``model`` is no module, or a selector is of no known kind.
        ValueError: nothing is left.

    """
    if isinstance(granularity, ParameterTensor):
        layers = {}
        tied = _tied(model)
        for name, module in select_parameters(model, include, exclude).items():
            if name in tied:
                # A mask on one of its holders would not reach the others.
                warnings.warn(
                    f"fastprune: parameter '{name}' is left out: it is tied to {tied[name]}", stacklevel=3
                )
            else:
                layers[name] = module
    elif isinstance(granularity, Layer) and include is not None:
        layers = select_modules(model, include, exclude)
    else:
        layers = select_layers(model, include, exclude, stacklevel=4)
    granularities = {}
    for name, module in layers.items():
        own = granularity.for_layer(name, module, model)
        if own is not None:
            granularities[name] = own
    if not granularities:
        raise ValueError(
            f"`granularity` {granularity} finds no pieces in any of the {len(layers)} layers that were chosen"
        )
    return {name: layers[name] for name in granularities}, granularities
