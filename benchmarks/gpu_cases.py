"""What is measured on a GPU: the plan of cases, and each case's functions with their reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from fastprune import reference

SPARSITIES = (0.5, 0.75, 0.9, 0.95)
BLOCKSIZES = (16, 32, 64, 128)
SAMPLES = (1, 4, 16, 64, 256, 1024, 4096, 8192)
LINEAR_OPS = ("forward", "input gradient", "weight gradient")
CONVOLUTION_OPS = ("conv2d forward", "conv2d input gradient", "conv2d weight gradient")
LOSS_OPS = ("ablate_linear", "ablated_cross_entropy", "ablated_mlp_cross_entropy")
# ‖result - float64‖ / ‖float64‖. Rounding the result alone gives about 2e-3, 2e-4 and 3e-8; tf32 keeps 10
# bits of the factors.
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "tf32": 2e-3, "float32": 2e-5}


@dataclass(frozen=True)
class Case:
    """One call. ``dtype`` is "tf32" for float32 tensors where torch may use tf32 for its products.

    Samples of convolutions are images, features are channels.
    """

    op: str
    dtype: str
    samples: int
    out_features: int = 4096
    in_features: int = 4096
    blocksize: int = 16
    sparsity: float = 0.9

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


@dataclass
class Problem:
    """A case's functions, ours first; ``expected`` gives the result in float64 on a device.

    ``unchecked`` names a baseline that computes more than the result.
    """

    functions: dict[str, Callable[[], Tensor]]
    expected: Callable[[torch.device], Tensor]
    tolerance: float
    flops: float
    info: dict[str, float] = field(default_factory=dict)
    unchecked: str | None = None


def plan() -> list[Case]:
    """Return all cases, those first that would be missed most if time ran out."""
    return list(dict.fromkeys(_plan()))


def _plan() -> Iterator[Case]:
    for samples in (4096, 64, 1):
        for blocksize in BLOCKSIZES:
            yield Case("forward", "bfloat16", samples, blocksize=blocksize)
    for op in LINEAR_OPS[1:]:
        for samples, blocksize in itertools.product((4096, 64), BLOCKSIZES):
            yield Case(op, "bfloat16", samples, blocksize=blocksize)
    for op, channels in itertools.product(CONVOLUTION_OPS, (64, 256)):
        yield Case(op, "bfloat16", 32, channels, channels)
    for op in LOSS_OPS:
        yield Case(op, "float32", 2048, 512, 784)
    for dtype, samples in itertools.product(("float32", "tf32", "float16"), (4096, 64)):
        yield Case("forward", dtype, samples)
    for samples, sparsity, blocksize in itertools.product(SAMPLES, SPARSITIES, BLOCKSIZES):
        yield Case("forward", "bfloat16", samples, blocksize=blocksize, sparsity=sparsity)
    for op, channels, sparsity in itertools.product(CONVOLUTION_OPS, (64, 128, 256, 512), SPARSITIES):
        for blocksize, samples in itertools.product((16, 32, 64), (1, 32)):
            yield Case(op, "bfloat16", samples, channels, channels, blocksize, sparsity)
    for op, dtype in itertools.product(CONVOLUTION_OPS, ("float32", "tf32", "float16")):
        yield Case(op, dtype, 32, 128, 128)
    for op, samples, sparsity in itertools.product(LINEAR_OPS[1:], (256, 8192), SPARSITIES):
        for blocksize in BLOCKSIZES:
            yield Case(op, "bfloat16", samples, blocksize=blocksize, sparsity=sparsity)
    for dtype, samples, sparsity in itertools.product(
        ("float16", "tf32", "float32"), (1, 64, 1024, 8192), SPARSITIES
    ):
        for blocksize in (16, 64):
            yield Case("forward", dtype, samples, blocksize=blocksize, sparsity=sparsity)


def small_plan() -> list[Case]:
    """Return ragged cases of a few thousand elements: one below, at and above the blocks and tiles."""
    cases = []
    for op, dtype in itertools.product(LINEAR_OPS, TOLERANCES):
        for samples, size, blocksize in ((1, 151, 16), (17, 128, 32), (65, 129, 64), (129, 257, 128)):
            cases.append(Case(op, dtype, samples, size, size - 2, blocksize, 0.4))
    for op, dtype in itertools.product(CONVOLUTION_OPS, TOLERANCES):
        for images, size, blocksize in ((1, 512, 16), (3, 257, 32)):
            cases.append(Case(op, dtype, images, size // 8 + 1, size - 2, blocksize, 0.4))
    cases += [Case(op, "float32", samples, 33, 47) for op in LOSS_OPS for samples in (1, 65)]
    return cases


def make_problem(case: Case, device: torch.device, baselines: bool = True) -> Problem:
    """Return a case's functions, with those it is compared with unless ``baselines`` is False."""
    torch.manual_seed(0)
    if case.op in CONVOLUTION_OPS:
        problem = _convolution_problem(case, device)
    else:
        problem = (_linear_problem if case.op in LINEAR_OPS else _loss_problem)(case, device)
    if not baselines:
        problem.functions = {"fastprune": problem.functions["fastprune"]}
    return problem


