"""The kernels by themselves: they compile without torch, and run clean under the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastprune as fp

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "kernels"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on the path")


def compile_kernels(folder: Path, isas: list[str], flags: list[str]) -> list[Path]:
    """Compile every kernel file for each instruction set, and the dispatcher, with no include path."""
    common = [str(COMPILER), "-std=gnu++17", "-ffp-contract=fast", "-Wno-psabi", "-Wall", *flags, "-c"]
    objects, commands = [], []
    for source in sorted((KERNELS / "cpu").glob("*.cpp")):
        variants = [""] if source.stem == "dispatch" else isas
        for isa in variants:
            objects.append(folder / f"{source.stem}_{isa}.o")
            extra = [f"-DFASTPRUNE_CPU_NAMESPACE={isa}", *ISA_FLAGS[isa]] if isa else []
            command = [*common, f"-DFASTPRUNE_X86_KERNELS={int(IS_X86)}", *extra]
            commands.append([*command, str(source), "-o", str(objects[-1])])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True, cwd=folder), commands))
    return objects


def test_kernels_compile_without_torch_on_the_include_path(tmp_path: Path) -> None:
    objects = compile_kernels(tmp_path, ["baseline"], ["-O0", "-Werror"])
    assert len(objects) == len(list((KERNELS / "cpu").glob("*.cpp")))


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists symbols, is not on the path")
def test_no_symbol_of_one_instruction_set_can_be_linked_into_another(tmp_path: Path) -> None:
    isas = [isa for isa in ISA_FLAGS if IS_X86 or isa == "baseline"]
    # Without optimisation nothing is inlined: every function that could be shared is a symbol.
    for path in compile_kernels(tmp_path, isas, ["-O0"]):
        isa = path.stem.rpartition("_")[2]
        if not isa:
            continue
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        )
        symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
        shared = [
            name for _, kind, name in symbols if kind in "WVuTDBR" and f"fastprune::{isa}::" not in name
        ]
        assert shared == [], f"{path.name} shares {shared}"


@pytest.mark.parametrize("isa", fp.supported_cpu_isas())
def test_vectorised_functions_keep_their_error_bounds(tmp_path: Path, isa: str) -> None:
    program = tmp_path / "vec_accuracy"
    source = ROOT / "tests" / "cpp" / "vec_accuracy.cpp"
    flags = ["-std=gnu++17", "-O2", "-ffp-contract=fast", "-Wno-psabi", *ISA_FLAGS[isa], f"-I{KERNELS}"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_kernels_run_clean_under_the_sanitizers(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    linked = subprocess.run(
        [str(COMPILER), *SANITIZERS, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    )
    if linked.returncode != 0:
        pytest.skip(f"the compiler has no sanitizers: {linked.stderr.decode()[:200]}")
    isas = ["baseline", "avx2", "avx512"] if IS_X86 else ["baseline"]
    objects = compile_kernels(tmp_path, isas, SANITIZERS)
    stems = ("kernels_sanitized", "few_samples_sanitized", "convolutions_sanitized", "conv_changes_sanitized")
    for stem in stems:
        program = tmp_path / stem
        source = ROOT / "tests" / "cpp" / f"{stem}.cpp"
        command = [str(COMPILER), "-std=gnu++17", *SANITIZERS, f"-I{KERNELS}", str(source)]
        subprocess.run([*command, *map(str, objects), "-o", str(program)], check=True)
        for isa in fp.supported_cpu_isas():
            result = subprocess.run([str(program), isa], capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
            assert f"{isa}: 0 failures" in result.stdout
