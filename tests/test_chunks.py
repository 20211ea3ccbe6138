"""How many samples are traced at once: within the memory budget, and without a trace of it in the scores."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.batches import Batch
from fastprune.graph import TracedModel
from fastprune.importance.chunks import samples_at_once
from helpers import classification_batches, mlp

PEAK = """
    import sys, torch
    import fastprune as fp
    from torch import nn

    torch.set_num_threads(1)
    depth, width, samples, budget = map(int, sys.argv[1:])
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 4))

    def run(samples):
        loader = [(torch.randn(samples, width), torch.randint(0, 4, (samples,)))]
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        # Pieces that change the whole output of their layer.
        fp.score(model, loader, granularity=fp.Head(2), include="0", memory_budget=budget, progress=False)
        return status("VmHWM") - before

    def status(field):
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(lines[field].split()[0]) * 1024

    run(32)
    print(run(samples))
"""


def _peak(depth, width, samples, budget):
    arguments = [str(value) for value in (depth, width, samples, budget)]
    # Freed memory goes back to the system at once, or what an allocator keeps would be counted at random.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", textwrap.dedent(PEAK), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("depth", "width", "samples"), [(40, 64, 8192), (2, 2048, 2048)], ids=["many layers", "a large layer"]
)
def test_peak_memory_stays_within_the_budget(depth, width, samples):
    budget = 40 << 20
    assert _peak(depth, width, samples, budget) <= budget
    assert _peak(depth, width, samples, 1 << 40) > budget


@pytest.mark.parametrize("granularity", [fp.Unit(), fp.Block(4, 3), fp.InputUnit()], ids=str)
def test_scores_do_not_depend_on_how_a_batch_was_split(granularity):
    model, loader = mlp(), classification_batches((40, 17, 1))
    whole = fp.score(model, loader, granularity=granularity, progress=False)
    for budget in (1, 700, 3000):
        parts = fp.score(model, loader, granularity=granularity, memory_budget=budget, progress=False)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_model_that_mixes_its_samples_is_never_split():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(7, 9), nn.Linear(9, 5)

        def forward(self, x):
            hidden = torch.relu(self.layer(x))
            return self.head(hidden - hidden.mean(0))

    model, loader = Centred(), classification_batches((17, 40))
    whole = fp.score(model, loader, granularity=fp.Unit(), progress=False)
    parts = fp.score(model, loader, granularity=fp.Unit(), memory_budget=1, progress=False)
    for name in whole:
        assert torch.equal(parts[name], whole[name])


def test_a_loss_that_is_a_mean_sees_whole_batches():
    def largest(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none").max()

    model, loader = mlp(), classification_batches((17, 40))  # the second is larger than what was seen first
    whole = fp.score(model, loader, granularity=fp.Unit(), loss_fn=largest, progress=False)
    parts = fp.score(model, loader, granularity=fp.Unit(), loss_fn=largest, memory_budget=1, progress=False)
    assert parts.loss == whole.loss
    with torch.no_grad():
        expected = sum(float(largest(model(x), y)) * len(y) for x, y in loader) / 57
    assert whole.loss == pytest.approx(expected, rel=1e-5)


def test_more_samples_fit_into_more_memory_up_to_the_caches():
    model = mlp(64, 256, 10).eval()
    traced = TracedModel.trace(model)
    values = traced.run(Batch((torch.randn(32, 64),), {}, None, 32))
    counts = [samples_at_once(values, 32, budget) for budget in (1, 1 << 16, 1 << 20, 1 << 30, 1 << 40)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == (8 << 20) // (256 * 4)


def test_the_same_call_gives_the_same_bits():
    model, loader = mlp(), classification_batches((40, 17, 1))
    first, second = (fp.score(model, loader, granularity=fp.Block(4, 3), progress=False) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "1 GB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match="memory_budget"):
        fp.score(mlp(), classification_batches(), memory_budget=budget, progress=False)


def test_more_samples_fit_at_once_where_launches_cost(monkeypatch):
    model = mlp(64, 256, 10).eval()
    traced = TracedModel.trace(model)
    values = traced.run(Batch((torch.randn(32, 64),), {}, None, 32))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert samples_at_once(values, 32, 1 << 40) == (128 << 20) // (256 * 4)
