"""What was bought and what it cost: a cache of answers for all runs, a ledger for each run.

Both are SQLite files that commit row by row, so that a kill loses at most the requests in flight;
the ledger counts those as paid.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error
from jz3.files import canonical_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A paid answer."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A run's spending; calls without a known price count at what was booked for them."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


def request_key(**request: Any) -> str:
    """Return the SHA-256 of all that decides an answer: endpoint, model, messages, parameters."""
    return hashlib.sha256(canonical_json(request).encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """All answers ever bought, by the request's key."""

    def __init__(self, path: Path) -> None:
        self._file = _Database(
            path,
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, "
            "finish TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)",
        )

    def get(self, key: str) -> Answer | None:
        """Return the answer to a request, or None if it was never bought."""
        row = self._file.row(
            "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
        )
        return row and Answer(text=row[0], finish=row[1], prompt_tokens=row[2], completion_tokens=row[3])

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        self._file.write(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            (key, model, answer.text, answer.finish, answer.prompt_tokens, answer.completion_tokens),
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Ledger:
    """A run's requests, each booked at the most it can cost before it is sent."""

    def __init__(self, path: Path, max_calls: int, max_usd: float) -> None:
        self._max_calls = max_calls
        self._max_usd = max_usd
        self._file = _Database(
            path,
            "CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, key TEXT NOT NULL, usd REAL NOT NULL, "
            "prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0)",
        )

    def book(self, key: str, usd: float) -> int | None:
        """Book a call, or return None if one more would break a limit."""
        with self._file.transaction() as run:
            calls, spent = run("SELECT COUNT(*), COALESCE(SUM(usd), 0) FROM calls").fetchone()
            if calls + 1 > self._max_calls or spent + usd > self._max_usd:
                return None
            return run("INSERT INTO calls (key, usd) VALUES (?, ?)", (key, usd)).lastrowid

    def settle(self, call: int, usd: float, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace a booking by what the call really cost."""
        self._file.write(
            "UPDATE calls SET usd = ?, prompt_tokens = ?, completion_tokens = ? WHERE id = ?",
            (usd, prompt_tokens, completion_tokens, call),
        )

    def asked(self, key: str) -> bool:
        """Tell whether this run sent a request, answered or not."""
        return self._file.row("SELECT 1 FROM calls WHERE key = ? LIMIT 1", (key,)) is not None

    def totals(self) -> Totals:
        """Return the run's spending."""
        row = self._file.row(
            "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
            "COALESCE(SUM(usd), 0) FROM calls"
        )
        return Totals(calls=row[0], prompt_tokens=row[1], completion_tokens=row[2], usd=row[3])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Database:
    """An SQLite file with one table, whose errors name it."""

    def __init__(self, path: Path, table: str) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._named():
            # isolation_level None: every statement outside `transaction` commits by itself.
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(table)

    def row(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        with self._named():
            return self._connection.execute(query, values).fetchone()

    def write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._named():
            self._connection.execute(statement, values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        with self._named():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            full = "free the disk, or " if isinstance(error, sqlite3.OperationalError) else ""
            raise Jz3Error(f"{self._path}: {error}; {full}move the file away if it is damaged") from error
