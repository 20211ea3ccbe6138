"""A report of a compression as one HTML page: from a result, or from the folder that a run left."""

from __future__ import annotations

import os
from pathlib import Path

from .page import write_page
from .saved import read_saved


def report(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> None:
    """Write the report of a compression from what it left in a folder; see :meth:`CompressionResult.report`.

    Example:
        >>> result = fp.compress(model, train_loader, val_loader, checkpoint_dir="run/checkpoints")
        >>> result.save_history("run/history.json")
        >>> fp.report("run", "report.html")  # later, without the model

    Args:
        folder: with ``history.json``, which :meth:`CompressionResult.save_history` writes, a checkpoint
            directory, or both: ``checkpoints`` in it, or the folder itself. Without checkpoints there are no
            maps of the scores.
        path: of the page.
        checkpoint_dir: where the checkpoints are, if elsewhere.
        title: of the page.

    Raises:
        FileNotFoundError: the folder holds no compression.
        ValueError: a file in it is damaged, the checkpoints are those of another run, or ``path`` cannot be
            a file.
        TypeError: ``path`` is no path, or ``title`` no string.

    """
    checkpoints = None if checkpoint_dir is None else Path(checkpoint_dir)
    figures, scores, masks = read_saved(Path(folder), checkpoints)
    write_page(path, figures, scores, masks, title)


__all__ = ["report"]
