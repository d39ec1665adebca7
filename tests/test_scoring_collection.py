"""`jz3 index`, `jz3 query` and `jz3 explore` on what `jz3 score` wrote, with and without its features."""

import errno
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scoring_runs as runs
import torch

from jz3.cli import main
from jz3.errors import Jz3Error
from jz3.explain import token_values
from jz3.explore import render
from jz3.explore.view import View
from jz3.files import locked
from jz3.gradients import linear_layers, tokenize_query, tokenize_text
from jz3.index.opening import open_collection
from jz3.index.query import Searcher
from jz3.models import load_model, load_tokenizer
from jz3.scoring.collection import ScoredCollection
from jz3.scoring.config import ChooseSettings
from jz3.scoring.job import load_job
from jz3.scoring.merge import merge
from jz3.scoring.plan import load_plan
from jz3.scoring.workers import missing_shards, work

pytest.importorskip("faiss")

Data = tuple[list[str], dict[str, Path]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A plain, a compressed and a Parquet file of 60 texts, and one more text twice."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = runs.make_corpus(folder)
    twice = [{"id": name, "text": "apples and pears in equal number"} for name in ("once", "again")]
    return [*corpus, str(runs.write_lines(folder / "twice.jsonl", twice))], runs.make_targets(folder)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, data: Data, tiny_model: Path) -> Path:
    """A run with its features kept and its index built by the command."""
    out = tmp_path_factory.mktemp("run") / "out"
    runs.run(out, *data, keep_features=True, bits=8, max_tokens=256)
    assert main(["index", str(out), "--recall-queries", "20"]) == 0
    return out


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, data: Data, tiny_model: Path) -> Path:
    """A run without features."""
    out = tmp_path_factory.mktemp("run") / "bare"
    runs.run(out, *data, kind="sketch")
    return out


def test_index_of_a_scored_run(scored: Path) -> None:
    built = json.loads((scored / "index" / "index.json").read_text())
    # Four queries of each of two tasks; the control is none of them.
    assert (built["documents"], built["recall_queries"], built["recall_target_queries"]) == (62, 20, 8)
    assert built["recall_at_100"] == 1.0


