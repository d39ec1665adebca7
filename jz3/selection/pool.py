"""From a run's scores and features to the order in which each chooser takes texts."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.features.extract import coding_of, model_hash
from jz3.features.stage import load_projection, read_extracted
from jz3.files import read_jsonl
from jz3.influence import ranks, read_scores
from jz3.models import resolve_model
from jz3.records import Query
from jz3.seeding import rng
from jz3.selection.best import chosen_rows
from jz3.selection.config import DERIVED, SETS
from jz3.selection.two_stage import CHOOSERS, gather
from jz3.stage import StageContext
from jz3.store import Store


@dataclass(frozen=True, slots=True)
class Pool:
    """What the choosers look at: the influence stage's table of scores, and through a run its features."""

    scores: dict[str, Any]
    """See jz3.influence.read_scores."""
    tasks: tuple[str, ...]
    seed: int
    control: np.ndarray | None = None
    """Influence on the negative control."""

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
            Jz3Error: it has no more texts to choose from, though there are some that others can take.
        """
        tasks = (task,) if task else self.tasks
        sizes = self.scores["tokens"]
        rows = _fill(self.ordered(ctx, chooser, tasks, seed), sizes, tokens)
        held = sum(int(sizes[row]) for row in rows)
        if held < tokens and len(rows) < len(sizes):
            raise Jz3Error(
                f"{chooser} chooses among selection.candidates = {ctx.recipe.selection.candidates} texts, which hold "
                f"{held} of {tokens} tokens; raise selection.candidates, or lower comparison.tokens or more_tokens"
            )
        return rows

    def ordered(
        self, ctx: StageContext, chooser: str, tasks: Sequence[str], seed: int = 0
    ) -> Iterator[int] | list[int]:
        """Return the rows in the order in which a chooser takes them.

        Args:
            ctx: of a run with scores, and with features for the choosers of sets.
            chooser: see ComparisonConfig.methods.
            tasks: for which tasks together, as `selection.combine` says: with `quota` they choose in turn, each the
                next text that no other task has taken.
            seed: of `random` alone; 0: the influence stage's own draw.

        Raises:
            ValueError: the chooser is unknown or lacks its columns.
        """
        ids, everything = self.scores["id"], len(self.scores["id"])
        combine = ctx.recipe.selection.combine
        if combine == "quota" and len(tasks) > 1:
            return _in_turn([self.ordered(ctx, chooser, (task,), seed) for task in tasks])
        if chooser == "random" and seed:
            draws = np.array([rng(self.seed, "comparison", "random", seed, i).random() for i in ids])
            return np.lexsort((np.array(ids), draws)).tolist()
        columns = {n: v for n, v in self.scores.items() if ":" not in n or n.split(":", 1)[1] in tasks}
        if chooser == "control":
            if self.control is None:
                raise ValueError(
                    "the chooser `control` needs a negative control among the targets, and there is none"
                )
            return chosen_rows({"control": self.control, "id": ids}, chooser, everything, combine)
        if chooser == "stratified":
            return self._stratified(chosen_rows(columns, "influence", everything, combine))
        if chooser in DERIVED:
            columns |= {f"{chooser}:{task}": self._derived(chooser, task) for task in tasks}
        if chooser not in SETS:
            return chosen_rows(columns, chooser, everything, combine)
        best = chosen_rows(columns, "influence", ctx.recipe.selection.candidates, combine)
        features, queries = features_of(ctx, [ids[row] for row in best], tasks)
        return (best[place] for place in CHOOSERS[chooser](features, queries))

    def _derived(self, chooser: str, task: str) -> np.ndarray:
        influence = self.scores[f"influence:{task}"]
        if chooser == "dot":
            return influence * self.scores["norm"]
        if f"hidden:{task}" not in self.scores:
            raise ValueError("the chooser `mix` needs `hidden` among influence.baselines")
        return (ranks(influence) + ranks(self.scores[f"hidden:{task}"])) / (2 * len(influence))

    def _stratified(self, order: Sequence[int]) -> list[int]:
        """Reorder so that every beginning has the sources in the pool's proportions, as near as can be."""
        source = self.scores["source"]
        size = Counter(source)
        seen: Counter[str] = Counter()
        places = []
        for rank, row in enumerate(order):
            places.append(((seen[source[row]] + 0.5) / size[source[row]], rank, row))
            seen[source[row]] += 1
        return [row for *_, row in sorted(places)]


