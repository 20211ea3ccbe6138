"""What sparsify_ measures for each layer: how often, and what a gain must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.modules import clear_layer_seconds
from fastprune.timing import interleaved_medians
from helpers import masked_mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_gain_within_the_noise_is_not_worth_a_conversion(fake_medians):
    model, x = masked_mlp(0.5)
    fake_medians(lambda functions, **options: [1.0, 0.98][: len(functions)])
    fp.sparsify_(model, example_inputs=x, blocksize=(4, 4))
    assert type(model[0]) is nn.Linear
    assert "dense: sparse gains less than noise" in fp.explain(model)


def test_a_layer_is_measured_once_for_each_pattern_input_and_thread_count(fake_medians):
    measured = []

    def fake(functions, **options):
        measured.append(len(functions))
        return [2.0, 1.0][: len(functions)]

    fake_medians(fake)
    model, x = masked_mlp(0.5)
    other, _ = masked_mlp(0.25)

    def layers_measured(model, x):
        measured.clear()
        converted = fp.sparsify_(copy.deepcopy(model), example_inputs=x, blocksize=(4, 4))
        assert "2.00x" in fp.explain(converted)
        return measured.count(2)

    assert layers_measured(model, x) == 2
    assert layers_measured(model, x) == 0
    assert layers_measured(other, x) == 2
    assert layers_measured(model, x[:5]) == 2
    assert layers_measured(model.double(), x.double()) == 2
    torch.set_num_threads(2)  # the fixture of this file puts it back
    assert layers_measured(model, x.double()) == 2
    clear_layer_seconds()
    assert layers_measured(model, x.double()) == 2


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0, 5), (1e9, 9)])
def test_what_takes_long_is_measured_five_times(seconds, repeats):
    calls = []
    functions = [lambda: calls.append(0), lambda: calls.append(1)]
    medians = interleaved_medians(functions, repeats=9, warmup=0, maximum_seconds=seconds)
    assert len(medians) == 2
    assert calls == [0, 1] * repeats


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch):
    clock, slowness = [0.0], iter([1, 1, 1, 1, 1, 3, 3, 3, 3, 3])

    def takes(seconds):
        def function():
            clock[0] += seconds * next(slowness)

        return function

    monkeypatch.setattr("fastprune.timing.time.perf_counter", lambda: clock[0])
    # Their own medians would be 2 and 4.5.
    assert interleaved_medians([takes(2.0), takes(1.5)], repeats=5, warmup=0) == [2.0, 1.5]
