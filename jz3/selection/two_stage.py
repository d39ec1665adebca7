"""A set from a store that doesn't fit into memory: the exact scan keeps candidates, the set is chosen among them."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from jz3.errors import Jz3Error
from jz3.selection import sets
from jz3.selection.config import SETS
from jz3.store import Coding, Store, decode_rows, scan

if TYPE_CHECKING:
    import torch

CHOOSERS = {name: getattr(sets, name) for name in SETS}


def choose_set(
    store: Store,
    coding: Coding,
    queries: "torch.Tensor",
    k: int,
    chooser: str = "matching",
    candidates: int = 20_000,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Choose k documents of a store that are worth most together.

    Memory: candidates x K float32, however large the store is.

    Args:
        store: open.
        coding: of the store's projection.
        queries: [Q, K] float32, of one target; with several, weigh them so that the mean over the rows is
            the mean over the targets.
        k: how many documents.
        chooser: one of SETS, see jz3.selection.sets.
        candidates: documents of highest mean inner product with the queries, among which it chooses.
        advance: called with the number of documents just scanned.

    Returns:
        Document ids uint64 [min(k, candidates, N)], in the order of choice.

    Raises:
        ValueError: the chooser is unknown, or an argument is wrong, see jz3.store.scan.
        Jz3Error: the coding is of other rows, or a shard can't be read.
    """
    import torch

    if chooser not in CHOOSERS:
        raise ValueError(f"chooser must be one of {', '.join(CHOOSERS)}, got {chooser!r}")
    if candidates < k:
        raise ValueError(f"candidates must be at least k ({k}), got {candidates}")
    groups = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    ids = scan(store, coding, queries, candidates, groups=groups, advance=advance)[1][0]
    features = gather(store, coding, ids.tolist())
    order = CHOOSERS[chooser](features, queries.cpu().numpy())
    return ids[list(islice(order, k))]


def gather(store: Store, coding: Coding, ids: Sequence[int]) -> np.ndarray:
    """Decode the features of some documents; the other rows aren't touched.

    Args:
        store: open.
        coding: of the store's projection.
        ids: documents, each once.

    Returns:
        [len(ids), K] float32, in the order of `ids`.

    Raises:
        Jz3Error: the coding is of other rows, or the store lacks a document.
    """
    import torch

    store.check(coding)
    wanted = np.array(ids, np.uint64)
    order = np.argsort(wanted)
    ranked = wanted[order]
    features = np.zeros((len(wanted), store.info.k), np.float32)
    there = np.zeros(len(wanted), bool)
    for shard in store.shards if len(wanted) else ():
        place = np.minimum(np.searchsorted(ranked, shard.id), len(ranked) - 1)
        rows = np.flatnonzero(ranked[place] == shard.id)
        if len(rows):
            target = order[place[rows]]
            features[target] = decode_rows(torch.from_numpy(shard.codes[rows]), coding).numpy()
            there[target] = True
    if not there.all():
        raise Jz3Error(
            f"{store.folder} lacks {int((~there).sum())} of {len(wanted)} candidates, e.g. "
            f"{int(wanted[~there].min()):016x}; run the features and the influence stage again"
        )
    return features
