"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pulse_ray.config import ClusterConfig
from pulse_ray.runtime import cluster

ROOT = Path(__file__).parents[1]

# vLLM compiles a helper of its sampler when an engine writes its first token: seconds that a test with few tokens never
# earns back. tests/generation/test_engine.py lets it.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# What a test takes on a busy machine says nothing about it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session."""
    with cluster(ClusterConfig()):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the project; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    return folder
