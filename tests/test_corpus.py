"""The stage: duplicates, limits, resuming, counts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jz3.corpus import CorpusConfig, MinHashConfig, SourceConfig, run, stage
from jz3.corpus.dedup import Deduplicator, normalise, shingles
from jz3.errors import Jz3Error
from jz3.files import hash_text, read_jsonl
from jz3.models import ModelConfig, load_tokenizer
from jz3.records import Doc, Reject
from jz3.stage import StageContext

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve sum product prime even odd".split()
)


def sentence(number: int, length: int = 14) -> str:
    state, words = number * 2_654_435_761 + 12_345, []
    for _ in range(length):
        state = (state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % 2**64
        words.append(WORDS[(state >> 33) % len(WORDS)])
    return " ".join(words).capitalize() + f" is {number}."


def context(folder: Path, sources: list[SourceConfig], **settings: Any) -> StageContext:
    corpus = CorpusConfig(sources=tuple(sources), **{"max_tokens": 120, "min_tokens": 10, **settings})
    recipe = SimpleNamespace(seed=7, corpus=corpus, model=ModelConfig(name="tiny"))
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    return StageContext(recipe=cast(Any, recipe), run_dir=folder, name="corpus")


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def source(name: str, path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(name=name, kind="jsonl", paths=(str(path),), **settings)


def docs(folder: Path) -> list[Doc]:
    return [Doc.from_json(row) for row in read_jsonl(folder / "corpus" / "docs.jsonl")]


def rejects(folder: Path) -> list[Reject]:
    return [Reject.from_json(row) for row in read_jsonl(folder / "corpus" / "rejects.jsonl")]


@pytest.fixture(autouse=True)
def _tiny(tiny_model):
    """Every run here counts with the tiny model's tokenizer."""


def test_rows_counts_and_reasons(tmp_path, tiny_model):
    long = " ".join(sentence(i) for i in range(20))
    a = write(tmp_path / "a.jsonl", [sentence(100), "Hi.", long, "$" + "x + " * 200 + "y$", sentence(100)])
    b = write(tmp_path / "b.jsonl", [sentence(100).upper(), sentence(101), ""])
    summary = run(context(tmp_path, [source("a", a), source("b", b, generated=True, topic="t")]))
    found, refused = docs(tmp_path), rejects(tmp_path)
    tokenizer = load_tokenizer(tiny_model)
    for doc in found:
        assert doc.id == hash_text(doc.text)
        assert doc.tokens == len(tokenizer(doc.text, add_special_tokens=False)["input_ids"])
        assert 10 <= doc.tokens <= 120
    assert " ".join(d.text for d in found if d.meta["where"].endswith("a.jsonl:3")) == long
    assert [(r.reason, r.where.rpartition("/")[2]) for r in refused] == [
        ("too_short", "a.jsonl:2 piece 0"),
        ("unbreakable", "a.jsonl:4 piece 0"),
        ("duplicate", "a.jsonl:5 piece 0"),
        ("duplicate", "b.jsonl:1 piece 0"),
        ("empty_text", "b.jsonl:3"),
    ]
    assert refused[2].detail == refused[3].detail == f"kept {found[0].id}"
    assert [d.generated for d in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].meta["topic"] == "t" and "topic" not in found[0].meta
    assert summary["texts"] == len(found) and summary["tokens"] == sum(d.tokens for d in found)
    assert summary["generated"] == 1
    assert summary["rejected"] == {"duplicate": 2, "empty_text": 1, "too_short": 1, "unbreakable": 1}
    assert summary["by_source"]["b"]["rejected"] == {"duplicate": 1, "empty_text": 1}
    assert summary["by_source"]["b"]["records"] == 3
    json.dumps(summary)


