"""Fixtures for all tests: seeded generators, and hypothesis without deadlines."""

from __future__ import annotations

import random

import hypothesis
import numpy as np
import pytest
import torch

from fastprune.modules import convert

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


@pytest.fixture
def one_thread():
    """Nets of ten neurons spend their time waiting for threads; for files that test no kernel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sparse_is_faster(monkeypatch):
    """No time is measured: every masked layer that can be converted is."""
    monkeypatch.setattr(
        convert, "interleaved_medians", lambda functions, **options: [2.0, 1.0][: len(functions)]
    )
