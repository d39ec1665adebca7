"""The `selection` stage: the chosen texts, and why each of them."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from jz3.files import read_jsonl, write_jsonl
from jz3.records import Doc
from jz3.selection.best import chosen_rows
from jz3.selection.pool import Pool, load_pool
from jz3.stage import StageContext


def run(ctx: StageContext) -> dict[str, Any]:
    """Write selection/selected.jsonl (documents, in the order of choice) and selection/why.jsonl."""
    config = ctx.recipe.selection
    pool = load_pool(ctx)
    scores = pool.scores
    best = choose(ctx, pool)
    chosen = {m: chosen_rows(scores, m, config.k, config.combine) for m in methods(scores)}
    why = [
        {
            "id": scores["id"][row],
            "rank": rank,
            "chooser": config.chooser,
            "scores": {task: float(scores[f"influence:{task}"][row]) for task in pool.tasks},
            "source": scores["source"][row],
        }
        for rank, row in enumerate(best)
    ]
    write_jsonl(ctx.out / "why.jsonl", why)
    wanted = {scores["id"][row] for row in best}
    texts = read_jsonl(ctx.path("corpus", "docs.jsonl"))
    docs = {row["id"]: Doc.from_json(row) for row in texts if row["id"] in wanted}
    write_jsonl(ctx.out / "selected.jsonl", (docs[scores["id"][row]].to_json() for row in best))
    everything = range(len(scores["id"]))
    return {
        "chosen": len(best),
        "chooser": config.chooser,
        "candidates": min(config.candidates, len(scores["id"])),
        "combine": config.combine,
        "mix": {
            "corpus": _mix(scores, everything),
            **{m: _mix(scores, rows) for m, rows in chosen.items()},
            "chosen": _mix(scores, best),
        },
        "overlap_with_chosen": {
            m: len(set(rows) & set(best)) / max(len(best), 1) for m, rows in chosen.items()
        },
        "mean_tokens": {
            m: float(np.mean([scores["tokens"][r] for r in rows])) for m, rows in chosen.items() if rows
        },
    }


def choose(ctx: StageContext, pool: Pool) -> list[int]:
    """Return the rows of the recipe's choice, best first."""
    config = ctx.recipe.selection
    return list(islice(pool.ordered(ctx, config.chooser, pool.tasks), config.k))


def methods(scores: dict[str, Any]) -> list[str]:
    """Return the methods of a table of scores, gradient influence first."""
    found = dict.fromkeys(c.split(":")[0] for c in scores if c not in ("id", "source", "tokens", "norm"))
    return sorted(found, key=lambda m: m != "influence")


def _mix(scores: dict[str, Any], rows: Sequence[int]) -> dict[str, int]:
    return dict(sorted(Counter(scores["source"][r] for r in rows).items()))
