"""Shared by all tests: the tiny model, kept in a cache of the test session's own."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The folder of the random two-layer model."""
    from jz3.models import TINY, ModelConfig, resolve_model

    return resolve_model(ModelConfig(name=TINY))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real maths sets, where the checkout has one beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder shared/data beside the checkout: real maths sets are not at hand")
    return SHARED_DATA
