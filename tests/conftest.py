"""Fixtures for all tests: seeded generators, and hypothesis without deadlines."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune import metrics
from fastprune.modules import choice, clear_layer_seconds, formats, latency

# The tests of the CUDA kernels need no hypothesis, nor has every machine with a GPU.
with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    hypothesis.settings.register_profile(
        "fastprune",
        deadline=None,
        derandomize=True,
        max_examples=40,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("fastprune")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unmeasured():
    """No test sees the layer times of another."""
    clear_layer_seconds()


@pytest.fixture
def one_thread():
    """Nets of ten neurons spend their time waiting for threads; for files that test no kernel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fake_medians(monkeypatch):
    """Puts a function in the place of `interleaved_medians` wherever layers and models are measured."""

    def put(fake):
        for module in (choice, formats, latency, metrics):
            monkeypatch.setattr(module, "interleaved_medians", fake)

    return put


@pytest.fixture
def sparse_is_faster(fake_medians):
    """No time is measured: every masked layer that can be converted is."""
    fake_medians(lambda functions, **options: [2.0, 1.0][: len(functions)])


@pytest.fixture(params=fp.supported_cpu_isas())
def isa(request: pytest.FixtureRequest):
    fp.set_cpu_isa(request.param)
    assert fp.cpu_isa() == request.param
    yield request.param
    fp.set_cpu_isa("")
