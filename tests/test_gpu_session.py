"""The unattended GPU run, as far as it goes without a GPU: its plan, its budget of time, its failures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastprune as fp

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def session():
    return importlib.import_module("gpu_session")


@pytest.fixture
def cases():
    return importlib.import_module("gpu_cases")


@pytest.fixture
def benchmark_module():
    return importlib.import_module("gpu_benchmark")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_no_step_takes_what_later_steps_need(session) -> None:
    steps = list(session.STEP_SECONDS)
    assert session.seconds_for("build", steps[1:], 520) == 200
    # Slow to the last second, each step still leaves its share to the others, and the whole fits.
    remaining = 520.0
    for index, step in enumerate(steps):
        seconds = session.seconds_for(step, steps[index + 1 :], remaining)
        assert seconds >= session.RESERVED_SECONDS[step]
        remaining -= seconds
    assert remaining == 0
    assert session.seconds_for("bench", [], 300) == 300
    assert session.seconds_for("test", ["bench"], 100) == 0


def test_the_commands_of_a_real_run(session, tmp_path: Path) -> None:
    (build,) = session.commands("build", tmp_path, 200, "90", dry_run=False)
    assert "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90" in build.arguments
    assert "--no-index" in build.arguments
    tests = session.commands("test", tmp_path, 100, "90", dry_run=False)
    assert {command.name for command in tests} == {path.stem for path in ROOT.glob("tests/test_*_cuda.py")}
    # Skipped tests must not look like passed ones.
    assert {(command.wanted, command.fine) for command in tests} == {(" passed", (0,))}
    sanitizers = session.commands("sanitize", tmp_path, 100, "90", dry_run=False)
    assert [command.arguments[0] for command in sanitizers] == ["compute-sanitizer"] * 3
    assert len({command.name for command in sanitizers}) == 3
    (bench,) = session.commands("bench", tmp_path, 150, "90", dry_run=False)
    assert bench.arguments[-2:] == ("--seconds", "125")


@pytest.mark.parametrize(
    ("code", "wanted", "seconds", "status", "reason"),
    [
        ("print('3 passed')", " passed", 60, "ok", "3 passed"),
        ("print('3 skipped')", " passed", 60, "failed", "no 'passed'"),
        ("raise SystemExit(3)", "", 60, "failed", "exit status 3"),
        ("import time; time.sleep(600)", "", 0.5, "stopped", "after"),
    ],
)
def test_how_a_process_ended(
    session, tmp_path: Path, code: str, wanted: str, seconds: float, status: str, reason: str
) -> None:
    command = session.Command("name", python(code), wanted)
    outcome = session.run(command, "test", seconds, {}, tmp_path / "log")
    assert (outcome.step, outcome.command, outcome.status) == ("test", "name", status)
    assert reason in outcome.reason


def test_a_failed_step_is_recorded_and_the_next_ones_run(
    session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {
        "build": "raise SystemExit('broken build')",
        "test": "print('ran')",
        "bench": "print('measured')",
    }

    def commands(step, *_):
        return [session.Command(step, python(codes[step]))]

    monkeypatch.setattr(session, "commands", commands)
    monkeypatch.setattr(
        session, "missing_for", lambda step, _: {"sanitize": ["compute-sanitizer"]}.get(step, [])
    )
    monkeypatch.setattr(session, "BUILD", tmp_path / "build")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", "")
    assert session.main(["--output", str(tmp_path), "--architecture", "90"]) == 1
    outcomes = json.loads((tmp_path / "session.json").read_text())["outcomes"]
    assert [(outcome["step"], outcome["status"]) for outcome in outcomes] == [
        ("build", "failed"),
        ("test", "ok"),
        ("sanitize", "skipped"),
        ("bench", "ok"),
    ]
    assert "broken build" in outcomes[0]["reason"]
    assert all(text in (tmp_path / "log.txt").read_text() for text in ("broken build", "ran", "measured"))
    capsys.readouterr()

    codes["build"] = "pass"
    assert session.main(["build", "--output", str(tmp_path), "--architecture", "90"]) == 0
    assert session.main(["--output", str(tmp_path), "--architecture", "90", "--seconds", "5"]) == 1
    assert capsys.readouterr().out.count("left out") == 4


def test_unknown_steps_and_a_missing_gpu_are_refused(
    session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "architecture_of_gpu", lambda: None)
    monkeypatch.delenv("FASTPRUNE_GPU_DRY_RUN", raising=False)
    for arguments, message in ((["biuld"], "got biuld"), (["--output", str(tmp_path / "new")], "no GPU")):
        with pytest.raises(SystemExit, match="2"):
            session.main(arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_plan_covers_what_it_should_and_begins_with_some_of_everything(cases) -> None:
    plan = cases.plan()
    assert len(plan) == len(set(plan))
    forward = {
        (c.blocksize, c.sparsity, c.samples) for c in plan if (c.op, c.dtype) == ("forward", "bfloat16")
    }
    assert forward == {(b, s, n) for b in cases.BLOCKSIZES for s in cases.SPARSITIES for n in cases.SAMPLES}
    assert {cases.SAMPLES[0], cases.SAMPLES[-1]} == {1, 8192}
    assert {c.op for c in plan[:50]} == {*cases.LINEAR_OPS, *cases.CONVOLUTION_OPS, *cases.LOSS_OPS}
    assert {c.dtype for c in plan[:50]} == {c.dtype for c in plan} == set(cases.TOLERANCES)


def test_small_cases_are_right_on_the_cpu(benchmark_module, cases) -> None:
    small = cases.small_plan()
    assert {(case.op, case.dtype) for case in small} == {(case.op, case.dtype) for case in cases.plan()} | {
        (op, dtype) for op in cases.LINEAR_OPS + cases.CONVOLUTION_OPS for dtype in cases.TOLERANCES
    }
    chosen = [case for case in small if case.dtype == "float32"]
    results = [benchmark_module.run_case(case, torch.device("cpu"), None, 1) for case in chosen]
    assert [result["failures"] for result in results] == [{}] * len(chosen)
    assert all(result["error"] < 1e-4 for result in results)
    # The expected values come from elsewhere than the baselines, which agree with both.
    timer = benchmark_module.ColdTimer(torch.device("cpu"))
    for case in (chosen[1], chosen[-1]):
        timed = benchmark_module.run_case(case, torch.device("cpu"), timer, 1)
        assert timed["failures"] == {}
        assert len(timed["seconds"]) == 2


def test_a_wrong_result_and_a_missing_kernel_are_told_apart(
    benchmark_module, cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases.Case("forward", "float32", 5, 32, 32, 16, 0.5)
    made = cases.make_problem

    def broken(*arguments, **options):
        problem = made(*arguments, **options)
        right = problem.functions["fastprune"]
        problem.functions["fastprune"] = lambda: right() * 1.001
        return problem

    monkeypatch.setattr(benchmark_module, "make_problem", broken)
    result = benchmark_module.run_case(case, torch.device("cpu"), None, 1)
    assert "wrong: relative error 0.001" in result["failures"]["fastprune"]
    monkeypatch.setattr(benchmark_module, "make_problem", made)
    half = cases.Case("conv2d forward", "float16", 1, 32, 32, 16, 0.5)
    result = benchmark_module.run_case(half, torch.device("cpu"), None, 1)
    assert result["failures"]["fastprune"].startswith("no kernel")
    nan = torch.full((3,), torch.nan)
    assert not benchmark_module.relative_error(nan, torch.ones(3, dtype=torch.float64)) <= 1e300
    with pytest.raises(ValueError, match="shape"):
        benchmark_module.relative_error(torch.ones(2), torch.ones(3))


def test_the_script_goes_through_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_GPU_DRY_RUN", "1")
    monkeypatch.setenv("PYTHON", sys.executable)
    script = ROOT / "benchmarks" / "gpu_session.sh"
    result = subprocess.run([str(script), "--output", str(tmp_path)], capture_output=True, text=True)
    outcomes = json.loads((tmp_path / "session.json").read_text())["outcomes"]
    counts = Counter(outcome["step"] for outcome in outcomes)
    assert list(counts) == ["build", "test", "sanitize", "bench"], result.stdout + result.stderr
    assert {outcome["status"] for outcome in outcomes} == {"ok"}, outcomes
    assert result.returncode == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["dry_run"]
    assert report["fastprune"]["fastprune"] == fp.build_info()["fastprune"]
    assert "the times mean nothing" in (tmp_path / "benchmark.md").read_text()
    assert len(list(tmp_path.iterdir())) <= 8


def result_of(samples: int, blocksize: int, sparsity: float, **seconds: float) -> dict:
    return {
        **{"op": "forward", "dtype": "bfloat16", "samples": samples, "out_features": 64, "in_features": 64},
        **{"blocksize": blocksize, "sparsity": sparsity, "flops": 2e6, "seconds": seconds, "failures": {}},
    }


def test_the_tables_and_the_picture(tmp_path: Path) -> None:
    gpu_report = importlib.import_module("gpu_report")
    results = [
        result_of(4096, 16, 0.5, fastprune=2e-6, dense=3e-6, **{"torch BSR": 1e-6}),
        result_of(4096, 16, 0.9, fastprune=1e-6, dense=3e-6),
        result_of(1, 16, 0.9, dense=3e-6),
    ]
    results[2]["failures"]["fastprune"] = "wrong: relative error 1"
    report = {"dry_run": False, "gpu": "a GPU", "torch": "2", "results": results, "left_out": [{}]}
    lines = gpu_report.markdown(report).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 64x64")]
    assert rows == [
        ["64x64", "16", "50%", "4096", "2.0", "3.0", "1.0", "1.50", "0.50", "1.0"],
        ["64x64", "16", "90%", "1", "-", "3.0", "-", "-", "-", "-"],
        ["64x64", "16", "90%", "4096", "1.0", "3.0", "-", "3.00", "-", "2.0"],
    ]
    assert "- forward, bfloat16: fastprune: wrong: relative error 1" in lines
    assert lines[-1] == "Left out for lack of time: 1 cases."
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert gpu_report.plot(report, tmp_path / "picture.png") == str(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
