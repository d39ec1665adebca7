"""Preparing a model once."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jz3.models import _prepared


def test_a_model_wanted_twice_at_once_is_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JZ3_CACHE", str(tmp_path))
    built = []

    def build(part: Path) -> None:
        part.mkdir()
        (part / "tokenizer.json").write_text("{}")
        time.sleep(0.1)
        (part / "config.json").write_text("{}")
        built.append(part)

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: _prepared("model", build), range(2)))
    assert len(built) == 1 and len(set(folders)) == 1
    assert sorted(p.name for p in folders[0].iterdir()) == ["config.json", "tokenizer.json"]
