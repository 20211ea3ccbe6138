"""Values of the command line and of TOML files as the API takes them; no text is ever evaluated as code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..granularity import Block, Element, Granularity, Head, InputUnit, Layer, ParameterTensor, Unit
from ..importance import Floor, criteria
from ..masks import Budget

_PIECES = {kind.__name__: kind for kind in (Block, Element, Head, InputUnit, Layer, ParameterTensor, Unit)}
_CRITERIA = {kind.__name__: kind for kind in (*criteria.CRITERIA.values(), criteria.LossDelta)}
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_FLOORS = ("units", "blocks_per_row", "max_sparsity")


class UsageError(ValueError):
    """What was asked for cannot be done as it was asked; the message names the argument."""


class UserCodeError(RuntimeError):
    """Code of the user's, which the command line imports and calls, has failed."""


def integer(value: Any) -> int:
    """Return a whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"must be an integer, got {value!r}")
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"must be an integer, got {value!r}") from None


def number(value: Any) -> float:
    """Return a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be a number, got {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"must be a number, got {value!r}") from None


def flag(value: Any) -> bool:
    """Return True or False, which on the command line is an option with and without ``no-``."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def text(value: Any) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {value!r}")
    return value


def path(value: Any) -> Path:
    """Return a path, which is relative to the current directory."""
    return Path(text(value))


def reference(value: Any) -> Any:
    """Return the object that ``package.module:name`` names; the current directory can be imported from.

    Raises:
        ValueError: it is no such text, or there is no such module or name.
        UserCodeError: the module raised an error when it was imported.

    """
    if not isinstance(value, str) or not _REFERENCE.fullmatch(value):
        raise ValueError(f"must be package.module:name, got {value!r}")
    module_name, _, attributes = value.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"must name a module that can be imported, got {value!r}: {error}") from error
        raise UserCodeError(f"{module_name} raised {type(error).__name__}: {error}") from error
    except Exception as error:
        raise UserCodeError(f"{module_name} raised {type(error).__name__}: {error}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"must name something in {module_name}, which has no {attributes!r}")
        found = getattr(found, attribute)
    return found


def made(value: Any) -> Any:
    """Return what ``package.module:name`` names, or what it returns where it is called without arguments.

    Raises:
        ValueError: there is no such name, or it needs arguments.
        UserCodeError: the call raised an error.

    """
    found = reference(value)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(f"must be a value or callable without arguments, got {value!r}: {error}") from error
    try:
        return found()
    except Exception as error:
        raise UserCodeError(f"{value} raised {type(error).__name__}: {error}") from error


def _call(value: str, kinds: Mapping[str, Callable[..., Any]]) -> Any:
    """Return ``Name(1, key=2)`` made of literals, or ``Name`` alone, for one of the names."""
    wanted = ValueError(
        f"must be one of {', '.join(kinds)} with numbers or strings in brackets, got {value!r}"
    )
    try:
        tree = ast.parse(value.strip(), mode="eval").body
        arguments = tree.args if isinstance(tree, ast.Call) else []
        keywords = tree.keywords if isinstance(tree, ast.Call) else []
        name = tree.func if isinstance(tree, ast.Call) else tree
        if not isinstance(name, ast.Name) or any(keyword.arg is None for keyword in keywords):
            raise wanted
        positional = [ast.literal_eval(argument) for argument in arguments]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise wanted from None
    if name.id not in kinds:
        raise wanted
    try:
        return kinds[name.id](*positional, **named)
    except TypeError as error:
        raise ValueError(f"must be as the API takes it, got {value!r}: {error}") from error


def granularity(value: Any) -> Granularity | str:
    """Return ``Block(16, 16)`` or ``16x16``, ``Unit()`` and the like, or "auto"."""
    size = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text(value))
    if size:
        return Block(int(size[1]), int(size[2]))
    return value if value == "auto" else _call(value, _PIECES)


def criterion(value: Any) -> Any:
    """Return a name, ``LossDelta(targets="predictions")`` and the like, or ``package.module:function``."""
    if _REFERENCE.fullmatch(text(value)):
        return reference(value)
    return _call(value, _CRITERIA) if "(" in value else value


def _pairs(value: str) -> dict[str, Any]:
    """Return ``key=value,key=value`` with literals for values."""
    try:
        # As Python reads keyword arguments, so that commas in strings and lists are no ends.
        keywords = ast.parse(f"f({value})", mode="eval").body.keywords  # type: ignore[attr-defined]
        found = {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}
        if found and None not in found and ast.parse(f"f({value})", mode="eval").body.args == []:  # type: ignore[attr-defined]
            return found
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        pass
    raise ValueError(f"must be key=value,key=value, got {value!r}")


def _table(value: Any, kind: Callable[..., Any], keys: Iterable[str]) -> Any:
    """Return a frozen set of fields from ``Name(key=value)``, ``key=value`` or a table."""
    if isinstance(value, str):
        if re.match(r"\s*[A-Za-z]+\(", value):
            return _call(value, {kind.__name__: kind})
        value = _pairs(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"must be key=value or a table, got {value!r}")
    unknown = sorted(set(value) - set(keys))
    if unknown:
        raise ValueError(f"must have keys of {', '.join(keys)}, got {', '.join(unknown)}")
    return kind(**value)


def floor(value: Any) -> Floor | dict[str, Floor]:
    """Return ``max_sparsity=0.98`` and the like as a Floor; a table of tables goes by globs of names."""
    if isinstance(value, Mapping) and value and all(isinstance(entry, Mapping) for entry in value.values()):
        return {glob: _table(entry, Floor, _FLOORS) for glob, entry in value.items()}
    return _table(value, Floor, _FLOORS)


def budget(value: Any) -> Budget:
    """Return ``flops=0.4`` and the like as a Budget."""
    return _table(value, Budget, ("flops", "params", "bytes", "latency"))


def scope(value: Any) -> Any:
    """Return "global", "layer", or groups of globs: a list, which the command line takes as a literal."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return ast.literal_eval(value)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"must be 'global', 'layer' or a list of groups, got {value!r}") from None
    return value


def layers(value: Any) -> Any:
    """Return globs of names, or a predicate as ``package.module:function``; a list of these."""
    entries = value if isinstance(value, list) else [value]
    return [reference(entry) if _REFERENCE.fullmatch(text(entry)) else entry for entry in entries]


def distillation(value: Any) -> dict[str, Any]:
    """Return options of distill: a table, or ``key=value`` entries; functions as ``package.module:name``."""
    if isinstance(value, list):
        value = dict(_option(text(entry)) for entry in value)
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a table or key=value, got {value!r}")
    found = {}
    for key, entry in value.items():
        if isinstance(entry, str) and _REFERENCE.fullmatch(entry):
            entry = reference(entry)
        elif key == "autocast_dtype" and isinstance(entry, str):
            entry = getattr(torch, entry.removeprefix("torch."), None)
            if not isinstance(entry, torch.dtype):
                raise ValueError(f"must have a dtype such as bfloat16 for {key}, got {value[key]!r}")
        found[key] = entry
    return found


def _option(entry: str) -> tuple[str, Any]:
    key, separator, value = entry.partition("=")
    if not separator:
        raise ValueError(f"must be key=value, got {entry!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return key, value
