"""block_sparse_conv2d against torch's dense convolution, each in the faster memory format for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprune as fp
from convolution_layers import KINDS, RESNET, RESNET_32, Layer, make_convolution
from fastprune import ops
from harness import THREADS, faster, measure, onnxruntime_session, threads
from layers import assert_close, name_of

FORMATS = (torch.contiguous_format, torch.channels_last)


def weights_density(sparse: fp.BlockSparseConv2d, layer: Layer) -> float:
    """Kept share of the multiplications, padded kept blocks counted."""
    weights = layer.out_channels * layer.in_channels * layer.kernel_size**2
    return sparse.packed_values.numel() / weights


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("blocksize", [(16, 16), (8, 8)], ids=name_of)
@pytest.mark.parametrize("images", [1, 8, 32])
@pytest.mark.parametrize("layer", KINDS, ids=str)
@torch.no_grad()
def bench_convolution(
    benchmark, layer: Layer, images: int, blocksize: tuple[int, int], sparsity: float, thread_count: int
) -> None:
    sparse = make_convolution(layer, blocksize, sparsity)
    input = torch.randn(images, layer.in_channels, layer.size, layer.size)
    sides: list[list[Callable[[], Tensor]]] = [[], []]
    for memory_format in FORMATS:
        x, dense = input.to(memory_format=memory_format), sparse.to_dense().to(memory_format=memory_format)
        sides[0].append(lambda x=x: sparse(x))
        sides[1].append(lambda x=x, dense=dense: dense(x))
    with threads(thread_count):
        ours, theirs = faster(sides[0]), faster(sides[1])
        measure(
            benchmark,
            ours,
            theirs,
            check=assert_close,
            group=f"convolution {layer}, N = {images}, {thread_count} threads",
            flops=2.0 * sparse.packed_values.numel() * images * (-(-layer.size // layer.stride)) ** 2,
            kind=KINDS[layer],
            blocksize=name_of(blocksize),
            sparsity=sparsity,
            density=weights_density(sparse, layer),
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("blocksize", [(16, 16), (8, 8)], ids=name_of)
@pytest.mark.parametrize("layer", RESNET + RESNET_32, ids=str)
@torch.no_grad()
def bench_convolution_backward(
    benchmark, layer: Layer, blocksize: tuple[int, int], thread_count: int
) -> None:
    """Input gradient and weight gradient together, at 8 images and 75 % sparsity."""
    images, sparsity = 8, 0.75
    sparse = make_convolution(layer, blocksize, sparsity)
    weight = sparse.weight.clone()
    size, side = (images, layer.in_channels, layer.size, layer.size), layer.kernel_size // 2
    input, grad_output = torch.randn(size), torch.randn(images, layer.out_channels, layer.size, layer.size)
    structure = (sparse.crow_indices, sparse.col_indices)
    geometry: dict[str, Any] = {"kernel_size": sparse.kernel_size, "padding": (side,) * 4}

    def gradients(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_input = ops.block_sparse_conv2d_input_gradient(
            grad, sparse.packed_values, *structure, input_size=size, **geometry
        )
        return grad_input, ops.block_sparse_conv2d_weight_gradient(
            grad, x, *structure, blocksize=blocksize, **geometry
        )

    def dense_gradients(x: Tensor, grad: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            grad, x, dense, None, [1, 1], [side, side], [1, 1], False, [0, 0], 1, [True, True, False]
        )[:2]

    def check(found: tuple, wanted: tuple) -> None:
        assert_close(found[0], wanted[0])
        kept = make_convolution(layer, blocksize, sparsity)
        kept.packed_values.copy_(found[1])
        mask = make_convolution(layer, blocksize, sparsity)
        mask.packed_values.fill_(1.0)
        torch.testing.assert_close(
            kept.weight, torch.where(mask.weight.bool(), wanted[1], 0.0), rtol=1e-3, atol=1e-2
        )

    sides: list[list[Callable[[], Any]]] = [[], []]
    for memory_format in FORMATS:
        x, grad, dense = (part.to(memory_format=memory_format) for part in (input, grad_output, weight))
        sides[0].append(lambda x=x, grad=grad: gradients(x, grad))
        sides[1].append(lambda x=x, grad=grad, dense=dense: dense_gradients(x, grad, dense))
    with threads(thread_count):
        measure(
            benchmark,
            faster(sides[0]),
            faster(sides[1]),
            check=check,
            group=f"backward of convolution {layer}, N = {images}, {thread_count} threads",
            flops=4.0 * sparse.packed_values.numel() * images * layer.size**2,
            kind="convolution, backward",
            blocksize=name_of(blocksize),
            sparsity=sparsity,
            density=weights_density(sparse, layer),
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("layer", RESNET, ids=str)
@torch.no_grad()
def bench_convolution_onnxruntime(benchmark, layer: Layer, thread_count: int) -> None:
    """ONNX Runtime's dense convolution of channels-first images against ours of channels-last, at 75 %."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    sparse = make_convolution(layer, (16, 16), 0.75)
    input = torch.randn(8, layer.in_channels, layer.size, layer.size)
    weight = onnx.numpy_helper.from_array(sparse.weight.contiguous().numpy(), "weight")
    bias = onnx.numpy_helper.from_array(sparse.bias.numpy(), "bias")
    real, side = onnx.TensorProto.FLOAT, layer.kernel_size // 2
    shape = [8, layer.out_channels, layer.size, layer.size]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[side] * 4)],
        "convolution",
        [onnx.helper.make_tensor_value_info("x", real, list(input.shape))],
        [onnx.helper.make_tensor_value_info("y", real, shape)],
        [weight, bias],
    )
    session = onnxruntime_session(graph, thread_count)
    array, channels_last = input.numpy(), input.contiguous(memory_format=torch.channels_last)
    with threads(thread_count):
        measure(
            benchmark,
            lambda: sparse(channels_last),
            lambda: session.run(None, {"x": array})[0],
            check=lambda ours, theirs: assert_close(ours, torch.as_tensor(theirs)),
            group=f"ONNX Runtime, convolution {layer}, N = 8, {thread_count} threads",
            kind="convolution against ONNX Runtime",
            blocksize="16x16",
            sparsity=0.75,
            density=weights_density(sparse, layer),
        )
