"""An encoder that lost single weights anywhere, as most pruned checkpoints did, against its dense form."""

from __future__ import annotations

import copy

import pytest
import torch

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