def test_pieces_whole_and_limit(tmp_path):
    texts = [" ".join(sentence(100 * k + i) for i in range(9)) for k in range(300)]
    path = write(tmp_path / "a.jsonl", [*texts, sentence(99_999)])
    run(context(tmp_path / "all", [source("a", path)]))
    run(context(tmp_path / "first", [source("a", path)], pieces_per_document=1))
    run(context(tmp_path / "whole", [source("a", path, whole=True)]))
    run(context(tmp_path / "few", [source("a", path, limit=70)], pieces_per_document=1))
    everything, first = docs(tmp_path / "all"), docs(tmp_path / "first")
    assert len(everything) > 2 * len(first)
    assert [d.text for d in first] == [d.text for d in everything if d.meta["piece"] == "0"]
    assert [d.text for d in docs(tmp_path / "whole")] == [sentence(99_999)]
    assert {r.reason for r in rejects(tmp_path / "whole")} == {"too_long"}
    assert docs(tmp_path / "few") == first[:70]


def test_near_duplicates_name_the_first_kept(tmp_path):
    base = [" ".join(sentence(10 * k + i) for i in range(6)) for k in range(30)]
    near = [text.replace(text.split()[20], "changed", 1) for text in base]
    other = [text.replace("is ", "was ") for text in base[:3]]
    path = write(tmp_path / "a.jsonl", base + near + other)
    settings = {"max_tokens": 512}
    summary = run(context(tmp_path / "on", [source("a", path)], **settings))
    kept = docs(tmp_path / "on")
    assert [d.text for d in kept] == base + other
    refused = rejects(tmp_path / "on")
    assert [r.detail for r in refused] == [f"kept {hash_text(text)}" for text in base]
    assert summary["rejected"] == {"near_duplicate": 30}
    summary = run(
        context(tmp_path / "off", [source("a", path)], minhash=MinHashConfig(enabled=False), **settings)
    )
    assert summary["texts"] == 63


def test_the_result_does_not_depend_on_how_a_source_is_divided(tmp_path):
    base = [" ".join(sentence(10 * k + i) for i in range(6)) for k in range(60)]
    texts = base + [text.replace("one", "uno", 1) for text in base] + base[:10]
    write(tmp_path / "whole.jsonl", texts)
    (tmp_path / "parts").mkdir()
    for number in range(0, len(texts), 7):
        write(tmp_path / "parts" / f"{number:04d}.jsonl", texts[number : number + 7])
    run(context(tmp_path / "one", [source("a", tmp_path / "whole.jsonl")]))
    run(context(tmp_path / "many", [source("a", tmp_path / "parts" / "*.jsonl")]))
    assert [d.text for d in docs(tmp_path / "one")] == [d.text for d in docs(tmp_path / "many")]
    assert [(r.reason, r.detail) for r in rejects(tmp_path / "one")] == [
        (r.reason, r.detail) for r in rejects(tmp_path / "many")
    ]


def test_normalisation_keeps_what_tells_formulas_apart():
    assert normalise("A  b\n\tC ") == normalise("a B c")
    assert normalise("e\u0301") == normalise("\u00e9")
    for one, two in [("x + 1", "x + 2"), ("x + 1", "x - 1"), ("x²", "x2")]:
        assert normalise(one) != normalise(two)
    assert shingles("a b, c", 3) == ["a b ,", "b , c"]
    assert shingles("a b", 5) == ["a b"]


def test_similarity_at_the_threshold_decides():
    words = [f"w{i}" for i in range(400)]
    for changed, expected in ((4, True), (40, False)):
        seen = Deduplicator(MinHashConfig())
        assert seen.admit(" ".join(words), "first") is None
        other = [f"v{i}" if i % (400 // changed) == 0 else w for i, w in enumerate(words)]
        assert (seen.admit(" ".join(other), "second") == ("near_duplicate", "first")) is expected


def outputs(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "corpus" / "docs.jsonl").read_bytes(), (folder / "corpus" / "rejects.jsonl").read_bytes()


def test_a_rerun_makes_only_what_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [" ".join(sentence(10 * k + i) for i in range(5)) for k in range(400)])
    sources = [source("a", path), source("b", write(tmp_path / "b.jsonl", [sentence(5)] * 3))]
    expected = run(context(tmp_path / "clean", sources))
    real, made = stage._cut, []

    def counting(record, *rest):
        if len(made) == 250:
            raise KeyboardInterrupt
        made.append(record.where)
        return real(record, *rest)

    monkeypatch.setattr(stage, "_cut", counting)
    with pytest.raises(KeyboardInterrupt):
        run(context(tmp_path / "killed", sources))
    assert not (tmp_path / "killed" / "corpus" / "docs.jsonl").exists()
    made.clear()

    def recording(record, *rest):
        made.append(record.where)
        return real(record, *rest)

    monkeypatch.setattr(stage, "_cut", recording)
    assert run(context(tmp_path / "killed", sources)) == expected
    assert made[0] == f"{path}:193" and len(made) == (400 - 192) + 3
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "clean")
    made.clear()
    run(context(tmp_path / "killed", sources))
    assert not made
    write(path, [sentence(k) for k in range(50)])
    assert run(context(tmp_path / "killed", sources))["by_source"]["a"]["records"] == 50


