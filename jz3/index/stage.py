"""The stage, and the same for runs of `jz3 score`."""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.index.build import describe
from jz3.index.config import IndexConfig
from jz3.stage import StageContext, progress_bar

if TYPE_CHECKING:
    import torch

    from jz3.index.collection import Collection


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
        Jz3Error: the run has no features, its model or corpus is missing, or another process builds the index;
            the message says what to do.
    """
    from jz3.files import locked

    if collection.missing_features:
        raise Jz3Error(collection.missing_features)
    with locked(collection.index / ".lock", wait=False) as alone:
        if not alone:
            raise Jz3Error(f"another process is building {collection.index}")
        return _index_scored(collection, config)


def _index_scored(collection: "Collection", config: IndexConfig) -> dict[str, Any]:
    from jz3.gradients import tokenize_query
    from jz3.index.query import Searcher

    searcher = Searcher(collection, exact=True)
    limit = searcher.query_tokens
    tokens = []
    for query in collection.queries():
        # Some can't be scored, which the run's rejects tell.
        with contextlib.suppress(ValueError):
            if query.role == "fit" and len(tokens) < config.recall_queries:
                row = tokenize_query(searcher.tokenizer, query.id, query.prompt, query.completion, limit)
                tokens.append(row)
    return _build(collection, config, searcher.features(tokens))


def _build(collection: "Collection", config: IndexConfig, queries: "torch.Tensor") -> dict[str, Any]:
    from jz3.index.build import build_index

    vectors = collection.vectors()
    collection.prepare_texts()
    with progress_bar(len(vectors), "index: documents") as advance:
        built = build_index(
            vectors,
            collection.index,
            config,
            queries=queries[queries.isfinite().all(1)],
            seed=collection.seed,
            advance=advance,
        )
    print(f"  index: {describe(built)}", file=sys.stderr, flush=True)
    return built
