"""unpack_attention_: the attention of torch's Transformers, as layers that can be pruned."""

from __future__ import annotations

import warnings

from torch import nn

from ..layers import check_model
from .attention import MultiheadAttention, why_packed
from .swapping import swap_modules


def unpack_attention_(model: nn.Module) -> nn.Module:
    """Put :class:`MultiheadAttention` in the place of each ``nn.MultiheadAttention``, and return the model.

    The model computes the same; its projections are Linear layers then, which are scored, masked, made
    block-sparse or cut by heads like all others. Call it before the optimizer is made: parameters are new.
    torch's Transformer layers leave their fast path, which reads weights past the layers. An attention that
    cannot be unpacked stays, with a warning that says why.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2)
        >>> small = fp.compress(fp.unpack_attention_(encoder), train_loader, val_loader, sparsity=0.75)

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is itself an ``nn.MultiheadAttention``.

    """
    check_model(model)
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError(
            "`model` must hold the attention, got the attention itself; "
            "use fastprune.MultiheadAttention.from_torch"
        )
    unpacked: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = why_packed(module)
            if reason is None:
                unpacked[name] = MultiheadAttention.from_torch(module)
            else:
                warnings.warn(f"fastprune: '{name}' stays packed: {reason}", stacklevel=2)
    swap_modules(model, unpacked)
    return model
