"""The store: what is written is read back; damage is named and the rest stays usable."""

import dataclasses
import errno
import importlib.metadata
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jz3
from jz3.errors import Jz3Error
from jz3.store import (
    Coding,
    Store,
    StoreInfo,
    find_store,
    has_shard,
    merge_stores,
    open_store,
    read_info,
    scan,
    verify,
    write_shard,
)
from jz3.store.format import read_manifest

INFO = StoreInfo(kind="adapted", k=32, bits=4, model_hash="m", projection_hash="p", reduction="mean")
CODING = Coding(torch.linspace(-1, 1, 32), torch.linspace(0.5, 2, 32), 4)


def fill(folder: Path | str, shards: int = 3, rows: int = 5) -> torch.Tensor:
    open_store(folder, INFO)
    values = CODING.mean + CODING.scale * torch.randn(
        shards * rows, 32, generator=torch.Generator().manual_seed(0)
    )
    for number in range(shards):
        part = values[number * rows : (number + 1) * rows]
        ids = [f"{2**63 + number * rows + i:016x}" for i in range(rows)]
        write_shard(folder, number, ids, part, torch.arange(rows, dtype=torch.float32), CODING)
    return values


def test_round_trip(tmp_path: Path) -> None:
    values = fill(tmp_path)
    store = Store(tmp_path, verify=True)
    assert len(store) == 15 and not store.damaged
    decoded = torch.cat([v for _, v in store.values(CODING)])
    # 16 Lloyd-Max levels leave 0.0095 of a normal's variance.
    error = ((decoded - values) / CODING.scale).square().mean()
    assert 0.004 < float(error) < 0.02
    assert [int(i) for s in store.shards for i in s.id] == [2**63 + i for i in range(15)]
    assert store.shards[1].norm.tolist() == [0, 1, 2, 3, 4]


def test_folders_may_be_named_by_strings(tmp_path: Path) -> None:
    values = fill(str(tmp_path / "one"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    open_store(two, read_info(one))
    write_shard(two, 0, ["1" * 16], values[:1], torch.ones(1), CODING)
    write_shard(two, 0, ["1" * 16], values[:1], torch.ones(1), CODING)
    assert merge_stores([one, two], str(tmp_path / "both")) == 4 and has_shard(two, 0)
    assert verify(str(tmp_path / "both")).rows == len(Store(str(find_store(one)))) + 1


def test_a_clone_that_is_not_installed_makes_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PYTHONPATH, as on a cluster's nodes, it has no metadata."""
    found = importlib.metadata.Distribution.from_name

    def without_jz3(name: str) -> importlib.metadata.Distribution:
        if name == "jz3":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", without_jz3)
    open_store(tmp_path, INFO)
    assert read_manifest(tmp_path)["versions"]["jz3"] == jz3.__version__


def test_opening_copies_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    codes = Store(tmp_path).shards[0].codes
    address = codes.ctypes.data
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (file,) = (m[-1] for m in maps if int(m[0].split("-")[0], 16) <= address < int(m[0].split("-")[1], 16))
    assert file == str(tmp_path / "000000.safetensors")
    codes[:] = 0
    assert Store(tmp_path).shards[0].codes.any()


@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "missing", "nonsense"])
def test_damaged_shard_is_named_and_the_rest_is_used(tmp_path: Path, damage: str) -> None:
    fill(tmp_path)
    path = tmp_path / "000001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        changed = {"truncated": data[:-3], "longer": data + b"x", "nonsense": bytes(len(data))}
        data[-5] ^= 1
        path.write_bytes(changed.get(damage, data))
    store = Store(tmp_path, verify=True)
    assert list(store.damaged) == ["000001.safetensors"]
    assert "000001.safetensors" in store.damaged["000001.safetensors"]
    assert [s.number for s in store.shards] == [0, 2]
    # Sizes are checked without being asked; what only the contents tell shows when they are read.
    assert (1 in [s.number for s in Store(tmp_path).shards]) == (damage in ("flipped", "nonsense"))
    if damage == "nonsense":
        with pytest.raises(Jz3Error, match="000001.safetensors doesn't hold the 5 rows"):
            Store(tmp_path).shards[1].codes  # noqa: B018


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": 5}', '{"rows":"5","bytes":1,"xxh3":"","store":""}']
)
def test_damaged_json_is_named(tmp_path: Path, text: str) -> None:
    fill(tmp_path)
    (tmp_path / "000001.json").write_text(text)
    store = Store(tmp_path)
    assert [s.number for s in store.shards] == [0, 2]
    assert "000001.json is damaged" in store.damaged["000001.safetensors"]
    assert not has_shard(tmp_path, 1)


