"""One shard of the corpus: read, tokenise, pass through the models, score, write, forget."""

import errno
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jz3.bm25 import Bm25
from jz3.corpus.readers import SourceText, reject
from jz3.errors import Jz3Error
from jz3.features.extract import coding_of, extract, open_sink
from jz3.files import atomic_path, canonical_json, hash_text, raise_trouble, write_json, write_jsonl
from jz3.gradients import RefusedText, Tokens, linear_layers, set_products
from jz3.models import load_on_device, load_tokenizer
from jz3.records import Reject
from jz3.scoring.job import PROJECTIONS, Job
from jz3.scoring.plan import Plan, Shard, split_place
from jz3.scoring.reading import Reader
from jz3.seeding import seed_for
from jz3.stage import trim_heap
from jz3.store import encode_rows, has_shard, open_store, write_codes

log = logging.getLogger(__name__)

STAGE = "score"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with when the disk, a quota or the process's file size limit is full."""


def scores_path(out: Path, number: int) -> Path:
    """Return a shard's file of scores; it is written last, so that a shard without it is not done."""
    return out / "scores" / f"{number:06d}.parquet"


def store_folder(out: Path, number: int, checkpoints: int) -> Path:
    """Return the store of a checkpoint's features."""
    return out / ("store" if checkpoints == 1 else f"store-{number}")


def has_rows(path: Path) -> bool:
    """Tell whether a shard's file of scores has a row; one that can't be read counts as if it had."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows > 0
    except (pyarrow.ArrowException, OSError):
        return True


def lacks_features(out: Path, plan: Plan, number: int) -> bool:
    """Tell whether a store lacks the features of a shard that has its scores; one without rows has none."""
    if not plan.settings.keep_features:
        return False
    count = len(plan.settings.checkpoints())
    kept = all(has_shard(store_folder(out, checkpoint, count), number) for checkpoint in range(count))
    return not kept and has_rows(scores_path(out, number))


@dataclass(slots=True)
class _Rows:
    """The columns of a shard as they grow."""

    id: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    hash: list[int] = field(default_factory=list)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    features: list[list[Any]] = field(default_factory=list)
    """Per checkpoint the windows' (codes, norm), if they are kept."""
    rejects: list[Reject] = field(default_factory=list)
    records: int = 0
    cut: int = 0

    def add(self, name: str, values: np.ndarray) -> None:
        self.numbers.setdefault(name, []).append(values.astype(np.float32))


