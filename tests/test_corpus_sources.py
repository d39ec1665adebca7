"""Sources: every kind is read, every kind of damage is counted with file and line."""

import errno
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jz3.corpus import SourceConfig, read_texts, readers
from jz3.corpus.docstrings import Docstring, docstrings, source_files, topic_of
from jz3.corpus.parquet import ParquetReader, read_parquet_file
from jz3.corpus.readers import SourceText
from jz3.corpus.sources import open_source
from jz3.errors import Jz3Error
from jz3.files import write_jsonl
from jz3.records import Reject


def jsonl(*paths: Path, **settings) -> SourceConfig:
    return SourceConfig(name="mine", kind="jsonl", paths=tuple(map(str, paths)), **settings)


def split(source: SourceConfig, seed: int = 0) -> tuple[list[SourceText], list[Reject]]:
    records = list(read_texts(source, seed))
    return [r for r in records if isinstance(r, SourceText)], [r for r in records if isinstance(r, Reject)]


def test_every_kind_of_bad_line_is_a_counted_reject(tmp_path):
    lines = [
        b'{"text": "good one"}',
        b'{"text": ',
        b"[1, 2]",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": " \\n "}',
        b'{"text": "nul \\u0000 inside"}',
        b'{"text": "half \\ud800 pair"}',
        b'{"text": "bad \xff byte"}',
        b'{"text": "' + b"x" * 400 + b'"}',
        b'{"text": ' + b"[" * 150 + b"}",
        b'{"n": ' + b"9" * 150 + b', "text": "big number"}',
        b"",
        b'{"text": "good two"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts, rejects = split(jsonl(path, max_line_bytes=300))
    assert [t.text for t in texts] == ["good one", "big number", "good two"]
    assert texts[-1].where == f"{path}:15"
    assert [(r.reason, r.where) for r in rejects] == [
        ("malformed_json", f"{path}:2"),
        ("not_an_object", f"{path}:3"),
        ("missing_field", f"{path}:4"),
        ("wrong_type", f"{path}:5"),
        ("wrong_type", f"{path}:6"),
        ("empty_text", f"{path}:7"),
        ("nul_bytes", f"{path}:8"),
        ("invalid_unicode", f"{path}:9"),
        ("invalid_utf8", f"{path}:10"),
        ("line_too_long", f"{path}:11"),
        ("malformed_json", f"{path}:12"),
    ]
    assert "other" in rejects[2].detail
    for row in rejects:
        json.dumps(row.to_json(), ensure_ascii=False).encode()
    assert len({r.id for r in rejects}) == len(rejects)


def test_hostile_json_does_not_break_the_reader(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": '
        + b"[" * 200_000
        + b"\n"
        + b'{"n": '
        + b"9" * 10_000
        + b', "text": "a"}\n{"text": "fine"}\n'
    )
    texts, rejects = split(jsonl(path))
    assert texts[-1].text == "fine"
    assert [r.reason for r in rejects][:1] == ["malformed_json"]


def test_a_field_at_the_limit_of_nesting_costs_its_line_alone(tmp_path):
    path, limit = tmp_path / "a.jsonl", sys.getrecursionlimit()
    nested = ("[" * depth + "]" * depth for depth in range(limit - 150, limit))
    path.write_text("".join(f'{{"text": "deep", "n": {n}}}\n' for n in nested) + '{"text": "fine"}\n')
    texts, rejects = split(jsonl(path, keep_fields=("n",)))
    assert texts[-1].text == "fine" and len(texts) + len(rejects) == 151
    assert {r.reason for r in rejects} <= {"malformed_json"}


def test_a_one_megabyte_line_is_read_and_a_byte_order_mark_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "word " * 200_000}).encode() + b"\r\n")
    texts, rejects = split(jsonl(path))
    assert len(texts[0].text) == 1_000_000 and not rejects


