"""A FAISS index over the features: which texts help THIS problem?"""

import sys
from dataclasses import dataclass
from typing import Any

from jz3.stage import StageContext


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """How the index is built."""

    factory: str = "Flat"
    """A FAISS factory string, e.g. `Flat`, `IVF1024,SQ8`, `IVF4096,PQ64`, `HNSW32`."""
    probes: int = 16
    """Cells visited per query by IVF indexes."""
    recall_queries: int = 64
    """Queries (the targets' and, if these are fewer, stored documents) on which recall@100 against the
    exact scan is measured."""
    train: int = 65_536
    """Documents of the training sample, at most."""
    memory: float = 1.0
    """GiB: the index is built in parts that, like the training sample, take about that much. Parts of IVF
    indexes stay on disk and are mapped from there; others are read whole when they are searched."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Build index/ from the run's store, bring it up to date if it is there, and measure its recall."""
    import torch

    from jz3.features.extract import model_hash
    from jz3.features.stage import load_projection, read_extracted
    from jz3.index.build import build_index
    from jz3.index.docs import DocFile
    from jz3.influence import query_groups
    from jz3.models import resolve_model
    from jz3.records import Query
    from jz3.store import Coding, Store

    folder = ctx.path("features", "store")
    store = Store(folder)
    projection = load_projection(folder.parent, model_hash(resolve_model(ctx.recipe.model)))
    coding = Coding(projection.mean, projection.scale, store.info.bits)
    ids, arrays = read_extracted(folder.parent / "queries.safetensors")
    queries = {q.id: q for q in (Query.from_json(row) for row in ctx.rows("targets", "queries.jsonl"))}
    rows = sorted(r for members in query_groups(ids, queries).values() for r in members)
    values = torch.from_numpy(arrays["values"][rows])
    DocFile(ctx.path("corpus", "docs.jsonl"), ctx.out)
    with ctx.progress(len(store), "documents") as advance:
        built = build_index(
            store,
            coding,
            ctx.out,
            ctx.recipe.index,
            queries=values[values.isfinite().all(1)],
            seed=ctx.seed,
            advance=advance,
        )
    print(f"  index: {describe(built)}", file=sys.stderr, flush=True)
    return built


def describe(built: dict[str, Any]) -> str:
    """Return a line about a built index, from its index.json."""
    of_targets = built["recall_target_queries"]
    stored = built["recall_queries"] - of_targets
    return (
        f"{built['factory']}, {built['documents']:,} documents, recall@100 {built['recall_at_100']:.3f} against the "
        f"exact scan ({of_targets} target queries, {stored} documents)"
    )
