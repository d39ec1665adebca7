"""`jz3 fit` from files of queries and documents."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jz3.cli import main
from jz3.errors import Jz3Error
from jz3.features.adapted import AdaptedFit
from jz3.features.extract import model_hash
from jz3.fit_command import _tokens
from jz3.seeding import rng

SMALL = ["--k", "64", "--rank", "8", "--dtype", "float32"]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fit_from_both(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = write(
        tmp_path / "q.jsonl",
        [{"prompt": f"What is {i} + 2?", "completion": f"It is {i + 2}."} for i in range(5)]
        + [{"prompt": "What?", "completion": ""}, {"question": "?"}],
    )
    documents = write(tmp_path / "d.jsonl", [{"text": f"The number {i} is even or odd."} for i in range(6)])
    digests = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        arguments = ["fit", "tiny", "--queries", queries, "--documents", documents, "--out", str(out)]
        assert main([*arguments, *SMALL]) == 0
        said = capsys.readouterr().out
        assert "2 rows are unusable" in said and "fitted to 5 queries and 6 documents" in said
        digests.append(said.rsplit(None, 1)[1])
    assert digests[0] == digests[1]
    assert AdaptedFit.load(tmp_path / "a.safetensors", model_hash(tiny_model)).k == 64
    with pytest.raises(Jz3Error, match="was fitted for model"):
        AdaptedFit.load(tmp_path / "a.safetensors", "another")


def test_sample_is_drawn(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = write(tmp_path / "d.jsonl", [{"text": f"The number {i} is even or odd."} for i in range(6)])
    arguments = ["fit", "tiny", "--documents", documents, "--max-documents", "4", *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "f.safetensors")]) == 0
    assert "fitted to 0 queries and 4 documents" in capsys.readouterr().out


def test_prompts_are_not_scored(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"ask": f"Is {i} odd?", "text": f"Is {i} odd? The number {i} is even or odd."} for i in range(6)]
    documents = write(tmp_path / "d.jsonl", [*rows, {"ask": "What?", "text": "What?"}])
    means = []
    for field in ("", "ask"):
        out = tmp_path / f"f{field}.safetensors"
        options = ["--documents", documents, "--prompt-field", field, "--out", str(out)]
        assert main(["fit", "tiny", *options, *SMALL]) == 0
        assert ("1 rows are unusable" in capsys.readouterr().out) == bool(field)
        means.append(AdaptedFit.load(out, model_hash(tiny_model)).mean)
    assert not means[0].equal(means[1])


def test_files_as_users_have_them(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte order mark, blank lines, compression; what can't be read is counted with its place."""
    rows = [json.dumps({"text": f"The number {i} is even or odd."}) for i in range(4)]
    bad = [json.dumps({"text": "\ud800 is half a character."}), "{", json.dumps({"text": 3})]
    (tmp_path / "d.jsonl").write_text("\ufeff" + "\n\n".join([*rows, *bad]) + "\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes()))
    for name in ("d.jsonl", "d.jsonl.gz"):
        arguments = ["--documents", str(tmp_path / name), "--out", str(tmp_path / "f.safetensors"), *SMALL]
        assert main(["fit", "tiny", *arguments]) == 0
        said = capsys.readouterr().out
        assert "3 rows are unusable: 1 x invalid_unicode" in said and "fitted to 0 queries and 4 doc" in said
        assert f"first {tmp_path / name}:11: " in said and "1 x wrong_type" in said


def test_draw_is_that_of_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first usable rows of a permutation, in its order."""
    rows = [{"text": str(i)} if i % 3 else {"text": ""} for i in range(200)]
    path = Path(write(tmp_path / "d.jsonl", rows))
    order = [i for i in rng(7, "fit", "d.jsonl").permutation(200).tolist() if i % 3]
    for limit in (1, 20, 500):
        assert _tokens(path, ("text",), limit, 7, lambda row: int(row.text)) == order[:limit]
        assert "67 rows are unusable: 67 x empty_text" in capsys.readouterr().out


def test_errors(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "tiny"]) == 2
    assert "needs --queries, --documents, or both" in capsys.readouterr().err
    empty = write(tmp_path / "e.jsonl", [{"other": 1}])
    assert main(["fit", "tiny", "--documents", empty]) == 2
    assert "holds no usable row with text" in capsys.readouterr().err
    assert "1 x missing_field, first" in fitted(capsys, "--documents", empty)
    nowhere = tmp_path / "nowhere.jsonl"
    assert f"{nowhere} is no file" in fitted(capsys, "--queries", str(nowhere))
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    assert "is a Parquet file; jz3 fit reads JSON" in fitted(
        capsys, "--documents", str(tmp_path / "d.parquet")
    )
    some = write(tmp_path / "d.jsonl", [{"text": "The number 3 is odd.", "ask": None}])
    assert f"--out {tmp_path} is a folder; name a file" in fitted(
        capsys, "--documents", some, "--out", str(tmp_path)
    )
    assert not list(tmp_path.parent.glob("*.part"))
    told = fitted(capsys, "--documents", some, "--prompt-field", "ask")
    assert f"--prompt-field: no row of {some} has the field 'ask'" in told
    for name in ("k", "rank", "layers", "max-queries", "max-documents", "max-tokens", "batch-tokens"):
        told = fitted(capsys, "--documents", empty, f"--{name}", "0")
        assert f"--{name} must be at least 1, got 0" in told


def fitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of `jz3 fit`."""
    assert main(["fit", "tiny", *arguments]) == 2
    return capsys.readouterr().err
