"""`jz3 store info | verify | merge`: damage and duplicates are told, only what fits together is merged."""

import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from jz3.cli import main
from jz3.errors import Jz3Error
from jz3.store import Coding, Store, StoreInfo, merge_stores, module_hash, open_store, verify, write_shard
from jz3.store.repeats import SHOWN

INFO = StoreInfo(kind="adapted", k=16, bits=4, model_hash="m", projection_hash="p", reduction="mean", seed=3)
CODING = Coding(torch.zeros(16), torch.ones(16), 4)


def fill(folder: Path, first: int, shards: int = 2, rows: int = 4, info: StoreInfo = INFO) -> None:
    open_store(folder, info)
    for number in range(shards):
        start = first + number * rows
        values = torch.randn(rows, 16, generator=torch.Generator().manual_seed(start))
        ids = [f"{start + i:016x}" for i in range(rows)]
        write_shard(folder, number, ids, values, torch.ones(rows), CODING)


def test_merge_links_the_shards_in_order(tmp_path: Path) -> None:
    fill(tmp_path / "a", 0)
    fill(tmp_path / "b", 100, shards=3)
    assert merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c") == 5
    merged = Store(tmp_path / "c", verify=True)
    assert not merged.damaged
    ids = np.concatenate([s.id for s in merged.shards]).tolist()
    assert ids == [*range(8), *range(100, 112)]
    assert os.path.samefile(merged.shards[3].path, tmp_path / "b" / "000001.safetensors")
    # Once more, as after a kill: nothing changes.
    (tmp_path / "c" / "000004.json").unlink()
    assert merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c") == 5
    assert len(Store(tmp_path / "c", verify=True)) == 20


def test_stores_of_several_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1, 10):
        fill(tmp_path / "run" / f"store-{number}", 0)
    assert main(["store", "info", str(tmp_path / "run")]) == 2
    told, run = capsys.readouterr().err, tmp_path / "run"
    assert f"has a store per checkpoint; give {run}/store-0 or {run}/store-1 or {run}/store-10" in told