def _in_turn(orders: Iterable[Iterable[int]]) -> Iterator[int]:
    """Yield from each order in turn its next row that none has given."""
    left = [iter(order) for order in orders]
    given: set[int] = set()
    while left:
        for order in list(left):
            row = next((row for row in order if row not in given), None)
            if row is None:
                left.remove(order)
            else:
                given.add(row)
                yield row


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


def load_pool(ctx: StageContext, refused: Collection[str] = (), runs: Sequence[tuple[str, str]] = ()) -> Pool:
    """Read the influence stage's table; the control's scores stand apart.

    Args:
        ctx: of a run with scores.
        refused: texts that nobody may choose.
        runs: see ComparisonConfig.runs.

    Raises:
        Jz3Error: one of `runs` has no scores, or of other texts or tasks.
    """
    scores = read_scores(ctx.path("influence", "scores.parquet").parent)
    theirs: dict[str, list[np.ndarray]] = {}
    for name, folder in runs:
        for column, values in _foreign(scores, name, Path(folder) / "influence").items():
            theirs.setdefault(column, []).append(values)
    scores |= {column: np.mean(values, 0) for column, values in theirs.items()}
    keep = [row for row, i in enumerate(scores["id"]) if i not in refused]
    table = {
        name: [values[row] for row in keep] if isinstance(values, list) else values[keep]
        for name, values in scores.items()
        if not name.endswith(":control")
    }
    tasks = tuple(name.split(":", 1)[1] for name in table if name.startswith("influence:"))
    control = scores.get("influence:control")
    return Pool(table, tasks, ctx.seed, None if control is None else control[keep])


def _foreign(scores: dict[str, Any], name: str, folder: Path) -> dict[str, np.ndarray]:
    """Read another run's influence scores of this run's texts, as columns of the chooser `name`.

    A text that its features stage rejected comes last.
    """
    if not (folder / "scores.parquet").exists():
        raise Jz3Error(f"comparison.runs: {folder} has no scores; run its influence stage first")
    theirs = read_scores(folder)
    place = {i: row for row, i in enumerate(theirs["id"])}
    rejects = folder.parent / "features" / "rejects.jsonl"
    rejected = {row["id"] for row in read_jsonl(rejects)} if rejects.exists() else set()
    if lacking := [i for i in scores["id"] if i not in place and i not in rejected]:
        raise Jz3Error(
            f"comparison.runs: {folder} has no scores of {len(lacking)} of {len(scores['id'])} texts, e.g. "
            f"{lacking[0]}; it must be a run over the same texts"
        )
    rows = np.array([place.get(i, -1) for i in scores["id"]])
    tasks = [c.split(":", 1)[1] for c in scores if c.startswith("influence:") and c != "influence:control"]
    if lacking := [task for task in tasks if f"influence:{task}" not in theirs]:
        raise Jz3Error(f"comparison.runs: {folder} has no scores for the task {lacking[0]!r}")
    columns = {f"{name}:{task}": theirs[f"influence:{task}"] for task in tasks}
    return {n: np.where(rows < 0, values.min() - 1, values[rows]) for n, values in columns.items()}


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
    coding = coding_of(projection, store.info.bits)
    features = gather(store, coding, [int(i, 16) for i in ids])
    rows = (Query.from_json(row) for row in ctx.rows("targets", "queries.jsonl"))
    task_of = {q.id: q.task for q in rows if q.role == "fit"}
    names, arrays = read_extracted(folder.parent / "queries.safetensors")
    finite = np.isfinite(arrays["norm"]) & np.isfinite(arrays["values"]).all(1)
    chosen = [row for row, i in enumerate(names) if task_of.get(i) in tasks and finite[row]]
    counts = Counter(task_of[names[row]] for row in chosen)
    weights = [len(chosen) / (len(counts) * counts[task_of[names[row]]]) for row in chosen]
    return features, arrays["values"][chosen] * np.array(weights, np.float32)[:, None]
