"""The scores of a run as index and page read them: histograms, source mix, the best and the worst texts."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Key = int | str | tuple[int, int]
"""What names a text: its 64-bit id, as a number or 16 hexadecimal digits, or its place (shard, line)."""
PREFIX = "influence:"
BINS = 60


class ScoreTable:
    """Files of scores as one table, a column at a time; texts stay in the corpus."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files.

        Args:
            paths: tables with `id`, `source` and a column `influence:TASK` per task.
        """
        import pyarrow.parquet as pq

        self._paths = [str(path) for path in paths]
        names = pq.read_schema(self._paths[0]).names
        self.tasks = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
        column = self._read("source", read_dictionary=["source"])
        source: Any = column.unify_dictionaries().combine_chunks()
        self.sources: list[str] = source.dictionary.to_pylist()
        self._source = source.indices.to_numpy()

    def __len__(self) -> int:
        return len(self._source)

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers [N]."""
        return self._read(name).to_numpy()

    def _read(self, name: str, **options: Any) -> Any:
        import pyarrow.parquet as pq

        # A folder of the path such as `tokens=512` is no column.
        options["partitioning"] = None
        return pq.read_table(self._paths, columns=[name], **options)[name]

    def keys(self, rows: np.ndarray) -> list[Key]:
        """Return what names the texts of some rows."""
        ids = self._ids()
        return [ids[int(row)].as_py() for row in rows]

    @lru_cache(maxsize=1)  # noqa: B019 - one table a process, and its columns are what should stay
    def _ids(self) -> Any:
        return self._read("id")

    @lru_cache(maxsize=32)  # noqa: B019
    def scores(self, task: str) -> np.ndarray:
        """Return a task's scores [N] float32."""
        return self.column(PREFIX + task)

    @lru_cache(maxsize=8)  # noqa: B019
    def order(self, task: str) -> np.ndarray:
        """Return the rows from the best to the worst."""
        return np.argsort(-self.scores(task), kind="stable")

    def page(self, task: str, worst: bool, start: int, count: int) -> list[tuple[int, Key, float]]:
        """Return (rank, key, score) of a page of the best texts, or of the worst."""
        order, scores = self.order(task), self.scores(task)
        rows = order[::-1][start : start + count] if worst else order[start : start + count]
        first = len(order) - start if worst else start + 1
        step = -1 if worst else 1
        keys = self.keys(rows)
        return [(first + step * i, keys[i], float(scores[row])) for i, row in enumerate(rows)]

    def histogram(self, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Return counts [BINS] and edges [BINS + 1] over the range of all tasks' scores."""
        low = min(float(self.scores(t).min()) for t in self.tasks)
        high = max(float(self.scores(t).max()) for t in self.tasks)
        return np.histogram(self.scores(task), bins=BINS, range=(low, max(high, low + 1e-9)))

    def mix(self, k: int) -> dict[str, dict[str, float]]:
        """Return the share of every source in the corpus and among the best k texts of every task."""
        table = {"whole corpus": self._shares(np.arange(len(self)))}
        for task in self.tasks:
            table[f"best {min(k, len(self))}: {task}"] = self._shares(self.order(task)[:k])
        return table

    def _shares(self, rows: np.ndarray) -> dict[str, float]:
        counts = np.bincount(self._source[rows], minlength=len(self.sources))
        return {name: float(n / max(len(rows), 1)) for name, n in zip(self.sources, counts, strict=True)}
