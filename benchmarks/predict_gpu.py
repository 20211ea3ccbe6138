"""Predicts, from machine code and datasheets, how long kernels take on GPUs. Nothing is measured.

Reads what `make cuda-check` compiled, and, where a torch with the triton package is at hand, compiles
PyTorch's own block-sparse kernel for the same architectures. gpu_model.py has the model and its assumptions.

Usage: python benchmarks/predict_gpu.py [--kernels build/cuda-check] [--output FILE] [--no-triton]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gpu_model import GPUS, Gpu, Problem, Tiling, crossover, dense_seconds, predicted
from sass import HotLoop, disassemble, hot_loop, parse

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCKSIZES = (16, 32, 64, 128)
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
SAMPLES = (4096, 64, 1)


@dataclass(frozen=True)
class Candidate:
    """A kernel's hot loop and tiling for one block size and number of samples."""

    hot: HotLoop
    tiling: Tiling


def _float32_tiling(blocksize: int, samples: int, resident: int) -> Tiling:
    # Of csrc/kernels/cuda/block_sparse_linear.cu: 64 samples x 16 rows, at most 32 columns at a time.
    return Tiling(64, 16, min(32, blocksize), 128, resident, blocksize, itemsize=4)


def _large_tiling(strip: int) -> Callable[[int, int, int], Tiling | None]:
    # LargeTile of csrc/kernels/cuda/block_sparse_linear_plan.h: 64 bytes of each row in a stage.
    def tiling_of(blocksize: int, samples: int, resident: int) -> Tiling | None:
        # The kernel with the widest strips that the block allows; others serve up to 128 samples.
        if samples <= 128 or min(blocksize, 64) != strip:
            return None
        return Tiling(256, 64, 32, 256, resident, blocksize)

    return tiling_of


def _small_tiling(blocksize: int, samples: int, resident: int) -> Tiling | None:
    # SmallTile of the same.
    return Tiling(64, 64, 32, 128, resident, blocksize) if samples > _most_few_samples(blocksize) else None


def _most_few_samples(blocksize: int) -> int:
    # most_few_samples of the same.
    return 32 if blocksize % 64 == 0 else 64 if blocksize % 32 == 0 else 128


def _few_samples_tiling(blocksize: int, samples: int, resident: int) -> Tiling | None:
    # Of csrc/kernels/cuda/few_samples.cuh: eight warps take 16 columns each.
    if samples > _most_few_samples(blocksize):
        return None
    return Tiling(16, 16, 128, 256, resident, blocksize)


# How each kernel of ours tiles, by pattern of its name: (block size, samples, resident thread blocks) to a
# tiling, or None where the kernel does not serve that size.
TILINGS: dict[str, Callable[[int, int, int], Tiling | None]] = {
    "block_sparse_linear_f32": _float32_tiling,
    "block_sparse_linear_bf16_few_samples": _few_samples_tiling,
    "block_sparse_linear_bf16_64x64_by_16": _small_tiling,
    **{f"block_sparse_linear_bf16_256x64_by_{strip}": _large_tiling(strip) for strip in (16, 32, 64)},
}


def read_kernels(folder: Path, architecture: str) -> dict[str, tuple[HotLoop, int]]:
    """Return hot loop and resident thread blocks of each kernel that `make cuda-check` compiled.

    Raises:
        FileNotFoundError: it has not run, or there is no nvdisasm.

    """
    report = folder / "report.json"
    if not report.exists():
        raise FileNotFoundError(
            f"`folder` must hold what make cuda-check made, got {folder} without report.json"
        )
    resident = {
        kernel["name"]: kernel["resident_blocks"]
        for kernel in json.loads(report.read_text())["kernels"]
        if kernel["architecture"] == architecture
    }
    kernels = {}
    for cubin in sorted(folder.glob(f"*.sm_{architecture}.cubin")):
        for name, (code, labels) in parse(disassemble(cubin)).items():
            # Not all kernels multiply in a loop.
            try:
                kernels[name] = (hot_loop(code, labels), resident[name])
            except ValueError as error:
                print(f"{name}: {error}", file=sys.stderr)
    return kernels


def our_candidates(
    kernels: dict[str, tuple[HotLoop, int]], blocksize: int, samples: int
) -> dict[str, Candidate]:
    """Return our kernels that serve a block size and a number of samples."""
    found = {}
    for name, (hot, resident) in kernels.items():
        for pattern, tiling_of in TILINGS.items():
            if fnmatchcase(name, pattern) and (tiling := tiling_of(blocksize, samples, resident)) is not None:
                found[name] = Candidate(hot, tiling)
                break
    return found


