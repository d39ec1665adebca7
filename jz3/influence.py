"""Scores of every document for every target task, with baselines, a negative control and fidelity.

    score(i, task) = mean over the task's queries q of cos(G_i, G_q)

Source: LESS (arXiv 2402.04333), equation 5, one checkpoint, plain gradients on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.features.extract import model_hash
from jz3.features.stage import load_projection, read_extracted
from jz3.files import atomic_path
from jz3.models import resolve_model
from jz3.records import Doc, Query
from jz3.seeding import rng
from jz3.stage import StageContext
from jz3.store import Coding, Store

METHODS = ("influence", "hidden", "bm25", "loss", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceConfig:
    """What is reported beside the gradient scores."""

    baselines: tuple[str, ...] = ("hidden", "bm25", "loss", "random")
    """Choosers without gradients: `hidden` (RDS+: weighted mean of the last hidden states), `bm25`,
    `loss` (highest loss first), `random`."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Write influence/scores.parquet: per document and task a column per method."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    unknown = sorted(set(ctx.recipe.influence.baselines) - set(METHODS))
    if unknown:
        raise ValueError(f"influence.baselines: unknown {unknown[0]!r}; known: {', '.join(METHODS[1:])}")
    docs = [Doc.from_json(row) for row in ctx.rows("corpus", "docs.jsonl")]
    queries = {q.id: q for q in (Query.from_json(row) for row in ctx.rows("targets", "queries.jsonl"))}
    loaded = load_features(ctx)
    by_id = {d.id: d for d in docs}
    docs = [by_id[i] for i in loaded.ids]

    groups = query_groups(loaded.query_ids, queries)
    columns: dict[str, np.ndarray] = {}
    for task, members in groups.items():
        columns[f"influence:{task}"] = loaded.values @ loaded.query_values[members].mean(0)
        chosen = [queries[loaded.query_ids[m]] for m in members]
        for method in ctx.recipe.influence.baselines:
            if method == "hidden":
                columns[f"hidden:{task}"] = _cosine(loaded.hidden, loaded.query_hidden[members]).mean(1)
            elif method == "bm25":
                columns[f"bm25:{task}"] = bm25_scores([d.text for d in docs], chosen)
    if "loss" in ctx.recipe.influence.baselines:
        columns["loss"] = loaded.loss
    if "random" in ctx.recipe.influence.baselines:
        columns["random"] = np.array([rng(ctx.seed, "influence", "random", d.id).random() for d in docs])

    table = pa.table(
        {
            "id": [d.id for d in docs],
            "source": [d.source for d in docs],
            "tokens": [d.tokens for d in docs],
            "norm": loaded.norm.astype(np.float32),
            **{name: values.astype(np.float32) for name, values in columns.items()},
        }
    )
    with atomic_path(ctx.out / "scores.parquet") as part:
        pq.write_table(table, part)

    tasks = [t for t in groups if t != "control"]
    k = min(ctx.recipe.selection.k, len(docs))
    return {
        "documents": len(docs),
        "tasks": tasks,
        "fidelity": fidelity(ctx, loaded, queries),
        "negative_control": negative_control(columns, tasks, k, [d.source for d in docs]),
    }


@dataclass(frozen=True, slots=True)
class LoadedFeatures:
    """Features of a run in memory: documents in the store's order, queries in the stage's."""

    ids: list[str]
    values: np.ndarray
    norm: np.ndarray
    hidden: np.ndarray
    loss: np.ndarray
    query_ids: list[str]
    query_values: np.ndarray
    query_hidden: np.ndarray


def load_features(ctx: StageContext) -> LoadedFeatures:
    """Read what the features stage wrote; damaged shards are an error here, since none may be lost."""
    folder = ctx.path("features", "store")
    store = Store(folder, verify=True)
    if store.damaged:
        raise Jz3Error("; ".join(store.damaged.values()))
    projection = load_projection(folder.parent, model_hash(resolve_model(ctx.recipe.model)))
    coding = Coding(projection.mean, projection.scale, store.info.bits)
    ids: list[str] = []
    values, norms = [], []
    for shard, decoded in store.values(coding):
        ids += [f"{i:016x}" for i in shard.id.tolist()]
        values.append(decoded.numpy())
        norms.append(np.array(shard.norm))
    side: dict[str, tuple[np.ndarray, float]] = {}
    for path in sorted((folder.parent / "documents").glob("*.safetensors")):
        names, arrays = read_extracted(path)
        side.update(zip(names, zip(arrays["hidden"], arrays["loss"].tolist(), strict=True), strict=True))
    query_ids, arrays = read_extracted(folder.parent / "queries.safetensors")
    return LoadedFeatures(
        ids,
        np.concatenate(values),
        np.concatenate(norms),
        np.stack([side[i][0] for i in ids]),
        np.array([side[i][1] for i in ids]),
        query_ids,
        arrays["values"],
        arrays["hidden"],
    )


