"""The best of many scores under the tie rule: score descending, then id ascending."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


MOST_ROWS, MOST_SCORES = 1 << 20, 1 << 28
"""Rows, and scores of rows and queries, that a GPU holds at a time."""


def rows_at_once(queries: int) -> int:
    """Return how many rows a GPU scores at a time: a million for up to 256 queries, fewer for more."""
    return max(256, min(MOST_ROWS, MOST_SCORES // max(queries, 1)) // 256 * 256)


def top_k(values: "torch.Tensor", ids: "torch.Tensor", k: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the k best of every row by (value descending, id ascending), in that order.

    Args:
        values: [G, n].
        ids: int64 [G, n].
        k: how many; fewer are returned if n < k.

    Returns:
        values [G, min(k, n)], ids [G, min(k, n)].
    """
    order = ids.argsort(dim=1, stable=True)
    values, ids = values.gather(1, order), ids.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), ids.gather(1, order)


def merge_topk(
    parts: "Sequence[tuple[torch.Tensor, torch.Tensor]]", k: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Merge the results of `score_topk` over several shards into that over all of them.

    Args:
        parts: (values [G, k_j], ids [G, k_j]) of every shard.
        k: how many to keep.

    Returns:
        values and ids [G, min(k, sum of k_j)].

    Raises:
        ValueError: there are no parts.
    """
    import torch

    if not parts:
        raise ValueError("merge_topk: parts must hold at least one result, got none")
    return top_k(torch.cat([v for v, _ in parts], 1), torch.cat([i for _, i in parts], 1), k)


def chunk_topk(values: "torch.Tensor", ids: "torch.Tensor", k: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """`top_k` for many columns: only those not below the k-th value are sorted.

    Args:
        values: [G, n].
        ids: int64 [n].
        k: how many.

    Returns:
        values and ids [G, min(k, n)].
    """
    import torch

    if values.shape[1] <= 4 * k or not len(values):
        return top_k(values, ids.expand(len(values), -1), k)
    bound = values.topk(k, dim=1).values[:, -1:]
    best = []
    for row, above in zip(values, ~(values < bound), strict=True):  # a NaN is no smaller
        best.append(top_k(row[above][None], ids[above][None], k))
    return torch.cat([v for v, _ in best]), torch.cat([i for _, i in best])


def best_of_groups(scores: "torch.Tensor", groups: "torch.Tensor", count: int) -> "torch.Tensor":
    """Return the largest score of every group of queries: [Q, n] to [count, n]."""
    if count == len(scores):
        return scores
    grouped = scores.new_full((count, scores.shape[1]), float("-inf"))
    return grouped.scatter_reduce(0, groups[:, None].expand_as(scores), scores, "amax")
