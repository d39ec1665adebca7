"""Scores of every document for every target task, with baselines, a negative control and fidelity.

    score(i, task) = mean over the task's queries q of cos(G_i, G_q)

Source: LESS (arXiv 2402.04333), equation 5, one checkpoint, plain gradients on both sides.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jz3.bm25 import Bm25
from jz3.errors import Jz3Error
from jz3.features.extract import coding_of, model_hash
from jz3.features.stage import load_projection, read_extracted
from jz3.files import atomic_path, read_jsonl
from jz3.models import resolve_model
from jz3.records import Doc, Query
from jz3.seeding import rng
from jz3.stage import StageContext
from jz3.store import Store
from jz3.topk import TopK


def run(ctx: StageContext) -> dict[str, Any]:
    """Write influence/scores.parquet: per document and task a column per method.

    Documents pass through shard by shard of the store, so that memory doesn't grow with their number.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    baselines = ctx.recipe.influence.baselines
    queries = {q.id: q for q in (Query.from_json(row) for row in ctx.rows("targets", "queries.jsonl"))}
    query_ids, arrays = read_extracted(ctx.path("features", "queries.safetensors"))
    groups = _usable(query_groups(query_ids, queries), arrays)
    means = {task: arrays["values"][members].mean(0) for task, members in groups.items()}
    directions = {task: _unit(arrays["hidden"][members]).mean(0) for task, members in groups.items()}
    corpus = ctx.path("corpus", "docs.jsonl")
    bm25 = None
    if "bm25" in baselines:
        chosen = {task: [queries[query_ids[m]] for m in members] for task, members in groups.items()}
        bm25 = Bm25.count((row["text"] for row in read_jsonl(corpus)), chosen)
    exact = read_exact(ctx)
    compared: dict[str, np.ndarray] = {}
    path = ctx.out / "scores.parquet"
    count = 0
    with atomic_path(path) as part, contextlib.ExitStack() as stack:
        writer = None
        rows = map(Doc.from_json, read_jsonl(corpus))
        for block in feature_blocks(ctx):
            docs = [_next(rows, i) for i in block.ids]
            count += len(docs)
            columns = {f"influence:{task}": block.values @ mean for task, mean in means.items()}
            for task, direction in directions.items() if "hidden" in baselines else ():
                columns[f"hidden:{task}"] = _unit(block.hidden) @ direction
            for task, values in bm25.scores([d.text for d in docs]).items() if bm25 else ():
                columns[f"bm25:{task}"] = values
            if "loss" in baselines:
                columns["loss"] = block.loss
            if "random" in baselines:
                draws = [rng(ctx.seed, "influence", "random", d.id).random() for d in docs]
                columns["random"] = np.array(draws)
            compared.update({i: v for i, v in zip(block.ids, block.values, strict=True) if i in exact.wanted})
            table = pa.table(
                {
                    "id": [d.id for d in docs],
                    "source": [d.source for d in docs],
                    "tokens": [d.tokens for d in docs],
                    "norm": block.norm.astype(np.float32),
                    **{name: values.astype(np.float32) for name, values in columns.items()},
                }
            )
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(part, table.schema))
            writer.write_table(table)
        if writer is None:
            raise Jz3Error("the store of features is empty; run the features stage")

    tasks = [t for t in groups if t != "control"]
    return {
        "documents": count,
        "tasks": tasks,
        "fidelity": fidelity(exact, compared, query_ids, arrays["values"], queries),
        "negative_control": negative_control(
            lambda: score_batches(path), tasks, min(ctx.recipe.selection.k, count)
        ),
    }


def _next(docs: Iterator[Doc], key: str) -> Doc:
    """Return the document `key`; the store has the corpus's order, some documents left out."""
    for doc in docs:
        if doc.id == key:
            return doc
    raise Jz3Error(
        f"the store of features holds the document {key}, which the corpus has not; run the features stage again"
    )


@dataclass(frozen=True, slots=True)
class FeatureBlock:
    """Features of the documents of one shard, in the store's order."""

    ids: list[str]
    values: np.ndarray
    """[n, K] float32."""
    norm: np.ndarray
    hidden: np.ndarray
    loss: np.ndarray


def feature_blocks(ctx: StageContext) -> Iterator[FeatureBlock]:
    """Read what the features stage wrote; damaged shards are an error here, since none may be lost."""
    folder = ctx.path("features", "store")
    store = Store(folder, verify=True)
    if store.damaged:
        raise Jz3Error("; ".join(store.damaged.values()))
    projection = load_projection(folder.parent, model_hash(resolve_model(ctx.recipe.model)))
    coding = coding_of(projection, store.info.bits)
    for shard, decoded in store.values(coding):
        names, side = read_extracted(folder.parent / "documents" / f"{shard.number:06d}.safetensors")
        ids = [f"{i:016x}" for i in shard.id.tolist()]
        position = {name: row for row, name in enumerate(names)}
        rows = [position[i] for i in ids]
        yield FeatureBlock(
            ids, decoded.numpy(), np.array(shard.norm), side["hidden"][rows], side["loss"][rows]
        )


