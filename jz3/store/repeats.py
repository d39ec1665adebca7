"""Which document ids come more than once, in memory that doesn't depend on their number."""

import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from jz3.errors import Jz3Error
from jz3.store.shard import FULL, Shard

RUN = 1 << 16
"""Ids that are sorted together."""
SHOWN = 20
MIX = 0x9E3779B97F4A7C15
UNMIX = np.uint64(pow(MIX, -1, 1 << 64))


def repeated_ids(shards: Sequence[tuple[str, Shard]]) -> tuple[list[tuple[str, str, str]], int]:
    """Find the ids that come more than once.

    An external sort with one division: runs of RUN ids are sorted and written to a temporary file, 8 bytes
    an id; then one range of values after the other is gathered from all runs. Ids are multiplied by an odd
    number first, which makes the ranges equally full whatever the ids look like.

    Args:
        shards: with the names that they are to be called by.

    Returns:
        Up to 20 such ids with the names of the first two places, and how many ids there are.

    Raises:
        Jz3Error: the temporary file doesn't fit on its disk, or a shard can't be read.
    """
    ranges = -(-sum(shard.rows for _, shard in shards) // RUN)
    count = 0
    found: list[np.ndarray] = []
    for keys in _ranges(_runs(shards), ranges):
        twice = _twice(keys)
        count += len(twice)
        missing = SHOWN - sum(map(len, found))
        found.append(twice[:missing])
    shown = np.concatenate([np.empty(0, np.uint64), *found]) * UNMIX
    return _places(shards, np.sort(shown)), count


def _twice(keys: np.ndarray) -> np.ndarray:
    """Return what comes more than once in a sorted array, each once."""
    return np.unique(keys[1:][keys[1:] == keys[:-1]])


def _runs(shards: Sequence[tuple[str, Shard]]) -> Iterator[np.ndarray]:
    """Yield sorted runs of mixed ids, each id at most twice so that no range of theirs is overfull."""
    buffer = np.empty(RUN, np.uint64)
    filled = 0
    for _, shard in shards:
        ids = shard.id
        at = 0
        while at < len(ids):
            taken = min(RUN - filled, len(ids) - at)
            np.multiply(ids[at : at + taken], np.uint64(MIX), out=buffer[filled : filled + taken])
            at, filled = at + taken, filled + taken
            if filled == RUN:
                yield _at_most_twice(buffer)
                filled = 0
    if filled:
        yield _at_most_twice(buffer[:filled])


def _at_most_twice(keys: np.ndarray) -> np.ndarray:
    keys.sort()
    third = np.zeros(len(keys), bool)
    third[2:] = keys[2:] == keys[:-2]
    return keys[~third]


def _ranges(runs: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield the runs' numbers sorted anew: `count` ranges of values in order, each with what all runs have of it."""
    if count < 2:
        yield from runs
        return
    bounds = np.array([(i << 64) // count for i in range(1, count)], np.uint64)
    starts: list[np.ndarray] = []
    """Per run where its ranges begin in the file, and where the last one ends."""
    size = 0
    try:
        with tempfile.TemporaryFile() as file:
            for run in runs:
                edges = np.concatenate([[0], np.searchsorted(run, bounds), [len(run)]])
                starts.append(edges + size)
                size += len(run)
                file.write(run.data)
            for number in range(count):
                pieces = [_read(file, edges[number], edges[number + 1]) for edges in starts]
                keys = np.concatenate(pieces)
                keys.sort()
                yield keys
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Jz3Error(
            f"the ids of the store, 8 bytes a document, don't fit into {tempfile.gettempdir()} ({error.strerror}); "
            "set TMPDIR to a folder with more space"
        ) from error


def _read(file: IO[bytes], start: int, stop: int) -> np.ndarray:
    file.seek(8 * int(start))
    return np.frombuffer(file.read(8 * int(stop - start)), np.uint64)


def _places(shards: Sequence[tuple[str, Shard]], ids: np.ndarray) -> list[tuple[str, str, str]]:
    """Return ids with the names of the first two shards that hold them, once through all shards."""
    names: dict[int, list[str]] = {int(i): [] for i in ids}
    if names:
        for name, shard in shards:
            there = shard.id
            for key in there[np.isin(there, ids)].tolist():
                names[key].append(name)
    return [(f"{key:016x}", places[0], places[1]) for key, places in names.items()]
