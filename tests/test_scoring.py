"""`jz3 score`: every text once, the right score, whatever the files and the shards."""

import dataclasses
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scoring_runs as runs
import torch

from jz3.bm25 import Bm25
from jz3.cli import main
from jz3.corpus.readers import SourceText
from jz3.errors import Jz3Error
from jz3.features.adapted import AdaptedFit
from jz3.features.exact import exact_cosines
from jz3.gradients import linear_layers, tokenize_query, tokenize_text
from jz3.machine import products_obstacle
from jz3.models import load_model, load_tokenizer
from jz3.records import Query
from jz3.scoring.config import ChooseSettings, RunSettings, ScoreSettings, split_targets
from jz3.scoring.estimate import PaperSettings, paper_cost
from jz3.scoring.job import prepare
from jz3.scoring.merge import merge
from jz3.scoring.plan import load_plan, open_plan
from jz3.scoring.shard import Scorer, read_about, scores_path
from jz3.scoring.workers import work
from jz3.store import Coding, Store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Path]]:
    folder = tmp_path_factory.mktemp("corpus")
    return runs.make_corpus(folder), runs.make_targets(folder)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    baselines = ("hidden", "bm25", "loss", "random")
    options: dict[str, Any] = {"keep_features": True, "bits": 8, "exact_documents": 20, "exact_queries": 2}
    return out, runs.run(out, *data, baselines=baselines, **options)