def test_fields_are_joined_nested_and_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"q": "Why?", "a": {"body": "So."}, "score": 0.5, "tags": ["x"], "b.c": "d"}) + "\n"
    )
    texts, _ = split(jsonl(path, text_field="q+a.body", keep_fields=("score", "tags", "absent", "b.c")))
    assert texts[0].text == "Why?\n\nSo."
    assert texts[0].meta == {"score": "0.5", "tags": '["x"]', "b.c": "d"}


def zst(data: bytes, tmp_path: Path) -> bytes:
    path = tmp_path / "scratch"
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_and_truncated_ones_reported(tmp_path, suffix):
    lines = [json.dumps({"text": f"text {i} " + str(i * 7919)}).encode() + b"\n" for i in range(20_000)]
    data = gzip.compress(b"".join(lines)) if suffix == ".gz" else zst(b"".join(lines), tmp_path)
    whole, broken = tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.jsonl{suffix}"
    whole.write_bytes(data)
    broken.write_bytes(data[: len(data) * 3 // 4])
    texts, rejects = split(jsonl(whole))
    assert len(texts) == 20_000 and not rejects
    texts, rejects = split(jsonl(tmp_path / f"*.jsonl{suffix}"))
    assert 20_000 < len(texts) < 40_000
    assert rejects[-1].reason == "damaged_file" and rejects[-1].where.startswith(f"{broken}:")
    twice = tmp_path / f"twice{suffix}"
    twice.write_bytes(data + data)
    assert len(split(jsonl(twice))[0]) == 40_000, "files joined by cat"
    nothing = tmp_path / f"c.jsonl{suffix}"
    nothing.write_bytes(b"not compressed at all")
    with pytest.raises(Jz3Error, match="no usable text.*damaged_file"):
        split(jsonl(nothing))


def test_unusable_sources_are_one_line_errors(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(Jz3Error, match="matches no file"):
        split(jsonl(tmp_path / "absent*.jsonl"))
    with pytest.raises(Jz3Error, match="it is a folder"):
        split(jsonl(tmp_path))
    with pytest.raises(Jz3Error, match=r"empty\.jsonl: empty_file"):
        split(jsonl(empty))
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "good"}\n')
    texts, rejects = split(jsonl(good, empty))
    assert [t.text for t in texts] == ["good"] and [r.reason for r in rejects] == ["empty_file"]
    with pytest.raises(Jz3Error, match=r"missing_field no field 'body'; fields: text"):
        split(jsonl(good, text_field="body"))


def test_globs_are_expanded_in_order_and_once(tmp_path):
    for name in ("b", "a", "sub/c"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "a.jsonl")
    source = jsonl(tmp_path / "b.jsonl", tmp_path / "sub" / ".." / "b.jsonl", tmp_path / "**" / "*.jsonl")
    assert [t.text for t in split(source)[0]] == ["a", "b", "sub/c"]


@pytest.mark.parametrize("pattern", ["**/*.jsonl", os.fsdecode(b"caf\xe9/*")])
def test_a_file_name_that_is_no_utf8_is_refused(tmp_path, pattern):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "good"}\n')
    with pytest.raises(Jz3Error, match=r"caf\\xe9/a\.jsonl is no UTF-8; rename it") as error:
        split(jsonl(tmp_path / pattern))
    str(error.value).encode()
    folder.rename(tmp_path / "café")
    assert [t.text for t in split(jsonl(tmp_path / "**" / "*.jsonl"))[0]] == ["good"]


def test_rejects_of_odd_field_names_can_be_written(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"\\ud800": 1}\n{"text": "good"}\n')
    [row] = split(jsonl(path))[1]
    assert row.reason == "missing_field" and "fields: ?" in row.detail
    write_jsonl(tmp_path / "rejects.jsonl", [row.to_json()])


@pytest.mark.parametrize(
    ("skip", "rows", "wanted"), [(0, 4, [0, 1, 2, 3]), (3, 5, [3, 4, 5, 6, 7]), (9, 9, [9]), (0, 0, [])]
)
def test_rows_of_a_parquet_file(tmp_path, skip, rows, wanted):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(10)]}), path, row_group_size=3)
    found = list(ParquetReader(path, jsonl(path)).read(skip, rows))
    assert [r.text for r in found if isinstance(r, SourceText)] == [f"text {i}" for i in wanted]
    assert len(found) == len(wanted)


