"""Files that are never half written, what goes into them, and the hash that tells one model from another."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# As write_atomically names them: what is written, and the process that writes.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?P<process>[1-9][0-9]*)\.tmp")


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


def remove_stale_temporaries(directory: Path, targets: re.Pattern[str]) -> None:
    """Remove what :func:`write_atomically` left of processes that were killed while they wrote.

    Example:
        >>> remove_stale_temporaries(Path("run"), re.compile("round_.*"))

    Args:
        directory: whose own files are looked at.
        targets: the whole names of the files that were to be written; others' temporary files stay.

    """
    for path in directory.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or not targets.fullmatch(found["target"]) or not path.is_file():
            continue
        process = int(found["process"])
        # Containers give a later run the number of the one that was killed.
        if process == os.getpid() or not _is_running(process):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def state_digest(model: nn.Module) -> str:
    """Return a hash of a model's state, by which a file that was made with another model is recognised."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finite(value: Any) -> Any:
    """Return nested dicts and lists as JSON takes them: None in the place of numbers that are not finite.

    Example:
        >>> finite({"accuracy": float("nan"), "layers": [1.0]})
        {'accuracy': None, 'layers': [1.0]}

    """
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
