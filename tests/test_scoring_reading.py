"""What reading a planned corpus costs, counted: a file is gone through once however many shards it has."""

import errno
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scoring_runs as runs

from jz3.corpus import readers
from jz3.corpus.readers import SourceText
from jz3.scoring.config import ScoreSettings
from jz3.scoring.merge import _tables
from jz3.scoring.plan import Plan, make_plan
from jz3.scoring.reading import Reader
from jz3.scoring.shard import read_about, scores_path
from jz3.scoring.workers import parts

SHARDS, ROWS = 20, 15


class Counted(io.RawIOBase):
    """A stream that counts what is read from it."""

    def __init__(self, stream: Any, count: Counter[str]) -> None:
        self._stream, self._count = stream, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._count["units"] += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


@pytest.mark.parametrize("name", ["a.jsonl", "c.parquet"])
def test_a_file_that_cannot_be_read_now_gets_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A Parquet file's rows would be missing without a word, as the plan would know of none."""
    runs.make_corpus(tmp_path, 6)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("jz3.scoring.plan.open_lines", fail)
    monkeypatch.setattr(pq, "read_metadata", fail)
    with pytest.raises(OSError, match="Input/output error; the same command") as caught:
        make_plan([str(tmp_path / name)], ScoreSettings(), {})
    assert caught.value.filename == str(tmp_path / name)


def test_scores_that_cannot_be_read_now_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message about damaged ones advises, to delete them, would cost their work."""
    plan = make_plan([runs.make_corpus(tmp_path, 6)[0]], ScoreSettings(), {})

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq, "read_schema", fail)
    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error; the same command"):
        read_about(scores_path(tmp_path, 0), plan.key)
    with pytest.raises(OSError, match="Input/output error; the same command"):
        list(_tables(tmp_path, plan, ["norm"]))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that were decompressed of JSON lines, rows that were decoded of Parquet."""
    units: Counter[str] = Counter()
    open_lines, iter_batches = readers.open_lines, pq.ParquetFile.iter_batches

    def counted_lines(path: Path) -> Any:
        return io.BufferedReader(Counted(open_lines(path), units), 512)

    def counted_batches(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in iter_batches(self, *arguments, **options):
            units["units"] += len(batch)
            yield batch

    monkeypatch.setattr(readers, "open_lines", counted_lines)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted_batches)
    return units


def planned(folder: Path, suffix: str) -> tuple[Plan, int]:
    """Write a file of 20 shards, of Parquet in one row group; return its plan and its size in what is counted."""
    rows = [{"id": str(i), "text": t} for i, t in enumerate(runs.texts(SHARDS * ROWS))]
    path = folder / f"a{suffix}"
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        runs.write_lines(path, rows)
    plan = make_plan([str(path)], ScoreSettings(shard_documents=ROWS), {})
    assert len(plan.shards) == SHARDS
    return plan, len(rows) if suffix == ".parquet" else len(data)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_of_many_shards_is_read_once(tmp_path: Path, suffix: str, count: Counter[str]) -> None:
    plan, size = planned(tmp_path, suffix)
    count.clear()
    reader = Reader(plan)
    shards = [list(reader.read(shard)) for shard in plan.shards]
    reader.close()
    assert count["units"] == size
    assert [r.meta["id"] for rows in shards for r in rows if isinstance(r, SourceText)] == [
        str(i) for i in range(SHARDS * ROWS)
    ]
    # Each by itself, in any order and after a reading that was broken off, every shard is the same.
    order = random.Random(0).sample(range(SHARDS), SHARDS)
    for number in order:
        unfinished = reader.read(plan.shards[order[0]])
        next(unfinished)
        assert list(reader.read(plan.shards[number])) == shards[number]
        assert list(Reader(plan).read(plan.shards[number])) == shards[number]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_workers_of_one_file_read_on_from_where_they_begin(
    tmp_path: Path, suffix: str, count: Counter[str]
) -> None:
    """Four parts of a file: each goes through what lies before it and itself, once: 2.5 files in all."""
    plan, size = planned(tmp_path, suffix)
    count.clear()
    part = parts(plan, 4)
    for number in range(4):
        reader = Reader(plan)
        for shard in plan.shards:
            if part[shard.number] == number:
                assert len(list(reader.read(shard))) == ROWS
        reader.close()
    # What is decoded at a time (64 rows) may be a little more than a part.
    assert count["units"] <= 3 * size


def test_shards_that_are_passed_over_cost_one_pass(tmp_path: Path, count: Counter[str]) -> None:
    """A worker between others' shards, and a sample, go through the file at most once."""
    plan, size = planned(tmp_path, ".jsonl.gz")
    count.clear()
    reader = Reader(plan)
    assert [next(iter(reader.read(s))).where.rpartition(":")[2] for s in plan.shards[::3]] == [
        str(s.skip + 1) for s in plan.shards[::3]
    ]
    assert count["units"] <= size
    count.clear()
    assert len(reader.sample(40, "fit")) == 40 and count["units"] <= size
    assert len(reader.sample(40, "fit")) == 40 and count["units"] <= size


def test_the_plan_of_a_large_corpus_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jz3.scoring.plan.REPORT_SECONDS", 0.0)
    said: list[str] = []
    make_plan(runs.make_corpus(tmp_path, 60), ScoreSettings(shard_documents=12), {}, say=said.append)
    assert said[:3] == [
        f"plan: {rows} rows counted, file {n} of 3" for rows, n in ((12, 1), (20, 1), (32, 2))
    ]
