"""From a run's scores and features to the order in which each chooser takes texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jz3.comparison import sets
from jz3.comparison.config import DERIVED, SETS
from jz3.errors import Jz3Error
from jz3.features.extract import coding_of, model_hash
from jz3.features.stage import load_projection, read_extracted
from jz3.influence import ranks, read_scores
from jz3.models import resolve_model
from jz3.records import Query
from jz3.seeding import rng
from jz3.selection import chosen_rows
from jz3.stage import StageContext
from jz3.store import Store

CHOOSERS = {"matching": sets.matching, "coverage": sets.coverage, "diverse": sets.diverse}


@dataclass(frozen=True, slots=True)
class Pool:
    """What the choosers look at: the table of scores without the rows that hold a test problem."""

    scores: dict[str, Any]
    """See jz3.influence.read_scores."""
    tasks: tuple[str, ...]
    seed: int

    def order(self, ctx: StageContext, chooser: str, task: str, seed: int, tokens: int) -> list[int]:
        """Return the rows a chooser takes, best first, up to the one that fills `tokens`.

        Args:
            ctx: of the comparison.
            chooser: see ComparisonConfig.methods.
            task: for which task; empty: for all together.
            seed: number of the training, used by `random` alone.
            tokens: the budget.

        Raises:
            ValueError: the chooser is unknown or lacks its columns.
        """
        tasks = (task,) if task else self.tasks
        return _fill(self._ordered(ctx, chooser, tasks, seed), self.scores["tokens"], tokens)

    def _ordered(
        self, ctx: StageContext, chooser: str, tasks: Sequence[str], seed: int
    ) -> Iterator[int] | list[int]:
        ids, everything = self.scores["id"], len(self.scores["id"])
        combine = ctx.recipe.selection.combine
        if chooser == "random" and seed:
            draws = np.array([rng(self.seed, "comparison", "random", seed, i).random() for i in ids])
            return np.lexsort((np.array(ids), draws)).tolist()
        columns = {n: v for n, v in self.scores.items() if ":" not in n or n.split(":", 1)[1] in tasks}
        if chooser in DERIVED:
            columns |= {f"{chooser}:{task}": self._derived(chooser, task) for task in tasks}
        if chooser not in SETS:
            return chosen_rows(columns, chooser, everything, combine)
        best = chosen_rows(columns, "influence", ctx.recipe.comparison.candidates, combine)
        features, queries = features_of(ctx, [ids[row] for row in best], tasks)
        return (best[place] for place in CHOOSERS[chooser](features, queries))

    def _derived(self, chooser: str, task: str) -> np.ndarray:
        influence = self.scores[f"influence:{task}"]
        if chooser == "dot":
            return influence * self.scores["norm"]
        if f"hidden:{task}" not in self.scores:
            raise ValueError("comparison.methods has `mix`, which needs `hidden` among influence.baselines")
        return (ranks(influence) + ranks(self.scores[f"hidden:{task}"])) / (2 * len(influence))


def _fill(order: Iterator[int] | list[int], sizes: Sequence[int], tokens: int) -> list[int]:
    """Take rows until they hold `tokens`; the trainer reads them in its own order and cuts where it ends."""
    rows: list[int] = []
    total = 0
    for row in order:
        if total >= tokens:
            break
        rows.append(row)
        total += int(sizes[row])
    return rows


def load_pool(ctx: StageContext, refused: set[str]) -> Pool:
    """Read the influence stage's table without the texts in `refused` and without the control's columns."""
    scores = read_scores(ctx.path("influence", "scores.parquet").parent)
    keep = [row for row, i in enumerate(scores["id"]) if i not in refused]
    table = {
        name: [values[row] for row in keep] if isinstance(values, list) else values[keep]
        for name, values in scores.items()
        if not name.endswith(":control")
    }
    tasks = tuple(name.split(":", 1)[1] for name in table if name.startswith("influence:"))
    return Pool(table, tasks, ctx.seed)


def features_of(ctx: StageContext, ids: Sequence[str], tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Decode the features of some texts and of the fit queries of some tasks.

    Args:
        ctx: of a run with features.
        ids: texts.
        tasks: their queries, one task after the other.

    Returns:
        features [N, K] float32 in the order of `ids`, queries [M, K] float32 with a finite gradient. With
        several tasks a query of task t is multiplied by M / (tasks n_t), so that the mean over the rows
        is the mean over the tasks of their queries' means.

    Raises:
        Jz3Error: a shard of the store is damaged, or it lacks one of the texts.
    """
    folder = ctx.path("features", "store")
    projection = load_projection(folder.parent, model_hash(resolve_model(ctx.recipe.model)))
    store = Store(folder, verify=True)
    if store.damaged:
        raise Jz3Error("; ".join(store.damaged.values()))
    features = np.zeros((len(ids), projection.k), np.float32)
    missing = set(ids)
    place = {int(i, 16): row for row, i in enumerate(ids)}
    for shard, values in store.values(coding_of(projection, store.info.bits)):
        wanted = [(row, place[i]) for row, i in enumerate(shard.id.tolist()) if i in place]
        if wanted:
            source, target = map(list, zip(*wanted, strict=True))
            features[target] = values[source].numpy()
            missing -= {ids[row] for row in target}
    if missing:
        raise Jz3Error(
            f"{folder} lacks {len(missing)} of {len(ids)} candidates, e.g. {min(missing)}; "
            "run the features and the influence stage again"
        )
    rows = (Query.from_json(row) for row in ctx.rows("targets", "queries.jsonl"))
    task_of = {q.id: q.task for q in rows if q.role == "fit"}
    names, arrays = read_extracted(folder.parent / "queries.safetensors")
    finite = np.isfinite(arrays["norm"]) & np.isfinite(arrays["values"]).all(1)
    chosen = [row for row, i in enumerate(names) if task_of.get(i) in tasks and finite[row]]
    counts = Counter(task_of[names[row]] for row in chosen)
    weights = [len(chosen) / (len(counts) * counts[task_of[names[row]]]) for row in chosen]
    return features, arrays["values"][chosen] * np.array(weights, np.float32)[:, None]