def _op(name: str, *arguments: Any, tf32: bool) -> Tensor:
    """Call an op itself: its wrapper would quietly take the dense way where a kernel is missing."""
    op = getattr(torch.ops.fastprune, name).default
    # An op that knows no tf32 computes in float32, which is as right.
    knows = any(argument.name == "allow_tf32" for argument in op._schema.arguments)
    return op(*arguments, allow_tf32=True) if tf32 and knows else op(*arguments)


def _linear_problem(case: Case, device: torch.device) -> Problem:
    rows, cols = -(-case.out_features // case.blocksize), -(-case.in_features // case.blocksize)
    mask = torch.ones(rows * cols, dtype=torch.bool, device=device)
    mask[torch.randperm(rows * cols, device=device)[: round(case.sparsity * rows * cols)]] = False
    dense = torch.randn(case.out_features, case.in_features, device=device).to(case.torch_dtype)
    weight = fp.BlockSparseTensor.from_dense(dense, (case.blocksize,) * 2, mask=mask.view(rows, cols))
    dense = weight.to_dense()
    structure = (weight.crow_indices, weight.col_indices)
    input = torch.randn(case.samples, case.in_features, device=device).to(case.torch_dtype)
    upstream = torch.randn(case.samples, case.out_features, device=device).to(case.torch_dtype)
    tf32 = case.dtype == "tf32"
    divides = case.out_features % case.blocksize == 0 and case.in_features % case.blocksize == 0
    # torch's block-sparse kernels are written in Triton, for a GPU.
    bsr = weight.to_torch_bsr() if divides and device.type == "cuda" else None

    functions: dict[str, Callable[[], Tensor]]
    if case.op == "forward":
        functions = {
            "fastprune": lambda: _op(
                "block_sparse_linear_inference",
                *(input, weight.packed_values, *structure, None, case.out_features, "none"),
                tf32=tf32,
            ),
            "dense": lambda: F.linear(input, dense),
        }
        if bsr is not None:
            functions["torch BSR"] = lambda: F.linear(input, bsr)
    elif case.op == "input gradient":
        functions = {
            "fastprune": lambda: _op(
                "block_sparse_linear_input_gradient",
                *(upstream, weight.packed_values, *structure, case.in_features),
                tf32=tf32,
            ),
            "dense": lambda: upstream @ dense,
        }
    else:
        functions = {
            "fastprune": lambda: _op(
                "block_sparse_linear_weight_gradient",
                *(upstream, input, *structure, case.blocksize, case.blocksize),
                tf32=tf32,
            ),
            "dense": lambda: upstream.T @ input,
        }

    def expected(where: torch.device) -> Tensor:
        x, g, w = (tensor.to(where).double() for tensor in (input, upstream, dense))
        if case.op == "forward":
            return x @ w.T
        if case.op == "input gradient":
            return g @ w
        crow, col = (tensor.to(where) for tensor in structure)
        return reference.block_sparse_linear_weight_gradient(g, x, crow, col, blocksize=(case.blocksize,) * 2)

    flops = 2.0 * case.samples * weight.packed_values.numel()
    info = {"density": weight.density}
    unchecked = "dense" if case.op == "weight gradient" else None
    return Problem(functions, expected, TOLERANCES[case.dtype], flops, info, unchecked)


def _convolution_problem(case: Case, device: torch.device) -> Problem:
    """Kernels of 3 x 3 pixels in images as ResNet has them: 56 pixels wide with 64 channels, 7 with 512."""
    width = max(1, 3584 // case.in_features)
    channel_blocks = -(-case.in_features // case.blocksize)
    rows, cols = -(-case.out_features // case.blocksize), 9 * channel_blocks
    mask = torch.ones(rows * cols, dtype=torch.bool, device=device)
    mask[torch.randperm(rows * cols, device=device)[: round(case.sparsity * rows * cols)]] = False
    taps = torch.randn(case.out_features, 9, case.in_features, device=device).to(case.torch_dtype)
    matrix = F.pad(taps, (0, -case.in_features % case.blocksize)).flatten(1)
    weight = fp.BlockSparseTensor.from_dense(matrix, (case.blocksize,) * 2, mask=mask.view(rows, cols))
    tensors = (weight.packed_values, weight.crow_indices, weight.col_indices)
    geometry = {"kernel_size": (3, 3), "padding": (1, 1, 1, 1)}
    positions = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    size = (case.samples, case.in_features, width, width)
    dense = reference.dense_conv2d_weight(
        *tensors, out_channels=case.out_features, in_channels=case.in_features, kernel_size=(3, 3)
    ).contiguous(memory_format=torch.channels_last)

    def images(channels: int) -> Tensor:
        random = torch.randn(case.samples, channels, width, width, device=device).to(case.torch_dtype)
        return random.contiguous(memory_format=torch.channels_last)

    tf32 = case.dtype == "tf32"
    out = images(case.out_features) if case.op != "conv2d forward" else None
    input = images(case.in_features) if case.op != "conv2d input gradient" else None
    if case.op == "conv2d forward":
        flat = [count for counts in (*positions[:4], positions[4:]) for count in counts]
        operands, rest = (input, *tensors), (None, case.out_features, flat, "none")
        name, twin = "block_sparse_conv2d_inference", reference.block_sparse_conv2d
        options: dict[str, Any] = {"out_channels": case.out_features}
        functions = {"dense": lambda: F.conv2d(input, dense, padding=1)}
    elif case.op == "conv2d input gradient":
        operands, rest = (out, *tensors), (size, *positions)
        name, twin = "block_sparse_conv2d_input_gradient", reference.block_sparse_conv2d_input_gradient
        options = {"input_size": size}
        functions = {"dense": lambda: torch.nn.grad.conv2d_input(size, dense, out, padding=1)}
    else:
        operands, rest = (out, input, *tensors[1:]), (case.blocksize, case.blocksize, *positions)
        name, twin = "block_sparse_conv2d_weight_gradient", reference.block_sparse_conv2d_weight_gradient
        options = {"blocksize": (case.blocksize,) * 2}
        functions = {"dense": lambda: torch.nn.grad.conv2d_weight(input, dense.shape, out, padding=1)}

    def expected(where: torch.device) -> Tensor:
        moved = [tensor.to(where) for tensor in operands]
        moved = [tensor.double() if tensor.is_floating_point() else tensor for tensor in moved]
        return twin(*moved, **options, **geometry)

    ours = {"fastprune": lambda: _op(name, *operands, *rest, tf32=tf32)}
    flops = 2.0 * case.samples * width * width * weight.packed_values.numel()
    # The dense weight's gradient is more than that of its kept blocks.
    unchecked = "dense" if case.op == "conv2d weight gradient" else None
    return Problem(
        ours | functions, expected, TOLERANCES[case.dtype], flops, {"density": weight.density}, unchecked
    )


def _loss_problem(case: Case, device: torch.device) -> Problem:
    hidden_features, classes, block = case.out_features, 10, case.blocksize
    first = torch.randn(hidden_features, case.in_features, device=device) / case.in_features**0.5
    second = torch.randn(classes, hidden_features, device=device) / hidden_features**0.5
    input = torch.randn(case.samples, case.in_features, device=device)
    before = input @ first.T
    hidden = before.relu()
    logits = hidden @ second.T
    targets = torch.randint(classes, (case.samples,), device=device)
    units = [(0, classes, j, j + 1) for j in range(hidden_features)]
    blocks = [
        (r, min(r + block, hidden_features), c, min(c + block, case.in_features))
        for r in range(0, hidden_features, block)
        for c in range(0, case.in_features, block)
    ]
    bounds = units if case.op == "ablated_cross_entropy" else blocks[:64]
    pieces = torch.tensor(bounds, dtype=torch.int32, device=device)
    arguments = {
        "ablate_linear": (before, input, first, pieces),
        "ablated_cross_entropy": (logits, hidden, second, targets, pieces),
        "ablated_mlp_cross_entropy": (logits, input, before, first, second, targets, pieces, "relu"),
    }[case.op]
    trailing = () if case.op == "ablate_linear" else (None,)

    def masked_forwards() -> Tensor:
        """What a user writes: one masked forward for each piece."""
        losses = F.cross_entropy(logits, targets, reduction="none")
        results = []
        for a, b, c, d in bounds:
            if case.op == "ablated_cross_entropy":
                weight = second.clone()
                weight[a:b, c:d] = 0
                output = hidden @ weight.T
            else:
                weight = first.clone()
                weight[a:b, c:d] = 0
                output = input @ weight.T
                if case.op == "ablate_linear":
                    results.append(output)
                    continue
                output = output.relu() @ second.T
            results.append((F.cross_entropy(output, targets, reduction="none") - losses).double().sum())
        return torch.stack(results)

    def expected(where: torch.device) -> Tensor:
        moved = [
            value.to(where, torch.float64 if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for value in arguments
        ]
        return getattr(reference, case.op)(*moved)

    area = sum((b - a) * (d - c) for a, b, c, d in bounds)
    return Problem(
        {
            "fastprune": lambda: getattr(torch.ops.fastprune, case.op)(*arguments, *trailing),
            "masked forwards": masked_forwards,
        },
        expected,
        # What is allowed to each delta, of itself, is allowed here to all of them together.
        1e-4,
        2.0 * case.samples * area,
        {"pieces": float(len(bounds))},
    )
