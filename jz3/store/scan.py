"""The exact scan: the best documents of a store for every query, shard by shard."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jz3.errors import Jz3Error
from jz3.store.format import CODES, Coding, decode_rows
from jz3.store.reader import Store

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 14
BF16_BLOCK = 1 << 12
IN_PLACE = 1 << 19
"""Rows that are scanned at a time where they lie, and not copied."""
MOST_SHARDS = 256
"""Of a block: each is a mapping, of which a process has some ten thousands."""
SIGN = np.uint64(1 << 63)


def scan(
    store: Store,
    coding: Coding,
    queries: "torch.Tensor",
    k: int,
    *,
    groups: "torch.Tensor | None" = None,
    reduce: str = "mean",
    advance: Callable[[int], None] = lambda n: None,
) -> "tuple[torch.Tensor, np.ndarray]":
    """Find the k documents of a store with the largest inner products, looking at every one.

        score(i, g) = mean or max over the queries q of group g of <decode(codes_i), q>

    Codes are scored as they are, see jz3.ops.score_topk (bf16 in small blocks, in float64); memory doesn't
    depend on the store's size.

    Args:
        store: open.
        coding: of the store's projection.
        queries: [Q, K] float32; on a GPU the scan runs there.
        k: how many documents.
        groups: int [Q], the task of every query, counted from 0 without gaps; by default every query
            is a task of its own.
        reduce: `mean` or `max` over a group.
        advance: called with the number of documents just scanned.

    Returns:
        scores float32 [G, min(k, N)] on the CPU and document ids uint64 [G, min(k, N)], by (score
        descending, id ascending); the same whatever the division into shards.

    Raises:
        ValueError: k, queries or groups are wrong, see jz3.ops.score_topk.
        Jz3Error: the coding is of other rows, or a shard can't be read.
    """
    import torch

    from jz3 import backend
    from jz3.ops.best import merge_topk
    from jz3.ops.score_topk import score_topk

    store.check(coding)
    device = queries.device
    kind, mean, scale, folded = coding.scanned(queries)
    if kind == "bf16":
        # int8 codes of nothing: their checks and the folding of groups are wanted, not their scores.
        score_topk(
            torch.empty(0, store.info.k, dtype=torch.uint8, device=device),
            mean,
            scale,
            "int8",
            queries,
            k,
            groups=groups,
            reduce=reduce,
        )
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    in_place = device.type == "cpu" and backend.choose("score_topk")[0] == "cpu"
    rows = BF16_BLOCK if kind == "bf16" else IN_PLACE if in_place else BLOCK
    for codes, ids in _blocks(store, rows):
        names = torch.from_numpy(ids).to(device)
        if kind == "bf16":
            values = decode_rows(torch.from_numpy(_joined(codes)).to(device), coding)
            found = _topk_values(values, queries, k, names, groups, reduce)
        else:
            pieces = [torch.from_numpy(piece).to(device) for piece in codes]
            found = score_topk(pieces, mean, scale, kind, folded, k, ids=names, groups=groups, reduce=reduce)
        best = [merge_topk([*best, found], k)]
        advance(len(ids))
    return _on_cpu(best, queries, groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStore:
    """A checkpoint's store in `scan_checkpoints`."""

    store: Store
    coding: Coding
    queries: "torch.Tensor"
    """[Q, K] float32: the same Q queries in every checkpoint, as this one sees them."""
    weight: float


