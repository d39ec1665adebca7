"""The teacher that repeats recorded replies."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jz3.distillation.teachers import Reply, Request, Spending
from jz3.engines.text import whole_characters
from jz3.errors import Jz3Error
from jz3.files import hash_text


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
        except (ValueError, RecursionError) as error:
            raise Jz3Error(f"{where}: malformed JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("reply"), str):
            raise Jz3Error(f"{where}: a row needs the text `reply`")
        keys = [key for key in (row.get("prompt_id"), row.get("prompt_hash")) if key]
        if not keys or not all(isinstance(key, str) for key in keys):
            raise Jz3Error(f"{where}: a row needs `prompt_id` or `prompt_hash`")
        meta = row.get("meta", {})
        if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
            raise Jz3Error(f"{where}: `meta` must be an object of texts")
        reply = Reply(text=whole_characters(row["reply"]), finish=str(row.get("finish", "stop")), meta=meta)
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
