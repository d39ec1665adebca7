"""The protocol of a teacher, and the teacher that repeats recorded replies."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jz3.distillation.config import TeacherConfig
from jz3.errors import Jz3Error
from jz3.files import hash_text
from jz3.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and the bare text inside it."""

    prompt: Prompt
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a teacher answered to one request."""

    text: str
    finish: str = "stop"
    """`stop`, `length`, or whatever the endpoint says."""
    failure: str = ""
    """Why there is no text: `refused`, `teacher_failed` or `no_recorded_reply`; empty if there is one."""
    detail: str = ""
    """More about the failure."""
    meta: dict[str, str] = field(default_factory=dict)
    """Goes into the problem's `meta`, e.g. the teacher's model, `family`, `stand_in`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What the replies cost."""

    calls: int = 0
    """Requests sent, repeats included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    from_cache: int = 0
    """Different replies that were bought before this run."""


class Teacher(Protocol):
    """Writes problems."""

    name: str
    """Goes into every problem's `origin`."""
    stand_in: str
    """A label for the report if this is no real teacher, else empty."""

    def answer(self, requests: Sequence[Request], advance: Callable[[int], None]) -> list[Reply]:
        """Answer every request, in order; `advance` is told the number of replies just got."""
        ...

    def spending(self) -> Spending:
        """Say what this run's replies cost so far, earlier starts of the run included."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


def open_teacher(config: TeacherConfig, folder: Path, seed: int, avoid: Collection[str] = ()) -> Teacher:
    """Open the configured teacher.

    Args:
        config: which one.
        folder: the stage's folder; the endpoint's ledger of this run lies there.
        seed: the run's seed, for the offline teacher's draws.
        avoid: families of worked problems that the offline teacher must not write.

    Raises:
        Jz3Error: a key, package or file that it needs is missing.
    """
    if config.kind == "offline":
        from jz3.distillation.offline import OfflineTeacher

        return OfflineTeacher(seed, avoid)
    if config.kind == "recorded":
        return RecordedTeacher(Path(config.recorded).expanduser())
    from jz3.distillation.endpoint import EndpointTeacher

    return EndpointTeacher(config, folder)


class RecordedTeacher:
    """Repeats the replies of a JSON-lines file.

    A row holds `reply`, and `prompt_id`, `prompt_hash` (xxh3 of the prompt's text) or both; `finish` and
    `meta` are kept if they are there, so that the label of a stand-in survives being recorded.
    """

    stand_in = ""

    def __init__(self, path: Path) -> None:
        self.name = "recorded"
        self._rows: dict[str, Reply] = {}
        try:
            handle = open(path, encoding="utf-8")
        except OSError as error:
            raise Jz3Error(f"teacher: the recorded replies {path} can't be read: {error.strerror}") from error
        with handle:
            try:
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        self._add(line, f"{path}:{number}")
            except UnicodeDecodeError as error:
                raise Jz3Error(f"teacher: {path} is no valid UTF-8 ({error.reason})") from error
        labels = sorted({r.meta["stand_in"] for r in self._rows.values() if r.meta.get("stand_in")})
        self.stand_in = "; ".join(labels)

    def _add(self, line: str, where: str) -> None:
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise Jz3Error(f"{where}: malformed JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("reply"), str):
            raise Jz3Error(f"{where}: a row needs the text `reply`")
        keys = [key for key in (row.get("prompt_id"), row.get("prompt_hash")) if key]
        if not keys or not all(isinstance(key, str) for key in keys):
            raise Jz3Error(f"{where}: a row needs `prompt_id` or `prompt_hash`")
        meta = row.get("meta", {})
        if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
            raise Jz3Error(f"{where}: `meta` must be an object of texts")
        reply = Reply(text=row["reply"], finish=str(row.get("finish", "stop")), meta=meta)
        self._rows |= dict.fromkeys(keys, reply)

    def answer(self, requests: Sequence[Request], advance: Callable[[int], None]) -> list[Reply]:
        """Look every request up by its prompt's id, then by the hash of its text."""
        advance(len(requests))
        missing = Reply(text="", failure="no_recorded_reply")
        return [
            self._rows.get(r.prompt.id) or self._rows.get(hash_text(r.prompt.text)) or missing
            for r in requests
        ]

    def spending(self) -> Spending:
        """Nothing: the replies lie in a file."""
        return Spending()

    def close(self) -> None:
        """There is nothing to close."""
