"""Shared by all tests: the tiny model, real data, and what multiplies on a CPU."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests that run side by side must not wait for their threads in a loop on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NO_TILES, EMULATED_TILES, AVX2 = 0, 2, 1  # of csrc/cpu/ops.h
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The folder of the random two-layer model."""
    from jz3.models import TINY, ModelConfig, resolve_model

    return resolve_model(ModelConfig(name=TINY))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the random two-layer model up to its index and scores."""
    from jz3.cli import main

    folder = tmp_path_factory.getbasetemp() / "small_run"
    assert main(["run", "tiny", "--until", "index", "--out", str(folder)]) == 0
    assert main(["influence", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True, scope="module")
def modules_frozen() -> Iterator[None]:
    """Leave what has been imported out of the searches for cycles between stages, which take a second with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real maths sets, where the checkout has one beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder shared/data beside the checkout: real maths sets are not at hand")
    return SHARED_DATA


@pytest.fixture(params=["best", "vectors", "avx2", "emulated_tiles"])
def tile_unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What computes on this CPU: the best it has, vectors alone, those of AVX2 alone, and tiles in plain C++."""
    from jz3 import backend
    from jz3.gradients import products

    extension: Any = None if backend.extension_missing() else backend.extension()
    if not getattr(extension, "vector_unit", int)():
        pytest.skip("jz3's own products are not built here, or this CPU has no AVX2")
    tiles, vectors = best = extension.tile_unit(), extension.vector_unit()
    if request.param == "vectors" and tiles == NO_TILES:
        pytest.skip("vectors are the best here")
    if request.param in ("avx2", "emulated_tiles") and vectors == AVX2:
        pytest.skip("AVX2 is the best here")
    chosen = {
        "best": best,
        "vectors": (NO_TILES, vectors),
        "avx2": (NO_TILES, AVX2),
        "emulated_tiles": (EMULATED_TILES, vectors),
    }

    def choose(tiles: int, vectors: int) -> None:
        extension.choose_tile_unit(tiles)
        extension.choose_vector_unit(vectors)

    choose(*chosen[request.param])
    if request.param == "avx2":
        monkeypatch.setattr(products, "avx2_alone", lambda: True)
    yield
    choose(*best)