def test_shard_of_another_store_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    other = StoreInfo(kind="adapted", k=32, bits=4, model_hash="other", projection_hash="p", reduction="mean")
    open_store(tmp_path / "b", other)
    for name in ("000001.json", "000001.safetensors"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    store = Store(tmp_path / "b")
    assert not store.shards and "is of another store" in store.damaged["000001.safetensors"]


def test_half_written_shard_does_not_exist(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "000002.json").unlink()
    (tmp_path / "000003.safetensors.part").write_bytes(b"half")
    store = Store(tmp_path, verify=True)
    assert [s.number for s in store.shards] == [0, 1] and not store.damaged
    assert has_shard(tmp_path, 1) and not has_shard(tmp_path, 2)


def test_foreign_store_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    other = StoreInfo(kind="sketch", k=32, bits=4, model_hash="m", projection_hash="p", reduction="mean")
    with pytest.raises(Jz3Error, match="kind: 'adapted' in the store, 'sketch' now"):
        open_store(tmp_path, other)


def test_readable_while_growing(tmp_path: Path) -> None:
    fill(tmp_path, shards=1)
    before = Store(tmp_path)
    fill(tmp_path, shards=3)
    assert len(before) == 5 and len(Store(tmp_path)) == 15


def test_growing_store_shows_only_whole_shards(tmp_path: Path) -> None:
    """Another process writes; every look sees a prefix of what it wrote, and none of it damaged."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "import test_store\n"
        "test_store.fill(Path(sys.argv[1]), shards=40, rows=300)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s"), str(Path(__file__).parent)]
    writer = subprocess.Popen(command)
    seen: list[int] = []
    store = None
    while writer.poll() is None or not seen or seen[-1] < 40:
        if store is None and (tmp_path / "s" / "store.json").is_file():
            store = Store(tmp_path / "s", verify=True)
        elif store is not None:
            store.refresh(verify=True)
            assert not store.damaged
            assert [s.number for s in store.shards] == list(range(len(store.shards)))
            seen.append(len(store.shards))
        assert writer.poll() in (None, 0)
        time.sleep(0.01)
    assert seen[-1] == 40 and seen == sorted(seen)
    assert sorted(set(seen)) != [40], "the reader saw only the finished store"


def test_opening_holds_neither_memory_nor_file_descriptors(tmp_path: Path) -> None:
    fill(tmp_path, shards=1)
    for number in range(1, 300):
        for suffix in ("json", "safetensors"):
            data = (tmp_path / f"000000.{suffix}").read_bytes()
            (tmp_path / f"{number:06d}.{suffix}").write_bytes(data)
    before = len(os.listdir("/proc/self/fd"))
    store = Store(tmp_path)
    assert len(store.shards) == 300
    assert sum(len(codes) for _, codes in store.values(CODING)) == 1500
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, hard))
    try:
        assert verify(tmp_path).duplicate_count == 5
        assert scan(store, CODING, torch.ones(1, 32), 1500)[1].shape == (1, 1500)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_ten_thousand_shards_open_in_two_seconds(tmp_path: Path) -> None:
    fill(tmp_path, shards=1)
    parts = {s: (tmp_path / f"000000.{s}").read_bytes() for s in ("json", "safetensors")}
    for number in range(1, 10_000):
        for suffix, data in parts.items():
            (tmp_path / f"{number:06d}.{suffix}").write_bytes(data)
    start = time.perf_counter()
    store = Store(tmp_path)
    seconds = time.perf_counter() - start
    assert len(store) == 50_000 and seconds < 2, seconds


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
def test_every_code_comes_back(tmp_path: Path, bits: int) -> None:
    coding = Coding(CODING.mean, CODING.scale, bits)
    open_store(tmp_path, dataclasses.replace(INFO, bits=bits))
    values = CODING.mean + CODING.scale * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    write_shard(tmp_path, 0, [f"{i:016x}" for i in range(200)], values, torch.ones(200), coding)
    [(shard, decoded)] = Store(tmp_path, verify=True).values(coding)
    assert shard.codes.shape == (200, 32 * bits // 8)
    error = float(((decoded - values) / CODING.scale).square().mean())
    # Variance left by rounding to bf16, by 8 bits over +-5 scales, and by Lloyd-Max quantisers.
    low, high = {16: (1e-7, 1e-4), 8: (5e-5, 3e-4), 4: (0.005, 0.02), 2: (0.09, 0.14), 1: (0.3, 0.45)}[bits]
    assert low < error < high


def test_a_shard_is_readable_by_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    fill(tmp_path)
    arrays = load_file(tmp_path / "000002.safetensors")
    shard = Store(tmp_path).shards[2]
    for name in ("id", "norm", "codes"):
        assert np.array_equal(arrays[name], getattr(shard, name))


def test_a_shard_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, shards=1)
    [shard] = Store(tmp_path).shards

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    def full(path: str, **_: Any) -> None:
        raise RuntimeError(f"unable to mmap 80 bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr("jz3.store.shard.hash_file", fail)
    monkeypatch.setattr(torch, "from_file", full)
    with pytest.raises(OSError, match="Input/output error; the same command"):
        shard.verify()
    with pytest.raises(OSError, match="Cannot allocate memory; the same command"):
        shard.id_and_codes()


def test_writing_into_a_mapped_shard_leaves_the_file_alone(tmp_path: Path) -> None:
    fill(tmp_path)
    Store(tmp_path).shards[0].codes[:] = 0
    assert not Store(tmp_path, verify=True).damaged


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    values, norm = torch.zeros(2, 32), torch.ones(2)
    with pytest.raises(ValueError, match="64 bits.*'10000000000000000'"):
        write_shard(tmp_path, 9, ["1", "1" + "0" * 16], values, norm, CODING)
    with pytest.raises(ValueError, match="got '-1'"):
        write_shard(tmp_path, 9, ["1", "-1"], values, norm, CODING)
    with pytest.raises(ValueError, match="1 ids, 2 features"):
        write_shard(tmp_path, 9, ["1"], values, norm, CODING)
    with pytest.raises(ValueError, match="norm of document 2 is nan"):
        write_shard(tmp_path, 9, ["1", "2"], values, torch.tensor([1.0, torch.nan]), CODING)
    with pytest.raises(Jz3Error, match="32 numbers of 4 bits"):
        write_shard(tmp_path, 9, ["1", "2"], values, norm, Coding(CODING.mean, CODING.scale, 8))
    with pytest.raises(ValueError, match="bits must be one of"):
        open_store(tmp_path / "other", dataclasses.replace(INFO, bits=3))
    assert not has_shard(tmp_path, 9) and len(Store(tmp_path)) == 15


def test_a_store_only_grows(tmp_path: Path) -> None:
    fill(tmp_path)
    before = (tmp_path / "000001.safetensors").read_bytes()
    with pytest.raises(Jz3Error, match="holds other documents"):
        write_shard(tmp_path, 1, ["1", "2"], torch.zeros(2, 32), torch.ones(2), CODING)
    assert (tmp_path / "000001.safetensors").read_bytes() == before
    (tmp_path / "000001.safetensors").write_bytes(before[:-1])
    assert not has_shard(tmp_path, 1)
    fill(tmp_path)
    assert (tmp_path / "000001.safetensors").read_bytes() == before


def limited_disk(code: str, folder: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that may write no file larger than `size` bytes."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    head = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); folder = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", head + limit + code, str(folder), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True)


FILL = "import test_store; test_store.fill(folder, shards=2, rows=4000)"


def test_no_room_in_mid_shard(tmp_path: Path) -> None:
    fill(tmp_path, shards=1, rows=4000)
    assert (tmp_path / "000000.safetensors").stat().st_size > 60_000
    done = limited_disk(FILL.replace("shards=2", "shards=3"), tmp_path, 50_000)
    assert done.returncode == 1 and "Jz3Error: shard 0 does not fit on the disk" in done.stderr
    # The shard was being replaced and is gone; half of one isn't there.
    assert sorted(p.name for p in tmp_path.iterdir()) in (
        ["000000.safetensors", "store.json"],
        ["store.json"],
    )
    fill(tmp_path, shards=2, rows=4000)
    assert len(Store(tmp_path, verify=True)) == 8000


def test_full_disk_in_mid_shard(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs can't be mounted here")
    try:
        with pytest.raises(Jz3Error, match="shard 3 does not fit on the disk of .*No space left"):
            fill(disk, shards=9, rows=2000)
        store = Store(disk, verify=True)
        assert [s.number for s in store.shards] == [0, 1, 2] and not store.damaged
        assert not list(disk.glob("*.part"))
    finally:
        subprocess.run(["umount", disk], check=True)


def check_best(wanted: torch.Tensor, scores: torch.Tensor, rows: np.ndarray) -> None:
    """Compare found scores and rows [G, k] with all scores [G, N], up to the scan's grid (1e-4 of the spread)."""
    near = 1e-3 * float(wanted.std())
    for all_scores, found, picked in zip(wanted, scores, rows, strict=True):
        assert len(set(picked.tolist())) == len(picked)
        assert (found[1:] <= found[:-1]).all()
        assert torch.allclose(all_scores[torch.from_numpy(picked.astype(np.int64))], found, atol=near)
        best = all_scores.sort(descending=True).values[: len(picked)]
        assert torch.allclose(best, found, atol=near)


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("joined", [False, True])
def test_scan_finds_the_best_whatever_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, joined: bool
) -> None:
    for name, rows in (("IN_PLACE", 50), ("BLOCK", 30), ("BF16_BLOCK", 20), ("MOST_SHARDS", 4)):
        monkeypatch.setattr(sys.modules["jz3.store.scan"], name, rows)
    if joined:
        monkeypatch.setenv("JZ3_BACKEND", "score_topk=reference")
    generator = torch.Generator().manual_seed(2)
    values, queries = torch.randn(130, 32, generator=generator), torch.randn(3, 32, generator=generator)
    coding = Coding(CODING.mean, CODING.scale, bits)
    found = []
    first = 2**63 - 60
    for name, size in (("one", 130), ("many", 7)):
        open_store(tmp_path / name, dataclasses.replace(INFO, bits=bits))
        for number, start in enumerate(range(0, 130, size)):
            part = values[start : start + size]
            # Ids on both sides of 2^63: their order is that of unsigned numbers.
            ids = [f"{first + start + i:016x}" for i in range(len(part))]
            write_shard(tmp_path / name, number, ids, part, torch.ones(len(part)), coding)
        store = Store(tmp_path / name)
        found.append(scan(store, coding, queries, 20))
        decoded = torch.cat([v for _, v in store.values(coding)])
        check_best(queries @ decoded.T, found[-1][0], found[-1][1] - np.uint64(first))
    assert torch.equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_scan_of_tasks(tmp_path: Path, bits: int, reduce: str) -> None:
    coding = Coding(CODING.mean, CODING.scale, bits)
    open_store(tmp_path, dataclasses.replace(INFO, bits=bits))
    values = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    ids = [f"{i:016x}" for i in range(40)]
    write_shard(tmp_path, 0, ids, values, torch.ones(40), coding)
    [(_, decoded)] = Store(tmp_path).values(coding)
    queries, groups = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)), torch.tensor([1, 0, 1])
    scores, names = scan(Store(tmp_path), coding, queries, 40, groups=groups, reduce=reduce)
    products = queries @ decoded.T
    both = products[[0, 2]]
    wanted = torch.stack([products[1], both.mean(0) if reduce == "mean" else both.amax(0)])
    check_best(wanted, scores, names)
    with pytest.raises(ValueError, match="reduce must be mean or max"):
        scan(Store(tmp_path), coding, queries, 3, groups=groups, reduce="sum")


