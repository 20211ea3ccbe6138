"""Files that are never half written, and the hash by which one knows the model it was made with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


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


def state_digest(model: nn.Module) -> str:
    """Return a hash of a model's state, by which a file that was made with another model is recognised."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
