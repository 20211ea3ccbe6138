"""Measuring models: accuracy, size, multiply-adds and latency, and the table of before and after."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .batches import (
    Accuracy,
    Batch,
    Loss,
    LossFunction,
    OutputTransform,
    check_reiterable,
    iterate_batches,
    model_device,
    read_logits,
)
from .granularity import is_scorable
from .layers import check_model
from .masks import piece_mask_of
from .modules import BlockSparseLayer
from .timing import interleaved_medians


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
) -> dict[str, float]:
    """Return ``{"accuracy", "loss"}`` over all samples of a loader, in eval mode.

    Accuracy is the share of targets that the largest logit names (binary: the sign of a single logit);
    it is NaN where the targets of any batch are no classes.

    Example:
        >>> fp.evaluate(model, val_loader)["accuracy"]
        0.978

    Raises:
        ValueError: the loader is empty.

    """
    check_model(model)
    loss = Loss(loss_fn)
    accuracy = Accuracy()
    loss_sum = weight_sum = 0.0
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in iterate_batches(loader, model_device(model)):
            logits = read_logits(batch.fresh().call(model), output_transform)
            losses, weight = loss(logits, batch.targets, batch.size)
            loss_sum += float(losses.sum())
            weight_sum += weight
            accuracy.add(logits, batch.targets, loss)
    finally:
        for module, training in flags:
            module.training = training
    return {
        "accuracy": accuracy.value(),
        "loss": loss_sum / weight_sum if weight_sum else float("nan"),
    }


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights that are left, shared ones once.

    What is masked, a zero in the weight of a Linear or Conv2d, and the padding of blocks are not counted.
    """
    tensors = {id(parameter): parameter for parameter in model.parameters()}
    pruned = {}
    for module in model.modules():
        for name in ("weight", "bias"):
            mask = piece_mask_of(module, name)
            if mask is not None:
                pruned[id(mask)] = ~mask
        weight = module._parameters.get("packed_values" if isinstance(module, BlockSparseLayer) else "weight")
        if weight is not None and (is_scorable(module) or isinstance(module, BlockSparseLayer)):
            pruned[id(weight)] = weight == 0
    return sum(tensor.numel() for tensor in tensors.values()) - sum(
        int(zeros.sum()) for zeros in pruned.values()
    )


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, indices included, shared storage once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def count_flops(model: nn.Module, example: Batch) -> int:
    """Return the multiplications and additions of one forward, those of skipped blocks left out."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fused ops of the encoder's fast path, and those of attention on a CPU, have no FLOP formula.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            example.call(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


@dataclasses.dataclass
class ModelCosts:
    """What a model takes, whatever it computes: weights that are left, memory, multiply-adds, time."""

    parameters: int
    bytes: int
    flops: int
    latency_seconds: float


@dataclasses.dataclass
class ModelFigures:
    """What was measured of one model."""

    accuracy: float
    loss: float
    parameters: int
    bytes: int
    flops: int
    latency_seconds: float


@torch.no_grad()
def measure_costs(
    models: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    repeats: int = 25,
    maximum_seconds: float = float("inf"),
) -> list[ModelCosts]:
    """Return the costs of each model in eval mode; their latencies are medians of interleaved runs.

    Args:
        models: that take the same inputs.
        batches: FLOPs and latency are those of one forward of each, together.
        repeats: of the latency.
        maximum_seconds: after which there are no more repeats than five.

    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        flops = [sum(count_flops(model, batch) for batch in batches) for model in models]
        latencies = interleaved_medians(
            [functools.partial(_call_all, model, batches) for model in models],
            repeats=repeats,
            warmup=3,
            device=model_device(models[0]),
            minimum_seconds=2e-3,
            maximum_seconds=maximum_seconds,
        )
    finally:
        for module, training in flags:
            module.training = training
    return [
        ModelCosts(count_parameters(model), count_bytes(model), flops[index], latencies[index])
        for index, model in enumerate(models)
    ]


