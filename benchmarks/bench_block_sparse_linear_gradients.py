"""The gradients of block_sparse_linear, and a training step, against torch's dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune import ops
from harness import THREADS, measure, threads
from layers import SHAPES, assert_close, make_layer, name_of


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("blocksize", [(16, 16), (32, 32), (8, 8)], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@torch.no_grad()
def bench_backward(
    benchmark, shape: tuple[int, int], blocksize: tuple[int, int], sparsity: float, thread_count: int
) -> None:
    """Input gradient and weight gradient together, at 512 samples."""
    samples = 512
    layer = make_layer(*shape, blocksize, sparsity)
    weight, dense = layer.block_sparse_weight, layer.weight.clone()
    structure = (weight.crow_indices, weight.col_indices)
    input, grad_output = torch.randn(samples, shape[1]), torch.randn(samples, shape[0])

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        grad_input = ops.block_sparse_linear_input_gradient(
            grad_output, weight.packed_values, *structure, in_features=shape[1]
        )
        return grad_input, ops.block_sparse_linear_weight_gradient(
            grad_output, input, *structure, blocksize=blocksize
        )

    def check(found: tuple, wanted: tuple) -> None:
        kept = torch.ones_like(weight.packed_values)
        mask = fp.BlockSparseTensor(kept, *structure, weight.shape).to_dense().bool()
        grad_weight = fp.BlockSparseTensor(found[1], *structure, weight.shape).to_dense()
        assert_close(found[0], wanted[0])
        assert_close(grad_weight, torch.where(mask, wanted[1], 0.0))

    with threads(thread_count):
        measure(
            benchmark,
            ours,
            lambda: (grad_output @ dense, grad_output.T @ input),
            check=check,
            group=f"backward {name_of(shape)}, N = {samples}, {thread_count} threads",
            flops=4.0 * samples * layer.packed_values.numel(),
            kind="backward",
            blocksize=name_of(blocksize),
            sparsity=sparsity,
            density=layer.density,
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("blocksize", [(16, 16), (32, 32), (8, 8)], ids=name_of)
def bench_training_step(benchmark, blocksize: tuple[int, int], sparsity: float, thread_count: int) -> None:
    """Forward, backward and SGD of a 768-3072-768 block with ReLU, at 512 samples."""
    layers = [make_layer(3072, 768, blocksize, sparsity), make_layer(768, 3072, blocksize, sparsity)]
    sparse = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    dense = nn.Sequential(layers[0].to_dense(), nn.ReLU(), layers[1].to_dense())
    input, target = torch.randn(512, 768), torch.randn(512, 768)

    def step_of(model: nn.Module):
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            output = model(input)
            F.mse_loss(output, target).backward()
            optimizer.step()
            return output.detach()

        return step

    with threads(thread_count):
        # Trained apart they would drift; the gradients of one step are compared instead.
        for model in (sparse, dense):
            step_of(model)()
        torch.testing.assert_close(sparse[0].bias.grad, dense[0].bias.grad, rtol=1e-2, atol=1e-5)
        measure(
            benchmark,
            step_of(sparse),
            step_of(copy.deepcopy(dense)),
            check=lambda ours, theirs: None,
            group=f"training step of 768-3072-768, N = 512, {thread_count} threads",
            kind="training step",
            blocksize=name_of(blocksize),
            sparsity=sparsity,
            density=layers[0].density,
        )