class Scorer:
    """The models of a run and everything that is loaded once per worker."""

    def __init__(self, out: Path, plan: Plan, job: Job) -> None:
        """Load models, fits and the tasks' features.

        Args:
            out: the run's folder.
            plan: its plan.
            job: what `prepare` made.
        """
        from safetensors.torch import load_file

        self.out, self.plan, self.job = out, plan, job
        self.reader = Reader(plan)
        settings = plan.settings
        self.tokenizer = load_tokenizer(Path(job.checkpoints[0].model))
        self.models: list[tuple[Any, Any, Any, Any, dict[str, Any]]] = []
        for number, c in enumerate(job.checkpoints):
            folder = out / "fit" / str(number)
            file, kind = PROJECTIONS[c.kind]
            projection = kind.load(folder / file, c.model_hash)
            model = load_on_device(Path(c.model), settings.dtype)
            if (own := set_products(model, c.products)) != c.products:
                log.warning(
                    "the run's products are %r, and %r is what %s has here: its scores differ a little from those of "
                    "other machines",
                    c.products,
                    own,
                    c.model,
                )
            sink = open_sink(projection, model)
            tasks = load_file(folder / "tasks.safetensors")
            self.models.append((model, linear_layers(model), projection, sink, tasks))
        self.bm25 = Bm25.load(out / "bm25.json") if "bm25" in settings.baselines else None

    def run(self, shard: Shard) -> int:
        """Score a shard and write its files, the scores last.

        Returns:
            The tokens of the texts that were scored.

        Raises:
            Jz3Error: the disk is full, or the corpus changed.
        """
        start = time.monotonic()
        rows = self.score(self.reader.read(shard))
        try:
            self._write(shard, rows)
            timing = {"seconds": time.monotonic() - start, "tokens": sum(rows.tokens), "size": shard.size}
            timing["process"] = os.getpid()
            write_json(self.out / "timing" / f"{shard.number:06d}.json", timing)
        except OSError as error:
            if error.errno in FULL:
                raise Jz3Error(
                    f"the disk of {self.out} is full (shard {shard.number}: {error.strerror}); free some space "
                    "and run the same command again, it goes on from here"
                ) from error
            raise
        scored = sum(rows.tokens)
        del rows
        # Else batches of many shapes leave a heap of gaps that grows with the shards.
        trim_heap()
        return scored

    def score(self, records: Iterator[SourceText | Reject]) -> _Rows:
        """Score a stream of records window by window."""
        rows = _Rows(features=[[] for _ in self.models])
        window: list[tuple[SourceText, Tokens]] = []
        for record in records:
            rows.records += 1
            if isinstance(record, Reject):
                rows.rejects.append(_staged(record))
                continue
            try:
                tokens = self.plan.settings.tokens_of(self.tokenizer, record)
            except RefusedText as error:
                rows.rejects.append(_staged(reject(error.reason, record.where, str(error), record.text)))
                continue
            window.append((record, tokens))
            if len(window) == self.plan.settings.window:
                self._window(rows, window)
                window = []
        if window:
            self._window(rows, window)
        return rows

    def _window(self, rows: _Rows, window: list[tuple[SourceText, Tokens]]) -> None:
        import torch

        settings, tasks = self.plan.settings, self.job.tasks
        good = torch.ones(len(window), dtype=torch.bool)
        influence = np.zeros((len(window), len(tasks)))
        hidden = np.zeros((len(window), len(tasks)))
        loss = np.zeros(len(window))
        norms, kept = [], []
        for (model, layers, projection, sink, target), c in zip(
            self.models, self.job.checkpoints, strict=True
        ):
            found = extract(
                model,
                layers,
                [t for _, t in window],
                projection,
                batch_tokens=settings.batch_tokens,
                reduction=settings.reduction,
                sink=sink,
            )
            good &= torch.isfinite(found.norm) & (found.norm > 0) & torch.isfinite(found.values).all(1)
            influence += c.weight * (found.values @ target["readout"]).double().numpy()
            unit = torch.nn.functional.normalize(found.hidden, dim=1)
            hidden += c.weight * (unit @ target["hidden"]).double().numpy()
            loss += c.weight * found.loss.double().numpy()
            norms.append(found.norm.numpy())
            kept.append((found.values, found.norm))
        chosen = good.numpy()
        for (record, _), ok in zip(window, chosen, strict=True):
            if not ok:
                rows.rejects.append(_staged(reject("gradient_not_finite", record.where, "", record.text)))
        texts = [pair for pair, ok in zip(window, chosen, strict=True) if ok]
        for record, tokens in texts:
            path, line = split_place(record.where)
            text_hash = hash_text(record.text)
            rows.id.append(record.meta.get(settings.id_field) or text_hash)
            rows.source.append(record.meta.get(settings.source_field) or Path(path).name)
            rows.line.append(line)
            rows.tokens.append(len(tokens.ids))
            rows.cut += tokens.cut > 0
            rows.hash.append(int(text_hash, 16))
        for number, norm in enumerate(norms):
            rows.add("norm" if not number else f"norm:{number}", norm[chosen])
        for column, task in enumerate(tasks):
            rows.add(f"influence:{task}", influence[chosen, column])
        if "hidden" in settings.baselines:
            for column, task in enumerate(tasks):
                rows.add(f"hidden:{task}", hidden[chosen, column])
        if self.bm25 is not None:
            for task, values in self.bm25.scores([record.text for record, _ in texts]).items():
                rows.add(f"bm25:{task}", values)
        if "loss" in settings.baselines:
            rows.add("loss", loss[chosen])
        if "random" in settings.baselines:
            draws = [seed_for(settings.seed, "score", "random", record.where) / 2**64 for record, _ in texts]
            rows.add("random", np.array(draws))
        if settings.keep_features:
            # At once, as codes are an eighth of the features.
            for number, (values, norm) in enumerate(kept):
                projection = self.models[number][2]
                coding = coding_of(projection, settings.bits)
                rows.features[number].append((encode_rows(values[good], coding), norm[good]))

    def _write(self, shard: Shard, rows: _Rows) -> None:
        settings = self.plan.settings
        if settings.keep_features:
            for number, parts in enumerate(rows.features):
                self._write_features(shard, rows, number, parts)
        write_jsonl(
            self.out / "rejects" / f"{shard.number:06d}.jsonl", (row.to_json() for row in rows.rejects)
        )
        data = scores_bytes(self.plan, self.job, shard, rows)
        with atomic_path(scores_path(self.out, shard.number)) as part:
            part.write_bytes(data)

    def _write_features(self, shard: Shard, rows: _Rows, number: int, parts: list[Any]) -> None:
        import torch

        folder = store_folder(self.out, number, len(self.models))
        open_store(folder, self.job.store_info(number, self.plan.settings))
        if has_shard(folder, shard.number) or not parts:
            return
        ids = [f"{h:016x}" for h in rows.hash]
        codes, norms = (torch.cat(columns) for columns in zip(*parts, strict=True))
        write_codes(folder, shard.number, ids, codes, norms)