def test_queries_find_the_texts_of_every_format(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index finds what the exact scan finds, every text under its own id and source."""
    texts = runs.texts(60)
    asked = [3, 19, 20, 33, 40, 59]
    problems = runs.write_lines(tmp_path / "problems.jsonl", [{"text": texts[i]} for i in asked])
    answers = []
    for extra in ([], ["--exact"]):
        assert main(["query", str(scored), "--file", str(problems), "--k", "62", *extra]) == 0
        answers.append([json.loads(line)["matches"] for line in capsys.readouterr().out.splitlines()])
    wanted = {f"doc-{i}": (text, "ab"[i % 2]) for i, text in enumerate(texts)}
    wanted["once"] = ("apples and pears in equal number", "twice.jsonl")
    for index, exact in zip(*answers, strict=True):
        assert {m["id"]: (m["text"], m["source"]) for m in index} == wanted
        assert {m["id"] for m in exact} == wanted.keys()
        np.testing.assert_allclose([m["score"] for m in index], [m["score"] for m in exact], atol=1e-3)
    # Equal texts are found once each, both by the place of the first.
    assert sum(m["id"] == "once" for m in answers[0][0]) == 2


def test_a_run_of_somebody_else_is_searched(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its table of texts, which can't be kept in its folder."""
    shutil.copytree(scored, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "index")

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("jz3.scoring.collection.locked", fail)
    assert main(["query", str(tmp_path / "copy"), "--text", "What is 3 + 4?", "--k", "2", "--exact"]) == 0
    assert capsys.readouterr().out.count("cosine") == 2 and not (tmp_path / "copy" / "index").exists()


def test_query_scores_are_the_means_of_the_run(scored: Path) -> None:
    """The mean over a task's queries of what query finds is the task's column, up to the codes."""
    found = mean_scores(scored, None, exact=False)[1]
    table = runs.scores(scored)
    wanted = dict(zip(table["id"].to_pylist(), table["influence:sums"].to_pylist(), strict=True))
    assert len(found) == 60
    np.testing.assert_allclose([found[i] for i in found], [wanted[i] for i in found], atol=0.01)


def test_query_asks_and_answers_one_text(
    scored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 + 4?\n\n"))
    assert main(["query", str(scored), "--k", "2"]) == 0
    told = capsys.readouterr()
    assert told.out.count("cosine") == 2 and "Flat, 62 documents" in told.err
    assert main(["query", str(scored), "--text", "What is 3 + 4?", "--solution", "7.", "--k", "1"]) == 0
    assert capsys.readouterr().out.count("cosine") == 1


def test_view_of_a_scored_run(scored: Path) -> None:
    view = View(open_collection(scored))
    assert "62 texts" in view.header() and "recall@100 1.000" in view.header()
    assert len(view.examples()) == 2
    answer = view.ask(runs.texts(60)[25], "")
    # Asked as a question the text isn't quite itself.
    assert "doc-25" in [match.doc.id for match in answer.matches[:3]]
    assert "rgba(" in view.found(answer, 0, 2, True)
    check_ranked(view, scored)


def test_prompts_are_not_explained(
    data: Data, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"doc-{i}", "ask": f"What is {i}?", "text": t} for i, t in enumerate(runs.texts(8))]
    corpus = runs.write_lines(
        tmp_path / "corpus.jsonl", [{**r, "text": f"{r['ask']} {r['text']}"} for r in rows]
    )
    runs.run(tmp_path / "out", [str(corpus)], data[1], prompt_field="ask", keep_features=True)
    view = View(open_collection(tmp_path / "out"))
    monkeypatch.setattr(render, "highlighted", lambda text, pieces, values: (text, pieces, values))
    tokenizer, model = view.searcher.tokenizer, load_model(tiny_model, "float32")
    query = tokenize_query(tokenizer, "q", "What is the sum?", "It is the sum of apples.", 512)
    for match in view.searcher.ask("What is the sum?", "It is the sum of apples.", 3).matches:
        text, pieces, values = view._explained(match.doc, query)
        own = tokenize_text(tokenizer, "", text, 512, prompt=rows[int(match.doc.id[4:])]["ask"])
        assert "".join(pieces) == text and own.start > 1
        expected = token_values(model, linear_layers(model), own, [query])[0]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-2)


def check_ranked(view: View, out: Path) -> None:
    """Best and worst texts by their columns, all pages, with their texts; histograms of every task."""
    table = runs.scores(out)
    assert view.table().tasks == ["sums", "apples", "control"] and len(view.table()) == 62
    column = table["influence:apples"].to_numpy()
    order = np.argsort(-column, kind="stable")
    pages = "".join(view.ranked("apples", False, start, 5) for start in range(0, 62, 5))
    assert re.findall(r'jz3-id">([\w-]+) ', pages) == [table["id"][int(i)].as_py() for i in order]
    assert re.findall(r'jz3-score">([+-][\d.]+)<', pages) == [f"{column[i]:+.4f}" for i in order]
    texts = dict(enumerate(runs.texts(60)))
    assert all(texts.get(int(i), "apples and pears in equal number") in pages for i in order)
    worst = view.ranked("apples", True, 0, 1)
    assert re.findall(r'jz3-rank">(\d+)<', worst) == ["62"]
    assert view.table().histogram("sums")[0].sum() == 62
    assert view.table().sources == ["a", "b", "twice.jsonl"] and view.pictures().count("<svg") == 2


def test_without_features_scores_are_shown_and_the_rest_is_told(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["index"], ["query", "--text", "What is 3 + 4?"], ["query", "--exact", "--text", "x y"]):
        assert main([command[0], str(bare), *command[1:]]) == 2
        assert re.search(r"scored without --keep-features.*into another folder", capsys.readouterr().err)
    view = View(open_collection(bare))
    assert "no features" in view.header() and "--keep-features" in view.missing_features
    check_ranked(view, bare)
    with pytest.raises(Jz3Error, match="without --keep-features"):
        view.ask("What is 3 + 4?", "")


