"""Writes what the simulator's runs have covered to the file that FASTPRUNE_PTX_REPORT names."""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import records


def pytest_sessionfinish() -> None:
    if path := os.environ.get("FASTPRUNE_PTX_REPORT"):
        Path(path).write_text(json.dumps(records.report(), indent=1) + "\n")
