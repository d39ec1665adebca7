"""The best single texts by their scores, of a table or of a stream."""

import heapq
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jz3.topk import TopK

COMBINE = ("mean", "max", "quota")


def select(scores: np.ndarray, ids: Sequence[str], k: int, combine: str = "mean") -> list[int]:
    """Choose the k best rows.

    Args:
        scores: [N, tasks] float.
        ids: N ids; equal scores are ordered by id.
        k: how many to choose; fewer if N is smaller.
        combine: `mean`, `max` or `quota`, see jz3.selection.SelectionConfig.

    Returns:
        Row numbers, best first (score descending, id ascending).

    Raises:
        ValueError: a score is not finite, `combine` is unknown, k is negative or the shapes differ.
    """
    if scores.ndim != 2 or len(scores) != len(ids):
        raise ValueError(f"scores must be [{len(ids)}, tasks], got shape {scores.shape}")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(1).sum())} rows have a score that is not finite")
    if combine != "quota":
        total = scores.mean(1) if combine == "mean" else scores.max(1)
        return _order(total, ids)[:k]
    orders = [iter(_order(scores[:, t], ids)) for t in range(scores.shape[1])]
    chosen: dict[int, None] = {}
    while orders and len(chosen) < min(k, len(ids)):
        for order in orders:
            row = next((r for r in order if r not in chosen), None)
            if row is not None and len(chosen) < k:
                chosen[row] = None
    return list(chosen)


def _order(values: np.ndarray, ids: Sequence[str]) -> list[int]:
    return np.lexsort((np.array(ids), -values)).tolist()


Place = tuple[int, ...]
"""What names a row of a stream: integers, in the order in which equal scores are decided."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen row and what decided."""

    place: Place
    score: float
    """By which it was chosen."""
    task: int
    """Whose score that is; -1: the mean or maximum of all."""