def scan_checkpoints(
    checkpoints: Sequence[CheckpointStore],
    k: int,
    *,
    groups: "torch.Tensor | None" = None,
    reduce: str = "mean",
    advance: Callable[[int], None] = lambda n: None,
) -> "tuple[torch.Tensor, np.ndarray]":
    """Find the k documents with the largest weighted sums of the checkpoints' scores, looking at every one.

        score(i, g) = mean or max over the queries q of group g of
                      sum over c of w_c * <decode(codes_ci), q_c>

    For the stores OUT/store-N that `jz3 score --keep-features` writes for several checkpoints.

    Args:
        checkpoints: their stores, with the same documents in the same shards.
        k: how many documents.
        groups, reduce, advance: as for `scan`.

    Returns:
        scores and document ids, as of `scan`.

    Raises:
        ValueError: an argument is wrong, see jz3.ops.score_checkpoints.
        Jz3Error: the stores hold different documents or rows that are no codes (bf16), a coding is of other
            rows, or a shard can't be read.
    """
    import torch

    from jz3.ops.best import merge_topk
    from jz3.ops.score_checkpoints import CheckpointCodes, score_topk_checkpoints

    if not checkpoints:
        raise ValueError("scan_checkpoints: checkpoints must hold at least one, got none")
    first = checkpoints[0].store
    for c in checkpoints:
        c.store.check(c.coding)
    check_checkpoints([c.store for c in checkpoints])
    queries = [c.queries for c in checkpoints]
    forms = [c.coding.scanned(c.queries) for c in checkpoints]
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for blocks in zip(*(_blocks(c.store, BLOCK) for c in checkpoints), strict=True):
        ids = blocks[0][1]
        parts = []
        for c, (codes, names), (kind, mean, scale, query) in zip(checkpoints, blocks, forms, strict=True):
            if not np.array_equal(names, ids):
                raise Jz3Error(differ(first, c.store))
            parts.append(
                CheckpointCodes(
                    codes=torch.from_numpy(_joined(codes)).to(query.device),
                    mean=mean,
                    scale=scale,
                    kind=kind,
                    queries=query,
                    weight=c.weight,
                )
            )
        names = torch.from_numpy(ids).to(queries[0].device)
        found = score_topk_checkpoints(parts, k, ids=names, groups=groups, reduce=reduce)
        best = [merge_topk([*best, found], k)]
        advance(len(ids))
    return _on_cpu(best, queries[0], groups)


def check_checkpoints(stores: Sequence[Store]) -> None:
    """Refuse stores that can't be combined.

    Raises:
        Jz3Error: they hold different documents (perhaps as a shard of one is damaged), or bf16.
    """
    for store in stores:
        if CODES[store.info.bits] == "bf16":
            raise Jz3Error(
                f"{store.folder} holds bf16, which checkpoints can't be combined in; name one, or store codes"
            )
        if [shard.rows for shard in store.shards] != [shard.rows for shard in stores[0].shards]:
            damaged = [text for s in stores for text in s.damaged.values()]
            raise Jz3Error("; ".join(damaged) or differ(stores[0], store))


def differ(one: Store, other: Store) -> str:
    """Say that two checkpoints' stores don't belong together."""
    return (
        f"{one.folder} and {other.folder} hold different documents or hold them in another order; "
        "combine the stores of one finished run"
    )


def _on_cpu(
    best: "list[tuple[torch.Tensor, torch.Tensor]]", queries: "torch.Tensor", groups: "torch.Tensor | None"
) -> "tuple[torch.Tensor, np.ndarray]":
    import torch

    if not best:
        count = len(queries) if groups is None else _count(groups)
        return torch.empty(count, 0, dtype=torch.float32), np.empty((count, 0), np.uint64)
    values, found_ids = best[0]
    return values.cpu(), found_ids.cpu().numpy().view(np.uint64) ^ SIGN


def _count(groups: "torch.Tensor") -> int:
    return int(groups.max()) + 1 if len(groups) else 0


def _blocks(store: Store, rows: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yield about `rows` rows at a time: their codes in pieces, mapped from disk, and their ids, joined."""
    codes: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    for shard in store.shards:
        named, shard_codes = shard.id_and_codes()
        # Ids as int64 in the order that they have as uint64.
        shard_ids = (named ^ SIGN).view(np.int64)
        for start in range(0, shard.rows, rows):
            codes.append(shard_codes[start : start + rows])
            ids.append(shard_ids[start : start + rows])
            if len(codes) == MOST_SHARDS or sum(map(len, ids)) >= rows:
                yield codes, _joined(ids)
                codes, ids = [], []
    if codes:
        yield codes, _joined(ids)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _topk_values(
    values: "torch.Tensor",
    queries: "torch.Tensor",
    k: int,
    ids: "torch.Tensor",
    groups: "torch.Tensor | None",
    reduce: str,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """`score_topk` for rows that are no codes: products in float64, rounded to float32 once."""
    import torch

    from jz3.ops.best import chunk_topk

    scores = (queries.double() @ values.double().T).float()
    if groups is not None:
        count = _count(groups)
        index = groups.long()[:, None].expand_as(scores)
        empty = torch.zeros(count, scores.shape[1], device=scores.device, dtype=torch.float32)
        kind = "amax" if reduce == "max" else "mean"
        scores = empty.scatter_reduce(0, index, scores, kind, include_self=False)
    return chunk_topk(scores, ids, k)
