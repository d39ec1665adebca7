"""How the CUDA kernels of `segment_project` share documents out: pieces of documents in the slots of tiles.

A tile has 128 or 256 slots, each a position of the packed batch or empty. A document is cut into pieces of at most
`limit` positions from its own beginning, a piece begins at a multiple of 16 slots, and short pieces share a
tile, so that a document's result does not depend on what it is packed with. The tiles of one piece form a group,
which is one block's work; a document of one piece is written at once, of several through partial blocks.
"""

from dataclasses import dataclass

import numpy as np

ALIGN = 16
"""Slots that a tensor-core instruction sums over."""

SHARE = 0.1
"""Partial blocks may cost at most this share of the bytes of a and g."""

LONGEST = 2048
"""The most positions of a piece, so that long documents still keep many blocks busy."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The tables of csrc/cuda/launch.h."""

    slots: np.ndarray
    """int32 [tiles * slots of a tile]: the position in every slot, -1 for none."""
    pieces: np.ndarray
    """int32 [pieces, 4]: first slot within the tile, end, document or ~partial block, whether its sums end here."""
    tiles: np.ndarray
    """int32 [tiles + 1]: each tile's first piece."""
    groups: np.ndarray
    """int32 [groups + 1]: each group's first tile."""
    partials: np.ndarray
    """int64 [documents + 1]: each one's first partial block, for documents that aren't written at once."""
    documents: np.ndarray
    """int64: those documents, with several pieces or none."""


def piece_limit(width: int, outputs: int, columns: int, tile: int) -> int:
    """Return how many positions a piece may have: enough that partial blocks cost little.

    A piece costs 2 n (width + columns) bytes of g and a, and its partial block 8 outputs * columns, written and
    read. The limit depends on nothing else, so that results don't depend on the batch.
    """
    enough = 8 * outputs * columns / (2 * SHARE * (width + columns))
    limit = tile
    while limit < enough and limit < LONGEST:
        limit *= 2
    return limit


def plan_segments(bounds: np.ndarray, limit: int, tile: int) -> Plan:
    """Lay documents out in tiles.

    Args:
        bounds: int64 [S + 1]: document i has the positions bounds[i] .. bounds[i + 1].
        limit: the most positions of a piece, a multiple of `tile`.
        tile: slots of a tile.

    Returns:
        The tables; without any piece where every document is empty.
    """
    begins: list[int] = []  # of runs of positions that fill consecutive slots
    lengths: list[int] = []
    starts: list[int] = []
    pieces: list[tuple[int, int, int, int]] = []
    tiles, groups = [0], [0]
    documents, partials = [], [0]
    used = tile  # slots of the last tile
    for document, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        count = -(-(end - begin) // limit)
        first = partials[-1]
        if count != 1:
            documents.append(document)
            partials.append(first + count)
        for piece in range(count):
            at = begin + piece * limit
            length = min(limit, end - at)
            target = document if count == 1 else ~(first + piece)
            if used + length > tile:  # a new tile, and so a new group
                groups.append(groups[-1])
                used = 0
                opened = True
            else:
                opened = False
            begins.append(at)
            lengths.append(length)
            starts.append((groups[-1] - (not opened)) * tile + used)
            for offset in range(0, length, tile):
                if opened or offset:
                    tiles.append(tiles[-1])
                    groups[-1] += 1
                last = offset + tile >= length
                stop = used + -(-min(length - offset, tile) // ALIGN) * ALIGN
                pieces.append((used, stop, target, int(last)))
                tiles[-1] += 1
                used = stop if last else 0
    slots = np.full(groups[-1] * tile, -1, np.int32)
    if begins:
        length = np.array(lengths)
        within = np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
        slots[np.repeat(starts, length) + within] = np.repeat(begins, length) + within
    return Plan(
        slots,
        np.array(pieces, np.int32).reshape(-1, 4),
        np.array(tiles, np.int32),
        np.array(groups, np.int32),
        np.array(partials, np.int64),
        np.array(documents, np.int64),
    )
