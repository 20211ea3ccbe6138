"""Attention modules whose heads can be cut: three projections, a number of heads, an output projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..granularity import HEAD_COUNTS, Head

_PROJECTIONS = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
)  # fmt: skip


class Attention(NamedTuple):
    """An attention module.

    Attributes:
        owner: the module that has the number of heads.
        projections: of queries, keys and values.
        output: the projection behind the heads.
        num_heads: how many there are.
        attributes: those of the owner that count heads or their features.

    """

    owner: str
    projections: tuple[str, str, str]
    output: str
    num_heads: int
    attributes: dict[str, int]

    def dead_heads(self, columns: Tensor, values: Tensor) -> Tensor:
        """Return which heads give nothing.

        Args:
            columns: bool ``[features]``, True for masked inputs of the output projection.
            values: bool ``[features]``, True for features of the values that are zero whatever comes in.

        """
        return (columns | values).view(self.num_heads, -1).all(1)

    def without(self, heads: int) -> dict[str, int]:
        """Return the attributes of the owner when so many heads are gone."""
        left = self.num_heads - heads
        return {name: value // self.num_heads * left for name, value in self.attributes.items()}


def attentions(model: nn.Module) -> list[Attention]:
    """Return the attention modules of a model whose heads can be cut.

    ``nn.MultiheadAttention``, which packs its projections into one parameter, is none of them before
    :func:`unpack_attention_`.
    """
    found = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or not name:
            continue
        granularity = Head().for_layer(name, module, model)
        if not isinstance(granularity, Head):
            continue
        parent = name.rpartition(".")[0]
        around = parent.rpartition(".")[0]
        children = [f"{around}.{child}" if around else child for child, _ in modules[around].named_children()]
        for owner in (parent, *children):
            attention = _attention(modules, owner, name, granularity)
            if attention is not None:
                found.append(attention)
                break
    return found


def _attention(modules: dict[str, nn.Module], owner: str, output: str, granularity: Head) -> Attention | None:
    """The attention module of this name if it feeds this output projection, or None."""
    module = modules.get(owner)
    if module is None or isinstance(module, nn.MultiheadAttention):
        return None
    counts = [name for name in HEAD_COUNTS if getattr(module, name, None) == granularity.num_heads]
    prefix = f"{owner}." if owner else ""
    features = modules[output].in_features
    for names in _PROJECTIONS:
        layers = [modules.get(prefix + name) for name in names]
        if counts and all(
            isinstance(layer, nn.Linear) and layer.out_features == features for layer in layers
        ):
            attributes = {name: getattr(module, name) for name in counts}
            for name in ("all_head_size", "inner_dim"):
                if getattr(module, name, None) == features:
                    attributes[name] = features
            projections = (prefix + names[0], prefix + names[1], prefix + names[2])
            assert granularity.num_heads is not None
            return Attention(owner, projections, output, granularity.num_heads, attributes)
    return None


def features_of(heads: Tensor, features: int) -> list[int]:
    """Return the indices of the features of some heads, given a bool for each."""
    return torch.nonzero(heads.repeat_interleave(features // len(heads))).flatten().tolist()
