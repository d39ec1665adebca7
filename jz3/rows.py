"""Rows of JSON-lines files that are read when they are asked for: eight bytes of memory each, not a text."""

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar, overload

from jz3.errors import Jz3Error

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

BLOCK = 1 << 22
"""Bytes that are searched for line ends at a time."""


class Rows(Sequence[T], Generic[T]):
    """The rows of files that jz3 wrote, one after the other.

    Args:
        paths: the files; they must not change as long as this is used.
        decode: makes what is given out of a line's JSON object; a ValueError of it names a damaged row.

    Raises:
        Jz3Error: a file is missing; when a row is read also: it is damaged.
    """

    def __init__(self, paths: Sequence[Path], decode: Callable[[dict[str, Any]], T]) -> None:
        import numpy as np

        self._paths, self._decode = tuple(paths), decode
        self._begins = [0]  # of the files, in all their bytes
        starts = []
        for path in self._paths:
            if not path.is_file():
                raise Jz3Error(f"{path} is missing; run the stage that writes it")
            starts.append(_line_starts(path) + self._begins[-1])
            self._begins.append(self._begins[-1] + path.stat().st_size)
        self._starts: np.ndarray = np.concatenate(starts) if starts else np.empty(0, np.int64)

    def take(self, picked: "np.ndarray") -> "Rows[T]":
        """Return some of the rows: those with these numbers, or where a mask is true."""
        some: Rows[T] = object.__new__(Rows)
        some._paths, some._decode, some._begins = self._paths, self._decode, self._begins
        some._starts = self._starts[picked]
        return some

    def path(self, index: int) -> Path:
        """Return the file that holds a row."""
        return self._paths[bisect.bisect_right(self._begins, int(self._starts[index])) - 1]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return list(self._read(self._starts[index]))
        return next(self._read(self._starts[[index]]))

    def __iter__(self) -> Iterator[T]:
        return self._read(self._starts)

    def _read(self, starts: "np.ndarray") -> Iterator[T]:
        with ExitStack() as stack:
            number, handle = -1, None
            for start in map(int, starts):
                if handle is None or not self._begins[number] <= start < self._begins[number + 1]:
                    stack.close()
                    number = bisect.bisect_right(self._begins, start) - 1
                    handle = stack.enter_context(open(self._paths[number], "rb"))
                yield self._decoded(handle, start - self._begins[number], self._paths[number])

    def _decoded(self, handle: BinaryIO, start: int, path: Path) -> T:
        handle.seek(start)
        try:
            return self._decode(json.loads(handle.readline()))
        except ValueError as error:
            handle.seek(0)
            line = handle.read(start).count(b"\n") + 1
            raise Jz3Error(
                f"{path}:{line} is damaged ({error}); run the stage {path.parent.name!r} again"
            ) from error


def _line_starts(path: Path) -> "np.ndarray":
    import numpy as np

    size, starts = path.stat().st_size, [np.zeros(1, np.int64)]
    with open(path, "rb") as handle:
        begin = 0
        while block := handle.read(BLOCK):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (begin + 1))
            begin += len(block)
    every = np.concatenate(starts)
    return every[every < size]
