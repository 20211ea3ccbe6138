"""MultiheadAttention: torch's attention with its projections as Linear layers, which can be pruned."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers import has_forward_hooks

_NAMES = ("q_proj", "k_proj", "v_proj")


class MultiheadAttention(nn.Module):
    """A drop-in for ``nn.MultiheadAttention`` whose projections are Linear layers that it calls.

    torch's own packs three projections into one parameter and reads the weight of the fourth, so that blocks
    of them cannot be skipped nor heads cut. :func:`unpack_attention_` puts this one into its places. A state
    dict of torch's module is taken too.

    Example:
        >>> attention = fp.MultiheadAttention.from_torch(nn.MultiheadAttention(64, 4, batch_first=True))
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = attention(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))

    Args:
        embed_dim: features of queries and outputs.
        num_heads: divides ``embed_dim``.
        dropout: of the attention weights, in train mode.
        bias: whether the projections have one.
        kdim: features of the keys; None for ``embed_dim``.
        vdim: features of the values; None for ``embed_dim``.
        batch_first: whether sequences are ``[batch, length, features]``, else ``[length, batch, features]``.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``.

    """

    # What nn.TransformerEncoderLayer reads to find out that its fast path is not for this module.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"`num_heads` must divide `embed_dim`, {embed_dim}, got {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first = dropout, batch_first
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = nn.Linear(self.kdim, embed_dim, **options)
        self.v_proj = nn.Linear(self.vdim, embed_dim, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **options)

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> MultiheadAttention:
        """Return an attention with copies of the weights of torch's, in its mode, trainable where they are.

        Raises:
            TypeError: ``attention`` is none of torch's.
            ValueError: it has what this class has not, such as ``add_zero_attn``; the message says what.

        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"`attention` must be an nn.MultiheadAttention, got {type(attention).__name__}")
        reason = why_packed(attention)
        if reason is not None:
            raise ValueError(f"`attention` cannot be unpacked: {reason}")
        weight = attention.out_proj.weight
        unpacked = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.in_proj_bias is not None,
            attention.kdim,
            attention.vdim,
            attention.batch_first,
            weight.device,
            weight.dtype,
        )
        unpacked.load_state_dict(attention.state_dict())
        packed = attention.in_proj_weight is not None
        for name in _NAMES:
            own = unpacked.get_submodule(name)
            theirs = attention.in_proj_weight if packed else getattr(attention, f"{name}_weight")
            own.weight.requires_grad_(theirs.requires_grad)
            if own.bias is not None:
                own.bias.requires_grad_(attention.in_proj_bias.requires_grad)
        for name, parameter in attention.out_proj.named_parameters():
            getattr(unpacked.out_proj, name).requires_grad_(parameter.requires_grad)
        return unpacked.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, where asked for, the attention weights, as ``nn.MultiheadAttention`` does.

        Args:
            query: ``[length, batch, embed_dim]``, with ``batch_first`` ``[batch, length, embed_dim]``, or of
                one sequence ``[length, embed_dim]``.
            key: likewise, with ``kdim`` features.
            value: likewise, with ``vdim`` features.
            key_padding_mask: ``[batch, keys]``, True for keys to ignore, or floats that are added.
            need_weights: False is faster, and returns None in their place.
            attn_mask: ``[length, keys]`` or ``[batch * num_heads, length, keys]``, likewise.
            average_attn_weights: over heads; else ``[batch, num_heads, length, keys]``.
            is_causal: that ``attn_mask`` is the causal one, which is then not read where that saves time.

        Raises:
            ValueError: a mask is of another dtype or shape, or ``is_causal`` comes without ``attn_mask``.

        """
        if is_causal and attn_mask is None:
            raise ValueError("`attn_mask` must be the causal mask where `is_causal` is True, got None")
        batched, batch_first = query.dim() == 3, self.batch_first
        if not batched:
            query, key, value, batch_first = query[None], key[None], value[None], True
        q, k, v = (
            self._split(layer(x), batch_first)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        mixed = mixed.transpose(1, 2) if batch_first else mixed.permute(2, 0, 1, 3)
        output = self.out_proj(mixed.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return output, weights
        return output[0], None if weights is None else weights[0]

    def _split(self, projected: Tensor, batch_first: bool) -> Tensor:
        """Return ``[batch, heads, length, head_dim]``."""
        heads = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Return what is added to the scores of ``[batch, heads, length, keys]``."""
        batch, heads, length, keys = *q.shape[:3], k.shape[2]
        mask = None
        if attn_mask is not None:
            mask = _addend("attn_mask", attn_mask, ([length, keys], [batch * heads, length, keys]), q.dtype)
            mask = mask.view(batch, heads, length, keys) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            shapes: tuple[list[int], ...] = ([batch, keys], [keys]) if batch == 1 else ([batch, keys],)
            padding = _addend("key_padding_mask", key_padding_mask, shapes, q.dtype).view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        return mask

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the packed projections of torch's module apart."""
        for kind, own in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
            packed = state_dict.pop(prefix + kind, None)
            if packed is not None:
                for name, part in zip(_NAMES, packed.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{own}"] = part
        for name in _NAMES:
            weight = state_dict.pop(f"{prefix}{name}_weight", None)
            if weight is not None:
                state_dict[f"{prefix}{name}.weight"] = weight
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return what ``repr`` prints inside the brackets."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def why_packed(attention: nn.MultiheadAttention) -> str | None:
    """Return why one of torch's attentions cannot be unpacked, or None."""
    if parametrize.type_before_parametrizations(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__} may have a forward of its own"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "it has a bias among its keys and values (add_bias_kv)"
    if attention.add_zero_attn:
        return "it has a key of zeros (add_zero_attn)"
    if any(parametrize.is_parametrized(module) for module in attention.modules()):
        return "its weights have masks or other parametrizations; unpack it first, then mask"
    if any(has_forward_hooks(module) or "forward" in vars(module) for module in attention.modules()):
        return "it has hooks or a forward of its own"
    return None


def _addend(name: str, mask: Tensor, shapes: tuple[list[int], ...], dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers that are added to scores."""
    if list(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"`{name}` must have shape {expected}, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(f"`{name}` must be of bool or floating point, got {mask.dtype}")
    return mask.to(dtype)
