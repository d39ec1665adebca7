"""The ops don't depend on torch's defaults, nor on how many threads the system gives."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import normal

from jz3 import backend
from jz3.ops.ce_hidden_grad import ce_hidden_grad
from jz3.ops.encode import decode, encode
from jz3.ops.score_checkpoints import CheckpointCodes, score_topk_checkpoints
from jz3.ops.score_topk import score_topk
from jz3.ops.segment_project import segment_project
from jz3.ops.sign_project import sign_project
from jz3.ops.signs import sign_bits, signs
from jz3.ops.sketch import sketch

MEAN, SCALE = normal(1, 64), normal(2, 64).abs()
CODES = encode(normal(0, 500, 64), MEAN, SCALE, "4bit")
QUERIES = normal(3, 30, 64)
CHECKPOINT = CheckpointCodes(codes=CODES, mean=MEAN, scale=SCALE, kind="4bit", queries=QUERIES, weight=0.25)
A, G, LEFT = normal(4, 50, 16), normal(5, 50, 24), normal(6, 24, 8)
BOUNDS = torch.tensor([0, 20, 20, 50])
Y = torch.arange(50) % 24
RUNS: dict[str, Callable[[], Any]] = {
    "score_topk": lambda: score_topk(CODES, MEAN, SCALE, "4bit", QUERIES, 7),
    "score_topk_checkpoints": lambda: score_topk_checkpoints(
        [CHECKPOINT, dataclasses.replace(CHECKPOINT, weight=0.75)], 7
    ),
    "segment_project": lambda: segment_project(A, G, LEFT, BOUNDS),
    "sign_project": lambda: sign_project(A, 40, seed=1, name="m"),
    "sketch": lambda: sketch(A, "m", 8, seed=1),
    "encode": lambda: encode(QUERIES, MEAN, SCALE, "4bit"),
    "decode": lambda: decode(CODES, MEAN, SCALE, "4bit"),
    "ce_hidden_grad": lambda: ce_hidden_grad(G, normal(7, 24, 24), Y),
}


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def both(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("on", ["cpu", "reference"])
def test_the_default_dtype_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, defaults: None, name: str, dtype: torch.dtype, on: str
) -> None:
    if on == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", on)
    expected = both(RUNS[name]())
    torch.set_default_dtype(dtype)
    for a, b in zip(both(RUNS[name]()), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in RUNS if n not in ("score_topk_checkpoints", "ce_hidden_grad")])
def test_the_default_device_changes_nothing(defaults: None, name: str) -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    expected = both(RUNS[name]())
    torch.set_default_device("meta")
    for a, b in zip(both(RUNS[name]()), expected, strict=True):
        assert torch.equal(a, b)


PACKED = sign_bits(1, "left", 24, 8)
COUNTED: dict[str, Callable[[Any], Any]] = {
    "score_topk": lambda n: score_topk(CODES, MEAN, SCALE, "4bit", QUERIES, n(7)),
    "score_topk_checkpoints": lambda n: score_topk_checkpoints([CHECKPOINT], n(7)),
    "segment_project": lambda n: segment_project(A, G, PACKED, Y - 1, documents=n(24), outputs=n(8)),
    "sign_project": lambda n: sign_project(A, n(40), seed=n(1), name="m", first_col=n(256)),
    "sketch": lambda n: sketch(A, "m", n(8), seed=n(1)),
    "signs": lambda n: signs(n(1), "m", n(5), n(200), first_row=n(2), first_col=n(256)),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("number", [np.int64, np.uint16, torch.tensor], ids=["int64", "uint16", "tensor"])
@pytest.mark.parametrize("on", ["cpu", "reference"])
def test_counts_may_be_numpys_or_torchs(
    monkeypatch: pytest.MonkeyPatch, name: str, number: Any, on: str
) -> None:
    if on == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", on)
    for a, b in zip(both(COUNTED[name](number)), both(COUNTED[name](int)), strict=True):
        assert torch.equal(a, b)


def test_a_seed_that_is_no_integer_is_told() -> None:
    seeds: list[Any] = [None, 1.0, "1"]
    for seed in seeds:
        with pytest.raises(TypeError, match=f"seed must be an int, got {type(seed).__name__}"):
            signs(seed, "m", 5, 200)


@pytest.mark.parametrize("kind", ["int8", "4bit", "2bit", "1bit"])
@pytest.mark.parametrize("queries", [1, 40])
def test_codes_without_coordinates(kind: str, queries: int) -> None:
    none = torch.zeros(0)
    values, ids = score_topk(
        torch.zeros(5, 0, dtype=torch.uint8), none, none, kind, torch.zeros(queries, 0), 2
    )
    assert values.tolist() == [[0, 0]] * queries and ids.tolist() == [[0, 1]] * queries


FEW_THREADS = """
import os, resource, torch
from jz3 import backend
from jz3.gradients.products import Product, native_products
from jz3.ops.score_topk import score_topk
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
codes = torch.randint(0, 256, (4000, 512), generator=generator, dtype=torch.uint8)
mean, scale, queries = torch.zeros(512), torch.ones(512), torch.randn(40, 512, generator=generator)
matrix = torch.randn(512, 512, generator=generator)
def run():
    return *score_topk(codes, mean, scale, "int8", queries, 9), Product(matrix)(queries.repeat(20, 1))
backend.threads = lambda: 1
expected = run()
backend.threads = lambda: 16
try:
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    os.setuid(54321)
except OSError:
    raise SystemExit(print("unlimited"))
try:
    import threading
    threading.Thread(target=int).start()
except RuntimeError:
    assert all(map(torch.equal, run(), expected))
    print("as with one")
else:
    print("unlimited")
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="a limit for another user needs root"
)
def test_without_more_threads_the_work_is_done_by_those_there_are() -> None:
    if backend.extension_missing():
        pytest.skip(backend.extension_missing())
    done = subprocess.run([sys.executable, "-c", FEW_THREADS], capture_output=True, text=True, timeout=120)
    if done.stdout == "unlimited\n":
        pytest.skip("this system doesn't limit threads")
    assert done.stdout == "as with one\n", done.stderr
