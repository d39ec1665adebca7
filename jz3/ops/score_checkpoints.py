"""`score_topk` over several checkpoints of a model: the best documents by a weighted sum of scores.

    score(i, q) = sum over checkpoints c of w_c * row_scale_ci * <decode(codes_ci), psi_cq>

Every checkpoint's scores of a chunk of rows are those of `score_topk` bit for bit; they are added up in float64 in
the order of the checkpoints and rounded to float32 once. So the result is the same on every back end, and memory
is chunk x queries, never N x Q.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from jz3 import backend
from jz3.ops.best import best_of_groups, chunk_topk, merge_topk
from jz3.ops.checks import check_int, check_tensors
from jz3.ops.encode import CODEBOOKS, LEVELS
from jz3.ops.score_queries import Folded, check_and_fold, fold_queries
from jz3.ops.score_topk import MOST_BEST, score_codes_cuda, score_codes_reference, unsupported

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 24
"""Scores held at a time: rows x queries."""
MOST_ROWS = 1 << 18
"""Of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCodes:
    """What one checkpoint knows of the documents; the fields are arguments of `score_topk`."""

    codes: "torch.Tensor"
    """uint8 [N, bytes]: row i is document i in every checkpoint."""
    mean: "torch.Tensor"
    scale: "torch.Tensor"
    """float32 [K]; K and the kind may differ from checkpoint to checkpoint."""
    kind: str
    queries: "torch.Tensor"
    """float32 [Q, K]: the same Q queries, as this checkpoint sees them."""
    weight: float
    """w_c, such as the checkpoint's learning rate."""
    row_scale: "torch.Tensor | None" = None
    """float32 [N]; one by default."""


