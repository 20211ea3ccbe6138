"""Figures as a page of HTML shows them: escaped, rounded for the eye, exact in an attribute."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

TIMES, MINUS = "\u00d7", "\u2212"
NOT_KEPT = '<span class="none" title="not measured, or not kept">\u2013</span>'


def escape(text: Any) -> str:
    """Return text that is shown as it is, within elements and attributes."""
    return html.escape(str(text), quote=True)


def count(value: float) -> str:
    """Return a whole number with separators between thousands."""
    return f"{value:,.0f}"


def percent(share: float, digits: int = 2) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def signed(value: float, form: str) -> str:
    """Return a change with its sign, a true minus and nothing before a zero."""
    text = f"{abs(value):{form}}"
    if not text.strip("0.,"):
        return "±0"
    return f"{'+' if value > 0 else MINUS}{text}"


def times(ratio: float) -> str:
    """Return how many times as fast something is."""
    return f"{ratio:.2f}{TIMES}"


def sizes(shape: Sequence[int]) -> str:
    """Return a shape as its sizes."""
    return f" {TIMES} ".join(map(str, shape))


def seconds(value: float) -> str:
    """Return a time in the unit that suits it, with three digits or four."""
    unit, size = ("s", 1.0) if value >= 1.0 else ("ms", 1e-3) if value >= 1e-3 else ("µs", 1e-6)
    scaled = value / size
    digits = 0 if scaled >= 1000 else max(0, 2 - math.floor(math.log10(scaled))) if scaled > 0 else 0
    return f"{scaled:.{min(digits, 3)}f} {unit}"


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value is a finite number: None stands for what was not measured, or is not finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def data(value: Any, form: Callable[[float], str], key: str) -> str:
    """Return a figure as it is shown, with the exact number beside it for programs that read the page.

    Example:
        >>> data(0.8908, percent, "accuracy")
        '<data data-key="accuracy" value="0.8908">89.08 %</data>'

    """
    if not is_number(value):
        return NOT_KEPT
    return f'<data data-key="{escape(key)}" value="{value!r}">{escape(form(value))}</data>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells that are HTML already; the first of a row names it.

    Args:
        caption: what the table shows.
        head: of each column; an empty one is hidden from sight and from readers.
        rows: of as many cells.
        kind: the class of the table.

    """
    heads = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
