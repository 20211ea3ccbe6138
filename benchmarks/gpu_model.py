"""A model of a GPU: from counted instructions and bytes to the least time that a kernel can take.

Nothing here is measured. The predicted time is the largest of the bounds below; a real kernel takes longer,
since bounds overlap only in part. It serves to choose between tiles, and to see what limits each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sass import HotLoop


@dataclass(frozen=True)
class Gpu:
    """Rates of one multiprocessor in one clock, and of the whole chip.

    ``multiply_adds`` is of dense bfloat16 and float16 products; tf32 has half. ``mma_sync_share`` is what
    mma.sync reaches of it, the rest needs wgmma.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float  # Hz
    multiply_adds: int
    float_multiply_adds: int
    mma_sync_share: float
    l2_bytes_per_clock: int  # of the whole chip
    memory_bandwidth: float  # bytes per second


# A100 and its L2: NVIDIA A100 Tensor Core GPU Architecture whitepaper; 2039 GB/s: datasheet of the 80 GB SXM
# part. H100, H200: NVIDIA's datasheets of the SXM parts; 1.83 GHz is what gives their 989 TFLOP/s of dense
# bfloat16. Assumed: Hopper's L2 moves as many bytes in a clock as the A100's. 63 %: about what mma.sync
# reached on Hopper in the microbenchmarks of Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU
# Architecture, 2024 (arXiv:2402.13499).
GPUS = {
    "A100": Gpu("A100 SXM 80 GB", "80", 108, 1.41e9, 1024, 64, 1.0, 5120, 2.039e12),
    "H100": Gpu("H100 SXM", "90", 132, 1.83e9, 2048, 128, 0.63, 5120, 3.35e12),
    "H200": Gpu("H200 SXM", "90", 132, 1.83e9, 2048, 128, 0.63, 5120, 4.8e12),
}
SHARED_BYTES_PER_CLOCK = 128  # of a multiprocessor
ISSUE_SLOTS_PER_CLOCK = 4
# Assumptions. Shares of the peaks that good code reaches, and clocks from a step's loads to the next step's
# where nothing is loaded ahead: a read of L2 (about 270), shared memory, two barriers.
L2_SHARE = 0.7
MEMORY_SHARE = 0.9
CUBLAS_SHARE = 0.8
STEP_LATENCY = 500


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts ``input[samples, in_features] @ weight.T`` into thread blocks.

    A thread block owns ``tile_samples`` x ``tile_outputs`` of the output and steps over ``step_columns``.
    Where it owns several block rows, it steps over the union of their kept columns. ``issued_share`` is what
    it multiplies in a step of the whole tile, more than 1 where warps repeat each other's work.
    """

    tile_samples: int
    tile_outputs: int
    step_columns: int
    threads: int
    resident: int
    blocksize: int
    issued_share: float = 1.0
    itemsize: int = 2

    @property
    def block_rows(self) -> int:
        """Block rows that one thread block owns, 1 where it owns a part of one."""
        return max(1, self.tile_outputs // self.blocksize)


@dataclass(frozen=True)
class Problem:
    """The layer, its batch and its sparsity; kept blocks are taken to lie evenly."""

    samples: int
    out_features: int = 4096
    in_features: int = 4096
    sparsity: float = 0.9

    @property
    def density(self) -> float:
        """The kept share."""
        return 1 - self.sparsity


def bounds(
    gpu: Gpu, hot: HotLoop, tiling: Tiling, problem: Problem, skipping: bool = False
) -> dict[str, float]:
    """Return the seconds that each resource needs; ``skipping``: if no branch is ever taken the long way."""
    warps = tiling.threads // 32
    output_tiles = math.ceil(problem.out_features / tiling.tile_outputs)
    thread_blocks = math.ceil(problem.samples / tiling.tile_samples) * output_tiles
    # Of the columns, those in which any of the thread block's block rows keeps a block.
    union = 1 - (1 - problem.density) ** tiling.block_rows
    steps = problem.in_features / tiling.step_columns * union
    kept_in_step = problem.density / union if union else 0.0
    issued = tiling.tile_samples * tiling.tile_outputs * tiling.step_columns * tiling.issued_share
    # A loop that was unrolled does several steps in a turn, one within a step less than one.
    turns_per_step = issued / (hot.inner.multiply_adds * warps)
    # The multiprocessor with most thread blocks ends last.
    share = math.ceil(thread_blocks / gpu.multiprocessors)
    step_turns = share * warps * steps
    turns = step_turns * turns_per_step
    # Of a turn, what multiplies is skipped for blocks that are not kept, the rest is not.
    inner, around = hot.inner, hot.step
    instructions = inner.instructions - inner.product_instructions * (1 - kept_in_step)
    if skipping:
        instructions -= inner.skippable_instructions
    shared_bytes = inner.shared_bytes - inner.product_shared_bytes * (1 - kept_in_step)

    rate = gpu.multiply_adds * (1.0 if "HGMMA" in hot.inner.kind else gpu.mma_sync_share)
    if "TF32" in hot.inner.kind:
        rate /= 2
    if hot.inner.kind == "FFMA":
        rate = gpu.float_multiply_adds
    clocks = {
        "float" if inner.kind == "FFMA" else "tensor": turns * kept_in_step * inner.multiply_adds / rate,
        "shared": (turns * shared_bytes + step_turns * around.shared_bytes) / SHARED_BYTES_PER_CLOCK,
        "issue": (turns * instructions + step_turns * around.instructions) / ISSUE_SLOTS_PER_CLOCK,
        # Thread blocks of one multiprocessor wait side by side, as many as fit.
        "latency": steps
        * math.ceil(share / max(1, min(tiling.resident, share)))
        * STEP_LATENCY
        / (hot.pending + 1),
    }
    # Samples that do not exist are multiplied, but not loaded.
    rows_loaded = output_tiles * problem.samples + thread_blocks * tiling.tile_outputs * kept_in_step
    l2_bytes = steps * tiling.step_columns * tiling.itemsize * rows_loaded
    memory_bytes = tiling.itemsize * (
        problem.samples * (problem.in_features + problem.out_features)
        + problem.in_features * problem.out_features * problem.density
    )
    seconds = {name: value / gpu.clock for name, value in clocks.items()}
    seconds["L2"] = l2_bytes / (gpu.l2_bytes_per_clock * gpu.clock * L2_SHARE)
    seconds["memory"] = memory_bytes / (gpu.memory_bandwidth * MEMORY_SHARE)
    return seconds


def predicted(
    gpu: Gpu, hot: HotLoop, tiling: Tiling, problem: Problem, skipping: bool = False
) -> tuple[float, str]:
    """Return the largest bound in seconds, and its name."""
    found = bounds(gpu, hot, tiling, problem, skipping)
    name = max(found, key=lambda key: found[key])
    return found[name], name


def dense_seconds(gpu: Gpu, problem: Problem, itemsize: int = 2) -> float:
    """Return the seconds of a dense product by cuBLAS: its share of the peak, or the memory's."""
    size = problem.in_features * problem.out_features
    # float32 is taken to be without tf32.
    rate = gpu.float_multiply_adds if itemsize == 4 else gpu.multiply_adds
    arithmetic = problem.samples * size / (rate * gpu.multiprocessors * gpu.clock * CUBLAS_SHARE)
    moved = itemsize * (size + problem.samples * (problem.in_features + problem.out_features))
    return max(arithmetic, moved / (gpu.memory_bandwidth * MEMORY_SHARE))


def crossover(gpu: Gpu, hot: HotLoop, tiling: Tiling, problem: Problem, itemsize: int = 2) -> float | None:
    """Return the sparsity from which the kernel is predicted to be faster than dense, None where never."""
    dense = dense_seconds(gpu, problem, itemsize)

    def faster(sparsity: float) -> bool:
        at = Problem(problem.samples, problem.out_features, problem.in_features, sparsity)
        return predicted(gpu, hot, tiling, at)[0] < dense

    low, high = 0.0, 0.999
    if not faster(high):
        return None
    if faster(low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high
