"""The features stage, kind by kind, on the tiny preset's corpus and targets."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jz3.config import Recipe, settled, shipped_recipe
from jz3.errors import Jz3Error
from jz3.features import COUNTS, POSITIVE, FeaturesConfig, LessConfig, stage
from jz3.features.stage import (
    LARGE_FIT,
    _check_kept,
    load_projection,
    lost_documents,
    projection_path,
    read_extracted,
)
from jz3.files import hash_text, read_json, read_jsonl, write_json, write_jsonl, write_tensors
from jz3.gradients import Tokens
from jz3.index.opening import open_collection
from jz3.influence import feature_blocks
from jz3.models import load_tokenizer
from jz3.pipeline import run_pipeline
from jz3.records import Doc, Query, Reject
from jz3.stage import StageContext


def features_of(out: Path, **settings: Any) -> tuple[Recipe, dict[str, Any]]:
    """Run the tiny preset up to the features with other settings of theirs; return its summary."""
    recipe = shipped_recipe("tiny")
    recipe = dataclasses.replace(recipe, features=dataclasses.replace(recipe.features, **settings))
    run_pipeline(recipe, out, "features")
    return recipe, read_json(out / "features" / "manifest.json")["summary"]


@pytest.mark.parametrize("kind", ["sketch", "readout", "less"])
def test_every_kind_fills_the_store(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    less = LessConfig(share=0.2, epochs=2, batch_texts=4, rank=4, alpha=16.0)
    recipe, summary = features_of(tmp_path / "run", kind=kind, k=512, bits=8, less=less)
    k = 1024 if kind == "less" else 512
    assert (summary["kind"], summary["k"], summary["bytes_per_document"]) == (kind, k, k)
    ctx = StageContext(recipe=recipe, run_dir=tmp_path / "run", name="influence")
    values = np.concatenate([block.values for block in feature_blocks(ctx)])
    assert values.shape == (summary["documents"], k)
    # Codes of 8 bits keep the unit length of projections (hashed ones are of unit length on average).
    assert np.abs(np.linalg.norm(values, axis=1) - 1).mean() < 0.2
    with pytest.raises(Jz3Error, match="this model is another"):
        load_projection(tmp_path / "run" / "features", "another")
    if kind == "less":
        assert sorted(p.name for p in (tmp_path / "run" / "features" / "warm-up").iterdir()) == [
            "epoch-1.safetensors",
            "epoch-2.safetensors",
        ]


def test_queries_are_completed_and_documents_are_not(tmp_path: Path, tiny_model: Path) -> None:
    documents, queries = {}, {}
    for completion in (0, 512):
        out = tmp_path / str(completion)
        recipe, summary = features_of(out, completion=completion)
        ctx = StageContext(recipe=recipe, run_dir=out, name="influence")
        documents[completion] = np.concatenate([block.values for block in feature_blocks(ctx)])
        queries[completion] = read_extracted(out / "features" / "queries.safetensors")[1]["values"]
        assert summary["k"] == 256 and not (out / "features" / LARGE_FIT).exists()
    assert np.array_equal(documents[0], documents[512])
    assert queries[0].shape == queries[512].shape
    assert not np.allclose(queries[0], queries[512], atol=1e-4)


def test_lost_shards_are_written_again(tmp_path: Path, tiny_model: Path) -> None:
    """Whether a shard was deleted, as the message about a damaged one advises, or cut short."""
    texts = [f"The sum of {n} and {n + 1} is {2 * n + 1}." for n in range(20)]
    docs = [Doc(id=hash_text(t), text=t, source="sums", tokens=0) for t in texts]
    query = Query(id="0" * 16, task="sums", problem="1 + 1?", prompt="1 + 1? ", completion="The sum is 2.")
    write_jsonl(tmp_path / "corpus" / "docs.jsonl", (d.to_json() for d in docs))
    write_jsonl(tmp_path / "targets" / "queries.jsonl", [query.to_json()])
    recipe = shipped_recipe("tiny")
    features = dataclasses.replace(recipe.features, kind="sketch", k=256, shard_documents=4)
    recipe = dataclasses.replace(recipe, features=features)
    write_json(tmp_path / "recipe.json", dataclasses.asdict(settled(recipe)))
    for name in ("corpus", "targets"):
        write_json(tmp_path / name / "manifest.json", {"key": name, "seconds": 0})
    run_pipeline(recipe, tmp_path, "features")
    folder = tmp_path / "features"
    files = {p: p.read_bytes() for name in ("store", "documents") for p in (folder / name).iterdir()}
    assert len(files) == 16 and not lost_documents(folder)
    for suffix in ("json", "safetensors"):
        (folder / "store" / f"000001.{suffix}").unlink()
    (folder / "store" / "000002.safetensors").write_bytes(b"half")
    (folder / "documents" / "000003.safetensors").unlink()
    told = r"store holds 12 of 20 documents \(.*store/000001\.\S+ .*/000002\..*documents/000003\."
    with pytest.raises(Jz3Error, match=rf"{told}.*run `jz3 index {tmp_path}`"):
        open_collection(tmp_path).store()
    lines: list[str] = []
    run_pipeline(recipe, tmp_path, "features", say=lines.append)
    assert re.match(f"features: .*{told}", lines[2]) and lines[3].startswith("features: done in")
    assert {p: p.read_bytes() for p in files} == files and not lost_documents(folder)
    assert len(open_collection(tmp_path).store()) == 20
    shutil.rmtree(folder / "store")
    run_pipeline(recipe, tmp_path, "features", say=lines.append)
    assert {p: p.read_bytes() for p in files} == files
    run_pipeline(recipe, tmp_path, "features", say=lines.append)
    assert lines[-1].startswith("features: done before")


def test_what_a_kill_left_of_another_corpus_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """As when corpus/ is deleted and made anew from a changed file while the features are half done."""
    recipe = shipped_recipe("tiny")
    recipe = dataclasses.replace(recipe, features=dataclasses.replace(recipe.features, shard_documents=4))
    ctx = StageContext(recipe=recipe, run_dir=tmp_path, name="features")
    numbers = [torch.arange(i, i + 4) for i in (0, 4)]
    documents = [Tokens(f"{i:016x}", [0], 0) for i in range(6)]
    for shard, ids in enumerate(numbers):
        write_tensors(ctx.out / "documents" / f"{shard:06d}.safetensors", {"id": ids[: 6 - 4 * shard]})
    write_tensors(ctx.out / "queries.safetensors", {"id": numbers[0][:1]})
    queries = {"fit": documents[:1]}
    _check_kept(ctx, documents, queries)
    for others in (documents[:5], documents[:4], documents[::-1], [*documents, documents[0]]):
        with pytest.raises(Jz3Error, match=rf"documents/.* another corpus .* delete {ctx.out}"):
            _check_kept(ctx, others, queries)
    with pytest.raises(Jz3Error, match=r"queries\.safetensors belongs to another corpus or other targets"):
        _check_kept(ctx, documents, {"fit": documents[1:2]})


def test_a_query_that_is_not_finite_is_a_reject(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.extract

    def spoilt(*arguments: Any, side: str = "document", **options: Any) -> Any:
        found = real(*arguments, side=side, **options)
        if side == "query":
            found.norm[0] = found.values[0] = np.inf
        return found

    monkeypatch.setattr(stage, "extract", spoilt)
    _, summary = features_of(tmp_path / "run", kind="sketch", k=256)
    folder = tmp_path / "run" / "features"
    ids, arrays = read_extracted(folder / "queries.safetensors")
    rejects = [r for r in read_jsonl(folder / "rejects.jsonl") if r["reason"] == "gradient_not_finite"]
    assert [r["id"] for r in rejects] == [ids[0]] and np.isnan(arrays["norm"][0])
    assert sum(summary["queries"].values()) == len(ids) - 1


def test_long_documents_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    texts = [f"The sum of {n} and {n + 1} is {2 * n + 1}. " * (1 + 3 * (n % 2)) for n in range(20)]
    docs = [Doc(id=hash_text(t), text=t, source="sums", tokens=0) for t in texts]
    query = Query(id="0" * 16, task="sums", problem="1 + 1?", prompt="1 + 1? ", completion="The sum is 2.")
    write_jsonl(tmp_path / "corpus" / "docs.jsonl", (d.to_json() for d in docs))
    write_jsonl(tmp_path / "targets" / "queries.jsonl", [query.to_json()])
    recipe = shipped_recipe("tiny")
    corpus = dataclasses.replace(recipe.corpus, max_tokens=40, min_tokens=1)
    found = {}
    for long in ("truncate", "split"):
        features = dataclasses.replace(recipe.features, long=long, shard_documents=8)
        altered = dataclasses.replace(recipe, corpus=corpus, features=features)
        ctx = StageContext(recipe=altered, run_dir=tmp_path, name="features")
        found[long] = stage.run(ctx)
        # A second run reads the counts from the shards that are there.
        assert stage.run(ctx) == found[long]
        shutil.rmtree(ctx.out)
    truncated, split = found["truncate"], found["split"]
    assert truncated["cut"] == split["split"] == 10 and split["cut"] == truncated["split"] == 0
    assert truncated["tokens"] + truncated["cut_tokens"] == split["tokens"]


def test_a_start_token_takes_no_piece_its_end(tmp_path: Path, tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(tiny_model)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    text = "The sum of 3 and 4 is 7."
    length = len(tokenizer(text, add_special_tokens=False).input_ids)
    write_jsonl(
        tmp_path / "corpus" / "docs.jsonl", [Doc(id="0", text=text, source="s", tokens=length).to_json()]
    )
    recipe = shipped_recipe("tiny")
    for limit, cut in ((length, 0), (length - 1, 1)):
        corpus = dataclasses.replace(recipe.corpus, max_tokens=limit, min_tokens=1)
        ctx = StageContext(
            recipe=dataclasses.replace(recipe, corpus=corpus), run_dir=tmp_path, name="features"
        )
        [found] = stage.tokenize_documents(ctx, tokenizer, [])
        assert (len(found.ids), found.cut) == (1 + limit, cut)


def test_prompts_are_not_scored(tmp_path: Path, tiny_model: Path) -> None:
    asks = [f"What is {n} and {n + 1}?" for n in range(3)]
    texts = [f"{asks[0]}\n\nIt is 1.", f"{asks[1]}\n\nIt is 3.", asks[2]]
    docs = [
        Doc(id=hash_text(t), text=t, source="sums", tokens=0, meta={"ask": a} if a != asks[1] else {})
        for t, a in zip(texts, asks, strict=True)
    ]
    write_jsonl(tmp_path / "corpus" / "docs.jsonl", (d.to_json() for d in docs))
    recipe = shipped_recipe("tiny")
    features = dataclasses.replace(recipe.features, prompt_field="ask")
    ctx = StageContext(
        recipe=dataclasses.replace(recipe, features=features), run_dir=tmp_path, name="features"
    )
    tokenizer, rejects = load_tokenizer(tiny_model), list[Reject]()
    found = stage.tokenize_documents(ctx, tokenizer, rejects)
    assert tokenizer.decode(found[0].ids[: found[0].start]) == asks[0] and found[1].start == 1
    assert [(r.id, r.reason) for r in rejects] == [(docs[2].id, "too_short")]
    features = dataclasses.replace(recipe.features, prompt_field="aks")
    ctx = dataclasses.replace(ctx, recipe=dataclasses.replace(recipe, features=features))
    with pytest.raises(
        Jz3Error, match="prompt_field: no text of the corpus has the field 'aks'.* keep_fields"
    ):
        stage.tokenize_documents(ctx, tokenizer, rejects)


def test_a_folder_without_projection_is_told(tmp_path: Path) -> None:
    with pytest.raises(Jz3Error, match="no fit, sketch or other projection"):
        projection_path(tmp_path)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"features\.kind must be one of adapted, sketch, less, readout"):
        FeaturesConfig(kind="hidden")
    for name, least in {**dict.fromkeys(POSITIVE, 1), **dict.fromkeys(COUNTS, 0)}.items():
        settings: dict[str, Any] = {name: least - 1}
        with pytest.raises(ValueError, match=rf"features\.{name} must be at least {least}, got {least - 1}"):
            FeaturesConfig(**settings)
        settings[name] = least
        assert getattr(FeaturesConfig(**settings), name) == least
    with pytest.raises(ValueError, match=r"features\.bits must be one of \[1, 2, 4, 8, 16\], got 3"):
        FeaturesConfig(bits=3)
    with pytest.raises(ValueError, match=r"features\.reduction"):
        FeaturesConfig(reduction="max")
    with pytest.raises(ValueError, match=r"features\.long"):
        FeaturesConfig(long="drop")
    with pytest.raises(ValueError, match="share must lie in"):
        FeaturesConfig(less=LessConfig(share=0.0))
