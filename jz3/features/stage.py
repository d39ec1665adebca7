"""The `features` stage: fit, queries, documents into the store, exact cosines for the fidelity."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.errors import Jz3Error
from jz3.features import BY_PRODUCTS
from jz3.features.adapted import AdaptedFit, fit_adapted
from jz3.features.completion import fit_completion
from jz3.features.exact import exact_cosines
from jz3.features.extract import Extracted, Projection, coding_of, extract, model_hash, open_sink
from jz3.features.less import AdamDirection, Less
from jz3.features.lora import LoraShape, WarmUp, warm_up
from jz3.features.readout import Readout
from jz3.features.sketch import Sketch
from jz3.features.trainer_checkpoint import adopt_checkpoints
from jz3.files import hash_file, read_json, read_jsonl, write_jsonl, write_tensors
from jz3.gradients import (
    RefusedText,
    Tokens,
    layer_shape,
    linear_layers,
    set_products,
    start_tokens,
    tokenize_query,
    tokenize_text,
)
from jz3.models import load_on_device, load_tokenizer, resolve_model
from jz3.records import Doc, Query, Reject
from jz3.seeding import rng
from jz3.stage import StageContext, release_memory, trim_heap
from jz3.store import Store, StoreInfo, has_shard, module_hash, open_store, write_shard
from jz3.store.shard import shard_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROJECTIONS: dict[str, tuple[str, Any]] = {
    "adapted": ("fit.safetensors", AdaptedFit),
    "sketch": ("sketch.json", Sketch),
    "less": ("less.json", Less),
    "readout": ("readout.json", Readout),
}
"""Per kind the file of its projection in the stage's folder, and its class."""
LARGE_FIT = "queries-fit.safetensors"
"""The fit that queries are computed on; there until they are."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Compute the features of all queries and documents; see the store's and the fit's formats."""
    config = ctx.recipe.features
    folder = resolve_model(ctx.recipe.model)
    tokenizer = load_tokenizer(folder)
    rejects: list[Reject] = []
    documents = tokenize_documents(ctx, tokenizer, rejects)
    queries = tokenize_queries(ctx, tokenizer, rejects)
    _check_kept(ctx, documents, queries)
    model = load_on_device(folder, ctx.recipe.model.dtype)
    products = set_products(model, config.products if config.kind in BY_PRODUCTS else "exact")
    layers = linear_layers(model)
    name = model_hash(folder)

    sample, held_out = split_sample(ctx, documents)
    projection = _projection(ctx, model, layers, name, queries, sample, documents)
    path = projection_path(ctx.out)
    store = ctx.out / "store"
    open_store(
        store,
        StoreInfo(
            kind=config.kind,
            k=projection.k,
            bits=config.bits,
            model_hash=name,
            projection_hash=hash_file(path),
            reduction=config.reduction,
            module_hash=module_hash({n: layer_shape(m) for n, m in layers.items()}),
            seed=ctx.seed,
            products=products,
        ),
    )
    options = {"batch_tokens": config.batch_tokens, "reduction": config.reduction}
    everything = [t for texts in queries.values() for t in texts]
    if not (ctx.out / "queries.safetensors").exists():
        found = _queries(ctx, model, layers, name, projection, everything, sample)
        _write_extracted(ctx.out / "queries.safetensors", [t.id for t in everything], found, with_values=True)
        (ctx.out / LARGE_FIT).unlink(missing_ok=True)
        release_memory()
    names, arrays = read_extracted(ctx.out / "queries.safetensors")
    lost = {i for i, norm in zip(names, arrays["norm"], strict=True) if not np.isfinite(norm)}
    rejects += [Reject(id=i, stage="features", reason="gradient_not_finite") for i in sorted(lost)]

    sink = open_sink(projection, model)
    coding = coding_of(projection, config.bits)
    unusable = 0
    with ctx.progress(len(documents), "documents") as advance:
        for number, start in enumerate(range(0, len(documents), config.shard_documents)):
            part = documents[start : start + config.shard_documents]
            side = ctx.out / "documents" / f"{number:06d}.safetensors"
            if has_shard(store, number) and side.exists():
                advance(len(part))
                continue
            found = extract(model, layers, part, projection, sink=sink, advance=advance, **options)
            good = _finite(found)
            write_shard(
                store,
                number,
                [t.id for t, ok in zip(part, good, strict=True) if ok],
                found.values[good],
                found.norm[good],
                coding,
            )
            _write_extracted(side, [t.id for t in part], found, with_values=False)
            del found
            trim_heap()
    for side in sorted((ctx.out / "documents").glob("*.safetensors")):
        ids, arrays = read_extracted(side)
        for i, ok in zip(ids, np.isfinite(arrays["norm"]) & (arrays["norm"] > 0), strict=True):
            if not ok:
                unusable += 1
                rejects.append(Reject(id=i, stage="features", reason="gradient_not_finite"))
    write_jsonl(ctx.out / "rejects.jsonl", (r.to_json() for r in rejects))

    compared = _write_exact(ctx, model, layers, held_out, queries["unseen"])
    reasons: dict[str, int] = {}
    for reject in rejects:
        reasons[reject.reason] = reasons.get(reject.reason, 0) + 1
    return {
        "kind": config.kind,
        "k": projection.k,
        "bits": config.bits,
        "bytes_per_document": projection.k * config.bits // 8,
        "layers": len(projection.layers) if isinstance(projection, AdaptedFit) else len(layers),
        "products": products,
        "documents": len(documents) - unusable,
        "tokens": sum(len(t.ids) for t in documents),
        "cut": sum(t.cut > 0 for t in documents),
        "cut_tokens": sum(t.cut for t in documents),
        "split": sum(0 < t.window < len(t.ids) for t in documents),
        "queries": {role: sum(t.id not in lost for t in texts) for role, texts in queries.items()},
        "fit_documents": len(sample),
        "exact": compared,
        "rejected": reasons,
        "backend": backend.report(),
    }


