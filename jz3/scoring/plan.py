"""The plan of a run: its settings, its files, and how they are divided into shards, decided once.

A shard is a fixed range of lines or rows of one file, whatever the number of workers, so that what a
worker computes depends on the plan and the shard alone.
"""

import dataclasses
import json
import os
import shlex
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.corpus.config import SourceConfig
from jz3.corpus.readers import COMPRESSED, find_files, open_lines, skip_line
from jz3.errors import Jz3Error
from jz3.files import canonical_json, hash_file, hash_text, locked, raise_trouble, read_json, write_json
from jz3.machine import best_dtype, best_products
from jz3.scoring.config import ScoreSettings

FORMAT = "jz3-score-1"
LINES = (".jsonl", ".json", ".ndjson")
WRITTEN = (
    *("scores", "rejects", "fit", "store", "index", "timing", "logs", "claims", "slurm"),
    *("plan.json", "job.json", "manifest.json", "bm25.json", "queries.jsonl", "targets.rejects.jsonl"),
    *("rejects.jsonl", "selected.jsonl", "passed_over.jsonl"),
)
"""Files and folders that a run writes in its own; of several checkpoints also store-N and index-N."""
PREPARING = ".prepare.lock"
"""Held while the fits are made."""
REPORT_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of lines or rows of one file."""

    number: int
    file: int
    """Position in the plan's files."""
    skip: int
    """Lines or rows before it."""
    rows: int
    offset: int
    """Where it starts in a plain file, in bytes; 0 in a compressed one or Parquet."""
    size: int
    """Its uncompressed bytes, of Parquet an equal share of the row group's; the progress counts them."""
    last: bool
    """Whether it is its file's last: it reads on to the end, however that looks."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the corpus as it was when the plan was made."""

    path: str
    """Absolute, links kept: a link's own name says the format where that of its target doesn't."""
    size: int
    modified: int
    """Nanoseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module."""

    settings: ScoreSettings
    targets: dict[str, str]
    """Per target the hash of its file; the negative control's under `control`."""
    files: list[InputFile]
    shards: list[Shard]

    @property
    def key(self) -> str:
        """Identifies the plan in everything that is computed from it."""
        return hash_text(canonical_json(self.to_json()))

    @property
    def rows(self) -> int:
        """Lines and rows of the corpus."""
        return sum(s.rows for s in self.shards)

    @property
    def size(self) -> int:
        """Uncompressed bytes of the corpus."""
        return sum(s.size for s in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return what plan.json holds."""
        return {
            "format": FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "targets": self.targets,
            "files": [[f.path, f.size, f.modified] for f in self.files],
            "shards": [
                [s.number, s.file, s.skip, s.rows, s.offset, s.size, int(s.last)] for s in self.shards
            ],
        }

    def source(self) -> SourceConfig:
        """Return how the corpus's records are read."""
        s = self.settings
        return SourceConfig(
            name="score",
            kind="jsonl",
            paths=tuple(f.path for f in self.files),
            text_field=s.text_field,
            keep_fields=tuple(f for f in (s.id_field, s.source_field, s.prompt_field) if f),
            max_line_bytes=s.max_line_bytes,
        )

    def check_file(self, number: int) -> Path:
        """Return a file's path, if the file is still the one that was planned."""
        file = self.files[number]
        path = Path(file.path)
        try:
            stat = path.stat()
        except OSError as error:
            raise Jz3Error(f"{path}, a file of the corpus, can't be read: {error.strerror}") from error
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.modified):
            if stat.st_size != file.size:
                what = f"{file.size} bytes then, {stat.st_size} now); "
            else:
                seconds, nanoseconds = divmod(file.modified, 10**9)
                what = (
                    "as many bytes, another time); if it was only copied or restored, set its time back with "
                    f"`touch -d @{seconds}.{nanoseconds:09} {shlex.quote(str(path))}`, else "
                )
            raise Jz3Error(
                f"{path} changed after the plan was made ({what}score the changed corpus into another folder"
            )
        return path


def split_place(where: str) -> tuple[str, int]:
    """Split FILE:LINE; a whole file has the line 0."""
    path, _, line = where.rpartition(":")
    return (path, int(line)) if path and line.isdigit() else (where, 0)