def test_every_text_is_scored_once(finished: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = finished
    table = runs.scores(out)
    assert table["id"].to_pylist() == [f"doc-{i}" for i in range(60)]
    assert table["line"].to_pylist() == [*range(1, 21)] * 3
    assert {Path(f).name for f in table["file"].to_pylist()} == {"a.jsonl", "b.jsonl.gz", "c.parquet"}
    assert manifest["documents"]["records"] == manifest["documents"]["kept"] == 60
    assert manifest["documents"]["tokens"] == sum(table["tokens"].to_pylist())
    columns = ["influence", "hidden", "bm25"]
    wanted = [f"{m}:{t}" for m in columns for t in ("sums", "apples", "control")] + ["loss", "random"]
    assert table.column_names[6:] == ["norm", *wanted]
    assert all(np.isfinite(table[c].to_numpy()).all() for c in wanted)


def test_the_files_of_a_run_are_those_that_the_docs_name(finished: tuple[Path, dict[str, Any]]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "runs.md").read_text(encoding="utf-8")
    score = text[text.index("## `jz3 score`") :]
    named = re.findall(r"`([\w.*/-]+)`", "".join(re.findall(r"^\| (.*?) \|", score, re.MULTILINE)))
    assert len(named) >= 9 and not [name for name in named if not any(finished[0].glob(name))]
    written = {path.name for path in finished[0].glob("*.json*")}
    assert written - set(named) == {"job.json", "bm25.json"}, "what the workers are told"
    assert {"id", "source", "file", "line", "tokens", "hash", "norm"} <= set(
        runs.scores(finished[0]).column_names
    )


def test_scores_are_those_of_the_embedded_calls(
    finished: tuple[Path, dict[str, Any]], data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    """The columns are the mean inner products with the queries, by the same fit."""
    out, _ = finished
    plan = load_plan(out)
    model: Any = load_model(tiny_model, "float32")
    tokenizer = load_tokenizer(tiny_model)
    queries = [Query.from_json(row) for row in runs.rows_of(out / "queries.jsonl")]
    texts = runs.texts(60)
    [fit_file] = (out / "fit" / "0").glob("fit.safetensors")
    fit = AdaptedFit.load(fit_file, _hash(tiny_model))
    from jz3.features.extract import extract

    layers = linear_layers(model)
    documents = [tokenize_text(tokenizer, "", t, 64) for t in texts]
    mine = [tokenize_query(tokenizer, q.id, q.prompt, q.completion, 512) for q in queries if q.task == "sums"]
    assert len(mine) == 4 == plan.settings.queries
    wanted = extract(model, layers, documents, fit).values @ extract(model, layers, mine, fit).values.T
    found = runs.scores(out)["influence:sums"].to_numpy()
    np.testing.assert_allclose(found, wanted.mean(1).numpy(), atol=2e-6)


def _hash(folder: Path) -> str:
    from jz3.features.extract import model_hash

    return model_hash(folder)


def test_known_queries_give_exact_cosines(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    out = tmp_path / "out"
    runs.run(out, *data, kind="known", rank=64, baselines=())
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    queries = [Query.from_json(row) for row in runs.rows_of(out / "queries.jsonl")]
    documents = [tokenize_text(tokenizer, "", t, 64) for t in runs.texts(60)]
    mine = [
        tokenize_query(tokenizer, q.id, q.prompt, q.completion, 512) for q in queries if q.task == "apples"
    ]
    exact = exact_cosines(model, linear_layers(model), documents, mine).mean(1).numpy()
    found = runs.scores(out)["influence:apples"].to_numpy()
    assert np.corrcoef(found, exact)[0, 1] > 0.995
    np.testing.assert_allclose(found, exact, atol=0.02)


def test_scores_do_not_depend_on_shards_and_windows(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], data: tuple[list[str], dict[str, Path]]
) -> None:
    out, _ = finished
    fit = str(out / "fit" / "0" / "fit.safetensors")
    runs.run(tmp_path / "out", *data, shard_documents=7, window=5, batch_tokens=100, fit=fit)
    one, other = runs.scores(out), runs.scores(tmp_path / "out")
    assert one["id"].to_pylist() == other["id"].to_pylist()
    for column in ("influence:sums", "hidden:apples", "loss", "norm"):
        np.testing.assert_allclose(one[column].to_numpy(), other[column].to_numpy(), rtol=1e-4, atol=2e-6)


def test_prompts_are_not_scored(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    rows = [{"id": f"doc-{i}", "ask": f"What is {i}?", "text": t} for i, t in enumerate(runs.texts(8))]
    rows += [{"id": "no-field", "text": rows[0]["text"]}]
    joined = [{**r, "text": f"{r['ask']}\n\n{r['text']}"} if "ask" in r else r for r in rows]
    joined += [{"id": "alone", "ask": "What?", "text": "What?"}]
    corpus = [str(runs.write_lines(tmp_path / "corpus.jsonl", joined))]
    for name, field in (("whole", ""), ("answers", "ask")):
        runs.run(tmp_path / name, corpus, data[1], prompt_field=field, baselines=("loss",))
    whole, answers = runs.scores(tmp_path / "whole"), runs.scores(tmp_path / "answers")
    assert whole["id"].to_pylist() == [*answers["id"].to_pylist(), "alone"]
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    for row, loss in zip(joined, answers["loss"].to_pylist(), strict=False):
        tokens = tokenize_text(tokenizer, "", row["text"], 512, prompt=row.get("ask", ""))
        labels = torch.tensor([tokens.ids])
        ids, labels = labels.clone(), labels.masked_fill(torch.arange(len(tokens.ids)) < tokens.start, -100)
        with torch.no_grad():
            assert loss == pytest.approx(float(model(ids, labels=labels).loss), rel=2e-3)
    told: list[str] = []
    plan = open_plan(tmp_path / "x", corpus, ScoreSettings(**runs.SMALL, prompt_field="aks"), data[1], 1)
    prepare(tmp_path / "x", plan, data[1], told.append)
    assert (
        "none of the 10 texts drawn has the field 'aks' of --prompt-field: all of every text is scored"
        in told
    )
    [lost] = [r for p in (tmp_path / "answers" / "rejects").iterdir() for r in runs.rows_of(p)]
    assert lost["reason"] == "too_short"


def test_features_are_kept(finished: tuple[Path, dict[str, Any]], tiny_model: Path) -> None:
    out, _ = finished
    store = Store(out / "store", verify=True)
    fit = AdaptedFit.load(out / "fit" / "0" / "fit.safetensors", _hash(tiny_model))
    table = runs.scores(out)
    assert not store.damaged and len(store) == 60
    assert [int(i) for s in store.shards for i in s.id] == table["hash"].to_pylist()
    from safetensors.torch import load_file

    readout = load_file(out / "fit" / "0" / "tasks.safetensors")["readout"]
    decoded = torch.cat([v for _, v in store.values(Coding(fit.mean, fit.scale, 8))])
    coded = (decoded @ readout)[:, 0].numpy()
    assert np.corrcoef(coded, table["influence:sums"].to_numpy())[0, 1] > 0.999


def test_fidelity_is_measured_on_unseen_texts(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], data: tuple[list[str], dict[str, Path]]
) -> None:
    """Measured against exact gradients: few coordinates keep less of the ranking than many."""
    _, manifest = finished
    [good] = [c["fidelity"] for c in manifest["checkpoints"]]
    assert (good["documents"], good["queries"]) == (20, 4)
    options: dict[str, Any] = {"exact_documents": 20, "exact_queries": 2, "coordinates": 2}
    _, job = runs.start(tmp_path / "out", *data, **options)
    assert job.checkpoints[0].fidelity["spearman"] + 0.1 < good["spearman"] <= 1


def test_checkpoints_are_weighed(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    names = (str(tiny_model), str(runs.other_model(tiny_model, tmp_path / "other")))
    parts = []
    for number, name in enumerate(names):
        runs.run(tmp_path / f"single-{number}", *data, model=name, kind="sketch", baselines=("loss",))
        parts.append(runs.scores(tmp_path / f"single-{number}"))
    both = (f"{names[0]}=3", f"{names[1]}=1")
    runs.run(tmp_path / "both", *data, checkpoint=both, kind="sketch", baselines=("loss",))
    table = runs.scores(tmp_path / "both")
    for column in ("influence:sums", "loss"):
        one, two = (part[column].to_numpy() for part in parts)
        assert np.abs(one - two).max() > 1e-3
        np.testing.assert_allclose(table[column].to_numpy(), 0.75 * one + 0.25 * two, atol=1e-6)
    np.testing.assert_allclose(table["norm:1"].to_numpy(), parts[1]["norm"].to_numpy(), rtol=1e-5)


def test_manifest_explains_the_choice(finished: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = finished
    table, chosen = runs.scores(out), runs.rows_of(out / "selected.jsonl")
    mean = (table["influence:sums"].to_numpy().astype(float) + table["influence:apples"].to_numpy()) / 2
    best = np.argsort(-mean)[:8]
    assert [row["id"] for row in chosen] == [f"doc-{i}" for i in best]
    assert [row["text"] for row in chosen] == [runs.texts(60)[i] for i in best]
    assert [row["rank"] for row in chosen] == [*range(8)]
    assert chosen[0]["scores"]["sums"] == pytest.approx(table["influence:sums"][int(best[0])].as_py())
    assert chosen[0]["score"] == pytest.approx(mean[best[0]]) and "number 1 of 60" in chosen[0]["why"]
    methods = manifest["methods"]
    assert set(methods) == {"influence", "hidden", "bm25", "loss", "random", "control", "selected"}
    for method in methods.values():
        assert sum(method["mix"].values()) == 8 and method["about"]
    control = np.argsort(-table["influence:control"].to_numpy())[:8]
    shared = len(set(control.tolist()) & set(best.tolist())) / 8
    assert methods["control"]["overlap_with_influence"] == shared
    assert methods["hidden"]["about"].startswith("RDS+")
    assert methods["influence"]["overlap_with_influence"] == 1
    assert set(manifest["negative_control"]["overlap"]) == {"sums", "apples"}
    assert manifest["selection"]["chosen"] == manifest["selection"]["wanted"] == 8


def test_another_choice_needs_no_new_scores(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    out = tmp_path / "out"
    runs.run(out, *data)
    before = runs.score_files(out)
    manifest = runs.run(out, *data, choose=ChooseSettings(share=0.5, combine="quota", source_quota=0.5))
    assert manifest["selection"]["chosen"] == 30 and runs.score_files(out) == before
    assert manifest["methods"]["selected"]["mix"] == {"a": 15, "b": 15}
    assert "whose turn it was" in runs.rows_of(out / "selected.jsonl")[0]["why"]


def test_repeats_among_the_chosen_are_passed_over(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    texts = [t for t in runs.texts(12, seed=4) for _ in range(4)]
    texts = [t if i % 4 < 2 else t.replace(" the ", "  The ") for i, t in enumerate(texts)]
    corpus = [str(runs.write_lines(tmp_path / "twice.jsonl", [{"text": t} for t in texts]))]
    manifest = runs.run(tmp_path / "out", corpus, data[1], choose=ChooseSettings(k=10))
    chosen = runs.rows_of(tmp_path / "out" / "selected.jsonl")
    assert len(chosen) == 10
    assert len({" ".join(row["text"].casefold().split()) for row in chosen}) == 10
    mean = (lambda t: (t["influence:sums"].to_numpy().astype(float) + t["influence:apples"]) / 2)(
        runs.scores(tmp_path / "out")
    )
    for row in chosen:
        better = int((mean > row["score"]).sum())
        assert f"is number {better + 1} of 48" in row["why"]
        assert (f"{better - row['rank']} of the better ones were passed over" in row["why"]) == (
            better > row["rank"]
        )
    passed = runs.rows_of(tmp_path / "out" / "passed_over.jsonl")
    assert manifest["selection"]["passed_over"]["duplicate"] == len(passed) >= 9
    places = {f"{row['file']}:{row['line']}" for row in chosen}
    assert all(row["repeats"] in places for row in passed)


def test_bm25_in_a_stream_is_bm25s() -> None:
    import bm25s

    texts = runs.texts(40)
    queries = [
        Query(id=str(i), task="t", problem=f"number of {w}", prompt="", completion="apples of the sum")
        for i, w in enumerate(("pears", "birds", "zzz"))
    ]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    wanted = np.zeros(40)
    for q in queries:
        text = f"{q.problem} {q.completion}"
        words: Any = bm25s.tokenize(text, stopwords="en", return_ids=False, show_progress=False)[0]
        wanted += index.get_scores([w for w in words if w in index.vocab_dict]) / 3
    model = Bm25.count(iter(texts), {"t": queries})
    found = np.concatenate([model.scores(texts[:9])["t"], model.scores(texts[9:])["t"]])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.1


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="--kind must be one of"):
        ScoreSettings(kind="magic")
    with pytest.raises(ValueError, match="unknown 'magic'"):
        ScoreSettings(baselines=("magic",))
    with pytest.raises(ValueError, match="PATH=WEIGHT"):
        ScoreSettings(checkpoint=("folder",)).checkpoints()
    with pytest.raises(ValueError, match="weights must be positive"):
        ScoreSettings(checkpoint=("folder=-1",)).checkpoints()
    with pytest.raises(ValueError, match="I from 0 to N - 1"):
        RunSettings(worker="4/4").part()
    with pytest.raises(ValueError, match="exclude each other"):
        RunSettings(worker="0/4", slurm=True)
    with pytest.raises(ValueError, match="is taken"):
        split_targets(("a=x", "a=y"))
    with pytest.raises(ValueError, match="NAME=FILE is missing"):
        split_targets(())
    assert split_targets(("a=x=y",)) == {"a": Path("x=y")}
    # By default what memory surely has room for.
    assert [ChooseSettings().count(n) for n in (3, 60, 20_000_000)] == [1, 6, 10_000]
    assert ChooseSettings(share=0.1).count(20_000_000) == 2_000_000
    assert [ChooseSettings(k=8).count(n) for n in (5, 100)] == [5, 8]


def test_shards_know_their_counts(finished: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = finished
    plan = load_plan(out)
    about = [read_about(scores_path(out, s.number), manifest["run"]) for s in plan.shards]
    assert [a["records"] for a in about] == [12, 8, 12, 8, 12, 8]
    with pytest.raises(Jz3Error, match="belongs to another run"):
        read_about(scores_path(out, 0), "other")


def test_a_text_of_just_the_limit_is_not_cut(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    texts = ["one and two and three and four and five", "one and two and three and four and five and six"]
    corpus = [str(runs.write_lines(tmp_path / "a.jsonl", [{"text": t} for t in (*texts, *runs.texts(20))]))]
    limit = len(load_tokenizer(tiny_model)(texts[0]).input_ids)
    plan, job = runs.start(tmp_path / "out", corpus, data[1], max_tokens=limit)
    scorer = Scorer(tmp_path / "out", plan, job)
    rows = [SourceText(text=text, source="a", where=f"a.jsonl:{n}") for n, text in enumerate(texts, 1)]
    found = scorer.score(iter(rows))
    assert found.tokens == [limit, limit] and found.cut == 1


def test_workers_that_have_other_products_say_so(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """As one with a GPU, of a run that was prepared on a CPU."""
    if reason := products_obstacle("int16"):
        pytest.skip(reason)
    plan, job = runs.start(tmp_path / "out", data[0], data[1], products="exact")
    Scorer(tmp_path / "out", plan, job)
    assert "products" not in caplog.text
    [checkpoint] = job.checkpoints
    job = dataclasses.replace(job, checkpoints=[dataclasses.replace(checkpoint, products="int16")])
    Scorer(tmp_path / "out", plan, job)  # whose model runs on its own code
    assert "the run's products are 'int16', and 'exact' is what" in caplog.text


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, data: tuple[list[str], dict[str, Path]], tiny_model: Path
) -> None:
    """Ten times the texts in ten times the shards: the same peak, features kept or not."""
    peaks = []
    for count in (48, 480):
        rows = [{"text": t} for t in runs.texts(count, seed=count)]
        corpus = [str(runs.write_lines(tmp_path / f"{count}.jsonl", rows))]
        out = tmp_path / str(count)
        plan, job = runs.start(out, corpus, data[1], kind="sketch")
        tracemalloc.start()
        work(out)
        merge(out, plan, job, ChooseSettings(k=8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_dry_run_measures_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    data: tuple[list[str], dict[str, Path]],
    tiny_model: Path,
) -> None:
    corpus, targets = data
    small = [f"--{k.replace('_', '-')}={v}" for k, v in runs.SMALL.items()]
    arguments = ["score", *corpus, "--target", f"sums={targets['sums']}", "--out", str(tmp_path / "out")]
    assert main([*arguments, *small, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "documents         60," in text and "tokens a second" in text and "memory a worker" in text
    assert not (tmp_path / "out").exists()


def test_paper_estimate() -> None:
    """20 M texts of 500 tokens, 7B on 8 H100: 10 G tokens x 29 GF at half the peak is about 20 hours."""
    paper = PaperSettings(documents=20_000_000)
    cost = paper_cost(paper, ScoreSettings(), 3)
    assert cost.tokens == 1e10
    flop = 4 * 7e9 + 2 * (128 + 32) * 2.5e6
    assert cost.hours == pytest.approx(1e10 * flop / (0.5 * 989e12) / 8 / 3600)
    assert 19 < cost.hours < 22
    kept = paper_cost(paper, ScoreSettings(keep_features=True), 3)
    assert cost.files == 9766 * 4 + 8 and kept.files == 9766 * 6 + 8
    assert kept.feature_bytes == pytest.approx(20e9, rel=0.1) and kept.score_bytes < 3e9
    assert paper_cost(PaperSettings(documents=100, tokens_per_second=50.0), ScoreSettings(), 1).hours == (
        pytest.approx(100 * 500 / 50 / 8 / 3600)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("documents", -1),
        ("tokens_per_document", -5.0),
        ("tokens_per_document", math.nan),
        ("bytes_per_document", -1.0),
        ("params", math.inf),
        ("params", math.nan),
        ("gpus", 0),
        ("utilisation", 1.5),
        ("tokens_per_second", -1.0),
    ],
)
def test_paper_estimate_of_impossible_numbers_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} must be .*got {value}"):
        PaperSettings(**{name: value})
