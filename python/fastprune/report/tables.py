"""The tables of a report, made of the figures of a compression."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..masks import Masks
from .charts import bar
from .html import NOT_KEPT, count, data, escape, is_number, percent, seconds, signed, sizes, table, times

Figures = Mapping[str, Any]

FORMS: dict[str, Callable[[float], str]] = {
    "sparsity": percent,
    "accuracy": percent,
    "loss": "{:.4f}".format,
    "parameters": count,
    "flops": count,
    "bytes": count,
    "latency_seconds": seconds,
    "speedup": times,
    "seconds": "{:.1f} s".format,
}
"""How each figure is shown."""


def figure(source: Figures, key: str) -> str:
    """Return one figure of a round or of the dense model; what it lacks is shown as not kept."""
    value = speedup_of(source) if key == "speedup" else source.get(key)
    return data(value, FORMS[key], key)


def speedup_of(entry: Figures) -> float | None:
    """Return how many times as fast as the dense model a round's model is, None where it was not timed."""
    dense, sparse = entry.get("dense_latency_seconds"), entry.get("latency_seconds")
    return dense / sparse if is_number(dense) and is_number(sparse) and sparse else None


def dense_of(figures: Figures, last: Figures | None) -> dict[str, Any]:
    """Return what is known of the model before; its latency was measured in turn with the last round's."""
    dense = {"accuracy": figures["dense_accuracy"], **(figures.get("dense") or {})}
    if last is not None:
        dense["latency_seconds"] = last.get("dense_latency_seconds")
    return dense


def batch_of(figures: Figures) -> str:
    """Return for which batch sizes FLOPs and latencies are, to be put behind their names."""
    sizes_ = (figures.get("environment") or {}).get("batch_sizes")
    return f", batch {' + '.join(map(str, sizes_))}" if sizes_ else ""


def change(key: str, dense: Figures, after: Figures) -> str:
    """Return by how much a figure changed, in the unit that is used for it; empty where it is not known."""
    old, new = dense.get(key), after.get(key)
    if not is_number(old) or not is_number(new):
        return ""
    if key == "accuracy":
        return f"{signed(100 * (new - old), '.2f')} points"
    if key == "loss":
        return signed(new - old, ".4f")
    return f"{signed(100 * (new - old) / old, '.1f')} %" if old else ""


def comparison(figures: Figures, last: Figures | None) -> str:
    """Return the table of before and after."""
    dense, after, batch = dense_of(figures, last), last or {}, batch_of(figures)
    names = {
        "accuracy": "accuracy",
        "loss": "loss",
        "parameters": "parameters",
        "flops": f"FLOPs{batch}",
        "bytes": "bytes",
        "latency_seconds": f"latency{batch}",
    }
    rows = [
        [name, figure(dense, key), figure(after, key), change(key, dense, after)]
        for key, name in names.items()
    ]
    rows += [[name, "", figure(after, key), ""] for key, name in (("speedup", "speed-up"), ("sparsity",) * 2)]
    caption = (
        "The model before, and as it was returned: accuracy and loss on the validation data; parameters that "
        "are left; FLOPs and median latency of one forward; bytes of parameters and buffers; sparsity of the "
        "scored weights"
    )
    return table(caption, ["", "dense", "compressed", "change"], rows, "wide")


def rounds(history: list[dict[str, Any]]) -> str:
    """Return the table of the rounds."""
    if not history:
        return ""
    names = {"flops": "FLOPs", "latency_seconds": "latency", "speedup": "speed-up", "seconds": "took"}
    rows = [[str(entry["round"]), *(figure(entry, key) for key in FORMS)] for entry in history]
    head = ["round", *(names.get(key, key) for key in FORMS)]
    return table("Each round's model, as it would be returned", head, rows)


def probes(tried: list[dict[str, Any]] | None) -> str:
    """Return the table of what a search tried."""
    rows = [
        [
            percent(probe["sparsity"]),
            data(probe["accuracy"], percent, "probe_accuracy"),
            "holds" if probe["holds"] else "too low",
        ]
        for probe in tried or []
    ]
    head = ["sparsity", "accuracy", "within the limit"]
    return table("Sparsities that the search tried", head, rows, "wide") if rows else ""


def sparsities(last: Figures, masks: Masks | None) -> str:
    """Return the table of the layers' sparsities."""
    rows = []
    for name, value in last["layers"].items():
        shape = kept = NOT_KEPT
        if masks is not None and name in masks:
            shape = sizes(masks.weight_shapes[name])
            kept = f"{count(int(masks[name].sum()))} of {count(masks[name].numel())}"
        share = data(value, functools.partial(percent, digits=1), "layer_sparsity")
        rows.append([f"<code>{escape(name)}</code>", shape, kept, share, bar(value)])
    head = ["layer", "weight", "pieces kept", "sparsity", ""]
    return table("Share of each layer's weights that is pruned", head, rows, "bars")


def latencies(layers: Mapping[str, Figures]) -> str:
    """Return the table of what was measured of each layer; empty where nothing was."""
    measured = {
        name: [entry[key] for key in ("dense_seconds", "sparse_seconds")] for name, entry in layers.items()
    }
    longest = max((value for pair in measured.values() for value in pair if is_number(value)), default=0.0)
    if not longest:
        return ""
    rows = []
    for name, (dense, sparse) in measured.items():
        entry = layers[name]
        gain = dense / sparse if is_number(dense) and is_number(sparse) and sparse else None
        pairs = ((dense, "dense"), (sparse, ""))
        rows.append(
            [
                f"<code>{escape(name)}</code>"
                f"<small>{escape(entry['choice'])}: {escape(entry['reason'])}</small>",
                data(dense, seconds, "layer_dense_seconds"),
                data(sparse, seconds, "layer_sparse_seconds"),
                data(gain, times, "layer_gain"),
                "".join(bar(value / longest, kind) for value, kind in pairs if is_number(value)),
            ]
        )
    caption = "Median time of each masked layer on the example inputs, dense and sparse, and what it runs as"
    return table(caption, ["layer", "dense", "sparse", "gain", ""], rows, "bars")


def settings(figures: Figures) -> str:
    """Return the tables of the arguments and of where it was measured."""
    given = {key: value for key, value in (figures.get("settings") or {}).items() if value not in (None, {})}
    arguments = [[escape(key), f"<code>{escape(value)}</code>"] for key, value in given.items()]
    facts = [
        [
            escape(key.replace("_", " ")),
            escape(", ".join(map(str, value)) if isinstance(value, list) else value),
        ]
        for key, value in (figures.get("environment") or {}).items()
    ]
    tables = []
    if arguments:
        tables.append(table("Arguments", ["argument", "value"], arguments, "text"))
    if facts:
        tables.append(table("Where the last round was measured", ["", ""], facts, "text"))
    return f'<div class="pair">{"".join(tables)}</div>' if tables else ""
