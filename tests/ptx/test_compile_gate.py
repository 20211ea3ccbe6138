"""The compile gate: what it reads of ptxas, what it refuses, and how many thread blocks it says fit."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from . import budgets, compile_gate, cuda_check, harness, mutants, records
from .budgets import Budget
from .compile_gate import MULTIPROCESSORS, Kernel, parse

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 10496 bytes smem, 480 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    64 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, 480 bytes cmem[0]
ptxas info    : Compile time = 27.614 ms
"""
PTX = """
.visible .entry first(
	.param .align 8 .b8 first_param_0[136]
)
.maxntid 128, 2, 1
{
}
.visible .entry second(
	.param .u64 second_param_0
)
{
}
"""
FINE = Kernel("first", "80", 40, 10_496, 0, 0, 128)


@pytest.fixture(autouse=True)
def _budgets(monkeypatch):
    monkeypatch.setattr(
        budgets,
        "BUDGETS",
        {
            "fir*": Budget(40, 10_496, 1024),
            "first": Budget(1, 1),
            "second": Budget(40, 10_496, 1024, spill_bytes=8),
        },
    )


@pytest.fixture
def _empty_records(monkeypatch):
    for name in ("_shapes", "_launches", "_findings", "_mutants"):
        table = getattr(records, name)
        monkeypatch.setattr(records, name, type(table)(table.default_factory))


def test_a_log_is_read() -> None:
    first, second = parse(LOG, PTX, "80")
    assert first == replace(FINE, threads=256)
    assert second == Kernel("second", "80", 255, 0, 64, 32, None)
    assert parse(LOG, PTX.replace(".maxntid 128, 2, 1", ".maxntid 96"), "100")[0].threads == 96


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("", "ptxas -v"),
        (LOG.replace("Used 40", "Uses 40"), "ptxas -v"),
        (LOG.replace("properties for first", "properties for third"), "ptxas -v"),
        (
            LOG.replace("Compiling entry function 'second' for 'sm_80'", "").replace("Used 255", "Has 255"),
            "second",
        ),
    ],
)
def test_a_log_that_is_not_understood_and_a_call_are_errors(log: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(log, PTX, "80")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"local_bytes": 8}, "8 bytes in local memory"),
        (
            {"name": "second", "spill_bytes": 9, "local_bytes": 8},
            "spills 9 bytes of registers, its budget is 8",
        ),
        ({"registers": 41}, "41 registers, its budget is 40"),
        ({"static_shared_bytes": 10_497}, "10497 static_shared_bytes, its budget is 10496"),
        ({"threads": None}, "__launch_bounds__"),
        ({"name": "other"}, "no entry in tests/ptx/budgets.py"),
        ({"threads": 2048}, "does not fit"),
    ],
)
def test_each_fault_is_named(change: dict, message: str) -> None:
    assert FINE.faults() == []
    faults = replace(FINE, **change).faults()
    assert len(faults) == 1
    assert message in faults[0]


def test_the_first_pattern_counts_and_a_launch_keeps_to_it() -> None:
    assert budgets.budget_of("first") == Budget(40, 10_496, 1024)
    assert budgets.launch_findings("first", 1024) == []
    assert "1025 bytes" in budgets.launch_findings("first", 1025)[0]
    assert budgets.launch_findings("other", 1025) == []


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "a100", "h100"),
    [
        (128, 32, 0, 16, 16),  # 64 warps
        (32, 16, 0, 32, 32),  # 32 thread blocks
        (128, 33, 0, 12, 12),  # 40 registers are given: 48 warps
        (128, 128, 0, 4, 4),  # 16 warps
        (256, 255, 0, 1, 1),
        (128, 32, 40 * 1024, 4, 5),  # 41 KiB each
        (128, 32, 163 * 1024, 1, 1),
        (128, 32, 164 * 1024, 0, 1),
    ],
)
def test_resident_thread_blocks(threads: int, registers: int, shared: int, a100: int, h100: int) -> None:
    assert MULTIPROCESSORS["80"].resident_blocks(threads, registers, shared) == a100
    assert MULTIPROCESSORS["90"].resident_blocks(threads, registers, shared) == h100


