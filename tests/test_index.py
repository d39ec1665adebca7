"""The index finds what the exact scan finds, in parts, resumed, grown; texts are looked up by offset."""

import dataclasses
import errno
import gzip
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jz3.cli import main
from jz3.errors import Jz3Error
from jz3.files import write_jsonl
from jz3.gradients import Tokens
from jz3.index import build
from jz3.index.build import build_index, recall
from jz3.index.config import IndexConfig
from jz3.index.docs import DocFile
from jz3.index.opening import open_collection
from jz3.index.query import Encoder, Found, Match, _show
from jz3.index.search import SearchIndex
from jz3.index.vectors import Member, Vectors
from jz3.records import Doc
from jz3.store import Coding, Store, StoreInfo, open_store, scan, write_shard

faiss = pytest.importorskip("faiss")

K, ROWS = 32, 500
INFO = StoreInfo(kind="adapted", k=K, bits=8, model_hash="m", projection_hash="p", reduction="mean")
CODING = Coding(torch.zeros(K), torch.full((K,), 0.3), 8)
FIRST = 2**63 - 700


def values_of(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    centres = torch.randn(12, K, generator=torch.Generator().manual_seed(99))
    values = centres[torch.randint(12, (ROWS,), generator=generator)]
    values = values + 0.5 * torch.randn(ROWS, K, generator=generator)
    return values / values.norm(dim=1, keepdim=True)


def fill(folder: Path, shards: int) -> Store:
    open_store(folder, INFO)
    for number in range(shards):
        ids = [f"{FIRST + number * ROWS + i:016x}" for i in range(ROWS)]
        write_shard(folder, number, ids, values_of(number), torch.ones(ROWS), CODING)
    return Store(folder)


def vectors_of(store: Store) -> Vectors:
    return Vectors([Member(store, CODING)])


def opened(folder: Path, probes: int = 16) -> SearchIndex:
    return SearchIndex.open(folder, INFO.identity(), probes)


def exact_best(store: Store, queries: torch.Tensor, k: int) -> list[set[int]]:
    decoded = torch.cat([v for _, v in store.values(CODING)])
    return [{FIRST + int(i) for i in row} for row in (queries @ decoded.T).topk(k).indices]


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("Flat", 0.99),
        ("IVF8,SQ8", 0.95),
        ("IVF8,PQ16x4", 0.4),
        ("HNSW32", 0.9),
        ("HNSW32,SQ8", 0.9),
        ("PCA16,IVF8,SQ8", 0.4),
    ],
)
def test_factories(tmp_path: Path, factory: str, least: float) -> None:
    store = fill(tmp_path / "store", 3)
    config = IndexConfig(factory=factory, probes=8, recall_queries=30)
    built = build_index(vectors_of(store), tmp_path / "index", config)
    assert built["documents"] == 3 * ROWS and built["recall_queries"] == 30
    assert built == json.loads((tmp_path / "index" / "index.json").read_text())
    queries = values_of(77)[:40]
    scores, ids = opened(tmp_path / "index").search(queries.numpy(), 100)
    assert ids.shape == (40, 100) and (np.diff(scores, axis=1) <= 0).all()
    shares = [
        len(set(i.tolist()) & e) / 100 for i, e in zip(ids, exact_best(store, queries, 100), strict=True)
    ]
    assert np.mean(shares) >= least
    # The recall that is printed is the one that is found here by another way.
    measured = recall(
        opened(tmp_path / "index").search(queries.numpy(), 100)[1], scan(store, CODING, queries, 100)[1]
    )
    assert measured == pytest.approx(np.mean(shares), abs=0.005)
    assert abs(built["recall_at_100"] - np.mean(shares)) < 0.15


def test_recall_counts_equal_texts_as_often_as_they_come() -> None:
    ids = np.array([[7, 7, 8, 9]], np.uint64)
    assert recall(ids, np.array([[7, 7, 7, 8]], np.uint64)) == 0.75


