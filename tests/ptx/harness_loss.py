"""Runs the PTX of the loss-delta kernels: the panels they read, the kernel, and the sum over spans.

Every function returns its results and the simulator's findings. ``options`` are ``arch``, ``order``,
``seed``, ``ptx_transform`` (of the op's own kernel, not of the panels') and ``max_instructions``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import harness

WARP_SAMPLES, QUAD = 128, 4  # of csrc/kernels/cuda/loss_panels_plan.h
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # of csrc/kernels/types.h

DEFAULTS: dict[str, Any] = {
    "arch": "compute_80",
    "order": "forward",
    "seed": 0,
    "ptx_transform": None,
    "max_instructions": 10**8,
}


def _out(array: np.ndarray, name: str) -> object:
    return harness._ptxsim().Out(array, name) if array.size else None


def _view(matrix: np.ndarray, name: str) -> tuple:
    """Return MatrixView<const float> of csrc/kernels/types.h, member by member."""
    memory, row_stride = harness._rows_in_memory(matrix)
    return (harness._pointer(memory, name), *(np.int64(n) for n in (*matrix.shape, row_stride)))


def _launch(source: str, plan: dict, arguments: tuple, options: dict) -> list[str]:
    return [] if plan["grid"][0] == 0 else harness._launch(source, plan, arguments, **{**DEFAULTS, **options})


@functools.lru_cache(maxsize=64)
def _repeated(function: Callable[..., tuple], content: bytes, shape: tuple, arguments: tuple) -> tuple:
    matrix = np.frombuffer(content, np.float32).reshape(shape)
    rest, options = arguments
    return function(matrix, *rest, **dict(options))


def _prepare(function: Callable[..., tuple], matrix: np.ndarray, *rest: int, **options: Any) -> tuple:
    """Run a kernel that prepares a matrix, or return what it gave the last time: mutants are many."""
    kept = tuple((name, options[name]) for name in ("arch", "order", "seed") if name in options)
    return _repeated(function, matrix.tobytes(), matrix.shape, (rest, kept))


def _with_tiles_per_span(plan: dict, tiles: int) -> None:
    groups = plan["grid"][0] // plan["spans"]
    plan["span"] *= tiles
    plan["spans"] = -(-plan["spans"] // tiles)
    plan["grid"] = (groups * plan["spans"], 1, 1)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def transpose_to_panel(matrix: np.ndarray, multiple: int, **options: Any) -> tuple[np.ndarray, list[str]]:
    """Return ``[cols, padded rows]``."""
    from fastprune import _C

    rows, cols = matrix.shape
    panel = np.full((cols, padded(rows, multiple)), np.nan, np.float32)
    plan = _C.plan_transpose_to_panel_cuda(rows=rows, cols=cols, multiple=multiple)
    arguments = (*_view(matrix, "source"), _out(panel, "panel"), np.int64(panel.shape[1]))
    return panel, _launch("loss_panels", plan, arguments, options)


def softmax_panel(logits: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the probabilities, ``[classes, padded samples]``, and log-sum-exp of each sample in float64."""
    from fastprune import _C

    samples, classes = logits.shape
    probability = np.full((classes, padded(samples, WARP_SAMPLES)), np.nan, np.float32)
    log_sum_exp = np.full(samples, np.nan)
    plan = _C.plan_softmax_panel_cuda(samples=samples, classes=classes)
    arguments = (
        *_view(logits, "logits"),
        _out(probability, "probability"),
        _out(log_sum_exp, "log_sum_exp"),
    )
    return probability, log_sum_exp, _launch("loss_panels", plan, arguments, options)


def sum_spans(partial_sums: np.ndarray, **options: Any) -> tuple[np.ndarray, list[str]]:
    """Return the sum over the spans, the first dimension."""
    from fastprune import _C

    spans, num_pieces = partial_sums.shape
    delta_sum = np.full(num_pieces, np.nan)
    arguments = (
        harness._pointer(partial_sums, "partial_sums"),
        *(np.int64(spans), np.int64(num_pieces), _out(delta_sum, "delta_sum")),
    )
    plan = _C.plan_sum_spans_cuda(num_pieces=num_pieces)
    return delta_sum, _launch("loss_panels", plan, arguments, options)