class Stale(io.RawIOBase):
    """A file whose server goes away behind its first bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if count := self._data.readinto(buffer):
            return count
        raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_cannot_be_read_now_is_no_damaged_file(tmp_path, monkeypatch, kind):
    """What is left of it would be lost for ever, as a read file is not read again."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"not opened")

    def stale(*_: object, **__: object) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(readers, "open_lines", lambda _: io.BufferedReader(Stale(b'{"text": "one"}\n{"te')))
    monkeypatch.setattr(pq, "ParquetFile", stale)
    read = read_parquet_file if kind == "parquet" else readers.read_jsonl_file
    found = []
    with pytest.raises(OSError, match="Stale file handle; the same command goes on from here") as caught:
        found.extend(read(path, SourceConfig(name="a", kind=kind, paths=(str(path),))))
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(path))
    assert len(found) == (kind == "jsonl")


def test_parquet(tmp_path):
    source = SourceConfig(
        name="p",
        kind="parquet",
        paths=(str(tmp_path / "*.parquet"),),
        text_field="doc.body",
        keep_fields=("n",),
    )
    rows = [{"body": "one"}, {"body": ""}, {"body": None}, {"body": "two"}]
    pq.write_table(pa.table({"doc": rows, "n": [1, 2, 3, 4], "unused": ["x"] * 4}), tmp_path / "a.parquet")
    texts, rejects = split(source)
    assert [(t.text, t.meta["n"]) for t in texts] == [("one", "1"), ("two", "4")]
    assert [(r.reason, r.where.rpartition(":")[2]) for r in rejects] == [
        ("empty_text", "2"),
        ("wrong_type", "3"),
    ]
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-20])
    (tmp_path / "c.parquet").touch()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"doc": rows[:0], "n": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    texts, rejects = split(source)
    assert len(texts) == 2
    assert Counter(r.reason for r in rejects[2:]) == {"damaged_file": 1, "empty_file": 2, "missing_field": 1}
    assert "columns: text" in next(r for r in rejects if r.reason == "missing_field").detail


def _strings(cells: list[bytes]) -> pa.Array:
    """A column of strings whose bytes nobody checked."""
    buffers = pa.array(cells, pa.binary()).buffers()
    return pa.StringArray.from_buffers(len(cells), buffers[1], buffers[2])


def test_parquet_with_invalid_utf8_loses_only_those_cells(tmp_path):
    broken = _strings([b"fine", b"bad \xff", b"good"])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    texts, rejects = split(SourceConfig(name="p", kind="parquet", paths=(str(tmp_path / "a.parquet"),)))
    assert [t.text for t in texts] == ["fine", "good"] and [r.reason for r in rejects] == ["invalid_utf8"]


BAD = _strings([b"x", b"bad \xff", b"y"])


@pytest.mark.parametrize(
    "column",
    [
        pa.StructArray.from_arrays([BAD], ["inner"]),
        pa.ListArray.from_arrays([0, 1, 2, 3], BAD),
        pa.array([1, 10**8, 2], pa.int32()).cast(pa.date32()),
        pa.array([1, 2**62, 2]).cast(pa.timestamp("us")),
        pa.array([1, 2**62, 2]).cast(pa.duration("s")),
    ],
    ids=lambda column: str(column.type),
)
def test_a_parquet_value_that_python_cannot_hold_costs_its_row_alone(tmp_path, column):
    pq.write_table(pa.table({"text": ["one", "two", "three"], "d": column}), tmp_path / "a.parquet")
    source = SourceConfig(name="p", kind="parquet", paths=(str(tmp_path / "a.parquet"),), keep_fields=("d",))
    texts, [row] = split(source)
    assert [t.text for t in texts] == ["one", "three"] and all(t.meta["d"] for t in texts)
    assert (row.reason, row.where) == ("unreadable_value", f"{tmp_path / 'a.parquet'}:2")
    assert "column 'd'" in row.detail