def test_vectors_are_the_checkpoints_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of shards, or single rows; their inner products are the weighted sums of the checkpoints'."""
    monkeypatch.setattr("jz3.index.vectors.BLOCK", 300)
    stores = [fill(tmp_path / "one", 2), fill(tmp_path / "two", 0)]
    for number in range(2):
        ids = [f"{FIRST + number * ROWS + i:016x}" for i in range(ROWS)]
        write_shard(tmp_path / "two", number, ids, values_of(7 + number), torch.ones(ROWS), CODING)
    stores[1].refresh()
    vectors = Vectors(
        [Member(store, CODING, weight) for store, weight in zip(stores, (0.25, 0.75), strict=True)]
    )
    decoded = [torch.cat([v for _, v in store.values(CODING)]) for store in stores]
    whole = torch.cat([decoded[0] * 0.5, decoded[1] * 0.75**0.5], 1).numpy()
    pieces = list(vectors.blocks())
    assert [(s.number, start, len(v)) for s, start, v in pieces] == [
        (0, 0, 300), (0, 300, 200), (1, 0, 300), (1, 300, 200)
    ]  # fmt: skip
    assert np.array_equal(np.concatenate([v for *_, v in pieces]), whole)
    assert np.array_equal(vectors.rows(vectors.shards[1], np.array([3, 499])), whole[[ROWS + 3, ROWS + 499]])
    asked = values_of(20)[:3], values_of(21)[:3]
    queries = vectors.weighted(asked)
    wanted = 0.25 * asked[0] @ decoded[0].T + 0.75 * asked[1] @ decoded[1].T
    scores, found = vectors.scan(queries, 5)
    np.testing.assert_allclose(queries.numpy() @ whole.T, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(scores, wanted.topk(5).values, atol=1e-3)
    assert found.shape == (3, 5)
    assert len({Vectors([Member(s, CODING)]).identity for s in stores} | {vectors.identity}) == 2


def test_how_many_are_looked_for_may_be_numpys(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 1)
    build_index(vectors_of(store), tmp_path / "index", IndexConfig(factory="Flat"))
    index, queries = opened(tmp_path / "index"), values_of(77)[:3].numpy()
    for one, two in zip(index.search(queries, 5), index.search(queries, np.int64(5)), strict=True):  # pyright: ignore[reportArgumentType]
        assert np.array_equal(one, two)
    with pytest.raises(ValueError, match=r"search: k must be in \[1, \d+\], got 0"):
        index.search(queries, 0)


def test_few_probes_have_less_recall(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 3)
    found = [
        build_index(
            vectors_of(store), tmp_path / str(probes), IndexConfig(factory="IVF16,SQ8", probes=probes)
        )["recall_at_100"]
        for probes in (1, 16)
    ]
    assert found[0] < 0.9 < found[1]


def test_parts_are_mapped_and_change_nothing(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 6)
    whole = build_index(vectors_of(store), tmp_path / "one", IndexConfig(factory="IVF8,SQ8"))
    # Room for the training sample and for 1,000 rows of 40 bytes.
    small = IndexConfig(factory="IVF8,SQ8", train=300, memory=40_000 / 2**30)
    trained = tmp_path / "parts" / "trained.faiss"
    trained.parent.mkdir()
    for name in ("trained.faiss", "trained.json"):
        (tmp_path / "parts" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    parts = build_index(vectors_of(store), tmp_path / "parts", small)
    assert len(whole["parts"]) == 1 and len(parts["parts"]) == 3
    queries = values_of(77)[:20].numpy()
    one, many = (opened(tmp_path / name, 3).search(queries, 50) for name in ("one", "parts"))
    assert np.array_equal(one[1], many[1]) and np.allclose(one[0], many[0])
    for part in opened(tmp_path / "parts").parts:
        lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(part).invlists)
        assert isinstance(lists, faiss.OnDiskInvertedLists)


def test_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path / "store", 4)
    config = IndexConfig(factory="IVF4,SQ8", memory=40_000 / 2**30)
    wanted = build_index(vectors_of(store), tmp_path / "undisturbed", config)
    write = build._write_part

    def killed(*arguments: Any) -> None:
        if arguments[2].path.name == "part-000001.faiss":
            (arguments[1] / "part-000001.faiss.part").write_bytes(b"half")
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(build, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(vectors_of(store), tmp_path / "index", config)
    assert not (tmp_path / "index" / "index.json").exists()
    monkeypatch.setattr(build, "_write_part", write)
    first = (tmp_path / "index" / "part-000000.faiss").stat().st_mtime_ns
    advanced: list[int] = []
    assert build_index(vectors_of(store), tmp_path / "index", config, advance=advanced.append) == wanted
    assert (tmp_path / "index" / "part-000000.faiss").stat().st_mtime_ns == first
    assert sum(advanced) == 4 * ROWS


def test_grown_store_adds_a_part(tmp_path: Path) -> None:
    config = IndexConfig(factory="IVF4,SQ8", probes=4)
    build_index(vectors_of(fill(tmp_path / "store", 2)), tmp_path / "index", config)
    first = (tmp_path / "index" / "part-000000.faiss").stat().st_mtime_ns
    store = fill(tmp_path / "store", 3)
    for number in range(2):
        assert store.shards[number].xxh3 == Store(tmp_path / "store").shards[number].xxh3
    built = build_index(vectors_of(store), tmp_path / "index", config)
    assert built["documents"] == 3 * ROWS and built["parts"] == ["part-000000.faiss", "part-000001.faiss"]
    assert (tmp_path / "index" / "part-000000.faiss").stat().st_mtime_ns == first
    assert built["recall_at_100"] > 0.9


def test_parts_of_other_shards_are_built_again(tmp_path: Path) -> None:
    config = IndexConfig(factory="Flat")
    store = fill(tmp_path / "store", 2)
    build_index(vectors_of(store), tmp_path / "index", config)
    (tmp_path / "store" / "000001.json").unlink()
    ids = [f"{i:016x}" for i in range(ROWS)]
    write_shard(tmp_path / "store", 1, ids, values_of(5), torch.ones(ROWS), CODING)
    build_index(vectors_of(Store(tmp_path / "store")), tmp_path / "index", config)
    found = opened(tmp_path / "index").search(values_of(5)[:9].numpy(), 1)[1][:, 0]
    assert found.tolist() == list(range(9))


def test_wrong_settings_are_told(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 1)
    for factory, text in (
        ("Flatt", "'Flatt' is no FAISS factory string"),
        ("IVF4096,SQ8", "needs at least 4096 documents to train, there are 500"),
        ("IVF8,PQ7", "PQ7"),
    ):
        with pytest.raises(ValueError, match=text):
            build_index(vectors_of(store), tmp_path / "index", IndexConfig(factory=factory))
    for name in ("probes", "recall_queries", "train", "memory"):
        settings: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"index.{name} must be .*, got 0"):
            IndexConfig(**settings)
    build_index(vectors_of(store), tmp_path / "index", IndexConfig())
    with pytest.raises(Jz3Error, match="factory: 'Flat' there, 'HNSW8' now"):
        build_index(vectors_of(store), tmp_path / "index", IndexConfig(factory="HNSW8"))
    with pytest.raises(Jz3Error, match="index of the store"):
        SearchIndex.open(tmp_path / "index", "0" * 16, 1)
    open_store(tmp_path / "empty", INFO)
    with pytest.raises(Jz3Error, match="holds no document"):
        build_index(vectors_of(Store(tmp_path / "empty")), tmp_path / "index", IndexConfig())
    (tmp_path / "store" / "000000.safetensors").write_bytes(b"")
    with pytest.raises(Jz3Error, match="000000.safetensors has 0 bytes"):
        build_index(vectors_of(Store(tmp_path / "store")), tmp_path / "index", IndexConfig())


