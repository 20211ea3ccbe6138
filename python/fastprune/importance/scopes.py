"""Which layers are ranked together, and what share each group of them is to lose."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ..masks import check_scope, check_sparsity

Scope = str | Sequence[str | Sequence[str]]
"""What ``select`` takes as its scope: "global", "layer", or groups of layer names or globs."""

T = TypeVar("T")


class Group(NamedTuple):
    """Layers that are ranked together, and the share of their cost that may go; None leaves them alone."""

    layers: list[str]
    removable: float | None


def by_glob(entries: Mapping[str, T], names: Iterable[str], argument: str) -> dict[str, T]:
    """Return for each layer the entry of the first glob that its name matches; none where none does.

    Args:
        entries: glob to anything.
        names: of the layers.
        argument: that the globs came in, for the message.

    Raises:
        ValueError: there is a glob that is not the first one for any layer, "*" apart.

    """
    names = list(names)
    found = {name: _first(entries, name) for name in names}
    for glob in entries:
        if glob != "*" and glob not in found.values():
            raise ValueError(
                f"`{argument}` has '{glob}', which matches no layer that an earlier entry leaves; "
                f"the layers are {', '.join(names)}"
            )
    return {name: entries[glob] for name, glob in found.items() if glob is not None}


def _first(globs: Iterable[str], name: str) -> str | None:
    return next((glob for glob in globs if fnmatch.fnmatchcase(name, glob)), None)


def groups_of(
    names: Sequence[str], scope: Scope, removable: float | Mapping[str, float] | None
) -> list[Group]:
    """Return the groups that a selection ranks, in the order in which ties are broken.

    Args:
        names: of the layers, in the order of the model.
        scope: "global", "layer", or a list of groups, each a glob or a list of globs.
        removable: what share may go, for all or by glob; None where no share is asked for. Each glob's
            layers are a group; those that none matches are left alone.

    Raises:
        ValueError: the scope is none of these, a glob matches nothing, or a layer is in no group.
        TypeError: a group is no glob and no list of globs.

    """
    if isinstance(removable, Mapping):
        if not isinstance(scope, str):
            raise ValueError(
                "`scope` must be 'global' or 'layer' where `sparsity` names its own groups, "
                f"got {list(scope)}"
            )
        check_scope(scope)
        shares = {glob: check_sparsity(share, f"sparsity['{glob}']") for glob, share in removable.items()}
        globs = by_glob({glob: glob for glob in shares}, names, "sparsity")
        if scope == "layer":
            return [Group([name], shares[globs[name]] if name in globs else None) for name in names]
        members: dict[str | None, list[str]] = {glob: [] for glob in shares}
        for name in names:
            members.setdefault(globs.get(name), []).append(name)
        return [
            Group(layers, None if glob is None else shares[glob])
            for glob, layers in members.items()
            if layers
        ]
    if isinstance(scope, str):
        check_scope(scope)
        layers = [[name] for name in names] if scope == "layer" else [list(names)]
        return [Group(group, removable) for group in layers]
    return [Group(layers, removable) for layers in _groups(names, scope)]


def _groups(names: Sequence[str], scope: Sequence[str | Sequence[str]]) -> list[list[str]]:
    entries: dict[str, int] = {}
    if not isinstance(scope, Sequence):
        raise ValueError(f"`scope` must be 'global', 'layer' or a list of groups of layers, got {scope!r}")
    for index, group in enumerate(scope):
        for glob in [group] if isinstance(group, str) else group:
            if not isinstance(glob, str):
                raise TypeError(f"`scope` must hold name globs or lists of them, got {group!r}")
            entries.setdefault(glob, index)
    found = by_glob(entries, names, "scope")
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"`scope` leaves {', '.join(missing)} in no group; a last group '*' takes all the others"
        )
    groups = [[name for name in names if found[name] == index] for index in range(len(scope))]
    return [group for group in groups if group]