def query_groups(ids: Sequence[str], queries: dict[str, Query]) -> dict[str, list[int]]:
    """Return the rows of each task's `fit` queries, and of the control's under `control`."""
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(ids):
        query = queries[key]
        if query.role in ("fit", "control"):
            groups.setdefault("control" if query.role == "control" else query.task, []).append(row)
    return groups


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T


def bm25_scores(texts: Sequence[str], queries: Sequence[Query]) -> np.ndarray:
    """Return each text's mean BM25 score for the queries (problem and solution together).

    Args:
        texts: N documents.
        queries: the queries of one task.

    Returns:
        [N] float64.

    Source: Robertson and Zaragoza 2009, in bm25s's Lucene variant.
    """
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)
    total = np.zeros(len(texts))
    for query in queries:
        words: Any = bm25s.tokenize(
            f"{query.problem} {query.completion}", stopwords="en", return_ids=False, show_progress=False
        )[0]
        known = [w for w in words if w in index.vocab_dict]
        if known:
            total += index.get_scores(known)
    return total / max(len(queries), 1)


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


def fidelity(ctx: StageContext, loaded: LoadedFeatures, queries: dict[str, Query]) -> dict[str, Any]:
    """Compare stored features with exact gradients on documents and queries that the fit hasn't seen."""
    from safetensors.numpy import load_file

    path = ctx.run_dir / "features" / "exact.safetensors"
    if not path.exists():
        return {"documents": 0, "queries": 0}
    arrays = load_file(path)
    position = {i: row for row, i in enumerate(loaded.ids)}
    documents = [f"{i:016x}" for i in arrays["document"].tolist()]
    usable = [
        row for row, i in enumerate(documents) if i in position and np.isfinite(arrays["cosine"][row]).all()
    ]
    rows = [position[documents[row]] for row in usable]
    names = [f"{i:016x}" for i in arrays["query"].tolist()]
    columns = [loaded.query_ids.index(i) for i in names]
    exact = arrays["cosine"][usable]
    found = loaded.values[rows] @ loaded.query_values[columns].T
    result: dict[str, Any] = {"documents": len(rows), "queries": len(names), **agreement(found, exact)}
    result["tasks"] = {}
    for task in sorted({queries[i].task for i in names}):
        mine = [c for c, i in enumerate(names) if queries[i].task == task]
        result["tasks"][task] = agreement(found[:, mine], exact[:, mine])
    return result


def negative_control(
    columns: dict[str, np.ndarray], tasks: list[str], k: int, sources: Sequence[str]
) -> dict[str, Any]:
    """Overlap of each task's top k with the top k of an unrelated target; chance is k / N.

    An overlap above chance would mean that scores depend on the text alone (its length, its loss), not
    on the target. Targets that draw on different sources share less than chance; `within_sources`
    therefore gives the overlap of the top share k / N of every source, which doesn't see that.

    Args:
        columns: scores per text; without `influence:control` there is nothing to compare.
        tasks: the tasks' names.
        k: how many texts are chosen.
        sources: each text's source.

    Returns:
        `overlap` and `within_sources` per task, `chance` and `chance_interval` (hypergeometric, mean
        +- 1.96 standard deviations: where two unrelated choices of k among N fall).
    """
    if "influence:control" not in columns:
        return {}
    control = columns["influence:control"]
    n = len(control)
    chance = k / n
    spread = 1.96 * float(np.sqrt(chance * (1 - chance) * (n - k) / max(n - 1, 1) / k))
    best = set(np.argsort(-control, kind="stable")[:k].tolist())
    overlap, within = {}, {}
    groups = [np.flatnonzero(np.array(sources) == s) for s in sorted(set(sources))]
    for task in tasks:
        scores = columns[f"influence:{task}"]
        mine = set(np.argsort(-scores, kind="stable")[:k].tolist())
        overlap[task] = len(best & mine) / k
        shared = chosen = 0
        for rows in groups:
            size = max(1, round(len(rows) * chance))
            tops = [set(np.argsort(-x[rows], kind="stable")[:size].tolist()) for x in (scores, control)]
            shared, chosen = shared + len(tops[0] & tops[1]), chosen + size
        within[task] = shared / chosen
    return {
        "overlap": overlap,
        "within_sources": within,
        "chance": chance,
        "chance_interval": [max(0.0, chance - spread), min(1.0, chance + spread)],
    }


def read_scores(folder: Path) -> dict[str, Any]:
    """Read influence/scores.parquet as a dictionary of columns (lists of text, arrays of numbers)."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "scores.parquet")
    return {
        name: table[name].to_pylist() if name in ("id", "source") else table[name].to_numpy()
        for name in table.column_names
    }
