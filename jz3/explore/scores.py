"""The scores of a run for the page: histograms, source mix, the best and the worst texts."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "influence:"
BINS = 60


class ScoreTable:
    """influence/scores.parquet, a column at a time; texts stay in the corpus file."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Args:
            path: a table with `id`, `source` and a column `influence:TASK` per task.
        """
        import pyarrow.parquet as pq

        self._path = path
        names = pq.read_schema(path).names
        self.tasks = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
        table = pq.read_table(path, columns=["id", "source"], read_dictionary=["source"])
        self._ids = table["id"].combine_chunks()
        source: Any = table["source"].combine_chunks()
        self.sources: list[str] = source.dictionary.to_pylist()
        self._source = source.indices.to_numpy()

    def __len__(self) -> int:
        return len(self._ids)

    @lru_cache(maxsize=32)  # noqa: B019 - one table a process, and its columns are what should stay
    def scores(self, task: str) -> np.ndarray:
        """Return a task's scores [N] float32."""
        import pyarrow.parquet as pq

        return pq.read_table(self._path, columns=[PREFIX + task])[PREFIX + task].to_numpy()

    @lru_cache(maxsize=8)  # noqa: B019
    def order(self, task: str) -> np.ndarray:
        """Return the rows from the best to the worst."""
        return np.argsort(-self.scores(task), kind="stable")

    def page(self, task: str, worst: bool, start: int, count: int) -> list[tuple[int, str, float]]:
        """Return (rank, document id, score) of a page of the best texts, or of the worst."""
        order, scores = self.order(task), self.scores(task)
        rows = order[::-1][start : start + count] if worst else order[start : start + count]
        first = len(order) - start if worst else start + 1
        step = -1 if worst else 1
        return [(first + step * i, self._ids[int(r)].as_py(), float(scores[r])) for i, r in enumerate(rows)]

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
