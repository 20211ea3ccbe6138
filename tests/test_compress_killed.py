"""A compression that is killed, truly, at ten random instants ends with the same bits each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import killed_runs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_to_the_same_model_and_repeats_no_finished_round(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    command = [sys.executable, killed_runs.__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert len(runs) == killed_runs.KILLS
    for run in runs:
        assert run["failed"] == 0, done.stderr
        assert run["same"], run
        assert run["distilled"] == killed_runs.ROUNDS - run["finished"], run
    assert sum(run["killed"] for run in runs) >= killed_runs.KILLS // 2
    assert len({run["finished"] for run in runs}) > 1
