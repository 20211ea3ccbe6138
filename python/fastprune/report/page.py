"""The report of a compression: one page of HTML that needs nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import files
from ..importance import ImportanceScores
from ..masks import Masks
from . import tables
from .charts import Point, line_chart
from .heat_maps import heat_maps
from .html import TIMES, count, escape, is_number, percent, times
from .style import STYLE
from .tables import FORMS, Figures, batch_of, change, dense_of, speedup_of

# The page may show what it holds, and load nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    path: str | os.PathLike[str],
    figures: Figures,
    scores: ImportanceScores | None,
    masks: Masks | None,
    title: str | None = None,
) -> None:
    """Write the page to a file, atomically.

    Args:
        path: of the file; its folder must exist.
        figures: as :meth:`CompressionResult.to_dict` gives them.
        scores: of the last round, or None.
        masks: of the last round, or None.
        title: of the page.

    Raises:
        TypeError: ``path`` is no path, or ``title`` no string.
        ValueError: ``path`` is a folder, or in one that does not exist.

    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` must be a path, got {type(path).__name__}")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"`title` must be a string or None, got {type(title).__name__}")
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"`path` must be in a folder that exists, got {os.fspath(path)!r}")
    if target.is_dir():
        raise ValueError(f"`path` must name a file, got the folder {os.fspath(path)!r}")
    text = page(figures, scores, masks, title)
    files.write_atomically(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def page(
    figures: Figures, scores: ImportanceScores | None, masks: Masks | None, title: str | None = None
) -> str:
    """Return the page; see :func:`write_page`."""
    history = figures["history"]
    name = escape(title or "Compression report")
    last = history[-1] if history else None
    sections = [
        _headline(figures, last),
        _section("Before and after", tables.comparison(figures, last)),
        _section("Rounds", _charts(figures), tables.rounds(history), tables.probes(figures.get("probes"))),
    ]
    if last is not None:
        sections += [
            _section("Sparsity per layer", tables.sparsities(last, masks)),
            _section("Latency per layer", _latencies(last.get("layer_latency") or {})),
            _section("Importance of the pieces", _maps(scores, masks)),
        ]
    closing = _note(
        "Latencies are medians of interleaved runs of the dense and the compressed model. The validation "
        "data choose the rounds: measure what you publish on other data."
    )
    sections.append(_section("How this was made", tables.settings(figures), closing))
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{name}</title>\n'
        f"<style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{name}</h1><p>{escape(_summary(figures))}</p></header>\n"
        f"{body}\n</main></body></html>\n"
    )


def _section(heading: str, *parts: str) -> str:
    content = "\n".join(filter(None, parts)) or _note("There is none.")
    return f"<section><h2>{heading}</h2>\n{content}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _summary(figures: Figures) -> str:
    settings, rounds = figures.get("settings") or {}, len(figures["history"])
    parts = [f"{rounds} round{'' if rounds == 1 else 's'}"]
    if "criterion" in settings:
        blocks = f"{settings['granularity']} pieces"
        structures = {"units": "units and heads", "both": f"units, then {blocks},"}
        pieces = structures.get(settings.get("structure", "blocks"), blocks)
        parts.insert(0, f"{pieces} scored by {settings['criterion']}")
    return ", ".join(parts)


def _headline(figures: Figures, last: Figures | None) -> str:
    """The four figures that most readers came for."""
    if last is None:
        return _note("No round stayed within the limit on the accuracy: the model was returned as it was.")
    dense, speedup = dense_of(figures, last), speedup_of(last)
    tiles = []
    if speedup is not None:
        tiles.append(("speed-up", times(speedup), f"latency{batch_of(figures)}"))
    for key in ("accuracy", "parameters", "bytes"):
        if is_number(last.get(key)):
            tiles.append((key, FORMS[key](last[key]), change(key, dense, last)))
    shown = "".join(
        f"<li><span>{key}</span><strong>{escape(text)}</strong><small>{escape(detail)}</small></li>"
        for key, text, detail in tiles
    )
    return f'<ul class="tiles">{shown}</ul>'


def _charts(figures: Figures) -> str:
    """Accuracy, or loss where there is none, and speed-up over sparsity."""
    key = "accuracy" if is_number(figures["dense_accuracy"]) else "loss"
    charts = [_accuracy_chart(figures, key), _speedup_chart(figures)]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _accuracy_chart(figures: Figures, key: str) -> str:
    form, dense = FORMS[key], dense_of(figures, None)
    rounds = [entry for entry in figures["history"] if is_number(entry.get(key))]
    if not rounds or not is_number(dense.get(key)):
        return ""
    points = [Point(0.0, dense[key], f"dense: {form(dense[key])}", hollow=True)]
    points += [Point(entry["sparsity"], entry[key], f"{_of(entry)}: {form(entry[key])}") for entry in rounds]
    loose, limits = [], []
    if key == "accuracy":
        loose = [
            Point(
                probe["sparsity"],
                probe[key],
                f"tried {percent(probe['sparsity'])}: {form(probe[key])}",
                hollow=True,
            )
            for probe in figures.get("probes") or []
        ]
        drop = (figures.get("settings") or {}).get("max_accuracy_drop")
        if is_number(drop):
            limits.append((dense[key] - drop, "lowest that counts"))
    unit = "on the validation data" + (", %" if key == "accuracy" else "")
    return line_chart(
        f"{key.capitalize()} over sparsity",
        unit,
        points,
        form=_percentage if key == "accuracy" else "{:.3g}".format,
        label=(lambda value: f"{100 * value:.2f}") if key == "accuracy" else "{:.3g}".format,
        loose=loose,
        lines=limits,
    )


def _percentage(share: float) -> str:
    return f"{100 * share:.4g}"


def _of(entry: Figures) -> str:
    return f"round {entry['round']}, {percent(entry['sparsity'])} pruned"


def _speedup_chart(figures: Figures) -> str:
    points = [
        Point(entry["sparsity"], speedup, f"{_of(entry)}: {times(speedup)}")
        for entry in figures["history"]
        if (speedup := speedup_of(entry)) is not None
    ]
    if not points:
        return ""
    return line_chart(
        "Speed-up over sparsity",
        f"dense latency ÷ latency{batch_of(figures)}",
        points,
        form=lambda value: f"{value:.3g}{TIMES}",
        label=times,
        lines=[(1.0, "as fast as dense")],
    )


def _latencies(layers: dict[str, Any]) -> str:
    measured = tables.latencies(layers)
    if not measured:
        reasons = "; ".join(sorted({entry["reason"] for entry in layers.values()}))
        return _note(
            f"No layer was measured: {reasons}."
            if reasons
            else "No layer was swapped, or no times were kept."
        )
    return (
        '<p class="key"><span><i class="bar dense"><i></i></i> dense</span> '
        f'<span><i class="bar"><i></i></i> sparse</span></p>{measured}'
    )


def _maps(scores: ImportanceScores | None, masks: Masks | None) -> str:
    if scores is None:
        return _note("The scores of the last round were not kept.")
    maps = heat_maps(scores, masks)
    if not maps:
        return _note(f"There are no maps of {scores.granularity}: each layer is one piece.")
    return (
        _note(
            f"Scores of the last round by {scores.criterion} on {count(scores.num_samples)} samples. "
            "Importance is the rank of a piece among those of all layers that were still there. Rows are "
            "outputs, columns inputs; those of a convolution go tap by tap."
        )
        + '<p class="key"><span>rank: lowest <i class="ramp rank"></i> highest</span> '
        '<span>kept: none <i class="ramp kept"></i> all</span></p>'
        f'<div class="maps">{maps}</div>'
    )
