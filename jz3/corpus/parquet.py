"""The tolerant streaming reader of Parquet files."""

import bisect
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jz3.corpus.config import SourceConfig
from jz3.corpus.readers import SourceText, first_line, from_row, reject
from jz3.files import raise_trouble
from jz3.records import Reject

_UNREADABLE = (ValueError, OverflowError, LookupError)
"""What Arrow raises for a value that Python can't hold: bad UTF-8, a date beyond year 9999, an unknown time zone."""


class ParquetReader:
    """Reads a Parquet file from any row on, batch by batch, only the columns that are needed.

    The file stays open, so that reading on behind what was read last decodes no row twice; elsewhere a
    row group can only be read from its beginning.
    """

    def __init__(self, path: Path, source: SourceConfig) -> None:
        """Open nothing yet.

        Args:
            path: the file.
            source: what to take from it.
        """
        self.path = path
        self._source = source
        self._file: Any = None
        self._starts: list[int] = []
        """Row at which each group starts, and the number of rows."""
        self._columns: list[str] = []
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        """What is left of the batch that was read last."""
        self._number = 0
        """Rows read so far."""

    def close(self) -> None:
        """Close the file; a later `read` opens it again."""
        if self._file is not None:
            self._file.close()
        self._file, self._batches, self._batch, self._number = None, iter(()), None, 0

    def read(self, skip: int = 0, rows: int | None = None) -> Iterator[SourceText | Reject]:
        """Read records.

        Args:
            skip: rows before the first; whole row groups of them are not read.
            rows: read at most so many.

        Raises:
            OSError: the disk or its server is in trouble.
        """
        import pyarrow

        try:
            if not self.path.stat().st_size:
                yield reject("empty_file", str(self.path))
                return
            if refused := self._open():
                yield refused
                return
            total = self._starts[-1]
            stop = total if rows is None else min(skip + rows, total)
            if skip < stop:
                self._enter(skip)
            while self._number < stop:
                batch, wanted = self._next(), stop - self._number
                first = self._number + 1
                # Before anything is yielded, as whoever asked may not come back for the rest.
                self._batch = batch[wanted:]
                self._number += min(len(batch), wanted)
                for number, row in enumerate(_batch_rows(batch[:wanted]), first):
                    where = f"{self.path}:{number}"
                    if isinstance(row, str):
                        yield reject("unreadable_value", where, row)
                    else:
                        yield from_row(row, where, self._source)
            if not total:
                yield reject("empty_file", str(self.path), "no rows")
        except (pyarrow.ArrowException, OSError) as error:
            where = f"{self.path}:{self._number + 1}"
            self.close()
            raise_trouble(error, self.path)
            yield reject("damaged_file", where, f"{type(error).__name__}: {first_line(error)}")

    def _open(self) -> Reject | None:
        """Open the file unless it is; say why its records can't be used."""
        import pyarrow.parquet

        if self._file is not None:
            return None
        file = pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 20)
        source, known = self._source, file.schema_arrow.names
        wanted = [name.strip() for name in source.text_field.split("+")]
        lacking = [name for name in wanted if name not in known and name.partition(".")[0] not in known]
        if lacking:
            file.close()
            detail = f"no column {lacking[0]!r}; columns: {', '.join(known):.200}"
            return reject("missing_field", str(self.path), detail)
        columns = [c for c in (*wanted, *source.kept_fields()) if c.partition(".")[0] in known or c in known]
        self._columns = list(dict.fromkeys(columns))
        sizes = (file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._file, self._batches = file, self._read_groups(0)
        return None

    def _read_groups(self, first: int) -> Iterator[Any]:
        for group in range(first, len(self._starts) - 1):
            yield from self._file.iter_batches(64, [group], self._columns)

    def _enter(self, skip: int) -> None:
        """Stand `skip` rows behind the start."""
        group = bisect.bisect_right(self._starts, skip) - 1
        if self._number > skip or self._number < self._starts[group]:
            self._batches, self._batch, self._number = self._read_groups(group), None, self._starts[group]
        while self._number < skip:
            left = self._next()
            passed = min(len(left), skip - self._number)
            self._batch = left[passed:]
            self._number += passed

    def _next(self) -> Any:
        """Return what is left of the batch, or the next one."""
        while self._batch is None or not len(self._batch):
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise OSError("the file holds fewer rows than its footer says")
        return self._batch


def read_parquet_file(path: Path, source: SourceConfig) -> Iterator[SourceText | Reject]:
    """Read a whole Parquet file, see ParquetReader."""
    with contextlib.closing(ParquetReader(path, source)) as reader:
        yield from reader.read()


def _batch_rows(batch: Any) -> Iterable[dict[str, Any] | str]:
    """Rows of an Arrow batch, each a dictionary or why it can't be read; text that is no UTF-8 comes as bytes."""
    try:
        return batch.to_pylist()
    except _UNREADABLE:
        return [_row(batch, i) for i in range(len(batch))]


def _row(batch: Any, number: int) -> dict[str, Any] | str:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = _cell(batch.column(name)[number])
        except _UNREADABLE as error:
            return f"column {name!r}: {type(error).__name__}: {first_line(error)}"
    return row


def _cell(scalar: Any) -> Any:
    import pyarrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pyarrow.BinaryScalar):
            return scalar.as_buffer().to_pybytes()
        raise
