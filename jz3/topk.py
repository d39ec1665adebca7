"""The best rows of a stream, in memory that doesn't grow with the stream."""

import numpy as np


class TopK:
    """Keeps the `size` rows with the highest score of all that it is shown; ties go to the lower `tie`.

    A buffer of twice the size is cut back when it is full, and what can't enter any more is left out
    before it is copied: the amortised cost of a row is constant.
    """

    def __init__(self, size: int) -> None:
        """Make an empty selection.

        Args:
            size: how many rows to keep.

        Raises:
            ValueError: size is negative.
        """
        if size < 0:
            raise ValueError(f"size must not be negative, got {size}")
        self.size = size
        self.seen = 0
        """Rows with a finite score shown so far."""
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0
        self._worst = -np.inf

    def add(self, scores: np.ndarray, ties: np.ndarray) -> None:
        """Show rows.

        Args:
            scores: [n] float; rows that are not finite are passed over.
            ties: [n] or [n, m] int64: what names the row, in the order in which ties are broken.
        """
        finite = np.isfinite(scores)
        self.seen += int(finite.sum())
        good = finite & (scores >= self._worst)
        count = int(good.sum())
        if not count or not self.size:
            return
        self._parts.append((np.asarray(scores[good], np.float64), ties.reshape(len(ties), -1)[good]))
        self._held += count
        if self._held >= 2 * self.size:
            self._cut()

    def _cut(self) -> None:
        if not self._parts:
            return
        scores = np.concatenate([s for s, _ in self._parts])
        ties = np.concatenate([t for _, t in self._parts])
        order = np.lexsort((*ties.T[::-1], -scores))[: self.size]
        self._parts = [(scores[order], ties[order])]
        self._held = len(order)
        if self._held == self.size:
            self._worst = float(scores[order[-1]])

    def shrink(self, keep: int, worst: float) -> None:
        """Drop all but the best rows, and pass over rows below a score from now on.

        Args:
            keep: how many stay.
            worst: the score.
        """
        scores, ties = self.best()
        # Copies, so that what is dropped is freed.
        self._parts = [(scores[:keep].copy(), ties[:keep].copy())] if keep else []
        self._held = min(keep, len(scores))
        self._worst = max(self._worst, worst)

    @property
    def held(self) -> int:
        """Rows in memory."""
        return self._held

    @property
    def truncated(self) -> bool:
        """Whether rows were left out."""
        return self.seen > self.size

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores [k] float64, ties [k, m] int64), best first."""
        self._cut()
        return self._parts[0] if self._parts else (np.zeros(0), np.zeros((0, 1), np.int64))
