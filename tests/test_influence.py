"""The influence stage over a store that is read shard by shard."""

import dataclasses
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jz3 import influence
from jz3.config import shipped_recipe
from jz3.errors import Jz3Error
from jz3.files import hash_text, write_jsonl
from jz3.influence import FeatureBlock, read_scores
from jz3.records import Doc, Query
from jz3.seeding import rng
from jz3.stage import StageContext

K, WIDTH, SHARD = 16, 8, 64


@dataclasses.dataclass(frozen=True)
class World:
    """A corpus with stored features, of which every seventh document has none."""

    ctx: StageContext
    docs: list[Doc]
    values: np.ndarray
    hidden: np.ndarray
    query_values: np.ndarray
    query_hidden: np.ndarray
    tasks: list[str]

    def blocks(self, _: StageContext) -> Iterator[FeatureBlock]:
        rows = [i for i in range(len(self.docs)) if i % 7]
        for start in range(0, len(rows), SHARD):
            mine = rows[start : start + SHARD]
            norm = np.arange(start, start + len(mine), dtype=np.float32)
            ids = [self.docs[i].id for i in mine]
            yield FeatureBlock(ids, self.values[mine], norm, self.hidden[mine], norm / 2)


def make_world(folder: Path, count: int) -> World:
    generator = np.random.default_rng(count)
    words = ["apples", "pears", "sum", "integer", "prime", "field"]
    texts = [f"{' '.join(generator.choice(words, 12))} {i}" for i in range(count)]
    docs = [Doc(id=hash_text(t), text=t, source="ab"[i % 2], tokens=i) for i, t in enumerate(texts)]
    write_jsonl(folder / "corpus" / "docs.jsonl", (d.to_json() for d in docs))
    tasks = ["x", "x", "y", "control", "x"]
    queries = [
        Query(
            id=f"{i:016x}",
            task=task,
            problem=f"the {words[i]}",
            prompt="",
            completion="of pears",
            role="unseen" if i == 4 else ("control" if task == "control" else "fit"),
        )
        for i, task in enumerate(tasks)
    ]
    write_jsonl(folder / "targets" / "queries.jsonl", (q.to_json() for q in queries))
    query_values = generator.standard_normal((5, K)).astype(np.float32)
    query_hidden = generator.standard_normal((5, WIDTH)).astype(np.float32)
    arrays = {
        "id": np.arange(5, dtype=np.uint64),
        "values": query_values,
        "hidden": query_hidden,
        "norm": np.ones(5, np.float32),
        "loss": np.ones(5, np.float32),
    }
    (folder / "features").mkdir()
    save_file(arrays, folder / "features" / "queries.safetensors")
    values = generator.standard_normal((count, K)).astype(np.float32)
    exact = {
        "document": np.array([int(docs[i].id, 16) for i in (1, 2, 3, 7)], np.uint64),
        "query": np.array([4], np.uint64),
        "cosine": (values[[1, 2, 3, 7]] @ query_values[4:].T).astype(np.float32),
    }
    save_file(exact, folder / "features" / "exact.safetensors")
    recipe = shipped_recipe("tiny")
    ctx = StageContext(recipe=recipe, run_dir=folder, name="influence")
    hidden = generator.standard_normal((count, WIDTH)).astype(np.float32)
    return World(ctx, docs, values, hidden, query_values, query_hidden, tasks)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_table_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, 300)
    monkeypatch.setattr(influence, "feature_blocks", world.blocks)
    summary = influence.run(world.ctx)
    table = read_scores(tmp_path / "influence")
    rows = [i for i in range(300) if i % 7]
    assert table["id"] == [world.docs[i].id for i in rows]
    assert table["source"] == [world.docs[i].source for i in rows] and table["tokens"].tolist() == rows
    for task, members in {"x": [0, 1], "y": [2], "control": [3]}.items():
        cosines = (world.values[rows] @ world.query_values[members].T).mean(1)
        np.testing.assert_allclose(table[f"influence:{task}"], cosines, atol=1e-5)
        hidden = (unit(world.hidden[rows]) @ unit(world.query_hidden[members]).T).mean(1)
        np.testing.assert_allclose(table[f"hidden:{task}"], hidden, atol=1e-6)
    holds = np.array(["pears" in world.docs[i].text or "prime" in world.docs[i].text for i in rows])
    assert (table["bm25:y"][~holds & np.array(["sum" not in world.docs[i].text for i in rows])] == 0).all()
    np.testing.assert_array_equal(table["loss"], table["norm"] / 2)
    draws = [rng(world.ctx.seed, "influence", "random", world.docs[i].id).random() for i in rows]
    np.testing.assert_allclose(table["random"], draws, rtol=1e-6)
    assert summary["documents"] == len(rows) and summary["tasks"] == ["x", "y"]
    # Document 7 has no features; the three others agree with their exact cosines.
    assert summary["fidelity"]["documents"] == 3
    assert summary["fidelity"]["spearman"] == pytest.approx(1)
    control = summary["negative_control"]
    assert set(control["overlap"]) == {"x", "y"} and control["chance"] == pytest.approx(12 / len(rows))


def test_queries_that_are_not_finite_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, 60)
    monkeypatch.setattr(influence, "feature_blocks", world.blocks)
    path = tmp_path / "features" / "queries.safetensors"
    arrays = load_file(path)
    arrays["norm"][0], arrays["values"][0], arrays["hidden"][0] = np.nan, np.nan, np.nan
    save_file(arrays, path)
    influence.run(world.ctx)
    table = read_scores(tmp_path / "influence")
    rows = [i for i in range(60) if i % 7]
    np.testing.assert_allclose(table["influence:x"], world.values[rows] @ world.query_values[1], atol=1e-5)
    assert np.isfinite(table["hidden:x"]).all()
    arrays["norm"][2] = np.nan
    save_file(arrays, path)
    with pytest.raises(Jz3Error, match="no query of the task 'y' has a finite gradient"):
        influence.run(world.ctx)


def test_fidelity_drops_queries_before_documents() -> None:
    generator = np.random.default_rng(0)
    values, asked = generator.standard_normal((5, K)), generator.standard_normal((3, K))
    cosine = values @ asked.T
    cosine[:, 1], asked[1], cosine[2] = np.nan, np.nan, np.nan
    ids = [f"{i}" for i in range(3)]
    queries = {i: Query(id=i, task="x", problem="", prompt="", completion="", role="unseen") for i in ids}
    documents = [f"d{i}" for i in range(5)]
    exact = influence.Exact(documents, ids, cosine)
    found = influence.fidelity(exact, dict(zip(documents, values, strict=True)), ids, asked, queries)
    assert (found["documents"], found["queries"]) == (4, 2) and found["spearman"] == pytest.approx(1)


def test_document_that_the_corpus_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, 20)
    stranger = dataclasses.replace(world.docs[3], id="00000000000000ff")
    world.docs[3] = stranger
    monkeypatch.setattr(influence, "feature_blocks", world.blocks)
    with pytest.raises(Jz3Error, match="holds the document 00000000000000ff, which the corpus has not"):
        influence.run(world.ctx)
    assert not (tmp_path / "influence" / "scores.parquet").exists()


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    for count in (1000, 8000):
        world: Any = make_world(tmp_path / str(count), count)
        monkeypatch.setattr(influence, "feature_blocks", world.blocks)
        tracemalloc.start()
        influence.run(world.ctx)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + (1 << 20), peaks