def test_indexes_that_do_not_fit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = fill(tmp_path / "store", 1), tmp_path / "index"
    usage, sysconf = shutil.disk_usage(tmp_path), os.sysconf
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * ROWS))
    with pytest.raises(Jz3Error, match="'Flat' takes 136 bytes for each of 500 documents"):
        build_index(vectors_of(store), folder, IndexConfig())
    # Nothing is left that another factory would be refused for.
    build_index(vectors_of(store), folder, IndexConfig(factory="IVF4,SQ8"))
    monkeypatch.undo()
    build_index(vectors_of(store), tmp_path / "flat", IndexConfig())
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else sysconf(name))
    with pytest.raises(Jz3Error, match="is read whole.*IVF4096,SQ8"):
        opened(tmp_path / "flat")
    opened(folder)


def test_full_disk_is_told_and_a_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = fill(tmp_path / "store", 1), tmp_path / "index"
    write = faiss.write_index

    def full(index: Any, path: str) -> None:
        if "part-" not in path:
            return write(index, path)
        Path(path).write_bytes(b"half")
        raise RuntimeError("Error in void faiss::write_index: write error (No space left on device)")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(Jz3Error, match="part-000000.faiss can't be written .*No space left on device"):
        build_index(vectors_of(store), folder, IndexConfig())
    assert not list(folder.glob("*.part"))
    monkeypatch.undo()
    assert build_index(vectors_of(store), folder, IndexConfig())["documents"] == ROWS