class StreamingSelection:
    """Chooses the best rows of a stream of scores; memory grows with the choice, not with the stream.

    The same rule as `select`, with a limit per source and a last word about every candidate (whether
    it repeats a better one). What is refused is replaced by the next best; for that, more candidates
    than wanted are kept, and `choose` says if there were still too few.
    """

    def __init__(
        self, k: int, combine: str = "mean", source_limit: int | None = None, slack: float = 1.0
    ) -> None:
        """Make an empty selection.

        Args:
            k: rows to choose.
            combine: `mean`, `max` or `quota`, see jz3.selection.SelectionConfig.
            source_limit: rows of one source at most; None: no limit.
            slack: candidates kept per row to choose, at least 1; over all sources, and of each.
        """
        if combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
        self.k, self.combine = k, combine
        self._limit = k if source_limit is None else source_limit
        self._by_source = source_limit is not None
        self._pool = math.ceil(min(k, self._limit) * slack)
        self._cap = math.ceil(k * slack)
        self._tops: dict[int, dict[int, TopK]] = {}
        self._ends: dict[int, tuple[float, Place]] = {}
        """Per column the last of the candidates, once there were more than enough of them."""

    def add(self, scores: np.ndarray, places: np.ndarray, sources: np.ndarray) -> None:
        """Show rows.

        Args:
            scores: [n, tasks] float.
            places: [n, m] int64, see Place; all different.
            sources: [n] int.
        """
        if self.combine == "quota":
            columns = {t: scores[:, t] for t in range(scores.shape[1])}
        else:
            columns = {-1: scores.mean(1) if self.combine == "mean" else scores.max(1)}
        groups = np.unique(sources) if self._by_source else [-1]
        for source in groups:
            rows = slice(None) if source == -1 else sources == source
            for column, values in columns.items():
                tops = self._tops.setdefault(column, {})
                tops.setdefault(int(source), TopK(self._pool)).add(values[rows], places[rows])
        for column, tops in self._tops.items():
            # With one group its own size is the cap.
            if self._by_source and sum(top.held for top in tops.values()) > 2 * self._cap:
                self._shrink(column, tops)

    def _shrink(self, column: int, tops: dict[int, TopK]) -> None:
        """Cut the sources' candidates to as many in all, so that memory doesn't grow with the sources."""
        best = {source: top.best() for source, top in tops.items() if top.held}
        scores = np.concatenate([s for s, _ in best.values()])
        if len(scores) <= self._cap:
            return
        places = np.concatenate([p for _, p in best.values()])
        owner = np.repeat(list(best), [len(s) for s, _ in best.values()])
        order = np.lexsort((*places.T[::-1], -scores))[: self._cap]
        kept = Counter(owner[order].tolist())
        last = order[-1]
        self._ends[column] = (float(scores[last]), tuple(places[last].tolist()))
        for source in best:
            tops[source].shrink(kept[source], float(scores[last]))

    def candidates(self) -> list[Place]:
        """Return every row that may be chosen."""
        kept = (top.best()[1] for tops in self._tops.values() for top in tops.values())
        return list(dict.fromkeys(tuple(row) for rows in kept for row in rows.tolist()))

    def choose(
        self, refuse: Callable[[Place], str] = lambda place: ""
    ) -> tuple[list[Choice], dict[Place, str], bool]:
        """Choose, best first.

        Args:
            refuse: says why a row can't be chosen, or nothing; asked once per row, in order.

        Returns:
            The choices; the refused rows with their reasons (`source_quota` besides those given);
            whether the candidates sufficed: if not, choose again with more slack.
        """
        orders = {c: self._order(tops, self._ends.get(c)) for c, tops in sorted(self._tops.items())}
        chosen: dict[Place, Choice] = {}
        refused: dict[Place, str] = {}
        taken: Counter[int] = Counter()
        while orders and len(chosen) < self.k:
            for column in list(orders):
                for score, place, source in orders[column]:
                    if place is None:
                        if taken[source] < self._limit:
                            return list(chosen.values()), refused, False
                    elif place in chosen or place in refused:
                        continue
                    elif taken[source] >= self._limit:
                        refused[place] = "source_quota"
                    elif reason := refuse(place):
                        refused[place] = reason
                    else:
                        chosen[place] = Choice(place, score, column)
                        taken[source] += 1
                        break
                else:
                    del orders[column]
                if len(chosen) == self.k:
                    break
        return list(chosen.values()), refused, True

    @staticmethod
    def _order(
        tops: dict[int, TopK], end: tuple[float, Place] | None
    ) -> Iterator[tuple[float, Place | None, int]]:
        """Merge the sources' candidates; where those of a source or all end but the rows don't, give None."""

        def rows(source: int, top: TopK) -> Iterator[tuple[float, Place, int, bool]]:
            scores, places = top.best()
            for score, place in zip(scores.tolist(), places.tolist(), strict=True):
                yield -score, tuple(place), source, False
            # With fewer than its size, what is missing comes after the end of all.
            if top.truncated and len(scores) == top.size:
                worst = (-scores[-1], tuple(places[-1])) if len(scores) else (-np.inf, ())
                yield float(worst[0]), worst[1], source, True

        parts: list[Iterator[tuple[float, Place, int, bool]]] = [rows(s, t) for s, t in sorted(tops.items())]
        if end is not None:
            # No source: nothing of it was taken, and its number comes after the others'.
            parts.append(iter([(-end[0], end[1], sys.maxsize, True)]))
        for negative, place, source, ends in heapq.merge(*parts):
            yield -negative, None if ends else place, source


def chosen_rows(scores: dict[str, Any], method: str, k: int, combine: str) -> list[int]:
    """Return the rows that a method of the influence stage's table chooses.

    Args:
        scores: from `jz3.influence.read_scores`.
        method: `influence`, or a baseline of `InfluenceConfig.baselines`.
        k: how many.
        combine: `mean`, `max` or `quota`, see jz3.selection.SelectionConfig.
    """
    columns = [
        c for c in scores if c == method or (c.startswith(f"{method}:") and not c.endswith(":control"))
    ]
    if not columns:
        known = sorted({c.split(":")[0] for c in scores} - {"id", "source", "tokens", "norm"})
        raise ValueError(f"no scores of method {method!r}; there are: {', '.join(known)}")
    return select(np.stack([scores[c] for c in columns], 1), scores["id"], k, combine)