def test_huggingface_folders(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["one", "", "two"], "n": [1, 2, 3]})
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    data.to_json(str(tmp_path / "files" / "train.jsonl"))

    def source(name: str, **settings) -> SourceConfig:
        return SourceConfig(
            name="h", kind="huggingface", dataset=str(tmp_path / name), keep_fields=("n",), **settings
        )

    for name in ("plain", "dict", "files"):
        texts, rejects = split(source(name))
        assert [(t.text, t.meta) for t in texts] == [("one", {"n": "1"}), ("two", {"n": "3"})], name
        assert [r.reason for r in rejects] == ["empty_text"]
        (unit,) = open_source(source(name), 0)
        assert [r.where for r in unit.read(2)] == [f"{tmp_path / name}:train:3"]
    assert [t.text for t in split(source("dict", split="test"))[0]] == ["two"]
    with pytest.raises(Jz3Error, match="no split 'dev'; splits: train, test"):
        split(source("dict", split="dev"))
    with pytest.raises(Jz3Error, match="no such folder"):
        split(source("absent"))


def test_worked_problems_are_labelled_and_keep_their_family():
    pytest.importorskip("reasoning_gym")
    source = SourceConfig(name="w", kind="worked", families=("gcd", "products"), count=5)
    texts, rejects = split(source, seed=3)
    assert len(texts) == 10 and not rejects
    assert all(t.generated and "\\boxed{" in t.text for t in texts)
    assert Counter(t.meta["family"] for t in texts) == {"gcd": 5, "products": 5}
    assert [t.text for t in texts] == [t.text for t in split(source, seed=3)[0]]
    assert [t.text for t in texts] != [t.text for t in split(source, seed=4)[0]]
    with pytest.raises(Jz3Error, match="no family 'sums'"):
        split(SourceConfig(name="w", kind="worked", families=("sums",)))


def fake_package(folder: Path) -> None:
    long = "Return the sum of all the terms of the series, computed with care. " * 4
    files = {
        "__init__.py": f'"""The package. {long}"""\nraise SystemExit("was executed")\n',
        "public.py": f'''
def documented():
    """{long} documented"""
def _private():
    """{long} private"""
def short():
    """Short."""
def old():
    """Deprecated. {long}"""
class Thing:
    """{long} Thing

    %(template)s
    More of it."""
    def method(self):
        """{long} method"""
''',
        "_hidden.py": f'''
__all__ = ["exported"]
def exported():
    """{long} exported"""
def other():
    """{long} other"""
''',
        "_newdocs.py": f'add_newdoc("compiled", """{long} compiled""")\nattached = """{long} attached"""\n',
        "tests/test_it.py": f'"""{long} tests"""\n',
        "_vendor/x.py": f'"""{long} vendored"""\n',
        "broken.py": "def :\n",
    }
    for name, text in files.items():
        path = folder / "fakepkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_docstrings_are_parsed_not_imported(tmp_path, monkeypatch):
    fake_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(docstrings("fakepkg", 0, "fake"))
    names = sorted(d.name for d in found if isinstance(d, Docstring))
    assert names == [
        "fakepkg",
        "fakepkg._hidden.exported",
        "fakepkg._newdocs.attached",
        "fakepkg._newdocs.compiled",
        "fakepkg.public.Thing",
        "fakepkg.public.Thing.method",
        "fakepkg.public.documented",
    ]
    assert [d.where for d in found if not isinstance(d, Docstring)] == ["fakepkg/broken.py"]
    thing = next(d for d in found if isinstance(d, Docstring) and d.name.endswith("Thing"))
    assert "%(" not in thing.text and thing.text.endswith("\n\nMore of it.")
    assert found == list(docstrings("fakepkg", 0, "fake"))
    assert found != list(docstrings("fakepkg", 1, "fake"))
    _, rejects = split(SourceConfig(name="fakepkg", kind="docstrings"))
    assert [r.reason for r in rejects] == ["unparsed_file"]


