"""block_sparse_linear's forward against torch's dense Linear, other formats and other libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastprune as fp
from fastprune import _library
from harness import THREADS, measure, onnxruntime_session, threads
from layers import BLOCKSIZES, SAMPLES, SHAPES, SPARSITIES, assert_close, make_layer, name_of

cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or _library.cuda_kernels_unavailable_reason() is not None,
    reason="needs a GPU and the CUDA kernels",
)
devices = pytest.mark.parametrize(
    ("device", "thread_count"),
    [*(("cpu", count) for count in THREADS), pytest.param("cuda", 1, marks=cuda)],
)


def measure_forward(
    benchmark,
    kind: str,
    shape: tuple[int, int],
    samples: int,
    blocksize: tuple[int, int],
    sparsity: float,
    thread_count: int,
    device: str = "cpu",
) -> None:
    """Measure one layer against its dense twin."""
    layer = make_layer(*shape, blocksize, sparsity, device=device)
    dense, input = layer.to_dense(), torch.randn(samples, shape[1], device=device)
    with threads(thread_count):
        measure(
            benchmark,
            lambda: layer(input),
            lambda: dense(input),
            check=assert_close,
            group=f"linear {name_of(shape)}, N = {samples}, {device}, {thread_count} threads",
            flops=2.0 * samples * layer.packed_values.numel(),
            device=torch.device(device),
            kind=kind,
            blocksize=name_of(blocksize),
            sparsity=sparsity,
            density=layer.density,
        )


@devices
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=name_of)
@pytest.mark.parametrize("samples", [1, *SAMPLES])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@torch.no_grad()
def bench_forward(
    benchmark,
    shape: tuple[int, int],
    samples: int,
    blocksize: tuple[int, int],
    sparsity: float,
    device: str,
    thread_count: int,
) -> None:
    kind = "forward" if samples > 1 else "forward, one sample"
    measure_forward(benchmark, kind, shape, samples, blocksize, sparsity, thread_count, device)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 1), (1, 4), (1, 16)], ids=name_of)
@pytest.mark.parametrize("samples", [128, 512])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072)], ids=name_of)
@torch.no_grad()
def bench_fine_grained(
    benchmark,
    shape: tuple[int, int],
    samples: int,
    blocksize: tuple[int, int],
    sparsity: float,
    thread_count: int,
) -> None:
    """Unstructured sparsity, and blocks of one row or one column."""
    measure_forward(benchmark, "fine-grained forward", shape, samples, blocksize, sparsity, thread_count)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("blocksize", [(16, 16), (32, 32)], ids=name_of)
@pytest.mark.parametrize("samples", [1, 3, 5, 8, 9, 12, 16])
@pytest.mark.parametrize("shape", [(3072, 768), (4096, 1024), (1280, 2560)], ids=name_of)
@torch.no_grad()
def bench_few_samples(
    benchmark,
    shape: tuple[int, int],
    samples: int,
    blocksize: tuple[int, int],
    sparsity: float,
    thread_count: int,
) -> None:
    few = "one sample" if samples == 1 else "3 to 8 samples" if samples <= 8 else "9 to 16 samples"
    measure_forward(benchmark, f"few samples: {few}", shape, samples, blocksize, sparsity, thread_count)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("blocksize", [(16, 16), (8, 8)], ids=name_of)
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@torch.no_grad()
def bench_skewed(
    benchmark, shape: tuple[int, int], samples: int, blocksize: tuple[int, int], thread_count: int
) -> None:
    """All kept blocks in as few block rows as hold them, against the same number at random."""
    even = make_layer(*shape, blocksize, 0.75)
    skewed = make_layer(*shape, blocksize, 0.75, skewed=True)
    input = torch.randn(samples, shape[1])
    with threads(thread_count):
        assert_close(skewed(input), skewed.to_dense()(input))
        measure(
            benchmark,
            lambda: skewed(input),
            lambda: even(input),
            check=lambda ours, theirs: None,  # two layers, each checked against its dense one
            group=f"skewed pattern {name_of(shape)}, N = {samples}, {thread_count} threads",
            kind="skewed against random pattern",
            blocksize=name_of(blocksize),
            sparsity=0.75,
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("other", ["torch BSR", "scipy BSR", "ONNX Runtime dense"])
@pytest.mark.parametrize("samples", [64, 512])
@pytest.mark.parametrize("shape", [(1024, 1024), (3072, 768)], ids=name_of)
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@torch.no_grad()
def bench_other_libraries(
    benchmark, shape: tuple[int, int], samples: int, other: str, sparsity: float, thread_count: int
) -> None:
    layer = make_layer(*shape, (16, 16), sparsity)
    layer.bias = None
    input = torch.randn(samples, shape[1])
    with threads(thread_count):
        baseline = BASELINES[other](layer, input, thread_count)
        measure(
            benchmark,
            lambda: layer(input),
            baseline,
            check=lambda ours, theirs: assert_close(ours, torch.as_tensor(theirs)),
            group=f"{other}, {name_of(shape)}, N = {samples}, {thread_count} threads",
            kind=f"forward against {other}",
            blocksize="16x16",
            sparsity=sparsity,
            density=layer.density,
        )


def _torch_bsr(layer: fp.BlockSparseLinear, input: torch.Tensor, thread_count: int):
    weight = layer.block_sparse_weight.to_torch_bsr()
    return lambda: F.linear(input, weight)


def _scipy_bsr(layer: fp.BlockSparseLinear, input: torch.Tensor, thread_count: int):
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    weight = layer.block_sparse_weight
    parts = (weight.values.contiguous().numpy(), weight.col_indices.numpy(), weight.crow_indices.numpy())
    matrix = scipy_sparse.bsr_matrix(parts, shape=tuple(weight.shape), blocksize=weight.blocksize)
    columns = input.T.contiguous().numpy()
    return lambda: (matrix @ columns).T


def _onnxruntime_dense(layer: fp.BlockSparseLinear, input: torch.Tensor, thread_count: int):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    weight = onnx.numpy_helper.from_array(layer.weight.T.contiguous().numpy(), "weight")
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "linear",
        [onnx.helper.make_tensor_value_info("x", real, list(input.shape))],
        [onnx.helper.make_tensor_value_info("y", real, [input.shape[0], layer.out_features])],
        [weight],
    )
    session = onnxruntime_session(graph, thread_count)
    array = input.numpy()
    return lambda: session.run(None, {"x": array})[0]


BASELINES = {
    "torch BSR": _torch_bsr,
    "scipy BSR": _scipy_bsr,
    "ONNX Runtime dense": _onnxruntime_dense,
}
