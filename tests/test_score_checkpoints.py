"""Scores summed over checkpoints: against float64, one by one, ties, chunks, back ends, stores."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import BACKENDS, normal

from jz3 import backend
from jz3.errors import Jz3Error
from jz3.ops import score_checkpoints
from jz3.ops.encode import encode
from jz3.ops.score_checkpoints import CheckpointCodes, score_topk_checkpoints
from jz3.ops.score_queries import check_and_fold
from jz3.ops.score_topk import score_codes_reference, score_topk
from jz3.store import (
    CheckpointStore,
    Coding,
    Store,
    StoreInfo,
    open_store,
    scan,
    scan_checkpoints,
    write_shard,
)

GROUPS = torch.tensor([1, 0, 1, 2, 1])
KINDS = (("4bit", 70, 0.75), ("int8", 33, -0.2), ("1bit", 100, 2.0))
"""Codes, coordinates and weights of three checkpoints."""


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and backend.extension_missing():
        pytest.skip(backend.extension_missing())
    monkeypatch.setenv("JZ3_BACKEND", f"score_codes={request.param}")
    return request.param


def example(rows: int = 300, queries: int = 5) -> list[CheckpointCodes]:
    checkpoints = []
    for seed, (kind, dim, weight) in enumerate(KINDS):
        mean, scale = normal(10 * seed + 1, dim), normal(10 * seed + 2, dim).abs()
        codes = encode(normal(10 * seed, rows, dim) * scale + mean, mean, scale, kind)
        row_scale = None if seed == 1 else normal(10 * seed + 4, rows).abs()
        if rows > 9:
            codes[9] = codes[3]
            if row_scale is not None:
                row_scale[9] = row_scale[3]
        checkpoints.append(
            CheckpointCodes(
                codes=codes,
                mean=mean,
                scale=scale,
                kind=kind,
                queries=normal(10 * seed + 3, queries, dim),
                weight=weight,
                row_scale=row_scale,
            )
        )
    return checkpoints


def by_hand(checkpoints: list[CheckpointCodes], groups: torch.Tensor | None, reduce: str) -> torch.Tensor:
    """All scores [G, N], checkpoint by checkpoint from the definition of the scan, added up in float64."""
    total: Any = 0
    for c in checkpoints:
        folded = check_and_fold(
            "test", c.codes, c.mean, c.scale, c.kind, c.queries, c.row_scale, None, groups, reduce
        )
        ones = torch.ones(len(c.codes)) if c.row_scale is None else c.row_scale
        d = folded.digits
        scores = score_codes_reference(c.codes, c.kind, d.planes, d.step, d.bias, ones)
        total = total + c.weight * scores.double()
    total = total.float()
    if groups is None or reduce == "mean":
        return total
    return torch.stack([total[groups == g].amax(0) for g in range(int(groups.max()) + 1)])


def best_of(scores: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[list, list]:
    """The k best of every row by (score descending, id ascending)."""
    values, found = [], []
    for row in scores:
        order = np.lexsort((ids.numpy(), -row.numpy()))[:k]
        values.append(row[order].tolist())
        found.append(ids[order].tolist())
    return values, found


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["queries", "tasks"])
@pytest.mark.parametrize("chunk", [1 << 24, 200], ids=["one chunk", "many"])
def test_best_of_the_weighted_sums(
    on: str, monkeypatch: pytest.MonkeyPatch, chunk: int, groups: torch.Tensor | None, reduce: str
) -> None:
    monkeypatch.setattr(score_checkpoints, "CHUNK", chunk)
    checkpoints = example()
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    expected = by_hand(checkpoints, groups, reduce)
    for k in (1, 40, 400):
        values, found = score_topk_checkpoints(checkpoints, k, ids=ids, groups=groups, reduce=reduce)
        assert (values.tolist(), found.tolist()) == best_of(expected, ids, k)
    again = score_topk_checkpoints(checkpoints, 40, ids=ids, groups=groups, reduce=reduce)
    assert torch.equal(again[0], values[:, :40]) and torch.equal(again[1], found[:, :40])
    row = found.tolist()[0]
    assert abs(row.index(int(ids[9])) - row.index(int(ids[3]))) == 1
    assert (row.index(int(ids[9])) < row.index(int(ids[3]))) == bool(ids[9] < ids[3])


def test_scores_are_weighted_inner_products_up_to_the_grid(on: str) -> None:
    from jz3.ops.encode import decode

    checkpoints = example()
    exact: Any = 0
    for c in checkpoints:
        rows = decode(c.codes, c.mean, c.scale, c.kind).double()
        ones = torch.ones(300) if c.row_scale is None else c.row_scale
        exact = exact + c.weight * ones.double() * (c.queries.double() @ rows.T)
    values, found = score_topk_checkpoints(checkpoints, 300)
    assert float((values - exact.gather(1, found)).abs().max()) <= 1e-3 * float(exact.std())


def test_one_checkpoint_is_the_plain_scan(on: str) -> None:
    c = example()[0]
    one = CheckpointCodes(
        codes=c.codes, mean=c.mean, scale=c.scale, kind=c.kind, queries=c.queries, weight=1.0
    )
    for groups in (None, GROUPS):
        expected = score_topk(c.codes, c.mean, c.scale, c.kind, c.queries, 25, groups=groups)
        got = score_topk_checkpoints([one], 25, groups=groups)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_no_rows_and_no_queries(on: str) -> None:
    values, ids = score_topk_checkpoints(example(rows=0), 3)
    assert values.shape == ids.shape == (5, 0)
    values, ids = score_topk_checkpoints(example(queries=0), 3)
    assert values.shape[0] == ids.shape[0] == 0


def test_wrong_arguments_are_named() -> None:
    good = example()
    with pytest.raises(ValueError, match="at least one"):
        score_topk_checkpoints([], 3)
    with pytest.raises(ValueError, match=r"checkpoint 1: codes must have the axes .* N = 300"):
        score_topk_checkpoints([good[0], example(rows=299)[1]], 3)
    with pytest.raises(ValueError, match="checkpoint 1: queries must be 5 as the first one's, got 4"):
        score_topk_checkpoints([good[0], example(queries=4)[1]], 3)
    c = good[2]
    bad = CheckpointCodes(
        codes=c.codes, mean=c.mean, scale=c.scale, kind=c.kind, queries=c.queries, weight=float("nan")
    )
    with pytest.raises(ValueError, match="checkpoint 0: weight must be finite, got nan"):
        score_topk_checkpoints([bad], 3)
    wrong: list[Any] = [dataclasses.replace(c, weight="1"), (c.codes, c.mean), None]  # pyright: ignore[reportArgumentType]
    messages = (
        "0: weight must be a number, got str",
        "0 must be a CheckpointCodes, got tuple",
        "got NoneType",
    )
    for value, message in zip(wrong, messages, strict=True):
        with pytest.raises(TypeError, match=f"score_topk_checkpoints: checkpoint .*{message}"):
            score_topk_checkpoints([value], 3)
    stream: Any = iter(good)
    for a, b in zip(score_topk_checkpoints(stream, 3), score_topk_checkpoints(good, 3), strict=True):
        assert torch.equal(a, b)


def store_of(folder: Path, seed: int, shards: list[int], bits: int = 4) -> tuple[Store, Coding]:
    coding = Coding(normal(seed, 32), normal(seed + 1, 32).abs(), bits)
    info = StoreInfo(
        model_hash="m",
        module_hash="t",
        kind="adapted",
        k=32,
        bits=bits,
        projection_hash=str(seed),
        reduction="mean",
    )
    open_store(folder, info)
    rows = sum(shards)
    values, start = normal(seed + 2, rows, 32), 0
    for number, count in enumerate(shards):
        names = [f"{(i * 0x9E3779B97F4A7C15) % (1 << 64):016x}" for i in range(start, start + count)]
        write_shard(folder, number, names, values[start : start + count], torch.ones(count), coding)
        start += count
    return Store(folder), coding


def test_scan_of_several_stores(tmp_path: Path) -> None:
    weights, parts, scores = (0.3, 0.7), [], []
    queries = [normal(1, 4, 32), normal(2, 4, 32)]
    for number, weight in enumerate(weights):
        store, coding = store_of(tmp_path / str(number), 50 + number, [40, 60])
        parts.append(CheckpointStore(store=store, coding=coding, queries=queries[number], weight=weight))
        values, names = scan(store, coding, queries[number], 100)
        order = names.argsort(1)
        scores.append(weight * np.take_along_axis(values.numpy().astype(np.float64), order, 1))
    seen: list[int] = []
    values, names = scan_checkpoints(parts, 10, advance=seen.append)
    total = torch.from_numpy((scores[0] + scores[1]).astype(np.float32))
    everything = np.sort(np.concatenate([shard.id for shard in parts[0].store.shards]))
    best = total.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, best.values[:, :10]) and sum(seen) == 100
    assert np.array_equal(names, everything[best.indices[:, :10].numpy()])


def test_stores_that_do_not_belong_together(tmp_path: Path) -> None:
    def part(name: str, shards: list[int], bits: int = 4) -> CheckpointStore:
        store, coding = store_of(tmp_path / name, 5, shards, bits)
        return CheckpointStore(store=store, coding=coding, queries=normal(1, 4, 32), weight=1.0)

    one = part("one", [30])
    with pytest.raises(Jz3Error, match="different documents"):
        scan_checkpoints([one, part("fewer", [29])], 3)
    with pytest.raises(Jz3Error, match="different documents"):
        scan_checkpoints([one, part("divided", [10, 20])], 3)
    with pytest.raises(Jz3Error, match="bf16"):
        scan_checkpoints([one, part("wide", [30], 16)], 3)
    other = store_of(tmp_path / "other", 5, [])[0]
    names = [f"{i:016x}" for i in range(30)]
    write_shard(tmp_path / "other", 0, names, normal(1, 30, 32), torch.ones(30), one.coding)
    other.refresh()
    foreign = CheckpointStore(store=other, coding=one.coding, queries=one.queries, weight=1.0)
    with pytest.raises(Jz3Error, match="another order"):
        scan_checkpoints([one, foreign], 3)
    with pytest.raises(ValueError, match="at least one"):
        scan_checkpoints([], 3)
