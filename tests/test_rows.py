"""Rows are read where they lie: each alone, in slices, some of them, and no stage of the loop holds them all."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_filtering
import test_synthesis
from test_synthesis import Writer

from jz3 import rows as module
from jz3.errors import Jz3Error
from jz3.files import read_jsonl, write_jsonl
from jz3.filtering import run, stage
from jz3.rows import Rows

writer = test_synthesis.writer


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Files of 5, 0 and 3 rows; the texts hold line ends, signs of several bytes and more than a block."""
    paths = [tmp_path / "stage" / f"{name}.jsonl" for name in "abc"]
    for number, (path, count) in enumerate(zip(paths, (5, 0, 3), strict=True)):
        write_jsonl(path, ({"id": 10 * number + i, "text": "α\n\u2028" * (7 * i)} for i in range(count)))
    return paths


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_rows_are_those_of_the_files(three: list[Path], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    expected = [row for path in three for row in read_jsonl(path)]
    rows = Rows(three, lambda row: row)
    assert len(rows) == 8 and list(rows) == expected and list(rows) == expected
    assert [rows[i] for i in range(-8, 8)] == expected * 2
    assert rows[3:6] == expected[3:6] and rows[::-2] == expected[::-2] and rows[9:] == []
    assert [rows.path(i) for i in (0, 4, 5, 7)] == [three[0], three[0], three[2], three[2]]
    for wrong in (8, -9):
        with pytest.raises(IndexError):
            rows[wrong]


def test_some_rows_are_taken_by_number_or_mask(three: list[Path]) -> None:
    rows = Rows(three, lambda row: row["id"])
    assert list(rows.take(np.array([7, 0, 5, 5]))) == [22, 0, 20, 20]
    some = rows.take(np.arange(8) % 2 == 1)
    assert list(some) == [1, 3, 20, 22] and some[1:3] == [3, 20] and len(some.take(np.array([], int))) == 0
    assert some.path(2) == three[2]


def test_a_file_without_a_last_line_end_ends_with_a_row(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"id": 1}\n{"id": 2}')
    assert list(Rows([tmp_path / "a"], lambda row: row["id"])) == [1, 2]


def test_what_is_damaged_or_missing_is_named(three: list[Path]) -> None:
    def decode(row: dict[str, Any]) -> int:
        if row["id"] == 22:
            raise ValueError("22 is no id")
        return row["id"]

    rows = Rows(three, decode)
    with pytest.raises(Jz3Error, match=r"c.jsonl:3 is damaged \(22 is no id\); run the stage 'stage' again"):
        rows.take(np.array([7]))[0]
    three[0].write_bytes(b'{"id": 0}\n{"id":\n{"id": "\xff"}\n')
    rows = Rows(three, decode)
    for number, line in enumerate(("a.jsonl:2", "a.jsonl:3"), 1):
        with pytest.raises(Jz3Error, match=f"{line} is damaged"):
            rows[number]
    with pytest.raises(Jz3Error, match="d.jsonl is missing; run the stage"):
        Rows([three[0].with_name("d.jsonl")], decode)


def peak(work: Callable[[], Any]) -> int:
    """Return the most bytes that Python's objects take while this is done, after it was done once."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_filters_do_not_hold_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "READ_SHARD", 16)
    long = [test_filtering.problem(solution="x" * 100_000, id=f"s{i}") for i in range(300)]
    ctx = test_filtering.context(tmp_path, long, [], test_filtering.small())
    del long
    assert peak(lambda: run(ctx)) < 12_000_000, "the texts alone are 30 MB"


def test_synthesis_does_not_hold_the_texts(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = test_synthesis.context(tmp_path, docs=300, count=300)
    docs = list(read_jsonl(tmp_path / "corpus" / "docs.jsonl"))
    long = ({**doc, "text": doc["text"] + " " + "x" * 100_000} for doc in docs)
    write_jsonl(tmp_path / "corpus" / "docs.jsonl", long)
    assert peak(lambda: test_synthesis.run(ctx)) < 12_000_000, "the texts alone are 30 MB"


def test_synthesis_does_not_open_a_file_for_every_text(
    tmp_path: Path, writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file server each takes a millisecond: two hours of six million."""
    opened: list[Path] = []

    def counted(path: Path, mode: str) -> Any:
        opened.append(path)
        return open(path, mode)

    monkeypatch.setattr(module, "open", counted, raising=False)
    ctx = test_synthesis.context(tmp_path, docs=100, count=200, shard_size=50)
    assert test_synthesis.run(ctx)["prompts"] == 200
    assert len(opened) < 20
