"""Shared by all tests: the tiny model, real data, and what multiplies on a CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

NO_TILES, EMULATED_TILES = 0, 2  # of csrc/cpu/ops.h
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


@pytest.fixture(params=["best", "vectors", "emulated_tiles"])
def tile_unit(request: pytest.FixtureRequest) -> Iterator[None]:
    """What multiplies bfloat16 on this CPU: the best it has, vectors alone, and tiles in plain C++."""
    from jz3 import backend

    if backend.extension_missing() or not hasattr(backend.extension(), "has_bf16"):
        pytest.skip("jz3's own products are not built here")
    extension = backend.extension()
    best = extension.tile_unit()
    if request.param == "vectors" and best == NO_TILES:
        pytest.skip("vectors are the best here")
    extension.choose_tile_unit(
        {"best": best, "vectors": NO_TILES, "emulated_tiles": EMULATED_TILES}[request.param]
    )
    yield
    extension.choose_tile_unit(best)