def corpus_files(corpus: Sequence[str], out: Path | None = None) -> list[Path]:
    """Return the corpus's files in order, each once, and none that a run wrote.

    Args:
        corpus: files and globs. What another run wrote is taken where it is named, not where a glob
            matches it.
        out: the run's own folder, nothing of which is taken.

    Raises:
        Jz3Error: a path matches no file, or runs wrote all that matched.
    """
    found = find_files(SourceConfig(name="corpus", kind="jsonl", paths=tuple(corpus)))
    named = {os.path.realpath(os.path.expanduser(path)) for path in corpus}
    own = Path(os.path.realpath(out)) if out is not None else None
    runs: dict[Path, bool] = {}
    files = []
    for path in found:
        real = Path(os.path.realpath(path))
        for parent in real.parents:
            first = real.relative_to(parent).parts[0]
            if first not in WRITTEN and not first.startswith(("store-", "index-")):
                continue
            if parent not in runs:
                runs[parent] = parent == own or _is_run(parent)
            if runs[parent] and (parent == own or str(real) not in named):
                break
        else:
            files.append(path)
    if not files:
        raise Jz3Error(f"the corpus holds only files that runs wrote, e.g. {found[0]}; name others")
    return files


def _is_run(folder: Path) -> bool:
    try:
        table = json.loads((folder / "plan.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and table.get("format") == FORMAT


def make_plan(
    corpus: Sequence[str],
    settings: ScoreSettings,
    targets: dict[str, Path],
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Divide the corpus into shards; every file is read through once, of Parquet only the footer.

    Args:
        corpus: files and globs.
        settings: of the run.
        targets: per target its file.
        out: the run's folder, see `corpus_files`.
        say: told now and then how far it is, one line each.

    Raises:
        Jz3Error: a path matches no file, a file's kind is unknown or a target's file is missing.
        OSError: a file can't be read now, as its disk or server is in trouble.
    """
    if not corpus:
        raise ValueError("no corpus: give files or globs of .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
    files, shards = [], []
    paths = corpus_files(corpus, out)
    counted, told = 0, time.monotonic()
    for number, path in enumerate(paths):
        suffixes = [s for s in path.suffixes if s not in COMPRESSED]
        if path.suffix != ".parquet" and (not suffixes or suffixes[-1] not in LINES):
            raise Jz3Error(f"{path}: the name must end in .parquet, .jsonl, .json or .ndjson (.gz, .zst)")
        stat = path.stat()
        files.append(InputFile(os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        divide = _divide_parquet if path.suffix == ".parquet" else _divide_lines
        parts = []
        for part in divide(path, settings):
            parts.append(part)
            counted += part[1]
            # Of compressed files the reading alone may take hours.
            if time.monotonic() - told >= REPORT_SECONDS:
                told = time.monotonic()
                say(f"plan: {counted:,} rows counted, file {number + 1:,} of {len(paths):,}")
        parts = parts or [(0, 0, 0, 0)]
        for position, (skip, rows, offset, size) in enumerate(parts):
            last = position == len(parts) - 1
            shards.append(Shard(len(shards), number, skip, rows, offset, size, last))
    hashes = {}
    for name, path in targets.items():
        if not path.is_file():
            raise Jz3Error(f"target {name!r}: {path} is no file")
        hashes[name] = hash_file(path)
    return Plan(settings, hashes, files, shards)


def _divide_lines(path: Path, settings: ScoreSettings) -> Iterator[tuple[int, int, int, int]]:
    """Yield (skip, rows, offset, bytes); where a file is damaged, the last shard finds out how."""
    plain = path.suffix not in COMPRESSED
    limit = settings.max_line_bytes + 1
    skip = rows = start = position = 0
    try:
        with open_lines(path) as stream:
            while line := stream.readline(limit):
                position += len(line)
                if len(line) == limit and not line.endswith(b"\n"):
                    position += skip_line(stream)
                rows += 1
                if rows == settings.shard_documents:
                    yield skip, rows, start if plain else 0, position - start
                    skip, rows, start = skip + rows, 0, position
    except (OSError, EOFError, zlib.error) as error:
        raise_trouble(error, path)
    if rows:
        yield skip, rows, start if plain else 0, position - start


def _divide_parquet(path: Path, settings: ScoreSettings) -> Iterator[tuple[int, int, int, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise_trouble(error, path)
        return  # the only shard rejects the file with the reason
    total = metadata.num_rows
    size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
    for skip in range(0, total, settings.shard_documents):
        rows = min(settings.shard_documents, total - skip)
        yield skip, rows, 0, size * rows // total


def load_plan(out: Path) -> Plan:
    """Read the plan of a run's folder."""
    path = out / "plan.json"
    table = read_json(path)
    if table.get("format") != FORMAT:
        raise Jz3Error(f"{path} has the format {table.get('format')!r}, expected {FORMAT!r}")
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in table["settings"].items()
    }
    return Plan(
        ScoreSettings(**settings),
        table["targets"],
        [InputFile(*f) for f in table["files"]],
        [Shard(*row[:6], last=bool(row[6])) for row in table["shards"]],
    )


def open_plan(
    out: Path,
    corpus: Sequence[str],
    settings: ScoreSettings,
    targets: dict[str, Path],
    threads: int,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Make the run's plan, or check that the one it has is for the same settings, corpus and targets.

    Args:
        out: the run's folder.
        corpus: files and globs.
        settings: as given; in a new plan 0 threads becomes `threads`, and `auto` (dtype, products) what this
            machine is fast in; with an old plan they become what they were.
        targets: per target its file.
        threads: CPU threads a worker.
        say: see `make_plan`.

    Raises:
        Jz3Error: the folder is another run's, which has its fits already or is making them; the differences
            are named.
    """
    if (out / "recipe.json").exists():
        raise Jz3Error(f"{out} is a run of the loop (it has a recipe.json); use another folder")
    with locked(out / ".plan.lock"):
        if not (out / "plan.json").is_file():
            return _write_plan(out, corpus, settings, targets, threads, say)
        plan = load_plan(out)
        different = _differences(out, plan, corpus, settings, targets)
        if not different:
            return plan
        # What failed before its fits were there, for a wrong option perhaps, holds nothing worth keeping.
        with locked(out / PREPARING, wait=False) as idle:
            if idle and not (out / "job.json").is_file():
                shutil.rmtree(out / "fit", ignore_errors=True)
                return _write_plan(out, corpus, settings, targets, threads, say)
    raise Jz3Error(f"{out} was made with other settings ({'; '.join(different[:5])}); use another folder")


def _write_plan(
    out: Path,
    corpus: Sequence[str],
    settings: ScoreSettings,
    targets: dict[str, Path],
    threads: int,
    say: Callable[[str], None],
) -> Plan:
    dtype = best_dtype() if settings.dtype == "auto" else settings.dtype
    products = best_products() if settings.products == "auto" else settings.products
    settings = dataclasses.replace(
        settings, threads=settings.threads or threads, dtype=dtype, products=products
    )
    plan = make_plan(corpus, settings, targets, out, say)
    write_json(out / "plan.json", plan.to_json())
    return plan


def _differences(
    out: Path, plan: Plan, corpus: Sequence[str], settings: ScoreSettings, targets: dict[str, Path]
) -> list[str]:
    """Name what tells a plan from what is asked for."""
    wanted, found = dataclasses.asdict(settings), dataclasses.asdict(plan.settings)
    wanted |= {name: found[name] for name in ("threads", "dtype", "products") if wanted[name] in (0, "auto")}
    different = [f"{k}: {found[k]!r} -> {wanted[k]!r}" for k in wanted if wanted[k] != found[k]]
    paths = corpus_files(corpus, out)
    # A file may be given by another of its names.
    if sorted(map(os.path.realpath, paths)) != sorted(os.path.realpath(f.path) for f in plan.files):
        different.append(f"corpus: {len(plan.files)} files -> {len(paths)} files, not the same ones")
    for name in sorted(plan.targets.keys() | targets.keys()):
        path = targets.get(name)
        now = hash_file(path) if path is not None and path.is_file() else None
        if plan.targets.get(name) != now:
            different.append(f"target {name!r}: {plan.targets.get(name)} -> {now}")
    return different
