"""Keeping evaluation questions out of the training data, by shared phrases of words."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from jz3.errors import Jz3Error
from jz3.evaluation.benchmarks import benchmark_questions
from jz3.evaluation.config import BenchmarkConfig
from jz3.files import hash_text
from jz3.filtering.config import EvaluationFile, FilteringConfig

if TYPE_CHECKING:
    from jz3.config import Recipe

_WORD = re.compile(r"\\?[^\W\d_]+|\d+(?:\.\d+)?|[^\s\w]")
_IGNORED = frozenset("$,.;:!?\"'`()[]{}|&~")
_IGNORED_COMMANDS = frozenset(("\\left", "\\right", "\\text", "\\mathrm", "\\displaystyle", "\\quad"))


def words_of(text: str) -> list[str]:
    """Return the words that two texts must share to be the same question: lower case, numbers and
    operators kept, punctuation, braces and spacing commands dropped, a row of equal signs as one."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\\dfrac", "\\frac").replace("\u2019", "'")
    words: list[str] = []
    for word in _WORD.findall(text):
        if word in _IGNORED or word in _IGNORED_COMMANDS or (not word[-1].isalnum() and words[-1:] == [word]):
            continue
        words.append(word)
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """An evaluation question that a text shares phrases with."""

    suite: str
    question: int
    """Its number in its evaluation set, from 0."""
    phrases: int
    """How many different phrases are shared."""
    share: float
    """How much of the question's words they cover."""
    span: str
    """The longest stretch of shared words."""


@dataclass(slots=True)
class DecontaminationIndex:
    """The phrases of all evaluation questions.

    A question of at least `n` words gives all its phrases of n words; a shorter one is a single phrase,
    so that a text which holds it whole is found as well.

    Args:
        n: length of a phrase in words.
        min_words: a question with fewer words is found only as a whole text, and counted.
    """

    n: int = 13
    min_words: int = 6
    lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    """Words of each question that is found by its phrases."""
    digests: dict[str, str] = field(default_factory=dict)
    """Per evaluation set the hash of its questions in their order."""
    ignored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _phrases: dict[int, list[tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(list))
    _short: dict[tuple[str, ...], tuple[str, int]] = field(default_factory=dict)
    _begins: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Lengths of the phrases that begin with these words: of a long text few places begin any."""
    _counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, suite: str, question: str) -> None:
        """Add a question to the evaluation set `suite`."""
        self.digests[suite] = hash_text(self.digests.get(suite, "") + question)
        number = self._counts[suite]
        self._counts[suite] += 1
        words = words_of(question)
        if len(words) < self.min_words:
            self.ignored[suite] += 1
            if words:
                self._short.setdefault(tuple(words), (suite, number))
            return
        size = min(self.n, len(words))
        self.lengths[suite, number] = len(words)
        first = self._first()
        for start in range(len(words) - size + 1):
            self._begins[" ".join(words[start : start + first])].add(size)
            self._phrases[_hash(words, start, size)].append((suite, number, start))

    def _first(self) -> int:
        """Return how many words every phrase has at least."""
        return min(self.n, self.min_words)

    def questions(self) -> dict[str, int]:
        """Return how many questions each set has."""
        return dict(self._counts)

    def find(self, text: str) -> list[Hit]:
        """Return the questions that share phrases with `text`, the most covered first."""
        words = words_of(text)
        if len(words) < self.min_words and (short := self._short.get(tuple(words))):
            return [Hit(suite=short[0], question=short[1], phrases=1, share=1.0, span=" ".join(words))]
        found: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
        first = self._first()
        for start in range(len(words) - first + 1):
            for size in self._begins.get(" ".join(words[start : start + first]), ()):
                if start + size > len(words):
                    continue
                for suite, number, place in self._phrases.get(_hash(words, start, size), ()):
                    if min(self.n, self.lengths[suite, number]) == size:
                        found[suite, number][place] = start
        hits = [self._hit(words, suite, number, places) for (suite, number), places in found.items()]
        return sorted(hits, key=lambda h: (-h.share, -h.phrases, h.suite, h.question))

    def _hit(self, words: list[str], suite: str, number: int, places: dict[int, int]) -> Hit:
        length = self.lengths[suite, number]
        size = min(self.n, length)
        covered = bytearray(length)
        longest, run_start, previous = (0, 0), 0, -2
        for place in sorted(places):
            covered[place : place + size] = b"\1" * size
            if place != previous + 1:
                run_start = place
            previous = place
            longest = max(longest, (place + size - run_start, places[run_start]))
        span = " ".join(words[longest[1] : longest[1] + longest[0]])
        return Hit(
            suite=suite, question=number, phrases=len(places), share=sum(covered) / length, span=span[:300]
        )


def _hash(words: list[str], start: int, size: int) -> int:
    return xxhash.xxh3_64_intdigest("\x1f".join(words[start : start + size]).encode("utf-8", "surrogatepass"))


def build_index(
    config: FilteringConfig, queries: list[dict[str, Any]], benchmarks: Sequence[BenchmarkConfig] = ()
) -> DecontaminationIndex:
    """Index the run's evaluation questions, those of its benchmarks and those of the configured files.

    Args:
        config: the filters' settings.
        queries: rows of the run's evaluation queries, with `task` and `problem`.
        benchmarks: those the run is evaluated on; all their problems count, whatever their limit.

    Raises:
        Jz3Error: a file is missing or can't be read, lacks a field, or has no question to compare with.
    """
    index = DecontaminationIndex(config.ngram, config.min_question_words)
    for query in queries:
        index.add(query["task"], query["problem"])
    for benchmark in benchmarks:
        for question in benchmark_questions(benchmark):
            index.add(benchmark.name, question)
    for file in config.evaluation_files:
        before = len(index.lengths)
        for question in evaluation_questions(file):
            index.add(file.name or Path(file.path).stem, question)
        if len(index.lengths) == before:
            raise Jz3Error(
                f"evaluation file {file.path!r} has no question of {config.min_question_words} words or more; "
                "correct its `fields`, lower filtering.min_question_words or leave the file out"
            )
    return index


def check_files(recipe: "Recipe") -> None:
    """Read the benchmarks and the evaluation files of a recipe as the stage will.

    Raises:
        Jz3Error: one of them can't be used.
    """
    build_index(recipe.filtering, [], recipe.evaluation.benchmarks)


def evaluation_questions(file: EvaluationFile) -> Iterator[str]:
    """Read the questions of a configured evaluation set.

    Raises:
        Jz3Error: a line can't be read; a set that is kept out only in part would be worse than none.
    """
    try:
        with open(Path(file.path).expanduser(), encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield _question(json.loads(line), file, number)
    except OSError as error:
        raise Jz3Error(f"evaluation file {file.path!r} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Jz3Error(f"evaluation file {file.path!r} is not valid JSON lines in UTF-8: {error}") from error


def _question(row: Any, file: EvaluationFile, number: int) -> str:
    for name in file.fields:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            known = ", ".join(row) if isinstance(row, dict) else "none"
            raise Jz3Error(
                f"{file.path}:{number} has no text field {name!r} (its fields: {known}); "
                "set `fields` of this entry of filtering.evaluation_files"
            )
    return " ".join(row[name] for name in file.fields)
