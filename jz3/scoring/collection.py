"""A finished run of `jz3 score` as index, query and explore read it: its store, scores and texts."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import atomic_path, hash_file, locked, read_json, read_jsonl, where_writable, write_json
from jz3.index.collection import Collection, Encoding
from jz3.index.scores import Key, ScoreTable
from jz3.models import ModelConfig, resolve_model
from jz3.records import Doc, Query
from jz3.scoring.config import ChooseSettings
from jz3.scoring.job import PROJECTIONS, check_model, load_job
from jz3.scoring.plan import load_plan
from jz3.scoring.reading import Reader
from jz3.scoring.shard import has_rows, scores_path, store_folder
from jz3.store import Store
from jz3.store.format import differences
from jz3.store.shard import shard_path

if TYPE_CHECKING:
    from jz3.features.extract import Projection

LINE_BITS = 40
"""A place is shard << LINE_BITS | line."""


class ShardScores(ScoreTable):
    """The scores of all finished shards; a text's key is its place."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files.

        Args:
            paths: of finished shards, in order.
        """
        import pyarrow.parquet as pq

        super().__init__(paths)
        self._shards = np.array([int(path.stem) for path in paths])
        self._starts = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in paths)])
        self._lines = self.column("line")

    def keys(self, rows: np.ndarray) -> list[Key]:
        """See ScoreTable."""
        files = np.searchsorted(self._starts, rows, side="right") - 1
        return list(zip(self._shards[files].tolist(), self._lines[rows].tolist(), strict=True))


class ScoredCollection(Collection):
    """The texts of a run of `jz3 score`, with the features of its checkpoints if they were kept."""

    def __init__(self, out: Path, checkpoint: int | None = None) -> None:
        """Read plan and fits' descriptions.

        Args:
            out: the run's folder.
            checkpoint: the only one that is searched, counted from 0; None: all by their weights.

        Raises:
            Jz3Error: the run is not prepared yet.
            ValueError: there is no such checkpoint.
        """
        self._plan = load_plan(out)
        if not (out / "job.json").is_file():
            raise Jz3Error(f"{out} is a plan without fits yet; run the same `jz3 score` command to go on")
        self._job = load_job(out)
        count = len(self._job.checkpoints)
        if checkpoint is not None and not 0 <= checkpoint < count:
            raise ValueError(f"--checkpoint must be from 0 to {count - 1}, got {checkpoint}")
        self.folder, self.index, self.name = out, out / "index", out.name
        self.prompt_field = self._plan.settings.prompt_field
        self._numbers = tuple(range(count)) if checkpoint is None else (checkpoint,)
        if checkpoint is None:
            self.weights = tuple(c.weight for c in self._job.checkpoints)
            self.name += f", {count} checkpoints" if count > 1 else ""
        elif count > 1:
            self.index = out / f"index-{checkpoint}"
            self.name += f", checkpoint {checkpoint} of 0 to {count - 1}"
        names = [name for name, _ in self._plan.settings.checkpoints()]
        self.models = tuple(names[number] for number in self._numbers)
        missing = len(self._plan.shards) - len(self._done())
        if missing:
            self.name += f" ({missing:,} of {len(self._plan.shards):,} shards are not scored yet)"

    @property
    def missing_features(self) -> str:
        """See Collection."""
        if not self._plan.settings.keep_features:
            return (
                f"{self.folder} was scored without --keep-features, so that there are no features to search; "
                "score the corpus with --keep-features into another folder"
            )
        if not all((self._store_folder(number) / "store.json").is_file() for number in self._numbers):
            return (
                f"{self.folder} has no features yet; run the same `jz3 score` command until shards are done"
            )
        return ""

    @property
    def seed(self) -> int:
        """See Collection."""
        return self._plan.settings.seed

    @property
    def chosen(self) -> int:
        """See Collection."""
        if (self.folder / "manifest.json").is_file():
            return int(read_json(self.folder / "manifest.json")["selection"]["wanted"])
        return ChooseSettings().count(self._plan.rows)

    def _store_folder(self, number: int) -> Path:
        return store_folder(self.folder, number, len(self._job.checkpoints))

    def encoding(self, member: int = 0) -> Encoding:
        """See Collection."""
        settings, number = self._plan.settings, self._numbers[member]
        names = [name for name, _ in settings.checkpoints()]
        return Encoding(
            model=check_model(self.folder, names[number], self._job.checkpoints[number]),
            tokenizer=resolve_model(ModelConfig(name=names[0])),
            dtype=settings.dtype,
            products=self._job.checkpoints[number].products,
            reduction=settings.reduction,
            query_tokens=settings.query_tokens,
            document_tokens=settings.max_tokens,
        )

    def projection(self, member: int = 0) -> "Projection":
        """See Collection."""
        number = self._numbers[member]
        checkpoint = self._job.checkpoints[number]
        name, kind = PROJECTIONS[checkpoint.kind]
        path = self.folder / "fit" / str(number) / name
        if not path.is_file() or hash_file(path) != checkpoint.projection_hash:
            raise Jz3Error(
                f"{path} is not the one that the features were made with; restore it, or score the corpus into "
                "another folder"
            )
        return kind.load(path, checkpoint.model_hash)

    def store(self, member: int = 0) -> Store:
        """See Collection."""
        if self.missing_features:
            raise Jz3Error(self.missing_features)
        number = self._numbers[member]
        # A shard's features are written before its scores, so that of these every store has all.
        done = {int(path.stem): path for path in self._done()}
        store = Store(self._store_folder(number))
        wanted = self._job.store_info(number, self._plan.settings)
        if different := differences(store.info, wanted, ("in the store", "in the run")):
            raise Jz3Error(f"{store.folder} is another run's store ({'; '.join(different)})")
        store.shards = [shard for shard in store.shards if shard.number in done]
        known = {shard.number for shard in store.shards}
        for shard, path in done.items():
            file = shard_path(store.folder, shard)
            if shard not in known and file.name not in store.damaged and has_rows(path):
                raise Jz3Error(f"{file} is missing; run the same `jz3 score` command to write it again")
        return store

    def prepare_texts(self) -> None:
        """See Collection."""
        _ = self._table

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the texts in order [N] uint64 and their places [N] int64, mapped from disk once they are there."""
        folder = self.index
        done = self._done()
        wanted = {"run": self._job.key, "shards": len(done)}
        note = folder / "docs-table.json"
        if not note.is_file() or read_json(note) != wanted:
            table = _table_of(done)
            with where_writable(), locked(folder / ".docs.lock"):
                for name, array in zip(("ids", "places"), table, strict=True):
                    with atomic_path(folder / f"docs-{name}.npy") as part, open(part, "wb") as handle:
                        np.save(handle, array)
                write_json(note, wanted)
            return table
        ids, places = (np.load(folder / f"docs-{name}.npy", mmap_mode="r") for name in ("ids", "places"))
        return ids, places

    def _done(self) -> list[Path]:
        """Return the files of scores that are there, in order."""
        paths = [scores_path(self.folder, shard.number) for shard in self._plan.shards]
        return [path for path in paths if path.is_file()]

    def texts(self, keys: Sequence[Key]) -> list[Doc]:
        """See Collection."""
        places = [key if isinstance(key, tuple) else self._place(key) for key in keys]
        reader = Reader(self._plan)
        found = {(shard, line): text for shard, line, text in reader.read_places(places)}
        reader.close()
        rows = {(shard, row["line"]): row for shard, row in _rows_at(self.folder, places)}
        docs = []
        for place in places:
            if place not in found or place not in rows:
                path = self._plan.files[self._plan.shards[place[0]].file].path
                raise Jz3Error(f"{path}:{place[1]} holds no text that was scored; restore the corpus")
            row = rows[place]
            text, known = found[place], {name: row[name] for name in ("id", "source", "tokens")}
            docs.append(Doc(text=text.text, meta=text.meta, **known))
        return docs

    def find(self, name: str) -> tuple[int, int]:
        """Return the place of the first text whose id, as the scores have it, is `name`.

        Raises:
            Jz3Error: no text that was scored has that id.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        for path in self._done():
            table = pq.read_table(path, columns=["id", "line"])
            row = pc.index(table["id"], name).as_py()
            if row >= 0:
                return int(path.stem), table["line"][row].as_py()
        raise Jz3Error(f"{self.folder} has scored no text {name!r}")

    def _place(self, key: int | str) -> tuple[int, int]:
        number = int(key, 16) if isinstance(key, str) else int(key)
        ids, places = self._table
        row = int(np.searchsorted(ids, np.uint64(number)))
        if row == len(ids) or int(ids[row]) != number:
            raise Jz3Error(f"{self.folder} has scored no text {number:016x}; its index is another run's")
        return divmod(int(places[row]), 1 << LINE_BITS)

    def queries(self) -> list[Query]:
        """See Collection."""
        return [Query.from_json(row) for row in read_jsonl(self.folder / "queries.jsonl")]

    def scores(self) -> ScoreTable | None:
        """See Collection."""
        done = self._done()
        return ShardScores(done) if done else None


def _table_of(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet as pq

    ids, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for path in paths:
        table = pq.read_table(path, columns=["hash", "line"])
        ids.append(table["hash"].to_numpy())
        places.append((int(path.stem) << LINE_BITS) + table["line"].to_numpy())
    keys, values = np.concatenate(ids), np.concatenate(places)
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]


def _rows_at(out: Path, places: Sequence[tuple[int, int]]) -> "list[tuple[int, dict[str, Any]]]":
    """Read what the scores say of the texts at some places."""
    import pyarrow.parquet as pq

    wanted: dict[int, list[int]] = {}
    for shard, line in places:
        wanted.setdefault(shard, []).append(line)
    rows = []
    for shard, lines in wanted.items():
        table = pq.read_table(scores_path(out, shard), columns=["id", "source", "line", "tokens"])
        at = np.flatnonzero(np.isin(table["line"].to_numpy(), lines))
        rows += [(shard, row) for row in table.take(at).to_pylist()]
    return rows
