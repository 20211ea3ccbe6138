"""Runs a compression of the digits ten times, kills each at a random instant, and lets it go on.

test_compress_killed.py runs this in a process of its own, which forks: nothing but a kill can stop a run as
abruptly, and a fork need not import torch again. Prints one JSON line: for each run when it was killed, how
many rounds had been finished, how many were distilled afterwards, whether the model has the same bits, and
which half-written files are left.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fastprune as fp
from compression import digits

ROUNDS = 4
KILLS = 10


def compress(task, folder):
    """Run to the end; return the weights as they were before and after the conversion."""
    model, train, val = task
    result = fp.compress(
        model,
        train,
        val,
        sparsity=0.8,
        rounds=ROUNDS,
        granularity=fp.Block(8, 8),
        teacher="previous",
        max_samples=200,
        checkpoint_dir=folder,
        progress=False,
    )
    layers = (nn.Linear, fp.BlockSparseLinear)
    weights = {
        f"{name}.{part}": getattr(module, part).detach()
        for name, module in result.model.named_modules()
        if isinstance(module, layers)
        for part in ("weight", "bias")
    }
    return weights, [entry["accuracy"] for entry in result.history]


def finished_rounds(folder):
    """Return how many rounds count, as the file says."""
    state = folder / "state.json"
    return len(json.loads(state.read_text())["history"]) if state.exists() else 0


def fork(function):
    """Run a function in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    finally:
        os._exit(status)


def main(parent):
    """Run all and print what came of it."""
    torch.set_num_threads(1)
    task = digits()
    start = time.perf_counter()
    expected, accuracies = compress(task, parent / "whole")
    duration = time.perf_counter() - start
    run_module = importlib.import_module("fastprune.compression_run")
    distill = run_module.distill
    runs = []
    for index in range(KILLS):
        folder, log = parent / f"killed_{index}", parent / f"log_{index}"
        instant = random.Random(index).uniform(0.0, duration)
        child = fork(lambda folder=folder: compress(task, folder))
        time.sleep(instant)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        finished = finished_rounds(folder)

        def go_on(folder=folder, log=log):
            distilled = []
            run_module.distill = lambda *args, **options: distilled.append(1) or distill(*args, **options)
            weights, found = compress(task, folder)
            same = weights.keys() == expected.keys() and all(
                torch.equal(weights[key], expected[key]) for key in expected
            )
            entry = {
                "distilled": len(distilled),
                "same": same and found == accuracies,
                "left": [path.name for path in folder.glob(".*")],
            }
            log.write_text(json.dumps(entry))

        _, failed = os.waitpid(fork(go_on), 0)
        runs.append(
            {
                "instant": instant,
                "killed": os.WIFSIGNALED(status),
                "finished": finished,
                "failed": failed,
                **json.loads(log.read_text() if log.exists() else "{}"),
            }
        )
    print(json.dumps({"duration": duration, "runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