def _staged(row: Reject) -> Reject:
    return Reject(
        id=row.id, stage=STAGE, reason=row.reason, detail=row.detail, where=row.where, text=row.text[:400]
    )


def columns_of(plan: Plan, job: Job) -> list[str]:
    """Return the names of a run's columns of numbers, all float32."""
    per_task = ["influence", *(b for b in ("hidden", "bm25") if b in plan.settings.baselines)]
    names = ["norm", *(f"norm:{n}" for n in range(1, len(job.checkpoints)))]
    names += [f"{method}:{task}" for method in per_task for task in job.tasks]
    return names + [b for b in ("loss", "random") if b in plan.settings.baselines]


def scores_bytes(plan: Plan, job: Job, shard: Shard, rows: _Rows) -> bytes:
    """Return a shard's Parquet file; equal rows give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = plan.files[shard.file].path
    columns: dict[str, Any] = {
        "id": pa.array(rows.id, pa.string()),
        "source": pa.array(rows.source, pa.string()),
        "file": pa.array([path] * len(rows.id), pa.string()),
        "line": pa.array(rows.line, pa.int64()),
        "tokens": pa.array(rows.tokens, pa.int32()),
        "hash": pa.array(rows.hash, pa.uint64()),
    }
    for name in columns_of(plan, job):
        parts = rows.numbers.get(name)
        columns[name] = pa.array(np.concatenate(parts) if parts else np.zeros(0, np.float32), pa.float32())
    about = {
        "run": job.key,
        "shard": shard.number,
        "records": rows.records,
        "kept": len(rows.id),
        "rejected": dict(sorted(Counter(r.reason for r in rows.rejects).items())),
        "tokens": sum(rows.tokens),
        "cut": rows.cut,
    }
    table = pa.table(columns).replace_schema_metadata({"jz3": canonical_json(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_about(path: Path, key: str) -> dict[str, Any]:
    """Return the counts of a shard's file of scores.

    Raises:
        Jz3Error: the file is damaged or another run's.
    """
    import pyarrow
    import pyarrow.parquet as pq

    remedy = "delete it and run the same command again"
    try:
        metadata = pq.read_schema(path).metadata or {}
        about = json.loads(metadata[b"jz3"])
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise_trouble(error, path)
        raise Jz3Error(f"{path} is damaged ({error}); {remedy}") from error
    if about["run"] != key:
        raise Jz3Error(f"{path} belongs to another run ({about['run']}, this is {key}); {remedy}")
    return about
