"""From scores to chosen texts, with the reason of each choice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jz3.files import write_jsonl
from jz3.influence import read_scores
from jz3.records import Doc
from jz3.stage import StageContext

COMBINE = ("mean", "max", "quota")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """How many texts are chosen, and how tasks are combined."""

    k: int = 4000
    """Texts to choose (the paper's second teacher round has 4k)."""
    combine: str = "mean"
    """`mean` or `max` of the tasks' scores, or `quota`: the same number of texts for every task.
    `max` can collapse onto one task."""


def select(scores: np.ndarray, ids: Sequence[str], k: int, combine: str = "mean") -> list[int]:
    """Choose the k best rows.

    Args:
        scores: [N, tasks] float.
        ids: N ids; equal scores are ordered by id.
        k: how many to choose; fewer if N is smaller.
        combine: see SelectionConfig.

    Returns:
        Row numbers, best first (score descending, id ascending).

    Raises:
        ValueError: a score is not finite, `combine` is unknown, k is negative or the shapes differ.
    """
    if scores.ndim != 2 or len(scores) != len(ids):
        raise ValueError(f"scores must be [{len(ids)}, tasks], got shape {scores.shape}")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(1).sum())} rows have a score that is not finite")
    if combine != "quota":
        total = scores.mean(1) if combine == "mean" else scores.max(1)
        return _order(total, ids)[:k]
    orders = [iter(_order(scores[:, t], ids)) for t in range(scores.shape[1])]
    chosen: dict[int, None] = {}
    while orders and len(chosen) < min(k, len(ids)):
        for order in orders:
            row = next((r for r in order if r not in chosen), None)
            if row is not None and len(chosen) < k:
                chosen[row] = None
    return list(chosen)


def _order(values: np.ndarray, ids: Sequence[str]) -> list[int]:
    return np.lexsort((np.array(ids), -values)).tolist()


def chosen_rows(scores: dict[str, Any], method: str, k: int, combine: str) -> list[int]:
    """Return the rows that a method of the influence stage's table chooses.

    Args:
        scores: from `jz3.influence.read_scores`.
        method: `influence`, or a baseline of `InfluenceConfig.baselines`.
        k: how many.
        combine: see SelectionConfig.
    """
    columns = [
        c for c in scores if c == method or (c.startswith(f"{method}:") and not c.endswith(":control"))
    ]
    if not columns:
        known = sorted({c.split(":")[0] for c in scores} - {"id", "source", "tokens", "norm"})
        raise ValueError(f"no scores of method {method!r}; there are: {', '.join(known)}")
    return select(np.stack([scores[c] for c in columns], 1), scores["id"], k, combine)


def methods(scores: dict[str, Any]) -> list[str]:
    """Return the methods of a table of scores, gradient influence first."""
    found = dict.fromkeys(c.split(":")[0] for c in scores if c not in ("id", "source", "tokens", "norm"))
    return sorted(found, key=lambda m: m != "influence")


def run(ctx: StageContext) -> dict[str, Any]:
    """Write selection/selected.jsonl (documents, best first) and selection/why.jsonl."""
    config = ctx.recipe.selection
    scores = read_scores(ctx.path("influence", "scores.parquet").parent)
    docs = {row["id"]: Doc.from_json(row) for row in ctx.rows("corpus", "docs.jsonl")}
    chosen = {m: chosen_rows(scores, m, config.k, config.combine) for m in methods(scores)}
    best = chosen["influence"]
    tasks = [c for c in scores if c.startswith("influence:") and c != "influence:control"]
    why = [
        {
            "id": scores["id"][row],
            "rank": rank,
            "scores": {c.split(":", 1)[1]: float(scores[c][row]) for c in tasks},
            "source": scores["source"][row],
        }
        for rank, row in enumerate(best)
    ]
    write_jsonl(ctx.out / "why.jsonl", why)
    write_jsonl(ctx.out / "selected.jsonl", (docs[scores["id"][row]].to_json() for row in best))
    everything = range(len(scores["id"]))
    return {
        "chosen": len(best),
        "combine": config.combine,
        "mix": {"corpus": _mix(scores, everything), **{m: _mix(scores, rows) for m, rows in chosen.items()}},
        "overlap_with_influence": {
            m: len(set(rows) & set(best)) / max(len(best), 1)
            for m, rows in chosen.items()
            if m != "influence"
        },
        "mean_tokens": {
            m: float(np.mean([scores["tokens"][r] for r in rows])) for m, rows in chosen.items() if rows
        },
    }


def _mix(scores: dict[str, Any], rows: Sequence[int]) -> dict[str, int]:
    return dict(sorted(Counter(scores["source"][r] for r in rows).items()))
