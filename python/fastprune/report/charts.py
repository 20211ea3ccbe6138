"""Line charts as inline SVG that keeps its letters' size at any width, and bars for tables."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from .html import escape

# How much of the width of a phone's chart a label takes.
_LABEL_WIDTH = 0.2


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured value: ``x`` is a sparsity in [0, 1].

    Attributes:
        label: what the point is, shown when it is pointed at.
        hollow: drawn as a ring, for what is not one of the rounds.

    """

    x: float
    y: float
    label: str
    hollow: bool = False


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers from one at or below ``low`` to one at or above ``high``.

    Example:
        >>> ticks(0.891, 0.902)
        [0.89, 0.895, 0.9, 0.905]

    """
    span = high - low
    if span <= 0:
        span = abs(high) * 0.1 or 1.0
        low, high = low - span / 2, high + span / 2
    size = 10.0 ** math.floor(math.log10(span / about))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(
    title: str,
    y_title: str,
    points: list[Point],
    *,
    form: Callable[[float], str],
    label: Callable[[float], str],
    loose: Sequence[Point] = (),
    lines: Sequence[tuple[float, str]] = (),
) -> str:
    """Return a figure of values over sparsity.

    All positions are percentages of the drawing, which has no ``viewBox``: it becomes wider with the page
    and its letters do not.

    Args:
        title: what the figure shows.
        y_title: the quantity and its unit.
        points: in the order in which a line joins them.
        form: how the axis shows a value.
        label: how a point shows it.
        loose: points that no line joins.
        lines: horizontal ones, dashed, with their names.

    """
    everything = [*points, *loose]
    values = [point.y for point in everything] + [value for value, _ in lines]
    # Room below the lowest point for its label; no quantity here is below zero.
    marks = ticks(max(0.0, min(values) - 0.15 * (max(values) - min(values))), max(values))
    low, high = marks[0], marks[-1]

    def across(x: float) -> str:
        return f"{100 * x:.2f}%"

    def up(y: float) -> str:
        return f"{100 * (high - y) / (high - low):.2f}%"

    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{up(mark)}" y2="{up(mark)}"/>')
        parts.append(
            f'<text class="tick" x="-8" y="{up(mark)}" dy=".35em" text-anchor="end">{form(mark)}</text>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<text class="tick" x="{across(share)}" y="100%" dy="1.6em" text-anchor="middle">'
            f"{share:.0%}</text>"
        )
    parts.append(
        '<text class="tick" x="50%" y="100%" dy="3.1em" text-anchor="middle">'
        "sparsity of the scored weights</text>"
    )
    for value, name in lines:
        parts.append(f'<line class="limit" x1="0" x2="100%" y1="{up(value)}" y2="{up(value)}"/>')
        parts.append(f'<text class="limit" x="0" y="{up(value)}" dx="4" dy="1.2em">{escape(name)}</text>')
    for before, after in itertools.pairwise(points):
        parts.append(
            f'<line class="line" x1="{across(before.x)}" y1="{up(before.y)}" '
            f'x2="{across(after.x)}" y2="{up(after.y)}"/>'
        )
    for point in [*loose, *points]:
        kind = "point hollow" if point.hollow else "point"
        parts.append(
            f'<circle class="{kind}" cx="{across(point.x)}" cy="{up(point.y)}" r="4.5">'
            f"<title>{escape(point.label)}</title></circle>"
        )
    for index in _labelled(points):
        point = points[index]
        side, anchor = _place_of_label(points, index)
        parts.append(
            f'<text class="value" x="{across(point.x)}" y="{up(point.y)}" dy="{side}" '
            f'text-anchor="{anchor}">{escape(label(point.y))}</text>'
        )
    summary = "; ".join(point.label for point in everything)
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <small>{escape(y_title)}</small></figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{escape(f"{title}: {summary}")}" width="100%" '
        f'height="200">{"".join(parts)}</svg></div></figure>'
    )


def _place_of_label(points: list[Point], index: int) -> tuple[str, str]:
    """Return ``dy`` and ``text-anchor`` of a point's label, on the side that the line does not take."""
    point = points[index]
    before, after = points[max(index - 1, 0) : index], points[index + 1 : index + 2]
    below = bool(before or after) and all(other.y > point.y for other in (*before, *after))
    anchor = "start" if point.x < 0.05 else "end" if point.x > 0.95 else "middle"
    if anchor == "middle" and before and after and not below:
        falls, rises = before[0].y > point.y >= after[0].y, before[0].y <= point.y < after[0].y
        anchor = "start" if falls else "end" if rises else "middle"
    return "1.6em" if below else "-.8em", anchor


def _labelled(points: list[Point]) -> list[int]:
    """Return which points are labelled: the last, and before it those whose labels have room."""
    chosen: list[int] = []
    taken = 2.0
    for index in reversed(range(len(points))):
        _, anchor = _place_of_label(points, index)
        begin = points[index].x - _LABEL_WIDTH * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        if begin + _LABEL_WIDTH <= taken:
            chosen.append(index)
            taken = begin
    return chosen


def bar(share: float, kind: str = "") -> str:
    """Return a bar whose length is a share of its place, for the eye alone: the number stands beside it.

    Example:
        >>> bar(0.25)
        '<span class="bar" aria-hidden="true"><i style="width:25.00%"></i></span>'

    """
    width = 100 * min(max(share, 0.0), 1.0)
    classes = f"bar {kind}".rstrip()
    return f'<span class="{classes}" aria-hidden="true"><i style="width:{width:.2f}%"></i></span>'