def _check_kept(ctx: StageContext, documents: list[Tokens], queries: dict[str, list[Tokens]]) -> None:
    """Refuse what a killed making has left where the corpus or the targets were made anew since."""
    size = ctx.recipe.features.shard_documents
    files = {path: int(path.stem) * size for path in (ctx.out / "documents").glob("*.safetensors")}
    wanted = {path: documents[start : start + size] for path, start in files.items()}
    if (path := ctx.out / "queries.safetensors").exists():
        wanted[path] = [t for texts in queries.values() for t in texts]
    for path, texts in sorted(wanted.items()):
        if _ids_of(path) != [t.id for t in texts]:
            raise Jz3Error(
                f"{path} belongs to another corpus or other targets than {ctx.run_dir} holds now; delete {ctx.out}, to "
                "make it again"
            )


def lost_documents(folder: Path) -> str:
    """Say which documents' features a finished stage has lost; readers would do without them.

    Args:
        folder: the stage's.

    Returns:
        A clause with the number of documents and the first files that are missing; empty if nothing is lost.
    """
    store = folder / "store"
    wanted = read_json(folder / "manifest.json")["summary"]["documents"]
    shards = Store(store).shards if (store / "store.json").is_file() else []
    rows = sum(shard.rows for shard in shards)
    written = {shard.number for shard in shards}
    beside = {int(path.stem) for path in (folder / "documents").glob("*.safetensors")}
    lost = [str(shard_path(store, n)) for n in sorted(beside - written)]
    lost += [str(shard_path(folder / "documents", n)) for n in sorted(written - beside)]
    if rows == wanted and not lost:
        return ""
    files = f" ({', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''} missing or damaged)" if lost else ""
    return f"{store} holds {rows} of {wanted} documents{files}"


def projection_path(folder: Path) -> Path:
    """Return the file of a features folder's projection.

    Raises:
        Jz3Error: there is none.
    """
    for file, _ in PROJECTIONS.values():
        if (folder / file).exists():
            return folder / file
    raise Jz3Error(f"{folder} holds no fit, sketch or other projection; run `jz3 features` first")


def load_projection(folder: Path, model: str) -> Projection:
    """Read the projection of a features folder and refuse one of another model."""
    path = projection_path(folder)
    return next(kind for file, kind in PROJECTIONS.values() if file == path.name).load(path, model)


