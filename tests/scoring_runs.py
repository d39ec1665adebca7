"""Shared by the tests of `jz3 score`: a small corpus, targets, and runs inside this process."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jz3.models import load_model, load_tokenizer
from jz3.scoring.config import ChooseSettings, ScoreSettings
from jz3.scoring.job import Job, prepare
from jz3.scoring.merge import merge
from jz3.scoring.plan import Plan, open_plan
from jz3.scoring.workers import work

WORDS = (
    "the sum product number of apples pears integer value function field row equal first second "
    "takes gives answer total birds polynomial common divisor question solution"
).split()
SMALL: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "coordinates": 64,
    "rank": 8,
    "fit_documents": 12,
    "queries": 4,
    "exact_documents": 0,
    "shard_documents": 12,
    "window": 8,
    "batch_tokens": 512,
    "max_tokens": 64,
    "threads": 1,
}
"""Settings with which a shard takes some tens of milliseconds."""


def texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [
        f"{' '.join(generator.choices(WORDS, k=generator.randint(6, 60)))} {generator.randint(0, 10**6)}"
        for _ in range(count)
    ]


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSON lines (bytes as they are), compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def make_corpus(folder: Path, count: int = 60) -> list[str]:
    """Write a plain, a compressed and a Parquet file with `count` texts in all; return the paths."""
    rows = [{"id": f"doc-{i}", "text": t, "source": "ab"[i % 2]} for i, t in enumerate(texts(count))]
    third = count // 3
    paths = [
        write_lines(folder / "a.jsonl", rows[:third]),
        write_lines(folder / "b.jsonl.gz", rows[third : 2 * third]),
    ]
    table = pa.Table.from_pylist(rows[2 * third :])
    pq.write_table(table, folder / "c.parquet", row_group_size=7)
    return [str(p) for p in (*paths, folder / "c.parquet")]


def make_targets(folder: Path) -> dict[str, Path]:
    """Write two tasks and a control."""
    sums = [{"question": f"What is {i} + {i + 3}?", "answer": f"It is {2 * i + 3}."} for i in range(5)]
    words = [{"prompt": "Count the apples.\n", "completion": f"There are {i} apples."} for i in range(5)]
    control = [{"text": t} for t in texts(4, seed=9)]
    return {
        "sums": write_lines(folder / "sums.jsonl", sums),
        "apples": write_lines(folder / "apples.jsonl", words),
        "control": write_lines(folder / "control.jsonl", control),
    }


def other_model(tiny_model: Path, folder: Path) -> Path:
    """Write the tiny model with its weights moved a little."""
    model: Any = load_model(tiny_model, "float32")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return folder


def start(out: Path, corpus: list[str], targets: dict[str, Path], **settings: Any) -> tuple[Plan, Job]:
    """Plan and prepare a run."""
    plan = open_plan(out, corpus, ScoreSettings(**{**SMALL, **settings}), targets, 1)
    return plan, prepare(out, plan, targets)


def run(
    out: Path,
    corpus: list[str],
    targets: dict[str, Path],
    choose: ChooseSettings | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score a corpus in this process and return the manifest."""
    plan, job = start(out, corpus, targets, **settings)
    work(out)
    return merge(out, plan, job, choose or ChooseSettings(k=8))


def scores(out: Path) -> pa.Table:
    """Return a run's scores in the order of the shards."""
    return pa.concat_tables(pq.read_table(p) for p in sorted((out / "scores").glob("*.parquet")))


def score_files(out: Path) -> dict[str, bytes]:
    """Return the bytes of everything that must not depend on who did the work."""
    paths = [*(out / "scores").iterdir(), *(out / "rejects").iterdir()]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
