"""Maps of the pieces of a layer, how they ranked and which were kept, as small pictures in the page."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..granularity import Block, Element, Granularity, weight_as_taps
from ..importance import ImportanceScores
from ..masks import Masks
from .html import count, escape, percent, sizes

# Such a picture takes at most about 4 kB, so that a page of a hundred layers stays below one megabyte.
_MOST_CELLS = 4096
_MOST_CELLS_OF_A_SIDE = 256
_LEVELS = 32
# The lowest rank must not look like what is gone.
_FAINTEST = 0.14
# One colour whose opacity is the value: it goes from the page's own background, light or dark, to the colour.
_RANK_COLOUR = (43, 118, 222)
_KEPT_COLOUR = (208, 108, 16)


def ranks(scores: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the rank of each piece among those of all layers, in [0, 1]; NaN for what was pruned before.

    Equal scores get the mean of their ranks.

    Example:
        >>> ranks({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, {})
        {'a': array([1., 0.]), 'b': array([0.5])}

    """
    there: dict[str, np.ndarray] = {}
    for name, layer in scores.items():
        values = layer.detach().cpu().double().numpy()
        gone = pruned[name].cpu().numpy() if name in pruned else np.zeros(values.shape, dtype=bool)
        there[name] = np.where(gone, np.nan, values)
    joined = np.concatenate([layer.ravel() for layer in there.values()] or [np.empty(0)])
    ordered = np.sort(joined[~np.isnan(joined)])
    found = {}
    for name, present in there.items():
        below = np.searchsorted(ordered, present, side="left")
        middle = (below + np.searchsorted(ordered, present, side="right") - 1) / 2
        found[name] = np.where(np.isnan(present), np.nan, middle / max(len(ordered) - 1, 1))
    return found


def as_matrix(pieces: Tensor, granularity: Granularity) -> Tensor | None:
    """Return the pieces of a layer as a matrix of outputs by inputs; None where there is but one piece."""
    if isinstance(granularity, Element):
        return weight_as_taps(pieces).flatten(1)
    if pieces.numel() < 2:
        return None
    return pieces if pieces.dim() == 2 else pieces.reshape(1, -1)


def cells(matrix: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the means over cells of neighbouring entries, NaN left out, and how many a cell has.

    Example:
        >>> small, (rows, cols) = cells(np.ones((1000, 30)))
        >>> small.shape, rows, cols
        ((125, 30), 8, 1)

    """
    size, counts = [1, 1], list(matrix.shape)
    while counts[0] * counts[1] > _MOST_CELLS or max(counts) > _MOST_CELLS_OF_A_SIDE:
        longer = int(counts[1] >= counts[0])
        size[longer] += 1
        counts[longer] = -(-matrix.shape[longer] // size[longer])
    padded = np.full([number * each for number, each in zip(counts, size, strict=True)], np.nan)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = padded.reshape(counts[0], size[0], counts[1], size[1])
    known = ~np.isnan(blocks)
    number = known.sum((1, 3))
    sums = np.where(known, blocks, 0.0).sum((1, 3))
    return np.where(number > 0, sums / np.maximum(number, 1), np.nan), (size[0], size[1])


def png(opacity: np.ndarray, colour: Sequence[int]) -> bytes:
    """Return a picture of one colour in the opacities of a matrix, in [0, 1]; NaN is transparent.

    Source: the PNG specification, ISO/IEC 15948: 8-bit palette images with transparency.

    """
    levels = np.where(np.isnan(opacity), 0.0, np.clip(opacity, 0.0, 1.0)) * (_LEVELS - 1)
    rows = np.rint(levels).astype(np.uint8)
    lines = np.concatenate([np.zeros((len(rows), 1), np.uint8), rows], axis=1).tobytes()
    alphas = bytes(round(255 * level / (_LEVELS - 1)) for level in range(_LEVELS))

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data)
        for kind, data in (
            (b"IHDR", header),
            (b"PLTE", bytes(colour) * _LEVELS),
            (b"tRNS", alphas),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )


def _picture(opacity: np.ndarray, colour: Sequence[int], alternative: str) -> str:
    data = base64.b64encode(png(opacity, colour)).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def _piece(granularity: Granularity) -> tuple[str, str]:
    """What one piece and several of them are called."""
    name = {"InputUnit": "input", "Element": "weight"}.get(
        type(granularity).__name__, type(granularity).__name__.lower()
    )
    return name, f"{name}s"


def _panel(title: str, picture: str, ratio: float, axes: str) -> str:
    return (
        f'<div class="panel"><span>{title}</span>'
        f'<div class="map" style="aspect-ratio:{ratio:.3f}">{picture}</div><span>{axes}</span></div>'
    )


def heat_maps(scores: ImportanceScores, masks: Masks | None) -> str:
    """Return a figure for each layer with more than one piece: ranks, and the share that was kept.

    Args:
        scores: of the last round.
        masks: that were selected from them; None leaves those pictures out.

    """
    figures = []
    rank_of = ranks(scores, scores.pruned)
    for name, layer in scores.items():
        granularity = scores.granularities[name]
        ranked = as_matrix(torch.from_numpy(rank_of[name]), granularity)
        if ranked is None:
            continue
        figures.append(_figure(name, layer, ranked.numpy(), granularity, scores.weight_shapes[name], masks))
    return "\n".join(figures)


def _figure(
    name: str,
    layer: Tensor,
    ranked: np.ndarray,
    granularity: Granularity,
    weight_shape: torch.Size,
    masks: Masks | None,
) -> str:
    one, many = _piece(granularity)
    shown, (rows, cols) = cells(ranked)
    strip = len(ranked) == 1 and not isinstance(granularity, (Block, Element))
    if strip:
        ratio, axes = 16.0, f"→ {many} 0 to {ranked.shape[1] - 1}"
    else:
        # The weight's own proportions, within what can be looked at.
        ratio = float(np.clip(weight_shape[1:].numel() / max(weight_shape[0], 1), 0.75, 6.0))
        axes = f"→ inputs ({count(ranked.shape[1])} {one} columns) ↓ outputs ({count(ranked.shape[0])})"
    opacity = _FAINTEST + (1.0 - _FAINTEST) * shown
    gone = int(np.isnan(ranked).sum())
    panels = [_panel("importance", _picture(opacity, _RANK_COLOUR, f"importance of {name}"), ratio, axes)]
    facts = [f"{count(ranked.size)} {many} of {sizes(weight_shape)} weights"]
    if gone:
        facts.append(f"{percent(gone / ranked.size, 1)} gone before this round")
    if masks is not None and name in masks:
        mask = masks[name].cpu()
        kept = as_matrix(mask, granularity)
        assert kept is not None
        share, _ = cells(kept.numpy().astype(float))
        panels.append(_panel("kept", _picture(share, _KEPT_COLOUR, f"kept {many} of {name}"), ratio, axes))
        facts.append(f"{count(int(mask.sum()))} kept ({percent(int(mask.sum()) / mask.numel(), 1)})")
    if (rows, cols) != (1, 1):
        facts.append(f"each cell is the mean of {sizes((rows, cols))}")
    low, high = float(layer.min()), float(layer.max())
    facts.append(f"scores from {low:.3g} to {high:.3g}")
    return (
        f'<figure class="heat" data-layer="{escape(name)}"><figcaption><code>{escape(name)}</code> '
        f"{escape('; '.join(facts))}</figcaption>"
        f'<div class="panels{" stacked" if ratio > 1.8 else ""}">{"".join(panels)}</div></figure>'
    )
