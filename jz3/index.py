"""A FAISS index over the features: which texts help THIS problem?"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.features.extract import extract, model_hash
from jz3.features.stage import load_projection
from jz3.files import atomic_path
from jz3.gradients import linear_layers, tokenize_query, tokenize_text
from jz3.influence import load_features
from jz3.models import best_device, load_model, load_tokenizer, resolve_model
from jz3.records import Doc
from jz3.stage import StageContext
from jz3.templates import prompt_for


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """How the index is built."""

    factory: str = "Flat"
    """A FAISS factory string, e.g. `Flat`, `IVF1024,SQ8`, `IVF4096,PQ64`, `HNSW32`."""
    probes: int = 16
    """Cells visited per query by IVF indexes."""
    recall_queries: int = 64
    """Stored documents used as queries to measure recall@10 against the exact scan."""


@dataclass(frozen=True, slots=True)
class Match:
    """A text found for a problem."""

    doc: Doc
    score: float
    """Cosine of its gradient with the problem's."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Write index/features.faiss and measure its recall."""
    faiss = _faiss()
    config = ctx.recipe.index
    loaded = load_features(ctx)
    values = np.ascontiguousarray(loaded.values, dtype=np.float32)
    try:
        index = faiss.index_factory(values.shape[1], config.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"index.factory {config.factory!r} is no FAISS factory string ({error})") from error
    _set_probes(index, config.probes)
    if not index.is_trained:
        try:
            index.train(values)
        except RuntimeError as error:
            raise ValueError(
                f"index.factory {config.factory!r} needs more than {len(values)} documents to train; use `Flat`"
            ) from error
    index.add(values)
    with atomic_path(ctx.out / "features.faiss") as part:
        faiss.write_index(index, str(part))
    sample = values[:: max(1, len(values) // config.recall_queries)][: config.recall_queries]
    top = min(10, len(values))
    found = index.search(sample, top)[1]
    exact = np.argsort(-(sample @ values.T), axis=1, kind="stable")[:, :top]
    recall = np.mean([len(np.intersect1d(f, e)) / top for f, e in zip(found, exact, strict=True)])
    return {"factory": config.factory, "documents": int(index.ntotal), "recall_at_10": float(recall)}


def query_run(ctx: StageContext, text: str, solution: str, k: int) -> list[Match]:
    """Return the texts of a run's corpus whose gradients agree most with a problem's.

    Args:
        ctx: of a run whose index is built.
        text: the problem (or any text).
        solution: its solution; if given, only its tokens are scored, as for target queries. Without
            one every token of `text` is scored.
        k: how many texts.

    Returns:
        At most `k` matches, best first.

    Raises:
        ValueError: the text is empty or too short to have a gradient.
        Jz3Error: the index isn't built, or is of another model.
    """
    faiss = _faiss()
    if not text.strip():
        raise ValueError("the text to look up is empty")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    path = ctx.path("index", "features.faiss")
    config = ctx.recipe.features
    folder = resolve_model(ctx.recipe.model)
    projection = load_projection(ctx.path("features", "store").parent, model_hash(folder))
    tokenizer = load_tokenizer(folder)
    if solution.strip():
        tokens = tokenize_query(tokenizer, "query", prompt_for(text, "cot"), solution, config.query_tokens)
    else:
        tokens = tokenize_text(tokenizer, "query", text, config.query_tokens)
    model: Any = load_model(folder, ctx.recipe.model.dtype)
    model = model.to(best_device())
    found = extract(model, linear_layers(model), [tokens], projection, reduction=config.reduction)
    index = faiss.read_index(str(path))
    _set_probes(index, ctx.recipe.index.probes)
    scores, rows = index.search(np.ascontiguousarray(found.values.numpy()), min(k, index.ntotal))
    docs = {d["id"]: d for d in ctx.rows("corpus", "docs.jsonl")}
    ids = load_features(ctx).ids
    return [
        Match(Doc.from_json(docs[ids[row]]), float(score))
        for row, score in zip(rows[0], scores[0], strict=True)
        if row >= 0
    ]


def _set_probes(index: Any, probes: int) -> None:
    if hasattr(index, "nprobe"):
        index.nprobe = probes


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise Jz3Error("FAISS is not installed; pip install 'jz3[cpu]' (or 'jz3[gpu]')") from error
    return faiss
