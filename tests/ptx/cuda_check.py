"""`make cuda-check`: all that can be known of the CUDA kernels without a GPU, in one JSON file.

Every .cu is compiled and held against its budget; then all tests of this folder run in full. With nvcc but
without the simulator the tests are skipped, and the report says why.

Usage: PYTHONPATH=tests python -m ptx.cuda_check [--architectures 80 90] [--output FOLDER] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import compile_gate, harness, records

# So that no job is left alone with a long file at the end.
LONGEST_FIRST = (
    "test_block_sparse_conv2d_weight_gradient_mutants_ptx",
    "test_block_sparse_linear_weight_gradient_ptx",
    "test_block_sparse_conv2d_weight_gradient_ptx",
    "test_block_sparse_linear_ptx",
    "test_block_product_ptx",
    "test_block_sparse_conv2d_mutants_ptx",
    "test_block_sparse_conv2d_ptx",
    "test_ablated_mlp_cross_entropy_ptx",
    "test_ablated_cross_entropy_ptx",
    "test_ablate_linear_ptx",
)


def simulate(test_file: Path, output: Path) -> tuple[int, str, records.Report]:
    """Run one file of tests in full; return pytest's exit status, the end of its output, its counts."""
    report = output / f"{test_file.stem}.json"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "FASTPRUNE_PTX_SWEEP": "full",
        "FASTPRUNE_PTX_REPORT": str(report),
        "FASTPRUNE_PTX_FOLDER": str(output),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(test_file)]
    result = subprocess.run(
        command,
        env=environment,
        cwd=harness.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    counts: records.Report = {"simulated": {}, "mutants": {}}
    if report.exists():
        counts = json.loads(report.read_text())
        report.unlink()
    # A failure is shown whole, a success by its last lines.
    lines = result.stdout.splitlines()
    return result.returncode, "\n".join(lines if result.returncode else lines[-2:]), counts


def longest_first(test_files: Iterable[Path]) -> list[Path]:
    """Return the files of tests in the order to start them in."""
    places = {stem: place for place, stem in enumerate(LONGEST_FIRST)}
    return sorted(test_files, key=lambda path: (places.get(path.stem, len(places)), path.name))


def main(arguments: list[str]) -> int:
    """Run the check and return the exit status: 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--architectures", nargs="+", default=["80", "90"], choices=compile_gate.MULTIPROCESSORS
    )
    parser.add_argument("--output", type=Path, default=harness.REPOSITORY / "build" / "cuda-check")
    parser.add_argument("--jobs", type=int, default=2, help="compilers, then files of tests, at a time")
    parser.add_argument("--compile-only", action="store_true", help="runs nothing in the simulator")
    options = parser.parse_args(arguments)
    if harness._nvcc() is None:
        print("cuda-check: nvcc was not found; set NVCC or put it on the PATH", file=sys.stderr)
        return 1
    output = options.output.resolve()
    sources = sorted(harness.KERNELS.glob("*.cu"))
    kernels, faults = compile_gate.compile_all(sources, options.architectures, output, options.jobs)
    print(compile_gate.table(kernels), flush=True)

    skipped = "--compile-only" if options.compile_only else harness.unavailable_reason()
    test_files = [] if options.compile_only else longest_first(Path(__file__).parent.glob("test_*.py"))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda test_file: simulate(test_file, output), test_files))
    for test_file, (status, text, _) in zip(test_files, results, strict=True):
        print(f"\n{test_file.name}\n{text}")
        if status != 0:
            faults.append(f"{test_file.name}: pytest ended with status {status}")
    counts = records.merged(part for _, _, part in results)
    if skipped is None:
        run = {name.split()[0] for name in counts["simulated"]}
        faults += [f"{name} was not run in the simulator" for name in sorted({k.name for k in kernels} - run)]
    report = {
        "architectures": options.architectures,
        "kernels": [compile_gate.as_record(kernel) for kernel in kernels],
        "simulation_skipped": skipped,
        **counts,
        "faults": faults,
    }
    path = output / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + summary(counts), f"\n{path}")
    for fault in faults:
        print(f"cuda-check: {fault}", file=sys.stderr)
    return 1 if faults else 0


def summary(counts: records.Report) -> str:
    """Return the counts of the simulator's runs, one line for each kernel and architecture."""
    lines = [f"{'simulated':<64} {'shapes':>6} {'launches':>8} {'findings':>8}"]
    for name, row in counts["simulated"].items():
        lines.append(f"{name:<64} {row['shapes']:>6} {row['launches']:>8} {row['findings']:>8}")
    lines.append(f"{'mutants of':<64} {'made':>6} {'noticed':>8} {'same':>8}")
    for name, row in counts["mutants"].items():
        lines.append(f"{name:<64} {row['made']:>6} {row['noticed']:>8} {row['equivalent']:>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