def test_merge_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    fill(tmp_path / "a", 0)
    merge_stores([tmp_path / "a"], tmp_path / "c")
    [one, two] = [Store(tmp_path / n, verify=True).shards[1].path for n in ("a", "c")]
    assert one.read_bytes() == two.read_bytes() and not os.path.samefile(one, two)


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    fill(tmp_path / "a", 0)
    fill(tmp_path / "b", 100, info=dataclasses.replace(INFO, projection_hash="q", seed=4))
    fill(tmp_path / "same", 4)
    with pytest.raises(Jz3Error, match="projection_hash: 'p' in .*a, 'q' in .*b; seed: 3 in .*a, 4 in .*b"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(Jz3Error, match="same/000000.* is the same shard as .*a/000001.*; merge it once"):
        merge_stores([tmp_path / "a", tmp_path / "same"], tmp_path / "c")
    with pytest.raises(ValueError, match="can't be merged into itself"):
        merge_stores([tmp_path / "a"], tmp_path / "a")
    with pytest.raises(Jz3Error, match="no feature store"):
        merge_stores([tmp_path / "a", tmp_path / "none"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    merge_stores([tmp_path / "a"], tmp_path / "c")
    fill(tmp_path / "d", 500)
    with pytest.raises(Jz3Error, match="holds something else"):
        merge_stores([tmp_path / "d"], tmp_path / "c")
    path = tmp_path / "a" / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Jz3Error, match="damaged shards: .*000000.safetensors has"):
        merge_stores([tmp_path / "a"], tmp_path / "e")


def test_verify_tells_everything(tmp_path: Path) -> None:
    fill(tmp_path, 0, shards=4)
    values = torch.zeros(2, 16)
    write_shard(tmp_path, 9, ["1", "0000000000000002"], values, torch.ones(2), CODING)
    data = bytearray((tmp_path / "000001.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "000001.safetensors").write_bytes(data)
    (tmp_path / "000002.json").unlink()
    (tmp_path / "000007.safetensors.part").write_bytes(b"half")
    found = verify(tmp_path)
    assert found.shards == 3 and found.rows == 10
    assert list(found.damaged) == ["000001.safetensors"]
    assert found.unfinished == ["000002.safetensors", "000007.safetensors.part"]
    assert found.duplicate_count == 2
    assert found.duplicates[0] == ("0000000000000001", "000000.safetensors", "000009.safetensors")


def test_repeated_texts_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A corpus may hold a text twice, or a whole shard of them; a store is merged once."""
    for name, start in (("a", 0), ("b", 100)):
        fill(tmp_path / name, start)
        for number, ids in ((2, ["7", "7"]), (3, ["7", "7"])):
            write_shard(
                tmp_path / name, number, ids, torch.full((2, 16), float(start)), torch.ones(2), CODING
            )
    assert main(["store", "verify", str(tmp_path / "a")]) == 0
    assert "note: 1 ids come more than once (equal texts), e.g. 0000000000000007" in capsys.readouterr().out
    folders = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["store", "merge", *folders, "--out", str(tmp_path / "c")]) == 0
    text = capsys.readouterr().out
    assert "note: 1 ids" in text and "8 shards, 24 documents" in text
    assert main(["store", "merge", folders[0], folders[0], "--out", str(tmp_path / "d")]) == 2
    assert "is the same shard as" in capsys.readouterr().err


def test_repeated_ids_whatever_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs shorter than a shard, of several shards, or of all; ids that come once, twice or very often."""
    open_store(tmp_path, INFO)
    generator = random.Random(0)
    drawn = (
        [f"{int(2 ** generator.uniform(0, 10 if i % 2 else 64)):x}" for i in range(400)]
        + ["5"] * 90
        + ["ffffffffffffffff"] * 2
    )
    generator.shuffle(drawn)
    for number, start in enumerate(range(0, len(drawn), 41)):
        part = drawn[start : start + 41]
        values = torch.randn(len(part), 16)
        write_shard(tmp_path, number, part, values, torch.ones(len(part)), CODING)
    counts = Counter(int(name, 16) for name in drawn)
    wanted = {key for key, n in counts.items() if n > 1}
    assert len(wanted) > SHOWN
    for run in (1 << 17, 100, 41, 7, 1):
        monkeypatch.setattr("jz3.store.repeats.RUN", run)
        found = verify(tmp_path)
        assert found.duplicate_count == len(wanted)
        assert len(found.duplicates) == SHOWN
        for name, one, other in found.duplicates:
            places = [i // 41 for i, key in enumerate(drawn) if int(key, 16) == int(name, 16)]
            assert [one, other] == [f"{n:06d}.safetensors" for n in places[:2]]


def test_no_room_for_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 0, shards=3)
    monkeypatch.setattr("jz3.store.repeats.RUN", 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32, before[1]))
    try:
        with pytest.raises(Jz3Error, match="8 bytes a document, don't fit into .* set TMPDIR"):
            verify(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "run" / "features" / "store", 0)
    fill(tmp_path / "b", 100)
    assert main(["store", "info", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for line in (
        "kind             adapted",
        "rows             8",
        "seed             3",
        "code             4bit",
    ):
        assert line in text
    assert "'torch'" in text
    assert main(["store", "verify", str(tmp_path / "run"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.count("2 whole shards, 8 documents") == 2
    out = str(tmp_path / "c")
    assert main(["store", "merge", str(tmp_path / "run"), str(tmp_path / "b"), "--out", out]) == 0
    assert "4 shards, 16 documents" in capsys.readouterr().out
    (tmp_path / "b" / "000000.safetensors").unlink()
    assert main(["store", "verify", str(tmp_path / "b")]) == 2
    told = capsys.readouterr()
    assert "000000.safetensors is missing" in told.out and "1 damaged shards" in told.err
    for arguments, text in (
        (["merge", str(tmp_path / "b")], "needs --out"),
        (["info"], "needs the folder"),
        (["burn", str(tmp_path)], "must be one of info, verify, merge"),
        (["verify", str(tmp_path), "--out", "x"], "store verify writes nothing; --out x is for merge"),
        (["info", str(tmp_path)], "is no feature store"),
    ):
        assert main(["store", *arguments]) == 2
        assert text in capsys.readouterr().err


def test_module_hash_sees_names_shapes_and_order() -> None:
    table = {"a": (4, 8), "b": (8, 4)}
    assert module_hash(table) == module_hash(dict(table))
    assert (
        len(
            {
                module_hash(t)
                for t in (table, {"a": (4, 8)}, {"a": (4, 8), "b": (4, 8)}, {"a": (4, 8), "c": (8, 4)})
            }
        )
        == 4
    )


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    """`jz3 ... | head` ends without a word."""
    fill(tmp_path, 0)
    code = "import sys; from jz3.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "store", "info", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