def ablated_cross_entropy(
    logits: np.ndarray,
    hidden: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    pieces: np.ndarray,
    sample_weight: np.ndarray | None = None,
    *,
    tiles_per_span: int | None = None,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """Return what the kernels give that the launcher queues.

    ``tiles_per_span`` stands in for the plan's, which is above 1 for hundreds of thousands of pieces.
    """
    from fastprune import _C

    plan = _C.plan_ablated_cross_entropy_cuda(
        samples=len(logits), features=hidden.shape[1], classes=logits.shape[1], num_pieces=len(pieces)
    )
    if plan["grid"][0] == 0:
        return np.zeros(len(pieces)), []
    if tiles_per_span is not None:
        _with_tiles_per_span(plan, tiles_per_span)
    probability, log_sum_exp, found = _prepare(softmax_panel, logits, **options)
    panels = [
        _prepare(transpose_to_panel, matrix, multiple, **options)
        for matrix, multiple in ((hidden, WARP_SAMPLES), (weight, QUAD))
    ]
    findings = [*found, *(finding for _, found in panels for finding in found)]
    partial_sums = np.full((plan["spans"], len(pieces)), np.nan)
    # AblatedCrossEntropyCudaArgs of csrc/kernels/cuda/ablated_cross_entropy.h, member by member.
    arguments = (
        *(*_view(logits, "logits"), *_view(hidden, "hidden"), *_view(weight, "weight")),
        harness._pointer(targets, "targets"),
        harness._pointer(sample_weight, "sample_weight"),
        harness._pointer(pieces, "pieces"),
        *(np.int64(len(pieces)), np.int64(plan["span"]), _out(partial_sums, "partial_sums")),
        harness._pointer(probability, "probability"),
        harness._pointer(log_sum_exp, "log_sum_exp"),
        *(harness._pointer(panel, name) for (panel, _), name in zip(panels, ("h", "w"), strict=True)),
        None,
    )
    findings += _launch("ablated_cross_entropy", plan, arguments, options)
    delta_sum, found = sum_spans(partial_sums, **{**options, "ptx_transform": None})
    return delta_sum, findings + found


def ablated_mlp_cross_entropy(
    logits: np.ndarray,
    input: np.ndarray,
    pre_activation: np.ndarray,
    first_weight: np.ndarray,
    second_weight: np.ndarray,
    targets: np.ndarray,
    pieces: np.ndarray,
    activation: str | None,
    sample_weight: np.ndarray | None = None,
    *,
    tiles_per_span: int | None = None,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """Return what the kernels give that the launcher queues; ``tiles_per_span`` as in the above."""
    from fastprune import _C

    code = ACTIVATIONS[activation]
    plan = _C.plan_ablated_mlp_cross_entropy_cuda(
        samples=len(logits),
        in_features=input.shape[1],
        hidden=pre_activation.shape[1],
        classes=logits.shape[1],
        num_pieces=len(pieces),
        activation=code,
    )
    if plan["grid"][0] == 0:
        return np.zeros(len(pieces)), []
    if tiles_per_span is not None:
        _with_tiles_per_span(plan, tiles_per_span)
    probability, log_sum_exp, found = _prepare(softmax_panel, logits, **options)
    matrices = {
        "input": input,
        "pre_activation": pre_activation,
        "first_weight": first_weight,
        "second_weight": second_weight,
    }
    panels = {
        name: _prepare(transpose_to_panel, matrix, QUAD if "weight" in name else WARP_SAMPLES, **options)
        for name, matrix in matrices.items()
    }
    findings = [*found, *(finding for _, found in panels.values() for finding in found)]
    partial_sums = np.full((plan["spans"], len(pieces)), np.nan)
    # AblatedMlpCrossEntropyCudaArgs of csrc/kernels/cuda/ablated_mlp_cross_entropy.h, member by member.
    arguments = (
        *_view(logits, "logits"),
        *(member for name, matrix in matrices.items() for member in _view(matrix, name)),
        harness._pointer(targets, "targets"),
        harness._pointer(sample_weight, "sample_weight"),
        harness._pointer(pieces, "pieces"),
        *(np.int64(len(pieces)), np.int32(code), bytes(4), np.int64(plan["span"])),
        _out(partial_sums, "partial_sums"),
        harness._pointer(probability, "probability"),
        harness._pointer(log_sum_exp, "log_sum_exp"),
        *(harness._pointer(panel, f"{name} panel") for name, (panel, _) in panels.items()),
        None,
    )
    findings += _launch("ablated_mlp_cross_entropy", plan, arguments, options)
    delta_sum, found = sum_spans(partial_sums, **{**options, "ptx_transform": None})
    return delta_sum, findings + found


def ablate_linear(
    output: np.ndarray,
    input: np.ndarray,
    weight: np.ndarray,
    pieces: np.ndarray,
    *,
    misalign: int = 0,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """Return the masked outputs, written ``misalign`` bytes past an address aligned for vectors."""
    from fastprune import _C

    plan = _C.plan_ablate_linear_cuda(
        samples=len(output),
        in_features=input.shape[1],
        out_features=output.shape[1],
        num_pieces=len(pieces),
    )
    masked = np.full((len(pieces), *output.shape), np.nan, np.float32)
    if plan["grid"][0] == 0:
        return masked, []
    # AblateLinearArgs<float> of csrc/kernels/ablate_linear.h, member by member.
    arguments = (
        *(*_view(output, "output"), *_view(input, "input"), *_view(weight, "weight")),
        *(harness._pointer(pieces, "pieces"), np.int64(len(pieces))),
        harness._ptxsim().Out(masked, "masked", misalign=misalign),
    )
    return masked, _launch("ablate_linear", plan, arguments, options)
