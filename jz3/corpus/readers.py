"""Tolerant streaming readers: what can't be used comes out as a Reject, and the rest goes on."""

import contextlib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from jz3.corpus.config import SourceConfig
from jz3.errors import Jz3Error
from jz3.files import canonical_json, hash_text, raise_trouble
from jz3.records import Reject

STAGE = "corpus"
MAX_REJECT_CHARACTERS = 4000
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceText:
    """A text as its source holds it, before cutting."""

    text: str
    source: str
    where: str
    """File and line, or whatever names the record in its source."""
    generated: bool = False
    meta: dict[str, str] = field(default_factory=dict)
    nested: tuple[str, ...] = ()
    """Kept fields that are lists or objects, of which `meta` has the JSON."""


def reject(reason: str, where: str, detail: str = "", text: str = "") -> Reject:
    """Build the row of a refused record; `text` is shortened, it and `detail` are made writable."""
    text, detail = (
        part.encode("utf-8", "replace").decode("utf-8") for part in (text[:MAX_REJECT_CHARACTERS], detail)
    )
    return Reject(
        id=hash_text(where + "\n" + text), stage=STAGE, reason=reason, detail=detail, where=where, text=text
    )


def find_files(source: SourceConfig) -> list[Path]:
    """Expand the source's globs to files, in order and once each, also those with several names.

    Raises:
        Jz3Error: a path or glob matches no file, or one whose name is no UTF-8.
    """
    found: dict[str, None] = {}
    for pattern in source.paths:
        expanded = os.path.expanduser(pattern)
        matches = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        files = [match for match in matches if not os.path.isdir(match)]
        if not files:
            hint = f"; it is a folder, give a glob such as {pattern.rstrip('/')}/*" if matches else ""
            raise Jz3Error(f"source {source.name!r}: {pattern!r} matches no file{hint}")
        found.update(dict.fromkeys(files))
    once: dict[str, str] = {}
    for name in sorted(found):
        printable = os.fsencode(name).decode("utf-8", "backslashreplace")
        if printable != name:
            # Rows name their file, and neither JSON nor the terminal can hold such a name.
            raise Jz3Error(f"source {source.name!r}: the name of {printable} is no UTF-8; rename it")
        once.setdefault(os.path.realpath(name), name)
    return [Path(name) for name in once.values()]


class LineReader:
    """Reads a JSON-lines file, plain, `.gz` or `.zst`, from any line on, one line in memory at a time.

    The file stays open, so that reading on behind what was read last goes through nothing twice: a
    compressed file can't be entered in the middle.
    """

    def __init__(self, path: Path, source: SourceConfig) -> None:
        """Open nothing yet.

        Args:
            path: the file.
            source: what to take from it.
        """
        self.path = path
        self._source = source
        self._stream: BinaryIO | None = None
        self._number = 0
        """Lines read so far."""

    def close(self) -> None:
        """Close the file; a later `read` opens it again."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def read(
        self, skip: int = 0, lines: int | None = None, mark: tuple[int, int] = (0, 0)
    ) -> Iterator[SourceText | Reject]:
        """Read records.

        Args:
            skip: lines before the first.
            lines: read at most so many; blank ones count.
            mark: lines (at most `skip`) and bytes before a place from which a plain file can be read;
                not used for a compressed one.

        Raises:
            OSError: the disk or its server is in trouble.
        """
        # Where the file can't even be opened.
        number = skip
        try:
            stream = self._enter(skip, mark)
            while (lines is None or self._number < skip + lines) and (
                line := stream.readline(self._source.max_line_bytes + 1)
            ):
                self._number = number = self._number + 1
                where = f"{self.path}:{number}"
                if len(line) > self._source.max_line_bytes and not line.endswith(b"\n"):
                    size = len(line) + skip_line(stream)
                    detail = f"{size} bytes, max_line_bytes is {self._source.max_line_bytes}"
                    yield reject("line_too_long", where, detail, line[:200].decode("utf-8", "replace"))
                elif line.strip():
                    yield _parse_line(line, where, self._source, first=number == 1)
        except (OSError, EOFError, zlib.error) as error:
            self.close()
            raise_trouble(error, self.path)
            compressed = self.path.suffix in COMPRESSED
            reason = "damaged_file" if number or compressed else "unreadable_file"
            yield reject(reason, f"{self.path}:{number + 1}", f"{type(error).__name__}: {error}")
            return
        if not number:
            yield reject("empty_file", str(self.path))

    def _enter(self, skip: int, mark: tuple[int, int]) -> BinaryIO:
        """Return the stream, `skip` lines behind its start."""
        plain = self.path.suffix not in COMPRESSED
        if self._stream is None or self._number > skip:
            self.close()
            self._stream, self._number = open_lines(self.path), 0
        if plain and self._number < mark[0]:
            self._stream.seek(mark[1])
            self._number = mark[0]
        while self._number < skip and skip_line(self._stream):
            self._number += 1
        return self._stream


def read_jsonl_file(path: Path, source: SourceConfig) -> Iterator[SourceText | Reject]:
    """Read a whole JSON-lines file, see LineReader."""
    with contextlib.closing(LineReader(path, source)) as reader:
        yield from reader.read()


def open_lines(path: Path) -> BinaryIO:
    """Open a plain, `.gz` or `.zst` file for reading lines."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 16))
    return open(path, "rb")


