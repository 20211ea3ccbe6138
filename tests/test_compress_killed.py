"""A compression that is killed, truly, at ten random instants ends with the same bits; what it left goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune as fp
import killed_runs
from compression import OPTIONS, task
from fastprune.files import write_atomically


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
        assert run["left"] == [], run
    assert sum(run["killed"] for run in runs) >= killed_runs.KILLS // 2
    assert len({run["finished"] for run in runs}) > 1


def killed_within_a_write(path):
    """Begin to write a file in a process that is killed before the end; return its id."""

    def write(temporary):
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = killed_runs.fork(lambda: write_atomically(path, write))
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("one_thread", "sparse_is_faster")
def test_what_a_killed_run_left_half_written_goes_and_no_other_file(tmp_path):
    model, train, val = task()
    options = {**OPTIONS, "rounds": 1, "checkpoint_dir": tmp_path}
    fp.compress(model, train, val, **options)
    whole = {path.name for path in tmp_path.iterdir()}
    names = (
        "state.json",
        "round_000.safetensors",
        "round_000_compressed.safetensors",
        "round_012_scores.safetensors",
    )
    stale = [f".{name}.{killed_within_a_write(tmp_path / name)}.tmp" for name in names]
    stale.append(f".state.json.{os.getpid()}.tmp")  # in a container the next run may have the same id
    dead = killed_within_a_write(tmp_path / "notes.txt")
    others = [
        f".notes.txt.{dead}.tmp",
        f".round_0.safetensors.{dead}.tmp",
        f"state.json.{dead}.tmp",
        f".state.json.{dead}.tmp.bak",
        ".state.json.tmp",
        f".state.json.{os.getppid()}.tmp",  # that process may be writing
    ]
    for name in (stale[-1], *others):
        (tmp_path / name).write_text("")
    folder = tmp_path / f".state.json.{dead}.tmp"
    folder.mkdir()
    assert all((tmp_path / name).exists() for name in stale)

    with pytest.raises(ValueError, match="holds a run with other arguments"):
        fp.compress(model, train, val, **{**options, "seed": 5})
    assert all((tmp_path / name).exists() for name in stale)
    fp.compress(model, train, val, **options)
    assert {path.name for path in tmp_path.iterdir()} == {*whole, *others, folder.name}
