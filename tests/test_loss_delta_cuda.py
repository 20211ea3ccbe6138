"""Loss deltas on a GPU: the ops against their twins in float64, and score() against a CPU in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch

import fastprune as fp
from ablation_cases import assert_exact, block_pieces, column_pieces
from fastprune import _library, ops, reference
from loss_delta_cases import CASES

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if (missing := _library.cuda_kernels_unavailable_reason()) is not None:
    pytest.skip(f"the CUDA kernels are {missing}", allow_module_level=True)

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
NETWORKS = (
    "relu",
    "gelu",
    "sigmoid, which is not 0 at 0",
    "a single layer",
    "batch norm between layer and activation",
    "convolutions",
    "residual network",
    "attention over embeddings",
    "ignore_index",
    "class weights",
    "masked by blocks",
    "data-dependent control flow",
)


def on_gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def last_layer(samples: int, features: int, classes: int, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(samples)
    hidden = torch.randn(samples, features).relu()
    weight = scale * torch.randn(classes, features)
    logits = hidden @ weight.T + torch.randn(classes)
    return logits, hidden, weight, torch.randint(0, classes, (samples,))


def two_layers(
    samples: int, in_features: int, hidden: int, classes: int, activation: str | None
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(samples)
    input, first = torch.randn(samples, in_features), torch.randn(hidden, in_features)
    before = input @ first.T + torch.randn(hidden)
    second = torch.randn(classes, hidden)
    function: Callable = reference.ACTIVATIONS.get(activation, torch.clone)  # type: ignore[arg-type]
    return function(before) @ second.T, input, before, first, second, torch.randint(0, classes, (samples,))


@pytest.mark.parametrize(
    ("samples", "features", "classes"), [(1, 1, 2), (15, 17, 3), (129, 15, 151), (600, 65, 10)]
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_ablated_cross_entropy(samples: int, features: int, classes: int, scale: float) -> None:
    arguments = last_layer(samples, features, classes, scale)
    pieces = torch.cat([column_pieces(classes, features), block_pieces(classes, features, 5, 7)])
    sample_weight = torch.rand(samples) * (torch.arange(samples) % 3 > 0)
    for factors in (None, sample_weight):
        deltas = ops.ablated_cross_entropy(*on_gpu(*arguments, pieces, factors))  # type: ignore[arg-type]
        wanted = reference.ablated_cross_entropy(*arguments, pieces, factors)
        assert_exact(deltas.cpu(), wanted, arguments[0], arguments[3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (129, 15, 33, 17), (300, 31, 129, 10)], ids=str)
def test_ablated_mlp_cross_entropy(activation: str | None, sizes: tuple[int, int, int, int]) -> None:
    *layers, targets = two_layers(*sizes, activation)
    hidden, in_features = layers[3].shape
    pieces = torch.cat([column_pieces(hidden, in_features), block_pieces(hidden, in_features, 16, 5)])
    deltas = ops.ablated_mlp_cross_entropy(*on_gpu(*layers, targets, pieces), activation)  # type: ignore[arg-type]
    wanted = reference.ablated_mlp_cross_entropy(*layers, targets, pieces, activation)
    assert_exact(deltas.cpu(), wanted, layers[0], targets)


@pytest.mark.parametrize(("samples", "in_features", "out_features"), [(1, 1, 1), (65, 17, 63), (129, 33, 68)])
def test_ablate_linear(samples: int, in_features: int, out_features: int) -> None:
    torch.manual_seed(0)
    arguments = [torch.randn(samples, out_features), torch.randn(samples, in_features)]
    arguments.append(torch.randn(out_features, in_features))
    pieces = block_pieces(out_features, in_features, 17, 20)
    masked = ops.ablate_linear(*on_gpu(*arguments, pieces))  # type: ignore[arg-type]
    wanted = reference.ablate_linear(*(tensor.double() for tensor in arguments), pieces)
    torch.testing.assert_close(masked.cpu().double(), wanted, rtol=0, atol=1e-4)


def test_slices_give_the_same_bits_and_so_does_every_run() -> None:
    arguments = last_layer(130, 20, 6)
    pieces = column_pieces(6, 20)
    logits, hidden, weight, targets, rectangles = on_gpu(*arguments, pieces)
    plain = ops.ablated_cross_entropy(logits, hidden, weight, targets, rectangles)  # type: ignore[arg-type]
    wide = torch.cat([hidden, hidden], dim=1)[:, :20]  # type: ignore[list-item]
    transposed = weight.T.contiguous().T  # type: ignore[union-attr]
    for _ in range(3):
        deltas = ops.ablated_cross_entropy(logits, wide, transposed, targets, rectangles)  # type: ignore[arg-type]
        assert torch.equal(deltas, plain)


def test_they_never_wait_for_the_device_and_run_in_a_graph() -> None:
    *layers, targets = two_layers(100, 20, 40, 10, "gelu")
    pieces = block_pieces(40, 20, 16, 5)
    static = on_gpu(*layers, targets, pieces)

    def call() -> tuple[torch.Tensor, ...]:
        logits, input, before, first, second, labels, rectangles = static
        return (
            ops.ablated_mlp_cross_entropy(*static, "gelu"),  # type: ignore[arg-type]
            ops.ablated_cross_entropy(logits, before, second, labels, rectangles[:2] % 10),  # type: ignore[arg-type,index]
            ops.ablate_linear(before, input, first, rectangles),  # type: ignore[arg-type]
        )

    wanted = [result.clone() for result in call()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    for result, other in zip(results, wanted, strict=True):
        assert torch.equal(result, other) or bool((result.isnan() == other.isnan()).all())


def test_what_is_out_of_range_gives_nan() -> None:
    logits, hidden, weight, targets = last_layer(9, 6, 5)
    pieces = column_pieces(5, 6)
    pieces[2, 1] = 7
    deltas = ops.ablated_cross_entropy(*on_gpu(logits, hidden, weight, targets, pieces))  # type: ignore[arg-type]
    assert deltas.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("targets", ["labels", "predictions"])
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_those_of_the_cpu_in_float64(name: str, targets: Literal["labels", "predictions"]) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    loader = case.loader()
    criterion = fp.criteria.LossDelta(targets)
    options = {"criterion": criterion, "progress": False, "include": case.layers}
    loss_fn = case.loss_fn
    gpu_loss_fn = copy.deepcopy(loss_fn).cuda() if isinstance(loss_fn, torch.nn.Module) else loss_fn
    for granularity in case.granularities[:2]:
        exact_model = copy.deepcopy(model).double()
        exact_loader = [
            tuple(part.double() if part.is_floating_point() else part for part in batch) for batch in loader
        ]
        wanted = fp.score(exact_model, exact_loader, granularity=granularity, loss_fn=loss_fn, **options)
        scores = fp.score(
            copy.deepcopy(model).cuda(), loader, granularity=granularity, loss_fn=gpu_loss_fn, **options
        )
        assert scores.loss == pytest.approx(wanted.loss, rel=1e-5)
        for layer in wanted:
            tolerance = 1e-4 * wanted[layer].abs() + 1e-6 * abs(wanted.loss)
            assert bool(((scores[layer].cpu() - wanted[layer]).abs() <= tolerance).all()), layer