def _call_all(model: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        batch.call(model)


@dataclasses.dataclass
class Comparison:
    """The figures of a dense and a compressed model; printing it gives the table.

    Attributes:
        pruning_rate: share of the dense model's weights that is gone.
        speedup: dense latency over compressed latency, medians of interleaved runs.
        batch_size: samples of one forward of the latency and FLOPs.
        threads: CPU threads of the latency.

    """

    dense: ModelFigures
    compressed: ModelFigures
    pruning_rate: float
    speedup: float
    batch_size: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            ("accuracy", f"{self.dense.accuracy:.2%}", f"{self.compressed.accuracy:.2%}"),
            ("loss", f"{self.dense.loss:.4f}", f"{self.compressed.loss:.4f}"),
            ("parameters", f"{self.dense.parameters:,}", f"{self.compressed.parameters:,}"),
            ("bytes", f"{self.dense.bytes:,}", f"{self.compressed.bytes:,}"),
            (f"FLOPs (batch {self.batch_size})", f"{self.dense.flops:,}", f"{self.compressed.flops:,}"),
            (
                f"latency (batch {self.batch_size})",
                f"{self.dense.latency_seconds * 1e3:.3f} ms",
                f"{self.compressed.latency_seconds * 1e3:.3f} ms",
            ),
            ("pruning rate", "", f"{self.pruning_rate:.1%}"),
            ("speed-up", "", f"{self.speedup:.2f}x ({self.threads} threads)"),
        ]
        lines = [f"{'':<24}{'dense':>18}{'compressed':>28}"]
        return "\n".join(lines + [f"{name:<24}{dense:>18}{small:>28}" for name, dense, small in rows])


@torch.no_grad()
def compare(
    dense: nn.Module,
    compressed: nn.Module,
    loader: Iterable[Any],
    *,
    example_inputs: Any,
    loss_fn: LossFunction | None = None,
    output_transform: OutputTransform | None = None,
) -> Comparison:
    """Measure two models side by side: accuracy, loss, parameters, bytes, FLOPs and latency.

    Example:
        >>> print(fp.compare(teacher, model, val_loader, example_inputs=x))

    Args:
        dense: the model before.
        compressed: the model after.
        loader: batches for accuracy and loss; iterated twice, so no generator.
        example_inputs: a tensor, tuple or dict: the inputs of one forward for FLOPs and latency.
        loss_fn: see :func:`score`.
        output_transform: see :func:`score`.

    Raises:
        ValueError: the loader is empty.
        TypeError: ``example_inputs`` is of no known kind.

    """
    check_reiterable(loader, "loader")
    if isinstance(example_inputs, Tensor):
        example = Batch((example_inputs,), {}, None, example_inputs.shape[0])
    elif isinstance(example_inputs, tuple):
        example = Batch(example_inputs, {}, None, example_inputs[0].shape[0])
    elif isinstance(example_inputs, dict):
        sizes = [
            value.shape[0] for value in example_inputs.values() if isinstance(value, Tensor) and value.dim()
        ]
        example = Batch((), example_inputs, None, sizes[0] if sizes else 1)
    else:
        raise TypeError(
            f"`example_inputs` must be a tensor, a tuple or a dict, got {type(example_inputs).__name__}"
        )
    models = (check_model(dense, "dense"), check_model(compressed, "compressed"))
    device = model_device(dense)
    example = example.to(device).fresh()
    figures = [
        evaluate(model, loader, loss_fn=loss_fn, output_transform=output_transform) for model in models
    ]
    costs = measure_costs(models, [example])
    before, after = (
        ModelFigures(**accuracy, **dataclasses.asdict(cost))  # type: ignore[arg-type]
        for accuracy, cost in zip(figures, costs, strict=True)
    )
    return Comparison(
        before,
        after,
        pruning_rate=1.0 - after.parameters / before.parameters if before.parameters else 0.0,
        speedup=before.latency_seconds / after.latency_seconds,
        batch_size=example.size,
        threads=torch.get_num_threads(),
    )


def converted_layers(model: nn.Module) -> dict[str, BlockSparseLayer]:
    """Return the block-sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLayer)}
