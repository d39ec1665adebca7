"""Preparing a model once, and no second copy of its weights."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jz3.errors import Jz3Error
from jz3.estimate import _parameters
from jz3.models import TINY, ModelConfig, _prepared, cache_folder, load_model, load_tokenizer, resolve_model


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


def test_the_home_folder_may_be_named_as_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell has expanded what a recipe or an environment file says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JZ3_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(ModelConfig(name="~/model")) == folder


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_of_a_model_is_never_run(
    load: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Tok", None],
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tok", "auto_map": names}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(Jz3Error, match="code of its own"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_told_with_the_folder_that_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JZ3_CACHE", str(tmp_path))

    def build(part: Path) -> None:
        part.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(Jz3Error, match="is full.*JZ3_CACHE"):
        _prepared("model", build)


def test_a_pointer_of_git_lfs_is_told_from_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(ModelConfig(name=TINY)), folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 123\n")
    for read in (load_model, lambda path: _parameters(str(path))):
        with pytest.raises(Jz3Error, match="model.*git lfs pull"):
            read(folder)


def test_mistrals_second_copy_of_the_weights_is_neither_loaded_nor_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "consolidated.safetensors", "model-00001-of-00001.safetensors", "tokenizer.model"]

    def download(_: str, *, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        wanted = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        (tmp_path / "loaded.txt").write_text("\n".join(wanted))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = resolve_model(ModelConfig(name="mistralai/Mistral-7B-v0.3"))
    assert (folder / "loaded.txt").read_text().split() == [names[0], *names[2:]]
    for name in names[1:3]:
        save_file({"w": torch.zeros(3, 5)}, folder / name)
    assert _parameters(str(folder)) == 15
