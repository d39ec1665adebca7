"""BM25 in a stream: the statistics of the queries' words are counted first, then texts score one by one.

    score(d, q) = sum over q's words w of ln(1 + (N - n_w + 1/2) / (n_w + 1/2)) f / (f + k1 (1 - b + b |d| / mean |d|))

with f the occurrences of w in d and n_w the texts that hold w. Only words of queries are counted, so
that the memory doesn't grow with the corpus.

Source: Robertson and Zaragoza 2009, Lucene's variant, as in bm25s.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import read_json, write_json
from jz3.records import Query

K1, B = 1.5, 0.75


@dataclass(frozen=True, slots=True)
class Bm25:
    """Weights of the queries' words, per task."""

    weights: dict[str, dict[str, float]]
    """Task to word to its inverse document frequency times its mean occurrences in a query."""
    mean_length: float

    @classmethod
    def count(cls, texts: Iterable[str], queries: Mapping[str, Sequence[Query]]) -> "Bm25":
        """Count the queries' words in a corpus or a sample of it.

        Args:
            texts: read once, in pieces. A word that none of a sample holds is rare, and weighs most.
            queries: per task its queries (problem and solution together).
        """
        words: dict[str, Counter[str]] = {}
        for task, group in queries.items():
            words[task] = Counter(
                w for row in tokenize([f"{q.problem} {q.completion}" for q in group]) for w in row
            )
        known = {w for counts in words.values() for w in counts}
        holds: Counter[str] = Counter()
        total = length = 0
        for piece in _pieces(texts):
            for row in tokenize(piece):
                total += 1
                length += len(row)
                holds.update(known.intersection(row))
        weights = {
            task: {
                w: n * math.log(1 + (total - holds[w] + 0.5) / (holds[w] + 0.5)) / max(len(queries[task]), 1)
                for w, n in counts.items()
            }
            for task, counts in words.items()
        }
        return cls(weights, length / max(total, 1))

    def scores(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return per task the mean score [N] float64 of its queries for each text."""
        result = {task: np.zeros(len(texts)) for task in self.weights}
        for row, words in enumerate(tokenize(texts)):
            norm = K1 * (1 - B + B * len(words) / max(self.mean_length, 1e-9))
            found = {w: f / (f + norm) for w, f in Counter(words).items()}
            for task, weights in self.weights.items():
                result[task][row] = sum(weights[w] * x for w, x in found.items() if w in weights)
        return result

    def save(self, path: Path) -> None:
        """Write the weights as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Bm25":
        """Read what `save` wrote."""
        return cls(**read_json(path))


def _pieces(texts: Iterable[str], size: int = 512) -> Iterable[list[str]]:
    piece: list[str] = []
    for text in texts:
        piece.append(text)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """Return each text's words as bm25s sees them, English stop words left out."""
    try:
        import bm25s
    except ImportError as error:
        raise Jz3Error(
            "the baseline bm25 needs the package bm25s: pip install bm25s, or leave it out of the baselines"
        ) from error
    rows: Any = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
    return rows