def triton_candidate(architecture: str, blocksize: int, samples: int, folder: Path) -> Candidate:
    """Return PyTorch's kernel for a layer of 4096 x 4096."""
    # Needs a torch that brings Triton, which the rest does not.
    from triton_bsr import compile_bsr_kernel

    sys.path.insert(0, str(REPOSITORY / "tests"))
    from ptx.compile_gate import MULTIPROCESSORS

    compiled = compile_bsr_kernel(architecture, samples, blocksize, 4096, 4096, folder)
    ((code, labels),) = parse(disassemble(compiled.cubin)).values()
    resident = MULTIPROCESSORS[architecture].resident_blocks(
        32 * compiled.warps, compiled.registers, compiled.shared_bytes
    )
    # Matrix instructions of 16 x 8 that the tile takes; warps repeat them where they are fewer.
    products = (compiled.tile_rows // 16) * max(1, compiled.tile_samples // 8)
    issued = max(products, compiled.warps) * 16 * 8 / (compiled.tile_rows * compiled.tile_samples)
    tiling = Tiling(
        tile_samples=compiled.tile_samples,
        tile_outputs=compiled.tile_rows,
        step_columns=compiled.step_columns,
        threads=32 * compiled.warps,
        resident=resident,
        blocksize=blocksize,
        issued_share=issued,
    )
    return Candidate(hot_loop(code, labels), tiling)


def _cell(gpu: Gpu, candidate: Candidate, problem: Problem) -> str:
    arguments = (gpu, candidate.hot, candidate.tiling, problem)
    (least, bound), (most, limit) = predicted(*arguments, skipping=True), predicted(*arguments)
    if most <= 1.01 * least:
        return f"{most * 1e6:.1f} {limit}"
    return f"{least * 1e6:.1f} {bound} to {most * 1e6:.1f} {limit}"


def rows_of(gpu: Gpu, label: str, samples: int, candidates: dict[int, Candidate]) -> list[str]:
    """Return a table's rows for one kernel, a row for each block size."""
    lines = []
    for blocksize, candidate in candidates.items():
        arguments = (gpu, candidate.hot, candidate.tiling)
        cells = [_cell(gpu, candidate, Problem(samples, sparsity=s)) for s in SPARSITIES]
        at = crossover(*arguments, Problem(samples), candidate.tiling.itemsize)
        faster_from = "never" if at is None else f"{at:.0%}"
        lines.append(f"| {label} | {blocksize} | " + " | ".join(cells) + f" | {faster_from} |")
    return lines


def report(
    kernels: dict[str, dict[str, tuple[HotLoop, int]]], triton: dict[tuple[str, int, int], Candidate]
) -> str:
    """Return one table for each GPU and number of samples.

    ``kernels`` are ours by architecture; ``triton`` is PyTorch's by architecture, block size and samples.
    """
    lines = []
    heads = " | ".join(f"{s:.0%}" for s in SPARSITIES)
    for gpu in GPUS.values():
        for samples in SAMPLES:
            dense = [f"{dense_seconds(gpu, Problem(samples), size) * 1e6:.1f}" for size in (2, 4)]
            lines += [
                "",
                f"**{gpu.name}, {samples} samples** (dense: bfloat16 {dense[0]}, float32 {dense[1]})",
            ]
            lines.append("")
            lines += [
                f"| kernel | block | {heads} | faster from |",
                "|---|---|" + "---|" * (len(SPARSITIES) + 1),
            ]
            rows: dict[str, dict[int, Candidate]] = {}
            for blocksize in BLOCKSIZES:
                ours = our_candidates(kernels[gpu.architecture], blocksize, samples)
                for name, candidate in ours.items():
                    rows.setdefault(name, {})[blocksize] = candidate
                if theirs := triton.get((gpu.architecture, blocksize, samples)):
                    rows.setdefault("torch BSR (Triton)", {})[blocksize] = theirs
            for name, candidates in rows.items():
                lines += rows_of(gpu, name, samples, candidates)
    return "\n".join(lines).strip()


def loops_table(kernels: dict[str, dict[str, tuple[HotLoop, int]]]) -> str:
    """Return what was counted in the hot loops of our kernels whose tiling is known."""
    lines = [
        "| kernel | sm | product | multiply-adds | instructions | skippable | shared bytes | ahead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for architecture, found in kernels.items():
        for name, (hot, _) in found.items():
            if not any(fnmatchcase(name, pattern) for pattern in TILINGS):
                continue
            inner = hot.inner
            cells: list[Any] = [name, architecture, inner.kind, inner.multiply_adds, inner.instructions]
            cells += [inner.skippable_instructions, inner.shared_bytes, hot.pending]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", type=Path, default=REPOSITORY / "build" / "cuda-check")
    parser.add_argument("--output", type=Path, help="writes the tables here too")
    parser.add_argument("--no-triton", action="store_true", help="leaves PyTorch's kernel out")
    options = parser.parse_args(arguments)
    architectures = sorted({gpu.architecture for gpu in GPUS.values()})
    kernels = {architecture: read_kernels(options.kernels, architecture) for architecture in architectures}
    triton: dict[tuple[str, int, int], Candidate] = {}
    if not options.no_triton and importlib.util.find_spec("triton") is None:
        print("PyTorch's kernel is left out: there is no triton package", file=sys.stderr)
    elif not options.no_triton:
        with tempfile.TemporaryDirectory() as folder:
            os.environ.setdefault("TRITON_CACHE_DIR", folder)
            for architecture in architectures:
                for samples in SAMPLES:
                    for blocksize in BLOCKSIZES:
                        triton[architecture, blocksize, samples] = triton_candidate(
                            architecture, blocksize, samples, Path(folder)
                        )
    text = loops_table(kernels) + "\n\n" + report(kernels, triton)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