def score_topk_checkpoints(
    checkpoints: Sequence[CheckpointCodes],
    k: int,
    *,
    ids: "torch.Tensor | None" = None,
    groups: "torch.Tensor | None" = None,
    reduce: str = "mean",
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Find the k best rows for every query or group of queries by the checkpoints' weighted scores.

    score(i, g) = mean or max over the queries q of group g of
                  sum over c of w_c * row_scale_ci * <decode(codes_ci), q_c>

    Args:
        checkpoints: at least one, with the same rows and queries.
        k: how many rows to find.
        ids: int64 [N], what to return for a row and what breaks ties; 0 .. N-1 by default.
        groups: int [Q], the task of every query, counted from 0 without gaps; by default every query
            is a task of its own.
        reduce: `mean` or `max` over a group, of the sums over checkpoints.

    Returns:
        values float32 [G, min(k, N)] and ids int64 [G, min(k, N)], by (value descending, id ascending).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: as for `score_topk`; or there is no checkpoint, a weight is not finite, or checkpoints
            differ in their rows, queries or devices.

    Source: the sum over checkpoints of TracIn (arXiv 2002.08484) and LESS (arXiv 2402.04333, eq. 5).
    """
    import torch

    k = check_int("score_topk_checkpoints", "k", k, 1, MOST_BEST)
    checkpoints = list(checkpoints)
    with torch.no_grad():
        folded = [
            _checked(number, c, checkpoints[0], ids, groups, reduce) for number, c in enumerate(checkpoints)
        ]
        if not folded:
            raise ValueError("score_topk_checkpoints: checkpoints must hold at least one, got none")
        codes, count = checkpoints[0].codes, folded[0].count
        if ids is None:
            ids = torch.arange(len(codes), device=codes.device)
        best = (torch.empty(count, 0, device=codes.device, dtype=torch.float32), ids.new_empty(count, 0))
        queries = len(folded[0].groups)
        chunk = max(1, min(MOST_ROWS, CHUNK // max(queries, 1)))
        for begin in range(0, len(codes) if count else 0, chunk):
            rows = slice(begin, begin + chunk)
            total = torch.zeros(queries, len(ids[rows]), dtype=torch.float64, device=codes.device)
            for c, f in zip(checkpoints, folded, strict=True):
                total += c.weight * _scores(c, f, rows).double()
            scores = best_of_groups(total.float(), folded[0].groups, count)
            best = merge_topk([best, chunk_topk(scores, ids[rows], k)], k)
        return best


def _checked(
    number: int,
    checkpoint: CheckpointCodes,
    first: CheckpointCodes,
    ids: "torch.Tensor | None",
    groups: "torch.Tensor | None",
    reduce: str,
) -> Folded:
    """Check one checkpoint, and that its rows and queries are as many as the first one's."""
    op = f"score_topk_checkpoints: checkpoint {number}"
    if not isinstance(checkpoint, CheckpointCodes):
        raise TypeError(f"{op} must be a CheckpointCodes, got {type(checkpoint).__name__}")
    c = checkpoint
    folded = check_and_fold(op, c.codes, c.mean, c.scale, c.kind, c.queries, c.row_scale, ids, groups, reduce)
    check_tensors(
        op, **{"the first codes": (first.codes, "N F", "uint8"), "codes": (c.codes, "N B", "uint8")}
    )
    if len(c.queries) != len(first.queries):
        raise ValueError(
            f"{op}: queries must be {len(first.queries)} as the first one's, got {len(c.queries)}"
        )
    if not isinstance(c.weight, Real):
        raise TypeError(f"{op}: weight must be a number, got {type(c.weight).__name__}")
    if not math.isfinite(c.weight):
        raise ValueError(f"{op}: weight must be finite, got {c.weight!r}")
    return folded


def _scores(checkpoint: CheckpointCodes, folded: Folded, rows: slice) -> "torch.Tensor":
    import torch

    codes, digits = checkpoint.codes[rows], folded.digits
    row_scale = checkpoint.row_scale
    row_scale = (
        torch.ones(len(codes), device=codes.device, dtype=torch.float32)
        if row_scale is None
        else row_scale[rows]
    )
    return backend.call(
        "score_codes", codes, checkpoint.kind, digits.planes, digits.step, digits.bias, row_scale
    )


def score_codes_cpu(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
    instructions: int = -1,
) -> "torch.Tensor":
    """The compiled products; `instructions` as for `score_topk_cpu`."""
    import torch

    scores = torch.empty(len(step), len(codes), dtype=torch.float32, device="cpu")
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    tensors = [x.contiguous() for x in (planes, step, bias, row_scale, scores)]
    backend.extension().score_codes(
        codes.data_ptr(),
        LEVELS[kind].ctypes.data,
        *(x.data_ptr() for x in tensors),
        len(codes),
        planes.shape[2],
        codes.shape[1],
        codes.stride(0),
        planes.shape[1],
        len(planes),
        CODEBOOKS[kind].bits,
        instructions,
        backend.threads(),
    )
    return scores


def _score_codes_triton(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
) -> "torch.Tensor":
    from jz3.kernels import score_topk as kernels

    return kernels.score_rows(codes, kind, planes, step, bias, row_scale)


def _example(device: str) -> tuple[Any, ...]:
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    rows, count = (50, 5) if device == "cpu" else (300, 40)  # as of score_topk
    codes = torch.from_numpy(rng.integers(0, 256, (rows, 32), dtype=np.uint8)).to(device)
    queries, mean, scale, row_scale = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(device)
        for shape in ((count, 64), (64,), (64,), (rows,))
    )
    digits = fold_queries(queries, mean, scale.abs(), CODEBOOKS["4bit"].unit)
    return codes, "4bit", digits.planes, digits.step, digits.bias, row_scale


backend.register(
    backend.Op(
        name="score_codes",
        reference=score_codes_reference,
        native={"cuda": score_codes_cuda, "triton": _score_codes_triton, "cpu": score_codes_cpu},
        example=_example,
        exact=True,
        unsupported=unsupported,
    )
)