def test_kill_9_and_rerun_give_the_same_files(tmp_path):
    path = write(tmp_path / "a.jsonl", [" ".join(sentence(10 * k + i) for i in range(8)) for k in range(800)])
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path; import test_corpus as t\n"
        "t.run(t.context(Path(sys.argv[1]), [t.source('a', sys.argv[2])]))\n"
    )
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", script, str(folder), str(path), str(here), str(here.parent)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    run(context(tmp_path / "clean", [source("a", path)]))
    process = start(tmp_path / "killed")
    blocks = tmp_path / "killed" / "corpus" / "blocks"
    deadline = time.monotonic() + 60
    while not list(blocks.rglob("000001.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in blocks.rglob("*.jsonl")}
    assert finished and not (tmp_path / "killed" / "corpus" / "docs.jsonl").exists()
    run(context(tmp_path / "killed", [source("a", path)]))
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "clean")
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


def test_a_match_that_no_record_meets_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [sentence(1), sentence(2)])
    given: dict[str, Any] = {"match_field": "text", "match": "IS 2."}
    run(context(tmp_path / "x", [source("a", path, **given)]))
    assert [d.text for d in docs(tmp_path / "x")] == [sentence(2)]
    with pytest.raises(Jz3Error, match="no record was taken, of 2 whose 'text' might hold 'of no text'"):
        run(context(tmp_path / "y", [source("a", path, **given | {"match": "of no text"})]))


def test_an_empty_corpus_is_an_error_and_an_empty_source_a_warning(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", ["Hi."])
    with pytest.raises(Jz3Error, match='corpus is empty: {"too_short": 1}'):
        run(context(tmp_path / "x", [source("a", path)]))
    good = write(tmp_path / "b.jsonl", [sentence(1)])
    with pytest.raises(Jz3Error, match="matches no file"):
        run(context(tmp_path / "z", [source("a", good), source("b", tmp_path / "absent")]))
    assert not (tmp_path / "z" / "corpus" / "blocks").exists(), "every source is looked at before the work"
    run(context(tmp_path / "y", [source("a", path), source("b", good)]))
    assert "source a gave no text" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 0}, "min_tokens must lie in"),
        ({"min_tokens": 600}, "min_tokens must lie in"),
        ({"pieces_per_document": -1}, "pieces_per_document"),
        ({"sources": ()}, "no sources"),
        ({"sources": (SourceConfig(name="a", kind="docstrings"),) * 2}, "two sources are named 'a'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**settings)
    with pytest.raises(ValueError, match="bands must divide"):
        MinHashConfig(permutations=128, bands=30)


def test_real_maths_is_cut_with_its_formulas_whole(shared_data, tiny_model):
    from jz3.corpus.cutting import pieces, token_counter
    from jz3.corpus.spans import protected_spans

    count = token_counter(load_tokenizer(tiny_model))
    path = shared_data / "samples" / "cot_pretrain_sampled.jsonl"
    for row in list(read_jsonl(path))[:150]:
        text = row["output"].replace("\r", "")
        found = list(pieces(text, count, 400))
        assert "".join("".join(p.text for p in found).split()) == "".join(text.split())
        squeezed = ["".join(p.text.split()) for p in found]
        for span in protected_spans(text):
            assert any("".join(text[span.start : span.end].split()) in piece for piece in squeezed)
