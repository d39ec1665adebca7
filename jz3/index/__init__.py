"""A FAISS index over the features: which texts help THIS problem?"""

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jz3.stage import StageContext, progress_bar

if TYPE_CHECKING:
    import torch

    from jz3.index.collection import Collection


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

    from jz3.features.stage import read_extracted
    from jz3.index.collection import LoopCollection
    from jz3.influence import query_groups

    collection = LoopCollection(ctx)
    ids, arrays = read_extracted(ctx.path("features", "store").parent / "queries.safetensors")
    queries = {q.id: q for q in collection.queries()}
    rows = sorted(r for members in query_groups(ids, queries).values() for r in members)
    return _build(collection, ctx.recipe.index, torch.from_numpy(arrays["values"][rows]))


def index_scored(collection: "Collection", config: IndexConfig) -> dict[str, Any]:
    """Build the index of a run of `jz3 score`, or bring it up to date, and measure its recall.

    Raises:
        Jz3Error: the run has no features, or its model or corpus is missing; the message says what to do.
    """
    from jz3.gradients import tokenize_query
    from jz3.index.query import Searcher

    searcher = Searcher(collection, exact=True)
    limit = searcher.encoding.query_tokens
    tokens = []
    for query in collection.queries():
        # Some can't be scored, which the run's rejects tell.
        with contextlib.suppress(ValueError):
            if query.role == "fit" and len(tokens) < config.recall_queries:
                row = tokenize_query(searcher.tokenizer, query.id, query.prompt, query.completion, limit)
                tokens.append(row)
    return _build(collection, config, searcher.features(tokens))


def _build(collection: "Collection", config: IndexConfig, queries: "torch.Tensor") -> dict[str, Any]:
    from jz3.features.extract import coding_of
    from jz3.index.build import build_index

    store, projection = collection.store(), collection.projection()
    collection.prepare_texts()
    with progress_bar(len(store), "index: documents") as advance:
        built = build_index(
            store,
            coding_of(projection, store.info.bits),
            collection.index,
            config,
            queries=queries[queries.isfinite().all(1)],
            seed=collection.seed,
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
