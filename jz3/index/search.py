"""Search an index that lies in parts on disk."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import read_json
from jz3.ops.checks import check_int

RECALL = 100
"""Recall is measured among so many best documents."""
MOST = 1 << 31
"""More than anyone asks for."""


class SearchIndex:
    """The parts of an index; those of IVF indexes are mapped, so that opening them reads little."""

    def __init__(self, parts: Sequence[Path], probes: int) -> None:
        """Open the parts.

        Args:
            parts: their files.
            probes: cells visited per query by IVF indexes.

        Raises:
            Jz3Error: a part is damaged or missing, or parts that can't be mapped are larger than the memory.
        """
        faiss = import_faiss()
        self.parts = []
        size = sum(path.stat().st_size for path in parts if path.is_file())
        for path in parts:
            try:
                part = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            except RuntimeError as error:
                raise Jz3Error(
                    f"{path} is damaged or missing; delete it and run `jz3 index` again"
                ) from error
            ivf = faiss.try_extract_index_ivf(part)
            if ivf is not None:
                ivf.nprobe = probes
                # One query is shared out over the cells that it visits.
                ivf.parallel_mode = 1
            elif size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
                raise Jz3Error(
                    f"the index {path.parent} is read whole, {size / 1e9:,.1f} GB, and this machine has "
                    f"{memory / 1e9:,.1f} GB of memory; give --exact, or delete it and build one that stays on disk, "
                    "such as IVF4096,SQ8"
                )
            self.parts.append(part)

    @classmethod
    def open(cls, folder: Path, identity: str, probes: int | None = None) -> "SearchIndex":
        """Open a built index.

        Args:
            folder: of the index.
            identity: of the store that it has to be of, see StoreInfo.identity.
            probes: see IndexConfig; None: as many as it was built for.

        Raises:
            Jz3Error: it isn't built, or is of another store.
        """
        table = read_json(folder / "index.json")
        if table["store"] != identity:
            raise Jz3Error(
                f"{folder} is an index of the store {table['store']}, not of {identity}; delete it and build it again"
            )
        return cls([folder / name for name in table["parts"]], probes or table["probes"])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(int(part.ntotal) for part in self.parts)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the documents with the largest inner products, approximately unless the index is flat.

        Args:
            queries: [Q, K] float32.
            k: how many.

        Returns:
            scores float32 [Q, m] and document ids uint64 [Q, m], m <= k, by (score descending, id
            ascending). Where the visited cells hold fewer documents, scores are -inf at the end.

        Raises:
            TypeError: `k` is no integer.
            ValueError: `k` is below 1.
        """
        k = check_int("search", "k", k, 1, MOST)
        queries = np.ascontiguousarray(queries, np.float32)
        found = [part.search(queries, min(k, int(part.ntotal))) for part in self.parts if part.ntotal]
        if not found:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.uint64)
        pairs = [(np.where(i == -1, -np.inf, s).astype(np.float32), i.view(np.uint64)) for s, i in found]
        return best_of(pairs, k)


def best_of(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Join what several searches found: scores [Q, m] and ids [Q, m], by (score descending, id ascending)."""
    scores = np.concatenate([s for s, _ in found], 1)
    names = np.concatenate([i for _, i in found], 1)
    order = np.stack([np.lexsort((n, -s))[:k] for n, s in zip(names, scores, strict=True)])
    return np.take_along_axis(scores, order, 1), np.take_along_axis(names, order, 1)


def signed(ids: np.ndarray) -> np.ndarray:
    """View document ids (uint64) as FAISS's int64."""
    return np.ascontiguousarray(ids).view(np.int64)


def import_faiss() -> Any:
    """Import FAISS.

    Raises:
        Jz3Error: it isn't installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise Jz3Error("FAISS is not installed; pip install 'jz3[cpu]' (or 'jz3[gpu]')") from error
    return faiss