def test_docstrings_of_real_packages():
    first = [d for d, _ in zip(docstrings("scipy.special", 0, "s"), range(40), strict=False)]
    assert all(isinstance(d, Docstring) and d.where.startswith("scipy/special/") for d in first)
    assert len({d.where.split(":")[0] for d in first}) > 8
    _, files = source_files("stdlib")
    names = {path.name for path in files}
    assert {"typing.py", "argparse.py"} <= names and not {"statistics.py", "fractions.py"} & names
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    assert (topic_of("scipy.special"), topic_of("stdlib"), topic_of("email"), topic_of("unheard")) == (
        "mathematics",
        "background",
        "background",
        "",
    )
    with pytest.raises(Jz3Error, match="pip install no_such_package"):
        source_files("no_such_package")
    with pytest.raises(Jz3Error, match="no Python sources at"):
        source_files("scipy.no_such_part")


def test_a_sample_depends_on_the_text_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text number {i}"}) + "\n" for i in range(2000)]
    path.write_text("".join(lines))
    some = {t.text for t in split(jsonl(path, sample=0.25))[0]}
    path.write_text("".join(reversed(lines)))
    assert {t.text for t in split(jsonl(path, sample=0.25))[0]} == some
    assert 400 < len(some) < 600
    assert {t.text for t in split(jsonl(path, sample=0.25), seed=1)[0]} != some


def test_records_are_taken_by_what_a_field_holds(tmp_path):
    rows = [
        {"text": "one", "of": "StackExchange-math"},
        {"text": "two", "of": "MetaMath"},
        {"text": "three", "of": None},
        {"text": "four"},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    settings: dict[str, Any] = {"match_field": "of", "match": "stackexchange"}
    texts, [lacking] = split(jsonl(tmp_path / "a.jsonl", **settings))
    assert [(t.text, t.meta) for t in texts] == [("one", {"of": "StackExchange-math"})]
    assert (lacking.reason, lacking.where) == ("missing_field", f"{tmp_path / 'a.jsonl'}:4")
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "a.parquet")
    parquet = SourceConfig(name="p", kind="parquet", paths=(str(tmp_path / "a.parquet"),), **settings)
    assert [t.text for t in split(parquet)[0]] == ["one"]


def test_memory_stays_flat_for_a_long_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as handle:
        for i in range(20_000):
            handle.write(json.dumps({"text": f"{i} " + "lorem ipsum " * 150}) + "\n")
    tracemalloc.start()
    count = sum(isinstance(r, SourceText) for r in read_texts(jsonl(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2 << 20, f"{peak} bytes for a file of 36 MB"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "csv"}, "kind must be one of"),
        ({"kind": "jsonl"}, "needs paths"),
        ({"kind": "docstrings", "sample": 0.0}, "sample must be"),
        ({"kind": "docstrings", "limit": -1}, "limit must be"),
        ({"kind": "huggingface"}, "needs dataset"),
        ({"kind": "worked"}, "needs families"),
        ({"kind": "docstrings", "name": "../up"}, "a name is made of"),
        ({"kind": "jsonl", "paths": ("a",), "match": "x"}, "match_field and match go together"),
        ({"kind": "docstrings", "match_field": "a", "match": "x"}, "has no fields"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"name": "x", **settings})


def test_importing_the_package_is_light():
    heavy = ("numpy", "torch", "transformers", "pyarrow", "datasets", "rensa")
    code = f"import sys, jz3.corpus; print([m for m in {heavy} if m in sys.modules])"
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
