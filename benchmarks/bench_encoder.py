"""Encoders that lost single weights anywhere, as most pruned checkpoints did, or blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from harness import THREADS, faster, measure, threads
from models import Encoder


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("granularity", [fp.Element(), fp.Block(4, 1), fp.Block(16, 16)], ids=str)
@torch.no_grad()
def bench_encoder(benchmark, granularity: fp.Granularity, sparsity: float, thread_count: int) -> None:
    """Six layers of BERT-base, 128 tokens, the smallest weights of each Linear masked; eager and compiled."""
    torch.manual_seed(0)
    model, input = Encoder().eval(), torch.randn(1, 128, 768)
    scores = fp.score(model, None, criterion="magnitude", granularity=granularity, progress=False)
    fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))
    dense = fp.remove_masks_(copy.deepcopy(model))
    with threads(thread_count):
        converted = fp.sparsify_(model, example_inputs=input, fold_batch_norm=True).eval()
        query = converted[0].query
        blocks = "x".join(map(str, query.blocksize)) if isinstance(query, fp.BlockSparseLinear) else "dense"
        compiled = torch.compile(copy.deepcopy(dense))
        measure(
            benchmark,
            lambda: converted(input),
            faster([lambda: dense(input), lambda: compiled(input)]),
            check=lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3),
            group=f"encoder, {granularity}, {thread_count} threads",
            kind=f"encoder after sparsify_, {granularity}",
            blocksize=blocks,
            sparsity=sparsity,
        )


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("unpacked", [False, True], ids=["packed", "unpacked"])
@torch.no_grad()
def bench_torchs_encoder(benchmark, unpacked: bool, sparsity: float, thread_count: int) -> None:
    """Two of torch's layers, 4 x 128 tokens, against their fast path; attention packed, or unpacked first."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model, input = copy.deepcopy(dense), torch.randn(4, 128, 768)
    if unpacked:
        fp.unpack_attention_(model)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(16, 16), progress=False)
    fp.apply_masks_(model, scores.select(sparsity=sparsity, scope="layer"))
    masked = fp.remove_masks_(copy.deepcopy(model)).state_dict()

    def weight(name: str) -> Tensor:
        if name in masked:
            return masked[name]
        return torch.cat([masked[name.replace("in_proj_", f"{part}_proj.")] for part in "qkv"])

    dense.load_state_dict({name: weight(name) for name in dense.state_dict()})
    with threads(thread_count):
        converted = fp.sparsify_(model, example_inputs=input).eval()
        measure(
            benchmark,
            lambda: converted(input),
            lambda: dense(input),
            check=lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3),
            group=f"torch's encoder, {thread_count} threads",
            kind=f"torch's encoder, attention {'unpacked' if unpacked else 'packed'}",
            blocksize="16x16",
            sparsity=sparsity,
        )