def test_target_queries_come_first_in_the_recall(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 1)
    config = IndexConfig(recall_queries=12)
    built = build_index(vectors_of(store), tmp_path / "index", config, queries=values_of(3)[:5])
    assert built["recall_queries"] == 12 and built["recall_target_queries"] == 5


def test_gpu_is_used_where_faiss_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []

    def to_gpus(index: Any) -> Any:
        moved.append(type(index).__name__)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, device, index: to_gpus(index), raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index, raising=False)
    store = fill(tmp_path / "store", 1)
    build_index(vectors_of(store), tmp_path / "index", IndexConfig(factory="IVF4,SQ8", probes=4))
    assert moved == ["IndexFlatIP", "IndexIVFScalarQuantizer"]
    assert len(opened(tmp_path / "index").search(values_of(0)[:1].numpy(), 5)[1][0]) == 5


def test_what_faiss_has_no_gpu_index_for_is_built_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU, PQ64 is refused for its tables in shared memory, and fast scan altogether."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("Error in clone_Index: This index type is not implemented on GPU.")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: index, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse, raising=False)
    store = fill(tmp_path / "store", 1)
    build_index(vectors_of(store), tmp_path / "index", IndexConfig(factory="IVF4,SQ8", probes=4))
    assert "on the CPU: Error in clone_Index: This index type is not implemented on GPU." in caplog.text
    assert len(opened(tmp_path / "index").search(values_of(0)[:1].numpy(), 5)[1][0]) == 5


def docs(folder: Path, count: int = 50) -> Path:
    rows = [
        Doc(id=f"{(i * 0x9E3779B97F4A7C15) % 2**64:016x}", text=f"text {i} \u00e9\n", source="s", tokens=i)
        for i in range(count)
    ]
    write_jsonl(folder / "docs.jsonl", (d.to_json() for d in rows))
    return folder / "docs.jsonl"


