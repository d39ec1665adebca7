"""The queries of `score_topk`, checked and folded into exact integers.

See jz3.ops.score_topk for the formula.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jz3.ops.checks import check_int, check_tensors
from jz3.ops.encode import check_row_bytes, check_scale, codebook

if TYPE_CHECKING:
    import torch

PLANES = 2
"""int8 digits of a query's coordinate, in base 128."""
MAX_DIM = 1 << 20
CACHED = 1 << 15
"""Coordinates that are folded at a time."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Queries as exact integers: sum over p of planes[p] * 128^(P - 1 - p), times `step`."""

    planes: "torch.Tensor"
    """int8 [P, Q, K], the most significant first."""
    step: "torch.Tensor"
    """float64 [Q], the codebook's unit included."""
    bias: "torch.Tensor"
    """float64 [Q]: <mean, psi_q>."""


def fold_queries(queries: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", unit: float) -> Digits:
    """Fold the codes' means and scales into the queries and put these on a grid of 7 PLANES + 1 bits.

    By numpy, in one thread and with the same bits wherever the queries are: after each of its ops on a CPU, torch's
    other threads spin for milliseconds, on the processors that the scan needs then.
    """
    import torch

    given, means, scales = (x.detach().cpu().numpy() for x in (queries, mean, scale))
    count, dim = given.shape
    planes = np.empty((PLANES, count, dim), np.int8)
    step, bias = np.empty(count), np.empty(count)
    block = max(1, CACHED // max(dim, 1))
    with np.errstate(invalid="ignore"):  # what isn't finite is told by `_check_numbers`
        for begin in range(0, count, block):
            some = slice(begin, begin + block)
            exact = given[some].astype(np.float64)
            bias[some] = (exact * means).sum(1)
            exact *= scales
            largest = np.abs(exact).max(1, initial=0)
            step[some] = np.where(largest == 0, 1, largest / (127 * 128 ** (PLANES - 1)))
            exact /= step[some, None]
            whole = np.rint(exact, out=exact).astype(np.int32)
            for plane in range(PLANES - 1, 0, -1):
                above = (whole + 64) >> 7
                planes[plane, some] = whole - (above << 7)
                whole = above
            planes[0, some] = whole
    return Digits(*(torch.from_numpy(x).to(queries.device) for x in (planes, step * unit, bias)))


@dataclass(frozen=True, slots=True)
class Folded:
    """Queries that are ready to score."""

    digits: Digits
    groups: "torch.Tensor"
    """int64 [Q]: every query's task."""
    count: int
    """Tasks."""


def check_and_fold(
    op: str,
    codes: "torch.Tensor",
    mean: "torch.Tensor",
    scale: "torch.Tensor",
    kind: str,
    queries: "torch.Tensor",
    row_scale: "torch.Tensor | None",
    ids: "torch.Tensor | None",
    groups: "torch.Tensor | None",
    reduce: str,
) -> Folded:
    """Check the tensors of `score_topk` and fold tasks whose mean is wanted into one query each."""
    import torch

    specs = {
        "codes": (codes, "N B", "uint8"),
        "mean": (mean, "K", "float32"),
        "scale": (scale, "K", "float32"),
        "queries": (queries, "Q K", "float32"),
    }
    for name, value, axes, hold in (
        ("row_scale", row_scale, "N", "float32"),
        ("ids", ids, "N", "int64"),
        ("groups", groups, "Q", "int"),
    ):
        if value is not None:
            specs[name] = (value, axes, hold)
    sizes = check_tensors(op, **specs)
    check_int(op, "the number of coordinates", sizes["K"], 0, MAX_DIM)
    book = codebook(op, kind)
    check_row_bytes(op, kind, sizes["K"], sizes["B"])
    if row_scale is not None and not _finite(row_scale):
        raise ValueError(f"{op}: row_scale must be finite")
    if reduce not in ("mean", "max"):
        raise ValueError(f"{op}: reduce must be mean or max, got {reduce!r}")
    if groups is None:
        folded, groups, count = queries, torch.arange(sizes["Q"], device=codes.device), sizes["Q"]
    else:
        folded, groups, count = _fold_tasks(op, queries, groups.long(), reduce)
    digits = fold_queries(folded, mean, scale, book.unit)
    _check_numbers(op, queries, mean, scale, digits)
    return Folded(digits, groups, count)


def _fold_tasks(
    op: str, queries: "torch.Tensor", groups: "torch.Tensor", reduce: str
) -> "tuple[torch.Tensor, torch.Tensor, int]":
    """Check the tasks; return the queries, of each task one where its mean is wanted, their tasks and how many."""
    import torch

    count = int(groups.max()) + 1 if len(groups) else 0
    fits = 0 <= int(groups.min() if len(groups) else 0) and count <= len(groups)
    members = torch.bincount(groups, minlength=count) if fits else groups[:0]
    if len(groups) and (len(members) == 0 or int(members.min()) == 0):
        raise ValueError(
            f"{op}: groups must be counted from 0 without gaps, got {groups.unique().tolist()!r:.80}"
        )
    if reduce == "mean" and count != len(queries):
        # On the CPU, as a GPU adds them in another order every time.
        exact, where, members = (x.detach().cpu() for x in (queries.double(), groups, members))
        sums = exact.new_zeros(count, queries.shape[1]).index_add_(0, where, exact)
        queries = (sums / members[:, None]).to(queries.device)
        groups = torch.arange(count, device=queries.device)
    return queries, groups, count


def _check_numbers(
    op: str, queries: "torch.Tensor", mean: "torch.Tensor", scale: "torch.Tensor", digits: Digits
) -> None:
    """Refuse numbers that aren't finite, which all reach a query's `step` or `bias`, and negative scales."""
    step, bias, scales = (x.detach().cpu().numpy() for x in (digits.step, digits.bias, scale))
    if len(step) and np.isfinite(step).all() and np.isfinite(bias).all() and scales.min(initial=0) == 0:
        return
    check_scale(op, mean, scale)
    if not _finite(queries):
        raise ValueError(f"{op}: queries must be finite")


def _finite(x: "torch.Tensor") -> bool:
    """Tell whether all numbers of a tensor are finite; on a CPU by one thread (see `fold_queries`)."""
    import torch

    return bool(np.isfinite(x.detach().numpy()).all() if x.device.type == "cpu" else torch.isfinite(x).all())