def skip_line(stream: BinaryIO) -> int:
    """Read to the end of the line and return how many bytes that was."""
    size = 0
    while part := stream.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _parse_line(line: bytes, where: str, source: SourceConfig, first: bool) -> SourceText | Reject:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return reject("invalid_utf8", where, error.reason, line.decode("utf-8", "replace"))
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return reject("malformed_json", where, str(error), text)
    if not isinstance(row, dict):
        return reject("not_an_object", where, f"a line must be a JSON object, got {type(row).__name__}", text)
    return from_row(row, where, source)


def from_row(row: dict[str, Any], where: str, source: SourceConfig) -> SourceText | Reject:
    """Take the text and the kept fields out of a record, or say why it can't be used."""
    parts = []
    for name in source.text_field.split("+"):
        found, value = _field(row, name.strip())
        if not found:
            known = ", ".join(map(str, row)) or "none"
            return reject("missing_field", where, f"no field {name.strip()!r}; fields: {known:.200}")
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                return reject("invalid_utf8", where, error.reason, value.decode("utf-8", "replace"))
        if not isinstance(value, str):
            detail = f"field {name.strip()!r} must be a text, got {type(value).__name__}"
            return reject("wrong_type", where, detail, str(value)[:200])
        parts.append(value)
    meta = {"topic": source.topic} if source.topic else {}
    nested: list[str] = []
    if source.match_field and not _field(row, source.match_field)[0]:
        known = ", ".join(map(str, row))
        return reject("missing_field", where, f"no field {source.match_field!r}; fields: {known:.200}")
    for name in source.kept_fields():
        found, value = _field(row, name)
        if found and value is not None:
            try:
                meta[name] = value if isinstance(value, str) else canonical_json(_plain(value))
            except RecursionError:  # it could just be read
                return reject("malformed_json", where, f"field {name!r} is nested too deeply", parts[0])
            if isinstance(value, list | dict):
                nested.append(name)
    found_text = SourceText(
        text="\n\n".join(parts),
        source=source.name,
        where=where,
        generated=source.generated,
        meta=meta,
        nested=tuple(nested),
    )
    return check_text(found_text, source.max_line_bytes)


def check_text(text: SourceText, max_bytes: int) -> SourceText | Reject:
    """Refuse a text that is empty, too large, holds NUL or is no valid Unicode."""
    if not text.text.strip():
        return reject("empty_text", text.where)
    if "\x00" in text.text:
        return reject("nul_bytes", text.where, "the text holds NUL characters", text.text)
    try:
        size = len(text.text.encode())
        "".join(text.meta.values()).encode()
    except UnicodeEncodeError as error:
        return reject("invalid_unicode", text.where, error.reason, text.text)
    if size > max_bytes:
        detail = f"{size} bytes, max_line_bytes is {max_bytes}"
        return reject("line_too_long", text.where, detail, text.text[:200])
    return text


def _field(row: dict[str, Any], name: str) -> tuple[bool, Any]:
    if name in row:
        return True, row[name]
    value: Any = row
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value


def _plain(value: Any) -> Any:
    """`value` with everything that JSON lacks (dates, bytes, decimals) as text."""
    return json.loads(json.dumps(value, default=str))


def open_huggingface(source: SourceConfig) -> tuple[Any, str]:
    """Open a Hugging Face data set, streaming unless it lies on disk in Arrow format.

    Returns:
        The data set (an iterable of dictionaries with `skip`), and a fingerprint of its content.

    Raises:
        Jz3Error: it, its configuration or its split can't be had; the message says why.
    """
    try:
        import datasets
    except ImportError as error:
        raise Jz3Error(f"source {source.name!r} needs the package datasets: pip install datasets") from error
    folder = Path(source.dataset).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data: Any = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                if source.split not in data:
                    raise ValueError(f"no split {source.split!r}; splits: {', '.join(map(str, data))}")
                data = data[source.split]
            return data, data._fingerprint
        if not folder.is_dir() and source.dataset.startswith((".", "/", "~")):
            raise ValueError("there is no such folder")
        where = str(folder) if folder.is_dir() else source.dataset
        data = datasets.load_dataset(
            where, source.config or None, split=source.split, revision=source.revision or None, streaming=True
        )
        return data, canonical_json([source.dataset, source.config, source.split, source.revision])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise Jz3Error(
            f"source {source.name!r}: data set {source.dataset!r} can't be read: {first_line(error)}"
        ) from error


def read_huggingface(data: Any, source: SourceConfig, start: int) -> Iterator[SourceText | Reject]:
    """Read an opened data set from record `start` on.

    Raises:
        Jz3Error: reading breaks off, e.g. the connection is lost; a rerun goes on from there.
    """
    rows = iter(data.skip(start) if start else data)
    number = start
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # a hub's readers raise whatever their transport does
            raise Jz3Error(
                f"source {source.name!r}: reading {source.dataset!r} broke off after record {number} "
                f"({type(error).__name__}: {first_line(error)}); run again to go on"
            ) from error
        if row is None:
            break
        number += 1
        yield from_row(row, f"{source.dataset}:{source.split}:{number}", source)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