def test_equal_scores_go_to_the_smaller_id(tmp_path: Path) -> None:
    open_store(tmp_path, INFO)
    for number, ids in enumerate((["ffffffffffffffff", "0000000000000005"], ["8000000000000000", "3"])):
        write_shard(tmp_path, number, ids, torch.ones(2, 32), torch.ones(2), CODING)
    _, names = scan(Store(tmp_path), CODING, torch.ones(1, 32), 3)
    assert names[0].tolist() == [3, 5, 2**63]


def test_scan_of_nothing_and_of_other_rows(tmp_path: Path) -> None:
    open_store(tmp_path, INFO)
    scores, names = scan(Store(tmp_path), CODING, torch.ones(2, 32), 3)
    assert scores.shape == names.shape == (2, 0)
    for bits, documents in ((16, 0), (16, 3), (4, 3)):
        coding, folder = Coding(CODING.mean, CODING.scale, bits), tmp_path / f"{bits} {documents}"
        open_store(folder, dataclasses.replace(INFO, bits=bits))
        ids = [f"{i:016x}" for i in range(documents)]
        write_shard(folder, 0, ids, torch.ones(documents, 32), torch.ones(documents), coding)
        none = torch.zeros(0, dtype=torch.int64)
        for groups in (None, none):
            scores, names = scan(Store(folder), coding, torch.ones(0, 32), 3, groups=groups)
            assert scores.shape == names.shape == (0, documents)
    with pytest.raises(Jz3Error, match="the coding is for 32 of 8 bits"):
        scan(Store(tmp_path), Coding(CODING.mean, CODING.scale, 8), torch.ones(2, 32), 3)
