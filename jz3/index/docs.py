"""Texts of a corpus by id, looked up in its file instead of held in memory."""

import json
from array import array
from pathlib import Path

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import atomic_path, read_json, where_writable, write_json
from jz3.records import Doc


class DocFile:
    """A corpus file (JSON lines of Doc) with a table of where each document begins."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Map the table, making it first if it is missing or of another file; unwritable, it stays in memory.

        Args:
            path: docs.jsonl.
            folder: where the table lies: docs-ids.npy, docs-offsets.npy and docs-table.json.

        Raises:
            Jz3Error: a line of the file is no document.
        """
        self.path = path
        stat = path.stat()
        wanted = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        note = folder / "docs-table.json"
        if not note.is_file() or read_json(note) != wanted:
            self._ids, self._offsets = _table(path)
            with where_writable():
                for name, values in (("ids", self._ids), ("offsets", self._offsets)):
                    with atomic_path(folder / f"docs-{name}.npy") as part, open(part, "wb") as handle:
                        np.save(handle, values)
                write_json(note, wanted)
            return
        self._ids = np.load(folder / "docs-ids.npy", mmap_mode="r")
        self._offsets = np.load(folder / "docs-offsets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, key: int | str) -> Doc:
        """Return the document with an id (64 bits, or its 16 hexadecimal digits).

        Raises:
            Jz3Error: there is none, or its line is damaged.
        """
        number = int(key, 16) if isinstance(key, str) else int(key)
        row = int(np.searchsorted(self._ids, np.uint64(number)))
        if row == len(self._ids) or int(self._ids[row]) != number:
            raise Jz3Error(
                f"{self.path} has no document {number:016x}; it is not the corpus of these features"
            )
        with open(self.path, "rb") as handle:
            handle.seek(int(self._offsets[row]))
            line = handle.readline()
        try:
            return Doc.from_json(json.loads(line))
        except ValueError as error:
            raise Jz3Error(f"{self.path} is damaged at document {number:016x} ({error})") from error


def _table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = array("Q"), array("q")
    offset = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                ids.append(int(json.loads(line)["id"], 16))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise Jz3Error(
                    f"{path}:{number} is no document ({error}); run the corpus stage again"
                ) from error
            offsets.append(offset)
            offset += len(line)
    keys = np.frombuffer(ids, np.uint64)
    order = np.argsort(keys, kind="stable")
    return keys[order], np.frombuffer(offsets, np.int64)[order]