@pytest.mark.skipif(harness._nvcc() is None, reason="nvcc was not found")
def test_local_arrays_and_kernels_without_a_budget_fail_a_real_compilation(tmp_path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(64) first(float* x, int i) {\n'
        "  float values[64];\n"
        "  for (int j = 0; j < 64; ++j) values[j] = x[j];\n"
        "  for (int j = 0; j < 64; ++j) x[j] = 0;\n"
        "  x[0] = values[i] + values[i + 1];\n"
        "}\n"
        'extern "C" __global__ void other(float* x) { x[threadIdx.x] = 0; }\n'
    )
    kernels, faults = compile_gate.compile_all([source], ["80", "90"], tmp_path, jobs=1)
    assert sorted((k.name, k.architecture) for k in kernels) == [
        (name, architecture) for name in ("first", "other") for architecture in ("80", "90")
    ]
    assert sum("first" in fault and "bytes in local memory" in fault for fault in faults) == 2
    assert sum("other" in fault and "no entry" in fault for fault in faults) == 2
    assert (tmp_path / "kernels.sm_90.cubin").is_file()
    assert compile_gate.table(kernels).count("\n") == 4

    source.write_text("none")
    kernels, faults = compile_gate.compile_all([source], ["80"], tmp_path, jobs=1)
    assert kernels == []
    assert "does not compile" in faults[0]


@pytest.mark.usefixtures("_empty_records")
def test_what_was_run_is_counted() -> None:
    plan = {"kernel": "first", "grid": (1, 1, 1), "block": (128, 1, 1), "shared_bytes": 0}
    arguments = (np.int64(5), None, np.int32(1))
    for findings in ([], ["race"]):
        records.launch(plan, arguments, "compute_80", findings)
    records.launch({**plan, "grid": (2, 1, 1)}, arguments, "compute_80", [])
    made = [mutants.Mutant("no barrier", where, where, "first") for where in ("a", "b", "b", "c")]
    # "b" stands for one of its two.

    def notices(transform) -> bool:
        # What a broken kernel does counts for nothing.
        records.launch(plan, arguments, "compute_80", ["race"])
        return transform("") == "a"

    missed = mutants.unnoticed(made, notices, [("no barrier", "b")])
    assert missed == [("no barrier", "b"), ("no barrier", "c")]
    report = records.report()
    assert report == {
        "simulated": {"first compute_80": {"shapes": 2, "launches": 3, "findings": 1}},
        "mutants": {"first": {"made": 4, "noticed": 1, "equivalent": 1}},
    }
    twice = records.merged([report, json.loads(json.dumps(report))])
    assert twice["simulated"]["first compute_80"] == {"shapes": 4, "launches": 6, "findings": 2}
    assert "first compute_80" in cuda_check.summary(twice)


def test_a_mutant_goes_only_through_runs_in_which_it_changes_anything():
    lines = PTX.split("\n")
    body = lines.index("{")
    made = [
        mutants.Mutant("no guard", name, name, "first", body + 1 + i, f"@%p{name} {{}}")
        for i, name in enumerate("ab")
    ]
    calls = []

    def run(number, ptx_transform, max_instructions):
        ptx = ptx_transform(PTX)
        calls.append((number, ptx if ptx in "ab" else "probed", max_instructions))
        if ptx in "ab":
            return ["race"] if (ptx, number) == ("b", 1) else []
        assert "@%pb mov.b32 %unused, %reached1;" in ptx
        assert ".entry second" not in ptx
        found = f"[uninit-register] read of uninitialised register %reached{number} at PTX line 9"
        return [found] if number < 2 else [found.replace("2", "0"), "unbroken and wrong"]

    runs = mutants.Runs(made, [functools.partial(run, number) for number in range(3)])
    assert runs(made[1])
    assert [name for _, name, _ in calls] == ["probed", "probed", "b"]
    assert runs.faults == []
    assert not runs(made[0])
    assert [call[:2] for call in calls[3:]] == [(0, "a"), (2, "probed"), (2, "a")]
    assert runs.faults == ["unbroken and wrong"]
    assert calls[-1][2] < 10**6


def test_a_sample_of_mutants_leaves_out_what_computes_the_same():
    made = [mutants.Mutant("no barrier", where, where, "first") for where in "abcdef"]
    assert [mutant.where for mutant in mutants.sample_of(made, 2, [("no barrier", "c")])] == ["a", "e"]


def test_long_files_of_tests_start_first():
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    ordered = cuda_check.longest_first(files)
    assert sorted(ordered) == files
    assert tuple(file.stem for file in ordered[: len(cuda_check.LONGEST_FIRST)]) == cuda_check.LONGEST_FIRST
