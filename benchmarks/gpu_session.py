"""Builds, tests, sanitises and measures the CUDA kernels, unattended and within a budget of time.

The steps, all of them unless some are named: build, test, sanitize, bench. Each has a share of the time; what
does not fit is stopped, and named. A step that fails is recorded, and the next ones run. A folder gets
session.json (what ran, how it ended), log.txt (all output), benchmark.json, benchmark.md and benchmark.png.

Needs a CUDA torch, nvcc and g++; for the build scikit-build-core, pybind11, cmake and ninja, for the tests
pytest and numpy, for the package safetensors and tqdm. What is missing may lie as wheels in a folder
(``--wheels``), and is installed beside the build.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = REPOSITORY / "build" / "gpu"
# The most seconds of each step; measuring gets all that the others leave.
STEP_SECONDS = {"build": 200, "test": 130, "sanitize": 100, "bench": 10_000}
# Kept free for each step that is still to come.
RESERVED_SECONDS = {"build": 60, "test": 40, "sanitize": 40, "bench": 120}
# Side by side in a step.
MOST_PROCESSES = 6
MODULES = {
    "build": {"torch": "torch", "scikit_build_core": "scikit-build-core", "pybind11": "pybind11"},
    "test": {"pytest": "pytest", "numpy": "numpy", "safetensors": "safetensors", "tqdm": "tqdm"},
    "sanitize": {"safetensors": "safetensors", "tqdm": "tqdm"},
    "bench": {"safetensors": "safetensors", "tqdm": "tqdm"},
}


@dataclass(frozen=True)
class Command:
    """One process of a step.

    ``wanted`` must stand in its output, for programs whose exit status of 0 says too little; ``fine`` are the
    statuses that mean success.
    """

    name: str
    arguments: tuple[str, ...]
    wanted: str = ""
    fine: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: "ok", "failed", "stopped" for lack of time, "left out", or "skipped"."""

    step: str
    command: str
    status: str
    seconds: float = 0.0
    reason: str = ""


def seconds_for(step: str, later: list[str], remaining: float) -> float:
    """Return the seconds that a step may take: its most, less what later steps need of what remains."""
    free = remaining - sum(RESERVED_SECONDS[name] for name in later)
    return max(0.0, min(STEP_SECONDS[step], free))


def architecture_of_gpu() -> str | None:
    """Return the first GPU's architecture as CMake names it, "90", or None where torch sees no GPU."""
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def commands(step: str, output: Path, seconds: float, architecture: str, dry_run: bool) -> list[Command]:
    """Return the processes of a step, which may run side by side; only one where times are measured."""
    python = sys.executable
    benchmark = (python, "benchmarks/gpu_benchmark.py", *(("--dry-run",) if dry_run else ()))
    if step == "build":
        if dry_run:
            return [Command("import", (python, "-c", "import fastprune; print(fastprune.build_info())"))]
        settings = (
            f"--config-settings=build-dir={BUILD / 'cmake'}",
            "--config-settings=cmake.define.FASTPRUNE_CUDA=ON",
            f"--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}",
        )
        options = (
            "--no-index",
            "--no-build-isolation",
            "--no-deps",
            "--upgrade",
            "--target",
            f"{BUILD / 'site'}",
        )
        return [Command("pip", (python, "-m", "pip", "install", *options, *settings, "."))]
    if step == "test":
        pytest = (
            python,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=--strict-markers",
        )
        files = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("tests/test_*_cuda.py"))
        # One process for each file: a kernel that breaks its process breaks no other tests. A file whose
        # tests are all skipped has not passed; pytest's status 5 is such a file.
        return [
            Command(file.stem, (*pytest, str(file)), *(("", (0, 5)) if dry_run else (" passed",)))
            for file in files
        ]
    if step == "sanitize":
        check = (*benchmark, "--check-only", "--seconds", str(round(seconds * 0.8)))
        if dry_run:
            return [Command("check", check)]
        sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--tool")
        return [Command(tool, (*sanitizer, tool, *check)) for tool in ("memcheck", "racecheck", "synccheck")]
    # The last case begun, the tables and the picture come on top.
    options = ("--output", str(output), "--seconds", str(max(1, round(seconds - 25))))
    return [Command("gpu_benchmark", (*benchmark, *options))]


def missing_for(step: str, dry_run: bool) -> list[str]:
    """Return the packages and programs that a step lacks."""
    missing = [
        package for module, package in MODULES[step].items() if importlib.util.find_spec(module) is None
    ]
    if step == "build":
        missing += [program for program in ("nvcc", "g++") if shutil.which(program) is None]
        # These two come as programs or as Python packages.
        missing += [
            tool
            for tool in ("cmake", "ninja")
            if shutil.which(tool) is None and importlib.util.find_spec(tool) is None
        ]
    elif step == "sanitize" and not dry_run and shutil.which("compute-sanitizer") is None:
        missing.append("compute-sanitizer")
    return missing


