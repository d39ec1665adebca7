"""`jz3 score` on input that is damaged, foreign or changed, and on a disk that is full."""

import contextlib
import errno
import gzip
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scoring_runs as runs
import torch

from jz3.errors import Jz3Error
from jz3.files import locked
from jz3.models import load_model, load_tokenizer
from jz3.scoring.command import score, score_corpus
from jz3.scoring.config import ChooseSettings, RunSettings, ScoreSettings
from jz3.scoring.job import load_job, prepare
from jz3.scoring.merge import merge
from jz3.scoring.plan import load_plan, make_plan, open_plan
from jz3.scoring.reading import Reader
from jz3.scoring.shard import Scorer
from jz3.scoring.targets import read_target
from jz3.scoring.workers import missing_shards, work
from jz3.store import Store


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return runs.make_targets(tmp_path_factory.mktemp("targets"))


BIG = 2**80 + 7


def test_damaged_lines_are_counted_and_the_rest_is_scored(
    tmp_path: Path, targets: dict[str, Path], tiny_model: Path
) -> None:
    """Two hundred texts with two damaged lines, among odd ids, encodings and files without a text."""
    texts = runs.texts(200)
    rows: list[Any] = [{"id": i, "text": t} for i, t in enumerate(texts)]
    rows[17] = b'{"id": 17, "text": "broken'
    rows[18] = '{"id": 18, "text": "caf\xe9 in another encoding"}'.encode("latin-1")
    rows[19] = {"id": BIG, "text": texts[19]}
    rows[20] = {"id": 21, "text": texts[20]}  # the same id as the next one, another text
    rows[22] = {"id": "twenty-two", "text": "naïve Gauß 数学 " + texts[22]}
    rows[23] = {"id": 23, "text": "   "}
    rows[24] = {"id": 24, "body": "no text"}
    rows[25] = {"id": 25, "text": 7}
    rows[26] = {"id": 26, "text": "x"}
    rows[27] = b""
    rows[28] = {"id": 28, "text": "nul \0 byte"}
    corpus = [str(runs.write_lines(tmp_path / "mixed.jsonl", rows))]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "utf16.jsonl").write_bytes('{"text": "in sixteen bits"}\n'.encode("utf-16"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is none")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    pq.write_table(pa.table({"other": ["a text"]}), tmp_path / "other.parquet")
    for name in ("empty.jsonl", "utf16.jsonl", "bad.parquet", "none.parquet", "other.parquet"):
        corpus.append(str(tmp_path / name))
    manifest = runs.run(tmp_path / "out", corpus, targets, choose=ChooseSettings(k=200))
    table = runs.scores(tmp_path / "out")
    ids = table["id"].to_pylist()
    assert len(ids) == 200 - 8 == manifest["documents"]["kept"]
    assert ids[17:20] == [str(BIG), "21", "21"]
    assert "twenty-two" in ids and manifest["selection"]["repeated_ids"] == 1
    assert manifest["documents"]["rejected"] == {
        "damaged_file": 1,
        "empty_file": 2,
        "empty_text": 1,
        "invalid_utf8": 2,
        "malformed_json": 1 + 1,
        "missing_field": 2,
        "nul_bytes": 1,
        "too_short": 1,
        "wrong_type": 1,
    }
    rejects = runs.rows_of(tmp_path / "out" / "rejects.jsonl")
    assert Counter(r["reason"] for r in rejects) == manifest["documents"]["rejected"]
    places = {r["reason"]: r["where"] for r in rejects if "mixed" in r["where"]}
    assert places["malformed_json"].endswith("mixed.jsonl:18") and places["invalid_utf8"].endswith(":19")
    chosen = {(row["id"], row["line"]) for row in runs.rows_of(tmp_path / "out" / "selected.jsonl")}
    assert {(str(BIG), 20), ("21", 21), ("21", 22)} <= chosen


def test_lines_keep_their_numbers_in_every_shard(tmp_path: Path, targets: dict[str, Path]) -> None:
    """Shards of plain files start at bytes, those of compressed ones are found by reading; both agree."""
    rows: list[Any] = [{"id": str(i), "text": t} for i, t in enumerate(runs.texts(40))]
    rows[5] = b""
    rows[13] = b'{"text": "' + b"long" * 5000 + b'"}'
    plain = runs.write_lines(tmp_path / "a.jsonl", rows)
    packed = runs.write_lines(tmp_path / "b.jsonl.gz", rows)
    settings = ScoreSettings(shard_documents=7, max_line_bytes=10_000)
    found = []
    for path in (plain, packed):
        plan = make_plan([str(path)], settings, {})
        reader = Reader(plan)
        assert [s.rows for s in plan.shards] == [7, 7, 7, 7, 7, 5]
        records = [r for shard in plan.shards for r in reader.read(shard)]
        found.append([r.where.rpartition(":")[2] for r in records])
    assert found[0] == found[1] == [str(i) for i in range(1, 41) if i != 6]
    plan = make_plan([str(plain), str(packed)], settings, {})
    places = [(s.number, line) for s in plan.shards for line in (s.skip + 1, s.skip + s.rows)]
    read = [(shard, line) for shard, line, _ in Reader(plan).read_places(list(reversed(places)))]
    assert read == [(s, line) for s, line in places if line not in (6, 14)]


def test_files_with_several_names_and_links_without_a_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link's own name says the format; each file counts once, by whichever of its names."""
    blob = runs.write_lines(tmp_path / "blobs" / "0a1b", [{"text": t} for t in runs.texts(3)])
    link = tmp_path / "snapshot" / "part.jsonl"
    link.parent.mkdir()
    link.symlink_to(blob)
    again = tmp_path / "snapshot" / "same.jsonl"
    again.symlink_to(blob)
    monkeypatch.chdir(tmp_path)
    corpus = ["snapshot/part.jsonl", str(link), str(again)]
    settings = ScoreSettings(dtype="float32")
    plan = open_plan(tmp_path / "out", corpus, settings, {}, 1)
    assert len(plan.files) == 1 and Path(plan.files[0].path).is_symlink()
    assert [type(r).__name__ for r in Reader(load_plan(tmp_path / "out")).read(plan.shards[0])] == [
        "SourceText"
    ] * 3
    assert open_plan(tmp_path / "out", [str(again)], settings, {}, 1).key == plan.key


def test_what_runs_wrote_is_no_corpus(tmp_path: Path) -> None:
    """A glob over a folder that holds OUT and an older run finds the corpus alone, before and after."""
    runs.write_lines(tmp_path / "a.jsonl", [{"text": t} for t in runs.texts(3)])
    settings = ScoreSettings(dtype="float32")
    old = tmp_path / "old"
    open_plan(old, [str(tmp_path / "a.jsonl")], settings, {}, 1)
    for folder in (old, tmp_path / "out"):
        chosen = runs.write_lines(folder / "selected.jsonl", [{"text": "chosen before"}])
    runs.write_lines(old / "corpus" / "b.jsonl", [{"text": t} for t in runs.texts(2)])
    corpus = [str(tmp_path / "**" / "*.jsonl")]
    for _ in range(2):
        plan = open_plan(tmp_path / "out", corpus, settings, {}, 1)
        assert [Path(f.path).name for f in plan.files] == ["a.jsonl", "b.jsonl"]
    # Another run's choice may be scored where it is named, one's own never.
    named = open_plan(tmp_path / "third", [str(old / "selected.jsonl")], settings, {}, 1)
    assert named.rows == 1
    with pytest.raises(Jz3Error, match="only files that runs wrote"):
        open_plan(tmp_path / "out", [str(chosen)], settings, {}, 1)


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(Jz3Error, match=r"has no file locks \(No locks available\)"):
        open_plan(tmp_path / "out", [], ScoreSettings(), {}, 1)


def test_damaged_target_is_told(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b'{"question": "q", "answer": "a"}\n' * 99, mtime=0))
    data[12:20] = b"\xff" * 8
    (tmp_path / "target.jsonl.gz").write_bytes(data)
    with pytest.raises(Jz3Error, match="target 'sums': .*target.jsonl.gz can't be read"):
        read_target("sums", tmp_path / "target.jsonl.gz", ScoreSettings())


def test_odd_targets_are_refused_and_odd_lines_counted(tmp_path: Path) -> None:
    (tmp_path / "target.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        Jz3Error, match=r"'sums': .*target\.parquet is a Parquet file; targets are JSON lines"
    ):
        read_target("sums", tmp_path / "target.parquet", ScoreSettings())
    rows: list[Any] = [
        b'{"question": ' + b"[" * 100_000,
        {"question": "q", "answer": ["First add.", "So 27."]},
        {"question": "q", "answer": {"text": "So 27."}},
        {"question": "q", "answer": 27},
    ]
    path = runs.write_lines(tmp_path / "target.jsonl", rows)
    [query], rejects = read_target("sums", path, ScoreSettings())
    assert query.completion == "27"
    assert [r.reason for r in rejects] == ["malformed_json", "wrong_type", "wrong_type"]
    assert "field 'answer'" in rejects[1].detail


def test_what_is_refused_of_a_target_is_told(tmp_path: Path, tiny_model: Path) -> None:
    rows: list[Any] = [{"question": "q", "answer": "a"}, {"question": "p"}, {"question": 5, "answer": "a"}]
    target = runs.write_lines(tmp_path / "target.jsonl", rows)
    long = runs.write_lines(tmp_path / "long.jsonl", [rows[0], {"question": "long " * 2000, "answer": "7"}])
    told: list[str] = []
    corpus, settings = runs.make_corpus(tmp_path, 12), ScoreSettings(**runs.SMALL)
    targets = {"sums": target, "long": long}
    prepare(tmp_path / "out", open_plan(tmp_path / "out", corpus, settings, targets, 1), targets, told.append)
    [line] = [line for line in told if "refused" in line]
    assert line.startswith(
        "of the targets' rows 3 are refused (1 no_completion, 1 prompt_too_long, 1 wrong_type"
    )
    assert "first at" in line and line.endswith(f"{tmp_path / 'out' / 'targets.rejects.jsonl'}")


def asked(path: Path, row: dict[str, Any], name: str = "sums", **fields: Any) -> tuple[str, str]:
    """Return problem and completion of the one query of a file with the given fields."""
    [query] = read_target(name, runs.write_lines(path, [row]), ScoreSettings(**fields))[0]
    return query.problem, query.completion


def test_fields_of_targets_are_named_or_found_each_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl"
    row = {"question": "q 1", "answer": "a 1", "why": "w 1", "input": "i 1"}
    assert asked(path, row) == ("q 1", "a 1")
    assert asked(path, row, solution_field="why") == ("q 1", "w 1")
    assert asked(path, row, problem_field="question") == ("q 1", "a 1")
    assert asked(path, row, problem_field="input") == ("i 1", "a 1")
    assert asked(path, row, problem_field="input", solution_field="why") == ("i 1", "w 1")
    assert asked(path, {"input": "i 1", "completion": "c 1"}, problem_field="input") == ("i 1", "c 1")
    # The partner that is usual counts first; without any, all of the field is scored.
    both = {"problem": "p 1", "answer": "a 1", "solution": "s 1"}
    assert asked(path, both, problem_field="problem") == ("p 1", "s 1")
    assert asked(path, {"input": "i 1", "why": "w 1"}, problem_field="input") == ("i 1", "i 1")
    assert asked(path, {"question": "q 1", "answer": "a 1"}, problem_field="answer") == ("a 1", "a 1")
    with pytest.raises(
        Jz3Error, match="--solution-field 'why' is given, .* has input, why.* --problem-field"
    ):
        asked(path, {"input": "i 1", "why": "w 1"}, solution_field="why")


def test_fields_of_the_control_are_those_of_the_tasks_or_found(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    fields = {"problem_field": "input", "solution_field": "why"}
    assert asked(path, {"input": "i 1", "why": "w 1"}, "control", **fields) == ("i 1", "w 1")
    assert asked(path, {"question": "q 1", "answer": "a 1"}, "control", **fields) == ("q 1", "a 1")
    assert asked(path, {"text": "t 1"}, "control", solution_field="why") == ("t 1", "t 1")
    assert asked(path, {"why": "w 1"}, "control", **fields) == ("w 1", "w 1")
    assert asked(path, {"why": "w 1"}, "control", solution_field="why") == ("w 1", "w 1")
    with pytest.raises(Jz3Error, match="'control': .* has the fields body; wanted are"):
        asked(path, {"body": "b 1"}, "control", **fields)
    assert asked(path, {"body": "b 1"}, "control", problem_field="body") == ("b 1", "b 1")
    nested = {"row": {"q": "i 1", "a": "w 1"}}
    assert asked(path, nested, "control", problem_field="row.q", solution_field="row.a") == ("i 1", "w 1")


def test_options_that_contradict_each_other_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="--slurm-arguments belong to --slurm"):
        RunSettings(slurm_arguments="--partition=gpu")
    with pytest.raises(ValueError, match="--reduction must be mean or sum, got 'median'"):
        ScoreSettings(reduction="median")
    several = ScoreSettings(model="tiny", checkpoint=("a=1", "b=2"))
    with pytest.raises(ValueError, match="--model tiny and --checkpoint exclude each other"):
        score(target=("t=x",), settings=several)
    corpus, fit = runs.make_corpus(tmp_path, 12), tmp_path / "out" / "fit" / "0" / "fit.safetensors"
    targets = runs.make_targets(tmp_path)
    runs.start(tmp_path / "out", corpus, targets)
    with pytest.raises(Jz3Error, match=f"--fit {fit} is of the kind adapted, not sketch as --kind says"):
        runs.start(tmp_path / "other", corpus, targets, fit=str(fit), kind="sketch")
    (tmp_path / "no.fit").write_bytes(b"no fit")
    with pytest.raises(Jz3Error, match="no.fit can't be read .*; make it again, e.g. with `jz3 fit`"):
        runs.start(tmp_path / "third", corpus, targets, fit=str(tmp_path / "no.fit"))


def test_what_would_fail_at_the_end_fails_at_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    settings, choose = ScoreSettings(), ChooseSettings()
    with pytest.raises(Jz3Error, match="needs the package rensa.*--no-near-duplicates"):
        score_corpus((), {}, tmp_path / "out", settings, choose, RunSettings())
    with pytest.raises(ValueError, match="--worker takes I/N"):
        score_corpus((), {}, tmp_path / "out", settings, choose, RunSettings(worker="2/2"))
    assert not (tmp_path / "out").exists()


def test_half_a_compressed_file(tmp_path: Path, targets: dict[str, Path], tiny_model: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [f"{t} {rng.bytes(40).hex()}" for t in runs.texts(60)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in noise).encode()
    data = gzip.compress(lines)
    (tmp_path / "half.jsonl.gz").write_bytes(data[: len(data) // 2])
    other = pa.compress(lines, "zstd", asbytes=True)
    (tmp_path / "half.jsonl.zst").write_bytes(other[: len(other) // 2])
    whole = runs.write_lines(tmp_path / "whole.jsonl", [{"text": t} for t in runs.texts(20)])
    corpus = [str(tmp_path / "half.jsonl.gz"), str(tmp_path / "half.jsonl.zst"), str(whole)]
    manifest = runs.run(tmp_path / "out", corpus, targets)
    assert manifest["documents"]["rejected"] == {"damaged_file": 2}
    files = Counter(Path(f).name for f in runs.scores(tmp_path / "out")["file"].to_pylist())
    assert files["whole.jsonl"] == 20 and 15 < files["half.jsonl.gz"] < 35


def test_no_usable_text_is_told(tmp_path: Path, targets: dict[str, Path], tiny_model: Path) -> None:
    corpus = [str(runs.write_lines(tmp_path / "a.jsonl", [{"body": "x"}] * 3))]
    with pytest.raises(Jz3Error, match='no text of the corpus could be scored: {"missing_field": 3}'):
        runs.run(tmp_path / "out", corpus, targets, kind="sketch")
    message = "none of the texts drawn .*3 missing_field; first at .*a.jsonl:1: no field 'text'; fields: body.*--text"
    with pytest.raises(Jz3Error, match=message):
        runs.run(tmp_path / "adapted", corpus, targets)


def test_what_failed_before_its_fits_is_planned_anew(
    tmp_path: Path, targets: dict[str, Path], tiny_model: Path
) -> None:
    """A wrong option costs no new folder, unless the fits are there or another process is making them."""
    rows = [{"body": text} for text in runs.texts(12)]
    corpus, out = [str(runs.write_lines(tmp_path / "a.jsonl", rows))], tmp_path / "out"
    with pytest.raises(Jz3Error, match="none of the texts drawn"):
        runs.start(out, corpus, targets)
    (out / "fit" / "0").mkdir(parents=True)
    (out / "fit" / "0" / "fit.safetensors").write_bytes(b"of the other plan")
    with locked(out / ".prepare.lock"), pytest.raises(Jz3Error, match="text_field: 'text' -> 'body'"):
        runs.start(out, corpus, targets, text_field="body")
    plan, _ = runs.start(out, corpus, targets, text_field="body")
    assert plan.settings.text_field == "body" and load_plan(out) == plan
    with pytest.raises(Jz3Error, match="seed: 0 -> 1"):
        runs.start(out, corpus, targets, text_field="body", seed=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "q", "answer": ""}, {"question": "p", "answer": " "}],
            "no usable query .*2 no_completion",
        ),
        ([{"question": "q"}], "no usable query .*1 no_completion"),
        ([{"prompt": "p"}], "no usable query .*1 no_completion"),
        ([{"title": "q"}], "has the fields title; wanted are question"),
        ([], "holds no JSON object in its first 100 lines; targets are JSON lines"),
        (["question,answer", "q,a"], "holds no JSON object in its first 100 lines"),
        ([{"question": "long " * 2000, "answer": "7"}], "no query with anything to score .*prompt_too_long"),
    ],
)
def test_target_without_completions(tmp_path: Path, rows: list[Any], message: str, tiny_model: Path) -> None:
    corpus = runs.make_corpus(tmp_path, 12)
    target = runs.write_lines(tmp_path / "target.jsonl", rows)
    with pytest.raises(Jz3Error, match=f"(?s)target 'sums'.*{message}"):
        runs.start(tmp_path / "out", corpus, {"sums": target})
    assert not (tmp_path / "out" / "job.json").exists()


def test_another_model_is_refused(tmp_path: Path, targets: dict[str, Path], tiny_model: Path) -> None:
    corpus = runs.make_corpus(tmp_path, 24)
    model: Any = load_model(tiny_model, "float32")
    copy = tmp_path / "model"
    model.save_pretrained(copy)
    load_tokenizer(tiny_model).save_pretrained(copy)
    plan, _ = runs.start(tmp_path / "out", corpus, targets, model=str(copy))
    fit = str(tmp_path / "out" / "fit" / "0" / "fit.safetensors")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(copy)
    with pytest.raises(Jz3Error, match="the model .* changed"):
        runs.start(tmp_path / "out", corpus, targets, model=str(copy))
    with pytest.raises(Jz3Error, match="was fitted for model"):
        runs.start(tmp_path / "other", corpus, targets, model=str(copy), fit=fit)
    assert len(missing_shards(tmp_path / "out", plan)) == len(plan.shards)


def test_other_settings_and_changed_files_are_refused(
    tmp_path: Path, targets: dict[str, Path], tiny_model: Path
) -> None:
    corpus = runs.make_corpus(tmp_path, 24)
    plan, job = runs.start(tmp_path / "out", corpus, targets)
    with pytest.raises(Jz3Error, match="max_tokens: 64 -> 32"):
        runs.start(tmp_path / "out", corpus, targets, max_tokens=32)
    with pytest.raises(Jz3Error, match="corpus: 3 files -> 2 files"):
        runs.start(tmp_path / "out", corpus[:2], targets)
    with pytest.raises(Jz3Error, match="target 'apples'.*None"):
        runs.start(tmp_path / "out", corpus, {k: v for k, v in targets.items() if k != "apples"})
    with pytest.raises(Jz3Error, match="shards are not scored yet"):
        merge(tmp_path / "out", plan, job, ChooseSettings())
    with open(corpus[0], "a") as handle:
        handle.write(json.dumps({"text": "one more text that was not there"}) + "\n")
    with pytest.raises(Jz3Error, match=r"a.jsonl changed after the plan was made \(\d+ bytes then"):
        work(tmp_path / "out")


def test_files_of_which_only_the_time_changed_can_be_set_back(
    tmp_path: Path, targets: dict[str, Path], tiny_model: Path
) -> None:
    corpus = runs.write_lines(tmp_path / "my corpus.jsonl", [{"text": t} for t in runs.texts(4)])
    os.utime(corpus, ns=(0, 1_700_000_000_000_000_042))
    plan, _ = runs.start(tmp_path / "out", [str(corpus)], targets)
    os.utime(corpus)
    with pytest.raises(Jz3Error, match="as many bytes, another time") as told:
        plan.check_file(0)
    [command] = re.findall(r"`(touch .*)`", str(told.value))
    subprocess.run(shlex.split(command), check=True)
    assert plan.check_file(0) == corpus


def test_equal_texts_have_no_fidelity(tmp_path: Path, targets: dict[str, Path], tiny_model: Path) -> None:
    corpus = runs.write_lines(tmp_path / "corpus.jsonl", [{"text": runs.texts(1)[0]}] * 30)
    _, job = runs.start(tmp_path / "out", [str(corpus)], targets, exact_documents=4)
    assert job.checkpoints[0].fidelity == {}


def test_one_process_chooses_at_a_time(tmp_path: Path, targets: dict[str, Path], tiny_model: Path) -> None:
    out = tmp_path / "out"
    plan, job = runs.start(out, runs.make_corpus(tmp_path, 12), targets)
    work(out)
    other = threading.Thread(target=merge, args=(out, plan, job, ChooseSettings(k=2)))
    with locked(out / ".choose.lock"):
        other.start()
        other.join(0.2)
        assert other.is_alive() and not (out / "selected.jsonl").exists()
    other.join()
    assert (out / "manifest.json").is_file()


def test_foreign_and_damaged_scores_are_named(
    tmp_path: Path, targets: dict[str, Path], tiny_model: Path
) -> None:
    corpus = runs.make_corpus(tmp_path, 24)
    runs.run(tmp_path / "out", corpus, targets)
    runs.run(tmp_path / "other", corpus, targets, seed=5)
    path = tmp_path / "out" / "scores" / "000001.parquet"
    good = path.read_bytes()
    path.write_bytes((tmp_path / "other" / "scores" / "000001.parquet").read_bytes())
    with pytest.raises(Jz3Error, match="000001.parquet belongs to another run"):
        runs.run(tmp_path / "out", corpus, targets)
    path.write_bytes(good[:-40])
    with pytest.raises(Jz3Error, match="000001.parquet is damaged"):
        runs.run(tmp_path / "out", corpus, targets)
    path.unlink()
    runs.run(tmp_path / "out", corpus, targets)
    assert path.read_bytes() == good


def _worker(out: Path, limit: int = 0) -> "subprocess.CompletedProcess[str]":
    def cap() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "jz3.scoring", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=cap,
    )


def test_full_disk_in_the_middle_of_a_shard(
    tmp_path: Path, targets: dict[str, Path], tiny_model: Path
) -> None:
    """No file may grow beyond 3 KB: the shard's scores can't be written; with room, the run goes on."""
    corpus = runs.make_corpus(tmp_path, 24)
    runs.run(tmp_path / "reference", corpus, targets, keep_features=True)
    plan, job = runs.start(tmp_path / "out", corpus, targets, keep_features=True)
    done = _worker(tmp_path / "out", limit=3000)
    assert done.returncode == 2 and "is full (shard 0" in done.stderr and "Traceback" not in done.stderr
    assert len(missing_shards(tmp_path / "out", plan)) == len(plan.shards)
    work(tmp_path / "out")
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(tmp_path / "reference")
    store = Store(tmp_path / "out" / "store", verify=True)
    assert not store.damaged and len(store) == 24


def test_full_file_system(tmp_path: Path, targets: dict[str, Path], tiny_model: Path) -> None:
    """Full in the middle of the third shard, with features kept: the store stays whole, and goes on with room."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        corpus = runs.make_corpus(tmp_path, 24)
        runs.run(tmp_path / "reference", corpus, targets, keep_features=True)
        plan, _ = runs.start(small / "out", corpus, targets, keep_features=True)
        scorer = Scorer(small / "out", plan, load_job(small / "out"))
        for shard in plan.shards[:2]:
            scorer.run(shard)
        filler = small / "filler"
        with open(filler, "wb", buffering=0) as handle, contextlib.suppress(OSError):
            while True:
                handle.write(bytes(1024))
        with pytest.raises(Jz3Error, match="disk of .* is full|does not fit on the disk"):
            work(small / "out")
        assert missing_shards(small / "out", plan) == [s.number for s in plan.shards[2:]]
        store = Store(small / "out" / "store", verify=True)
        assert not store.damaged and [s.number for s in store.shards] == [0, 1]
        filler.unlink()
        runs.run(small / "out", corpus, targets, keep_features=True)
        assert runs.score_files(small / "out") == runs.score_files(tmp_path / "reference")
        store, wanted = (Store(f / "store", verify=True) for f in (small / "out", tmp_path / "reference"))
        assert not store.damaged and [s.xxh3 for s in store.shards] == [s.xxh3 for s in wanted.shards]
    finally:
        # Lazily, as loaded fits stay mapped.
        subprocess.run(["umount", "--lazy", str(small)], check=True)