def test_texts_are_found_by_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = docs(tmp_path)
    DocFile(path, tmp_path / "table")

    def refuse(*_: Any) -> None:
        raise AssertionError("the table is there already")

    monkeypatch.setattr("jz3.index.docs._table", refuse)
    found = DocFile(path, tmp_path / "table")
    assert len(found) == 50
    for i in (0, 7, 49):
        key = (i * 0x9E3779B97F4A7C15) % 2**64
        assert found.get(key).text == found.get(f"{key:016x}").text == f"text {i} \u00e9\n"
    with pytest.raises(Jz3Error, match="has no document 0000000000000005"):
        found.get(5)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_table_that_cannot_be_kept_is_made_for_this_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A copied run has other times, and may lie on a read-only disk or belong to somebody else."""
    path = docs(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(code, "not writable")

    monkeypatch.setattr("jz3.index.docs.atomic_path", fail)
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="not writable"):
            DocFile(path, tmp_path / "table")
        return
    found = DocFile(path, tmp_path / "table")
    assert len(found) == 50 and found.get((7 * 0x9E3779B97F4A7C15) % 2**64).text == "text 7 \u00e9\n"


def test_table_follows_the_file(tmp_path: Path) -> None:
    path = docs(tmp_path)
    DocFile(path, tmp_path)
    docs(tmp_path, 60)
    assert DocFile(path, tmp_path).get((59 * 0x9E3779B97F4A7C15) % 2**64).tokens == 59
    for line in ("nonsense", '{"id": "xyz"}', '{"id": "11111111111111111"}', "[]"):
        with open(path, "a") as handle:
            handle.write(line + "\n")
        with pytest.raises(Jz3Error, match="docs.jsonl:61 is no document"):
            DocFile(path, tmp_path)
        docs(tmp_path, 60)


def test_query_a_file(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (small_run / "corpus" / "docs.jsonl").read_text().splitlines()]
    file = tmp_path / "problems.jsonl"
    lines = [
        json.dumps({"text": rows[3]["text"]}),
        "nonsense",
        "",
        json.dumps({"problem": "What is 3 * 4?", "solution": "It is 12."}),
        json.dumps({"problem": 3}),
        json.dumps({"problem": "  "}),
    ]
    file.write_text("\n".join(lines))
    answers = []
    for extra in ([], ["--exact"]):
        assert main(["query", str(small_run), "--file", str(file), "--k", "4", *extra]) == 0
        told = capsys.readouterr()
        assert "5 problems, 3 not answered; per problem: gradient" in told.err and "search" in told.err
        answers.append([json.loads(line) for line in told.out.splitlines()])
    for index, exact in zip(*answers, strict=True):
        assert index.keys() == exact.keys() and index["line"] == exact["line"]
        if "matches" in index:
            assert [m["id"] for m in index["matches"]] == [m["id"] for m in exact["matches"]]
            one, other = ([m["score"] for m in a["matches"]] for a in (index, exact))
            assert one == pytest.approx(other, abs=1e-3)
    assert [a["line"] for a in answers[0]] == [1, 2, 4, 5, 6]
    first = answers[0][0]["matches"][0]
    # A text is the one that helps most with itself.
    assert first["id"] == rows[3]["id"] and first["text"] == rows[3]["text"]
    file.write_text("nonsense\n" + json.dumps({"input": "What is 3 * 4?"}))
    assert main(["query", str(small_run), "--file", str(file)]) == 2
    told = capsys.readouterr()
    assert "needs one of problem, question, text" in told.out and "it has input" in told.out
    assert "holds no problem that could be answered" in told.err
    assert "must be" not in answers[0][1]["error"] and "empty" in answers[0][4]["error"]


def test_query_a_file_as_users_have_it(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte order mark, half characters, compression, damage."""
    lines = [
        '{"text": "What is 3 * 4?"}',
        '{"text": "3 \\ud83c"}',
        '{"\\ud83c": 1}',
        '{"text": "What is 4?"}',
    ]
    text = ("\ufeff" + "\n".join(lines)).encode() + b'\n{"text": "caf\xe9"}\n' + b"[" * 200_000
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    for file in (plain, packed):
        assert main(["query", str(small_run), "--file", str(file), "--k", "1"]) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert ["matches" in answer for answer in answers] == [True, False, False, True, False, False]
        assert "is no valid Unicode" in answers[1]["error"] and "it has ?" in answers[2]["error"]
        assert "is no valid Unicode" in answers[4]["error"] and "nested too deeply" in answers[5]["error"]
    assert main(["query", str(small_run), "--text", "3 \udcff"]) == 2
    assert "is no valid Unicode" in capsys.readouterr().err
    packed.write_bytes(packed.read_bytes()[:-9])
    assert main(["query", str(small_run), "--file", str(packed)]) == 2
    assert f"{packed} can't be read: " in capsys.readouterr().err


@pytest.mark.parametrize("products", ["int8", "int16"])
def test_stores_made_with_whole_numbers_are_queried_where_there_are_none(
    small_run: Path, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jz3.gradients.passes.products_obstacle", lambda kind: "it has none" if kind == products else ""
    )
    collection = open_collection(small_run)
    encoding = dataclasses.replace(collection.encoding(), products=products)
    encoder = Encoder(encoding, collection.projection())
    assert encoder.model.__dict__["_jz3_products"] == "exact"
    assert torch.isfinite(encoder.features([Tokens("", [5, 6, 7, 8], 1)])).all()


def test_what_is_found_cannot_command_the_terminal() -> None:
    doc = Doc(id="0" * 16, text="a\x1b]52;c;eA==\x07\nb", source="web\x9b2J", tokens=3)
    said: list[str] = []
    _show(Found([Match(doc, 0.5)], 0.0, 0.0), said.append)
    assert said == [f"1. cosine 0.5000  web\ufffd2J  {doc.id}", "   a\ufffd]52;c;eA==\ufffd b"]


def test_query_asks(
    small_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 times 4?\nx\n\nnot asked\n"))
    assert main(["query", str(small_run), "--k", "2"]) == 0
    told = capsys.readouterr()
    assert re.search(r"Flat, \d+ documents, recall@100 1.000 against the exact scan", told.err)
    assert told.out.count("cosine") == 2 and "at least 2 are needed" in told.err
    assert main(["query", str(small_run), "--text", "x", "--file", "y"]) == 2
    assert "not both" in capsys.readouterr().err
    assert main(["query", str(small_run), "--file", "y", "--solution", "z"]) == 2
    assert "--solution needs its --text" in capsys.readouterr().err
    assert main(["query", str(small_run), "--file", str(small_run / "none")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert main(["query", str(small_run), "--text", "What is 3?", "--k", "0"]) == 2
    assert "k must be at least 1" in capsys.readouterr().err