def test_page_without_features_can_be_built(bare: Path, scored: Path) -> None:
    pytest.importorskip("gradio")
    from jz3.explore.page import build_page

    shown = json.dumps(build_page(View(open_collection(bare))).get_config_file(), default=str)
    assert "No problem can be looked up" in shown and "Find the texts that help" not in shown
    shown = json.dumps(build_page(View(open_collection(scored))).get_config_file(), default=str)
    assert "Find the texts that help" in shown


def test_documents_that_came_after_the_index_are_told(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    shutil.rmtree(run / "index")
    (run / "scores" / "000000.parquet").rename(tmp_path / "later.parquet")
    index = ["index", str(run), "--recall-queries", "4"]
    with locked(run / "index" / ".lock"):
        assert main(index) == 2
        assert f"another process is building {run / 'index'}" in capsys.readouterr().err
    assert main(index) == 0
    (tmp_path / "later.parquet").rename(run / "scores" / "000000.parquet")
    capsys.readouterr()
    assert main(["query", str(run), "--text", "What is 3 + 4?"]) == 0
    assert f"WITHOUT 12 newer documents, until `jz3 index {run}` adds them" in capsys.readouterr().err
    assert "without 12 newer texts" in View(open_collection(run)).header()
    assert main(index) == 0
    assert "newer" not in View(open_collection(run)).header()


def test_without_an_index(
    scored: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half-scored and not indexed: the page scans what there is and says so, query names the remedy."""
    out = tmp_path / "half"
    runs.start(out, *data, keep_features=True)
    with pytest.raises(Jz3Error, match="has no features yet; run the same `jz3 score` command"):
        View(open_collection(out))
    work(out, (0, 2))
    assert main(["query", str(out), "--text", "What is 3 + 4?"]) == 2
    assert "has no index yet; run `jz3 index" in capsys.readouterr().err
    view = View(open_collection(out))
    assert "exact scan" in view.header() and "shards are not scored yet" in view.header()
    assert 0 < len(view.ask("What is 3 + 4?", "").matches) == len(view.table()) < 62


def test_what_does_not_belong_to_the_run_is_refused(scored: Path, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    collection: Any = open_collection(out)
    fit = out / "fit" / "0" / "fit.safetensors"
    data = fit.read_bytes()
    fit.write_bytes(data[:-4] + b"\1\2\3\4")
    with pytest.raises(Jz3Error, match="is not the one that the features were made with"):
        collection.projection()
    fit.write_bytes(data)
    info = json.loads((out / "store" / "store.json").read_text())
    (out / "store" / "store.json").write_text(json.dumps({**info, "model_hash": "0" * 16}))
    with pytest.raises(Jz3Error, match="another run's store .*model_hash: '0000000000000000' in the store"):
        collection.store()
    with pytest.raises(Jz3Error, match="has scored no text 0000000000000005"):
        collection.texts([5])
    with pytest.raises(ValueError, match="--checkpoint must be from 0 to 0, got 1"):
        open_collection(out, 1)
    with pytest.raises(Jz3Error, match="neither recipe.json nor plan.json"):
        open_collection(tmp_path)


def test_lost_corpus_and_changed_model_are_told(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, targets = runs.make_corpus(tmp_path, 12), runs.make_targets(tmp_path)
    model: Any = load_model(tiny_model, "float32")
    copy = tmp_path / "model"
    model.save_pretrained(copy)
    load_tokenizer(tiny_model).save_pretrained(copy)
    out = tmp_path / "out"
    runs.run(out, corpus, targets, model=str(copy), kind="sketch", keep_features=True)
    asked = ["query", str(out), "--exact", "--text", "What is 3 + 4?", "--k", "12"]
    assert main(asked) == 0
    Path(corpus[1]).rename(tmp_path / "moved.jsonl.gz")
    assert main(asked) == 2
    assert "b.jsonl.gz, a file of the corpus, can't be read" in capsys.readouterr().err
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(copy)
    assert main(asked) == 2
    assert re.search("the model .* changed: .* restore it", capsys.readouterr().err)
    with pytest.raises(Jz3Error, match="the model .* changed"):
        open_collection(out).encoding()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: Data, tiny_model: Path) -> Path:
    """A run of two models, the second weighing three times as much, with its features kept."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model: Any = load_model(tiny_model, "float32")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "other")
    load_tokenizer(tiny_model).save_pretrained(folder / "other")
    checkpoint = (f"{tiny_model}=1", f"{folder / 'other'}=3")
    runs.run(folder / "out", *data, checkpoint=checkpoint, keep_features=True, bits=8)
    return folder / "out"


def mean_scores(out: Path, checkpoint: int | None, exact: bool) -> tuple[Searcher, dict[str, float]]:
    """Return per text the score of the mean of a task's queries, as query finds it."""
    collection = open_collection(out, checkpoint)
    searcher = Searcher(collection, exact)
    queries = [q for q in collection.queries() if q.task == "sums"]
    tokens = [tokenize_query(searcher.tokenizer, q.id, q.prompt, q.completion, 512) for q in queries]
    found = searcher.nearest(searcher.features(tokens).mean(0, keepdim=True), 62)
    return searcher, {m.doc.id: m.score for m in found if m.doc.id.startswith("doc")}


def test_checkpoints_are_searched_together(two_checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One index over both finds the exact scan's scores, which are those of the run; so does explore."""
    out = two_checkpoints
    assert main(["index", str(out), "--recall-queries", "8"]) == 0
    assert "recall@100 1.000 against the exact scan (8 target queries" in capsys.readouterr().err
    assert main(["query", str(out), "--text", "What is 3 + 4?", "--k", "2"]) == 0
    assert "out, 2 checkpoints: Flat" in capsys.readouterr().err
    searcher, indexed = mean_scores(out, None, exact=False)
    exact = mean_scores(out, None, exact=True)[1]
    table = runs.scores(out)
    wanted = dict(zip(table["id"].to_pylist(), table["influence:sums"].to_pylist(), strict=True))
    assert len(indexed) == len(exact) == 60
    for found in (indexed, exact):
        np.testing.assert_allclose([found[i] for i in found], [wanted[i] for i in found], atol=0.01)
    one, two = (np.array([mean_scores(out, c, exact=True)[1][i] for i in exact]) for c in (0, 1))
    np.testing.assert_allclose(list(exact.values()), one / 4 + two * 3 / 4, atol=1e-5)
    assert np.abs(one - two).max() > 0.02
    view = View(open_collection(out))
    assert "other" in view.header() and "62 texts" in view.header()
    answer = view.ask("What is 3 + 4?", "")
    assert "rgba(" in view.found(answer, 0, 1, True)
    doc = answer.matches[0].doc
    text = tokenize_text(searcher.tokenizer, doc.id, doc.text, searcher.document_tokens)
    values = [encoder.token_values(text, answer.tokens) for encoder in searcher.encoders]
    torch.testing.assert_close(searcher.token_values(text, answer.tokens), values[0] / 4 + values[1] * 3 / 4)


def test_texts_are_explained_by_all_checkpoints(
    two_checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explain", str(two_checkpoints)]
    assert main([*command, "--doc", "doc-25", "--task", "sums", "--queries", "2"]) == 0
    shown = re.findall(r"cosine of gradients ([+-][\d.]+), with 2 queries of sums", capsys.readouterr().out)
    run = ScoredCollection(two_checkpoints)
    [doc] = run.texts([run.find("doc-25")])
    assert doc.id == "doc-25" and doc.text == runs.texts(60)[25]
    expected = 0.0
    for member, weight in enumerate(run.weights):
        encoding = run.encoding(member)
        model, tokenizer = load_model(encoding.model, "float32"), load_tokenizer(encoding.tokenizer)
        text = tokenize_text(tokenizer, "0", doc.text, encoding.document_tokens)
        asked = [
            tokenize_query(tokenizer, q.id, q.prompt, q.completion, encoding.query_tokens)
            for q in run.queries()
            if q.task == "sums"
        ][:2]
        expected += weight * float(token_values(model, linear_layers(model), text, asked).sum(1).mean())
    assert shown == [f"{expected:+.4f}"]
    assert main([*command, "--doc", "doc-99"]) == 2
    assert f"{two_checkpoints} has scored no text 'doc-99'" in capsys.readouterr().err
    assert main([*command, "--doc", "doc-25", "--task", "pears"]) == 2
    assert "has no task 'pears'; it has apples, sums" in capsys.readouterr().err


def test_one_of_several_checkpoints_is_searched(
    two_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out, ignore=shutil.ignore_patterns("index*"))
    asked = ["query", str(out), "--text", "What is 3 + 4?", "--checkpoint", "1"]
    assert main(asked) == 2
    assert f"run `jz3 index {out} --checkpoint 1`" in capsys.readouterr().err
    assert main(["index", str(out), "--checkpoint", "1", "--recall-queries", "4"]) == 0
    assert main(asked) == 0
    assert "checkpoint 1 of 0 to 1: Flat" in capsys.readouterr().err
    assert {p.name for p in out.glob("index*")} == {"index-1"}
    # Another's index in its place isn't searched.
    (out / "index-1").rename(out / "index")
    assert main(asked[:-2]) == 2
    assert "is an index of the store" in capsys.readouterr().err


def test_checkpoints_with_different_documents_are_not_joined(two_checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out)
    for suffix in ("json", "safetensors"):
        shutil.copy(out / "store-1" / f"000000.{suffix}", out / "store-1" / f"000002.{suffix}")
    vectors = open_collection(out).vectors()
    with pytest.raises(Jz3Error, match="store-0 and .*store-1 hold different documents"):
        list(vectors.blocks())
    (out / "store-1" / "000002.json").unlink()
    with pytest.raises(Jz3Error, match="store-1/000002.safetensors is missing; run the same `jz3 score`"):
        open_collection(out).vectors()
    for suffix in ("json", "safetensors"):
        shutil.copy(two_checkpoints / "store-1" / f"000002.{suffix}", out / "store-1")
    data = (out / "store-1" / "000000.safetensors").read_bytes()
    (out / "store-1" / "000000.safetensors").write_bytes(data[:-1])
    with pytest.raises(Jz3Error, match="000000.safetensors has .* bytes, expected"):
        open_collection(out).vectors()


def test_lost_features_are_written_again(two_checkpoints: Path, tmp_path: Path) -> None:
    """As the message about a damaged shard advises: delete it and run the same command again."""
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out, ignore=shutil.ignore_patterns("index*"))
    plan = load_plan(out)
    assert not missing_shards(out, plan)
    stores = {p: p.read_bytes() for name in ("store-0", "store-1") for p in (out / name).iterdir()}
    scores = runs.score_files(out)
    for suffix in ("json", "safetensors"):
        (out / "store-1" / f"000001.{suffix}").unlink()
    (out / "store-0" / "000003.safetensors").write_bytes(b"half")
    assert missing_shards(out, plan) == [1, 3]
    collection = open_collection(out)
    with pytest.raises(Jz3Error, match="store-1/000001.safetensors is missing; run the same `jz3 score`"):
        collection.store(1)
    # The scores are all there.
    table = collection.scores()
    assert table is not None and len(table) == 62 and "not scored yet" not in collection.name
    with pytest.raises(Jz3Error, match="2 of .* shards are not scored yet"):
        merge(out, plan, load_job(out), ChooseSettings(k=8))
    work(out)
    assert not missing_shards(out, plan)
    assert {p: p.read_bytes() for p in stores} == stores and runs.score_files(out) == scores
    assert len(open_collection(out).store(1)) == 62


def test_shard_without_a_usable_text_has_no_features(data: Data, tiny_model: Path, tmp_path: Path) -> None:
    empty = runs.write_lines(tmp_path / "empty.jsonl", [{"text": ""}, {"text": " "}])
    runs.run(tmp_path / "out", [*data[0], str(empty)], data[1], kind="sketch", keep_features=True)
    plan = load_plan(tmp_path / "out")
    store = open_collection(tmp_path / "out").store()
    assert len(store) == 62 and len(store.shards) == len(plan.shards) - 1
    assert not missing_shards(tmp_path / "out", plan)


def test_settings_of_an_index_belong_to_one_kind_of_run(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(scored), "--recipe", "tiny"]) == 2
    assert "is a run of `jz3 score`, which has none" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--factory", "HNSW8"]) == 2
    assert "the settings are in the recipe's section [index]" in capsys.readouterr().err
    assert main(["index", str(scored), "--factory", "HNSW8"]) == 2
    assert "factory: 'Flat' there, 'HNSW8' now" in capsys.readouterr().err