def score_batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Read a table of scores in pieces, without the ids."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name != "id"]
        for batch in file.iter_batches(columns=names):
            yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in names}


def query_groups(ids: Sequence[str], queries: dict[str, Query]) -> dict[str, list[int]]:
    """Return the rows of each task's `fit` queries, and of the control's under `control`."""
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(ids):
        query = queries[key]
        if query.role in ("fit", "control"):
            groups.setdefault("control" if query.role == "control" else query.task, []).append(row)
    return groups


def _usable(groups: dict[str, list[int]], arrays: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Leave out the queries without a finite gradient; one of them would spoil its task's mean."""
    good = np.isfinite(arrays["norm"]) & np.isfinite(arrays["values"]).all(1)
    kept = {task: [row for row in members if good[row]] for task, members in groups.items()}
    if empty := [task for task, members in kept.items() if not members]:
        raise Jz3Error(
            f"no query of the task {empty[0]!r} has a finite gradient ({len(groups[empty[0]])} have none); "
            "see features/rejects.jsonl, and try model.dtype 'float32'"
        )
    return kept


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return each value's rank along axis 0; equal values share their mean rank."""
    from scipy.stats import rankdata

    return rankdata(values, axis=0)


def agreement(features: np.ndarray, exact: np.ndarray, share: float = 0.1) -> dict[str, float]:
    """Compare scores with exact ones.

    Args:
        features: [N, Q] scores from features.
        exact: [N, Q] exact cosines.
        share: the top share whose recall is measured.

    Returns:
        `spearman` (mean over queries), `task_spearman` (of the mean over queries), `recall` (share of
        the exact top found in the features' top, mean over queries).
    """
    n = len(exact)
    top = max(1, round(n * share))
    recall = [
        len(np.intersect1d(np.argsort(-features[:, q])[:top], np.argsort(-exact[:, q])[:top])) / top
        for q in range(exact.shape[1])
    ]
    per_query = [np.corrcoef(ranks(features[:, q]), ranks(exact[:, q]))[0, 1] for q in range(exact.shape[1])]
    task = np.corrcoef(ranks(features.mean(1)), ranks(exact.mean(1)))[0, 1]
    return {
        "spearman": float(np.mean(per_query)),
        "task_spearman": float(task),
        "recall": float(np.mean(recall)),
    }


@dataclass(frozen=True, slots=True)
class Exact:
    """Exact cosines of documents and queries that the fit hasn't seen."""

    documents: list[str]
    queries: list[str]
    cosine: np.ndarray
    """[documents, queries] float32; a document without a finite gradient has a row that is not finite."""

    @property
    def wanted(self) -> set[str]:
        """The documents whose features are to be compared."""
        return set(self.documents)


def read_exact(ctx: StageContext) -> Exact:
    """Read the features stage's exact cosines; without any, there is nothing to compare."""
    from safetensors.numpy import load_file

    path = ctx.run_dir / "features" / "exact.safetensors"
    if not path.exists():
        return Exact([], [], np.zeros((0, 0), np.float32))
    arrays = load_file(path)
    names = [[f"{i:016x}" for i in arrays[key].tolist()] for key in ("document", "query")]
    return Exact(names[0], names[1], arrays["cosine"])


def fidelity(
    exact: Exact,
    values: Mapping[str, np.ndarray],
    query_ids: Sequence[str],
    query_values: np.ndarray,
    queries: Mapping[str, Query],
) -> dict[str, Any]:
    """Compare stored features with exact gradients on documents and queries that the fit hasn't seen.

    Args:
        exact: the exact cosines.
        values: stored features [K] by document; of those compared at least.
        query_ids: names of the rows of `query_values`.
        query_values: [Q, K] features of queries.
        queries: by id.

    Returns:
        How many were compared, and `agreement` over all queries and per task.
    """
    known = dict(zip(query_ids, query_values, strict=True))
    usable = [
        column
        for column, i in enumerate(exact.queries)
        if np.isfinite(known[i]).all() and np.isfinite(exact.cosine[:, column]).any()
    ]
    # Queries first: one without a finite gradient would take every document with it.
    exact = Exact(exact.documents, [exact.queries[c] for c in usable], exact.cosine[:, usable])
    finite = [
        row for row, i in enumerate(exact.documents) if i in values and np.isfinite(exact.cosine[row]).all()
    ]
    if not finite or not exact.queries:
        return {"documents": 0, "queries": 0}
    cosine = exact.cosine[finite]
    asked = np.stack([known[i] for i in exact.queries])
    found = np.stack([values[exact.documents[row]] for row in finite]) @ asked.T
    result: dict[str, Any] = {
        "documents": len(finite),
        "queries": len(usable),
        **agreement(found, cosine),
        "tasks": {},
    }
    for task in sorted({queries[i].task for i in exact.queries}):
        mine = [c for c, i in enumerate(exact.queries) if queries[i].task == task]
        result["tasks"][task] = agreement(found[:, mine], cosine[:, mine])
    return result


Batches = Callable[[], Iterable[Mapping[str, Any]]]
"""Gives a table of scores in pieces, columns by name, as often as it is asked."""


def negative_control(batches: Batches, tasks: Sequence[str], k: int) -> dict[str, Any]:
    """Overlap of each task's top k with the top k of an unrelated target; chance is k / N.

    An overlap above chance would mean that scores depend on the text alone (its length, its loss), not
    on the target. Targets that draw on different sources share less than chance, those that draw on
    the same source more: `expected_given_sources` is the chance of two choices that take as many texts
    of every source as these do. `within_sources` compares the top share k / N of every source, which
    doesn't see the sources either; with more than k sources there is no such share to take.

        expected_given_sources = (1/k) sum over sources s of k_task(s) k_control(s) / n_s

    Args:
        batches: the scores; read twice, in memory that grows with k and, by a name and some numbers, with
            the sources. Without a column `influence:control` there is nothing to compare.
        tasks: the tasks' names.
        k: how many texts are chosen.

    Returns:
        Per task `overlap`, `expected_given_sources`, `interval_given_sources` and `within_sources`;
        `within_interval`, `chance` and `chance_interval`. The intervals tell where two choices that
        have nothing else in common fall: hypergeometric, mean +- 1.96 standard deviations. With more than
        k sources `within_sources` is empty and `within_interval` None.
    """
    counts: Counter[str] = Counter()
    for batch in batches():
        if "influence:control" not in batch:
            return {}
        counts.update(batch["source"])
    if not counts or not k:
        return {}
    n = counts.total()
    code = {source: number for number, source in enumerate(sorted(counts))}
    sizes = [counts[source] for source in code]
    # One text of every source would be more than are chosen, and memory and time would grow with the sources.
    shares = [max(1, round(size * k / n)) for size in sizes] if len(sizes) <= k else []
    names = [*tasks, "control"]
    tops = {name: TopK(k) for name in names}
    within = {(name, s): TopK(share) for name in names for s, share in enumerate(shares)}
    start = 0
    for batch in batches():
        codes = np.array([code[source] for source in batch["source"]])
        rows = np.stack([np.arange(start, start + len(codes)), codes], 1)
        start += len(codes)
        for name in names:
            scores = np.asarray(batch[f"influence:{name}"])
            tops[name].add(scores, rows)
            for s in np.unique(codes).tolist() if shares else ():
                within[name, s].add(scores[codes == s], rows[codes == s])
    best = {name: top.best()[1] for name, top in tops.items()}
    mixes = {name: np.bincount(rows[:, 1], minlength=len(sizes)).tolist() for name, rows in best.items()}
    result: dict[str, Any] = {
        name: {} for name in ("overlap", "expected_given_sources", "interval_given_sources", "within_sources")
    }
    for task in tasks:
        result["overlap"][task] = len(np.intersect1d(best[task][:, 0], best["control"][:, 0])) / k
        expected, interval = shared_by_chance(mixes[task], mixes["control"], sizes, k)
        result["expected_given_sources"][task] = expected
        result["interval_given_sources"][task] = interval
        if shares:
            shared = sum(
                len(np.intersect1d(within[task, s].best()[1][:, 0], within["control", s].best()[1][:, 0]))
                for s in range(len(sizes))
            )
            result["within_sources"][task] = shared / sum(shares)
    chance, interval = shared_by_chance([k], [k], [n], k)
    apart = shared_by_chance(shares, shares, sizes, sum(shares))[1] if shares else None
    return {**result, "within_interval": apart, "chance": chance, "chance_interval": interval}


def shared_by_chance(
    first: Sequence[int], second: Sequence[int], sizes: Sequence[int], of: int
) -> tuple[float, list[float]]:
    """Return which share two random choices have in common, given how many each takes of every source.

    The number shared in a source of n texts of which the choices take a and b is hypergeometric, with
    mean a b / n and variance a b (n - a) (n - b) / (n^2 (n - 1)); sources are independent.

    Args:
        first: texts of every source in the first choice.
        second: texts of every source in the second.
        sizes: texts of every source.
        of: what the count is divided by.

    Returns:
        The mean, and mean +- 1.96 standard deviations within [0, 1].
    """
    mean = variance = 0.0
    for a, b, n in zip(first, second, sizes, strict=True):
        mean += a * b / n
        variance += a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1))
    spread = 1.96 * variance**0.5
    return mean / of, [max(0.0, (mean - spread) / of), min(1.0, (mean + spread) / of)]


def read_scores(folder: Path) -> dict[str, Any]:
    """Read influence/scores.parquet as a dictionary of columns (lists of text, arrays of numbers)."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "scores.parquet")
    return {
        name: table[name].to_pylist() if name in ("id", "source") else table[name].to_numpy()
        for name in table.column_names
    }
