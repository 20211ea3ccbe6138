"""What each kernel may use of a multiprocessor; `make cuda-check` fails where one passes its budget.

A kernel without an entry fails too. The number of resident thread blocks that a kernel counts on for hiding
latency follows from its budget, so an entry is raised only together with the reason in its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Budget:
    """Upper bounds for one kernel, on every architecture.

    Args:
        registers: of a thread.
        static_shared_bytes: what the kernel declares.
        dynamic_shared_bytes: the most that any launch plan asks for beside it; the simulator's runs check it.
        spill_bytes: of registers stored and loaded, and of the stack frame they take.

    """

    registers: int
    static_shared_bytes: int
    dynamic_shared_bytes: int = 0
    spill_bytes: int = 0


# Patterns of kernel names; the first that matches counts.
BUDGETS = {
    # Two thread blocks of eight warps on a multiprocessor.
    "block_sparse_linear_*_256x64_by_*": Budget(128, 0, 81_920),
    "block_sparse_linear_*_64x64_by_16*": Budget(112, 0, 40_960),
    "block_sparse_linear_*_few_samples*": Budget(72, 0, 49_152),
    "block_sparse_linear_weight_gradient_sum_*": Budget(32, 0),
    "block_sparse_*_weight_gradient_plain_*_16": Budget(112, 18_432),
    "block_sparse_*_weight_gradient_plain_*_64": Budget(168, 24_576),
    "block_sparse_*_weight_gradient_*_16*": Budget(112, 0, 36_864),
    "block_sparse_*_weight_gradient_*_32*": Budget(128, 0, 40_960),
    "block_sparse_*_weight_gradient_*_64*": Budget(192, 0, 49_152),
    "block_sparse_*_weight_gradient_*_128*": Budget(255, 0, 49_152),
    # Any block, plain multiply-adds.
    "block_sparse_linear_*": Budget(72, 10_752),
    # As the linear ones; the place of each sample's pixel takes 1 KiB more in the plain kernels.
    # Four pixels of a thread in tf32: some registers too many for two thread blocks, which were 1.4 times as
    # fast as one that spills none (docs/gpu.md).
    "block_sparse_conv2d_*tf32_256x64_by_*": Budget(128, 0, 81_920, spill_bytes=24),
    "block_sparse_conv2d_*_256x64_by_*": Budget(128, 0, 81_920),
    "block_sparse_conv2d_*_64x64_by_16*": Budget(112, 0, 40_960),
    "block_sparse_conv2d_f??": Budget(72, 11_776),
    "block_sparse_conv2d_bf16": Budget(72, 11_776),
    "block_sparse_conv2d_structure": Budget(40, 32),
    "transposed_structure": Budget(40, 32),
    "ablate_linear_f32": Budget(64, 8_704),
    "ablated_cross_entropy_f32": Budget(128, 0),
    # A warp's 16 KiB of shared memory bound the residency, not its registers.
    "ablated_mlp_cross_entropy_*_f32": Budget(160, 32_768),
    "transpose_to_panel_f32": Budget(40, 4_224),
    "softmax_panel_f32": Budget(64, 0),
    "sum_spans_f64": Budget(40, 0),
}


def budget_of(kernel: str) -> Budget | None:
    """Return the budget of a kernel, or None where the table has no entry for it."""
    return next((budget for pattern, budget in BUDGETS.items() if fnmatchcase(kernel, pattern)), None)


def launch_findings(kernel: str, shared_bytes: int) -> list[str]:
    """Return what is wrong with the dynamic shared memory of a launch, as findings of the simulator are."""
    budget = budget_of(kernel)
    # The compile gate names kernels without a budget.
    if budget is None or shared_bytes <= budget.dynamic_shared_bytes:
        return []
    return [
        f"[budget] {kernel} is launched with {shared_bytes} bytes of dynamic shared memory, "
        f"its budget is {budget.dynamic_shared_bytes}"
    ]
