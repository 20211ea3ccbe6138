"""Writing files so that a reader finds the old one or the new one, never half."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], write: Any) -> None:
    """Call ``write(temporary_path)`` and rename: the file is the old one or the new one, never half.

    Example:
        >>> write_atomically("state.json", lambda temporary: temporary.write_text(text))

    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