def tokenize_documents(
    ctx: StageContext, tokenizer: "PreTrainedTokenizerBase", rejects: list[Reject]
) -> list[Tokens]:
    """Tokenise the corpus; a text with nothing to predict becomes a reject."""
    documents = []
    config = ctx.recipe.features
    # The corpus counts a text alone, and a piece that just fits shall not lose its end to a start token.
    limit = ctx.recipe.corpus.max_tokens + len(start_tokens(tokenizer))
    prompted = False
    for row in read_jsonl(ctx.path("corpus", "docs.jsonl")):
        doc = Doc.from_json(row)
        prompted |= config.prompt_field in doc.meta
        try:
            prompt = doc.meta.get(config.prompt_field, "")
            documents.append(tokenize_text(tokenizer, doc.id, doc.text, limit, config.long, prompt))
        except RefusedText as error:
            rejects.append(Reject(id=doc.id, stage="features", reason=error.reason, detail=str(error)))
    if not documents:
        raise Jz3Error("the corpus holds no usable text; see corpus/rejects.jsonl")
    if config.prompt_field and not prompted:
        raise Jz3Error(
            f"features.prompt_field: no text of the corpus has the field {config.prompt_field!r}; a source keeps those "
            "named in its keep_fields"
        )
    return documents


def tokenize_queries(
    ctx: StageContext, tokenizer: "PreTrainedTokenizerBase", rejects: list[Reject]
) -> dict[str, list[Tokens]]:
    """Tokenise the queries by role; one without a completion to score becomes a reject."""
    queries: dict[str, list[Tokens]] = {"fit": [], "unseen": [], "control": []}
    for row in ctx.rows("targets", "queries.jsonl"):
        query = Query.from_json(row)
        try:
            tokens = tokenize_query(
                tokenizer, query.id, query.prompt, query.completion, ctx.recipe.features.query_tokens
            )
            queries[query.role].append(tokens)
        except RefusedText as error:
            rejects.append(Reject(id=query.id, stage="features", reason=error.reason, detail=str(error)))
    if not queries["fit"]:
        raise Jz3Error("no usable target query; see targets/rejects.jsonl and features/rejects.jsonl")
    return queries


