"""The scores of all that can be cut out of a model: units of layers, and heads of attentions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .granularity import Head, Unit
from .importance import ImportanceScores, score
from .layers import Selection, selects
from .shrinking import removable_layers


def score_units(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    example_inputs: Any,
    include: Selection = None,
    exclude: Selection = None,
    **options: Any,
) -> ImportanceScores:
    """Score the units and heads that can be cut out of a model, those that go together by one joint mask.

    Example:
        >>> scores = score_units(model, loader, example_inputs=x, exclude="stem")
        >>> small = fp.shrink(model, scores.select(sparsity=0.5, round_to=8), x)

    Args:
        model: dense or masked.
        loader: see :func:`score`.
        example_inputs: of the model, by which is found what can be cut.
        include: see :func:`score`; for heads, of the output projections.
        exclude: see :func:`score`.
        options: more arguments of :func:`score`.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: nothing can be cut.

    """
    taken = selects(include, exclude)
    units, heads = (
        [name for name in names if taken(name, model.get_submodule(name))]
        for names in removable_layers(model, example_inputs)
    )
    if not units and not heads:
        raise ValueError(
            "`structure` cannot be 'units' or 'both': no unit and no head of this model can be cut out"
            + (" that `include` and `exclude` leave" if include is not None or exclude is not None else "")
        )
    found = [
        score(model, loader, granularity=granularity, include=names, **options)
        for granularity, names in ((Unit(coupled=True), units), (Head(), heads))
        if names
    ]
    return found[0] if len(found) == 1 else found[0] | found[1]