def run(command: Command, step: str, seconds: float, environment: dict[str, str], log: Path) -> Outcome:
    """Run one process for at most so many seconds, its output into a file, and tell how it ended."""
    start = time.monotonic()
    with log.open("w") as stream:
        stream.write(f"== {step}: {command.name}\n$ {' '.join(command.arguments)}\n")
        stream.flush()
        process = subprocess.Popen(
            command.arguments,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever it started ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = round(time.monotonic() - start, 1)
    text = log.read_text(errors="replace")
    last = (text.strip().splitlines() or [""])[-1][:300]
    if code is None:
        return Outcome(step, command.name, "stopped", took, f"after {seconds:.0f} s: {last}")
    if code not in command.fine:
        return Outcome(step, command.name, "failed", took, f"exit status {code}: {last}")
    if command.wanted not in text:
        return Outcome(step, command.name, "failed", took, f"no {command.wanted.strip()!r} in: {last}")
    return Outcome(step, command.name, "ok", took, last)


def run_step(step: str, seconds: float, output: Path, architecture: str, dry_run: bool) -> list[Outcome]:
    """Run a step's processes, some of them side by side, and append their output to the log."""
    if missing := missing_for(step, dry_run):
        status = "skipped" if missing == ["compute-sanitizer"] else "failed"
        return [Outcome(step, "-", status, 0.0, f"missing: {', '.join(missing)}")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if step == "sanitize":
        # Every tensor an allocation of its own, so that a read past its end is seen.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if step == "test":
        # The references run on the CPU: more threads than cores, which spin, would take minutes.
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // MOST_PROCESSES))
    chosen = commands(step, output, seconds, architecture, dry_run)
    deadline = time.monotonic() + seconds

    def attempt(command: Command) -> Outcome:
        left = deadline - time.monotonic()
        if left < 1:
            return Outcome(step, command.name, "left out", 0.0, "no time left in its step")
        return run(command, step, left, environment, BUILD / f"{step}-{command.name}.log")

    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(MOST_PROCESSES) as pool:
        outcomes = list(pool.map(attempt, chosen))
    with (output / "log.txt").open("a") as log:
        for command in chosen:
            part = BUILD / f"{step}-{command.name}.log"
            if part.exists():
                log.write(part.read_text(errors="replace") + "\n")
                part.unlink()
    return outcomes


def install_wheels(folder: Path) -> Outcome:
    """Install all wheels of a folder beside the build."""
    wheels = sorted(map(str, folder.resolve().glob("*.whl")))
    arguments = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade")
    command = Command("wheels", (*arguments, "--target", str(BUILD / "wheels"), *wheels))
    BUILD.mkdir(parents=True, exist_ok=True)
    return run(command, "build", 120, dict(os.environ), BUILD / "wheels.log")


def main(arguments: list[str]) -> int:
    """Run the steps; the exit status is 1 where anything failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "steps", nargs="*", metavar="step", help=f"of {', '.join(STEP_SECONDS)}; all by default"
    )
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu_results")))
    parser.add_argument("--seconds", type=float, default=520.0, help="the whole run's budget")
    parser.add_argument(
        "--wheels", type=Path, default=os.environ.get("WHEELS"), help="folder of missing packages"
    )
    parser.add_argument("--architecture", help="what to build for, as CMake names it; the GPU's by default")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.steps) - set(STEP_SECONDS)):
        parser.error(f"a step must be one of {', '.join(STEP_SECONDS)}, got {', '.join(unknown)}")
    start = time.monotonic()
    dry_run = os.environ.get("FASTPRUNE_GPU_DRY_RUN") == "1"
    architecture = options.architecture or ("none" if dry_run else architecture_of_gpu())
    if architecture is None:
        parser.error("torch sees no GPU; FASTPRUNE_GPU_DRY_RUN=1 tries the steps without one")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "log.txt").write_text("")
    outcomes = []
    if options.wheels is not None:
        outcomes.append(install_wheels(Path(options.wheels)))
    places = [str(BUILD / name) for name in ("site", "wheels")] if not dry_run else []
    # For the processes to come, and for the search for what is missing.
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path[1:1] = places
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"

    steps = [step for step in STEP_SECONDS if not options.steps or step in options.steps]
    for index, step in enumerate(steps):
        seconds = seconds_for(step, steps[index + 1 :], options.seconds - (time.monotonic() - start))
        if seconds < 10:
            ended = [Outcome(step, "-", "left out", 0.0, "no time left")]
        else:
            ended = run_step(step, seconds, output, architecture, dry_run)
        outcomes += ended
        for outcome in ended:
            print(
                f"{outcome.step:<9} {outcome.command:<40} {outcome.status:<8} {outcome.seconds:>6.1f} s  "
                f"{outcome.reason}",
                flush=True,
            )
        record = {
            "dry_run": dry_run,
            "budget_seconds": options.seconds,
            "outcomes": [asdict(o) for o in outcomes],
        }
        (output / "session.json").write_text(json.dumps(record, indent=1) + "\n")
    table = output / "benchmark.md"
    if "bench" in steps and table.exists():
        print(table.read_text())
    return 0 if all(outcome.status in ("ok", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