def split_sample(ctx: StageContext, documents: Sequence[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """Draw the fit's documents, and from the others those of the comparison with exact gradients."""
    config = ctx.recipe.features
    order = rng(ctx.seed, "features", "sample").permutation(len(documents))
    # A small corpus must leave some documents for the comparison.
    fit = min(config.fit_documents, len(documents) // 2)
    shuffled = [documents[i] for i in order]
    return shuffled[:fit], shuffled[fit : fit + config.exact_documents]


def _projection(
    ctx: StageContext,
    model: Any,
    layers: Any,
    name: str,
    queries: dict[str, list[Tokens]],
    sample: list[Tokens],
    documents: list[Tokens],
) -> Projection:
    config = ctx.recipe.features
    path = ctx.out / PROJECTIONS[config.kind][0]
    if path.exists():
        return load_projection(ctx.out, name)
    if config.kind == "sketch":
        Sketch.of(name, layers, config.k, config.sketch_left, config.sketch_right, ctx.seed).save(path)
        return load_projection(ctx.out, name)
    if config.kind == "readout":
        Readout(name, config.k, config.readout_left, ctx.seed).save(path)
        return load_projection(ctx.out, name)
    if config.kind == "less":
        _warmed_up(ctx, model, name, documents).save(path)
        return load_projection(ctx.out, name)
    seen = queries["fit"][: config.fit_queries]
    with ctx.progress(2 * (len(seen) + len(sample)), "fit") as advance:
        fit = fit_adapted(
            model,
            name,
            layers,
            seen,
            sample,
            k=config.k + config.completion,
            rank=config.rank,
            max_layers=config.layers,
            batch_tokens=config.fit_batch_tokens,
            reduction=config.reduction,
            seed=ctx.seed,
            advance=advance,
        )
    fit.save(ctx.out / LARGE_FIT)
    fit.top(min(config.k, fit.k)).save(path)
    del fit
    release_memory()
    return load_projection(ctx.out, name)


def _queries(
    ctx: StageContext,
    model: Any,
    layers: Any,
    name: str,
    projection: Projection,
    queries: list[Tokens],
    sample: list[Tokens],
) -> Extracted:
    """Compute the queries' features; those of `adapted` are completed from the fit's documents."""
    config = ctx.recipe.features
    options = {"batch_tokens": config.batch_tokens, "reduction": config.reduction}
    completed = config.kind == "adapted" and config.completion > 0 and len(sample) > 1
    source = AdaptedFit.load(ctx.out / LARGE_FIT, name) if completed else projection
    with ctx.progress(len(queries), "queries") as advance:
        found = extract(model, layers, queries, source, side="query", advance=advance, **options)
    if not isinstance(source, AdaptedFit) or not completed:
        return found
    with ctx.progress(len(sample), "completion of the queries") as advance:
        completion = fit_completion(model, layers, source, projection.k, sample, advance=advance, **options)
    return dataclasses.replace(found, values=completion.fold(found.values))


def _warmed_up(ctx: StageContext, model: Any, name: str, documents: list[Tokens]) -> Less:
    """Train the adapters of `less` on a part of the corpus, or adopt the checkpoints of a training."""
    config = ctx.recipe.features
    less = config.less
    direction = AdamDirection(eps=less.eps, eps_inside=less.eps_inside, bias_correction=less.bias_correction)
    if less.checkpoints:
        checkpoints = adopt_checkpoints(
            [Path(c) for c in less.checkpoints],
            model,
            name,
            ctx.out / "warm-up",
            learning_rates=less.learning_rates,
            direction=direction,
        )
        return Less(name, checkpoints, config.k, ctx.seed, direction)
    shape = LoraShape(rank=less.rank, alpha=less.alpha, dropout=less.dropout, targets=less.targets)
    settings = WarmUp(
        share=less.share,
        epochs=less.epochs,
        learning_rate=less.learning_rate,
        batch_texts=less.batch_texts,
    )
    count = max(1, round(less.share * len(documents))) * less.epochs
    with ctx.progress(count, "warm-up") as advance:
        checkpoints = warm_up(
            model,
            name,
            documents,
            ctx.out / "warm-up",
            shape=shape,
            settings=settings,
            batch_tokens=config.batch_tokens,
            seed=ctx.seed,
            advance=advance,
        )
    release_memory()
    return Less(name, checkpoints, config.k, ctx.seed, direction)


def _write_exact(
    ctx: StageContext, model: Any, layers: Any, documents: list[Tokens], unseen: list[Tokens]
) -> dict[str, int]:
    """Write the exact cosines of held-out documents with unseen queries."""
    import torch

    config = ctx.recipe.features
    queries = unseen[: config.exact_queries]
    if not documents or not queries:
        log.warning("no document or unseen query is left to compare features with exact gradients")
        return {"documents": 0, "queries": 0}
    path = ctx.out / "exact.safetensors"
    if not path.exists():
        release_memory()
        with ctx.progress(len(documents), "exact gradients") as advance:
            cosines = exact_cosines(
                model,
                layers,
                documents,
                queries,
                # Like the fit it holds a batch's layer inputs.
                batch_tokens=min(config.batch_tokens, config.fit_batch_tokens),
                reduction=config.reduction,
                advance=advance,
            )
        tensors = {
            "cosine": cosines.float().contiguous(),
            "document": torch.from_numpy(_numbers([t.id for t in documents])),
            "query": torch.from_numpy(_numbers([t.id for t in queries])),
        }
        write_tensors(path, tensors)
    return {"documents": len(documents), "queries": len(queries)}


def _numbers(ids: list[str]) -> np.ndarray:
    return np.array([int(i, 16) for i in ids], dtype=np.uint64)


def _finite(found: Extracted) -> "Any":
    import torch

    return torch.isfinite(found.norm) & (found.norm > 0) & torch.isfinite(found.values).all(1)


def _write_extracted(path: Path, ids: list[str], found: Extracted, with_values: bool) -> None:
    import torch

    tensors = {
        "id": torch.from_numpy(_numbers(ids)),
        "norm": torch.where(_finite(found), found.norm, torch.nan),
        "loss": found.loss,
        "hidden": found.hidden,
    }
    if with_values:
        tensors["values"] = found.values
    write_tensors(path, {n: t.contiguous() for n, t in tensors.items()})


def _ids_of(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return [f"{i:016x}" for i in file.get_tensor("id").tolist()]


def read_extracted(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read what the stage wrote for queries or one shard of documents: ids and arrays."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    return [f"{i:016x}" for i in arrays.pop("id").tolist()], arrays
