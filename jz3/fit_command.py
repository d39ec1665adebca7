"""`jz3 fit`: the fit file of `adapted` features from files of queries, documents, or both."""

import heapq
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from jz3.corpus.config import SourceConfig
from jz3.corpus.readers import SourceText, read_jsonl_file, reject
from jz3.errors import Jz3Error
from jz3.records import Reject


def fit(
    model: Positional[str],
    queries: Path | None = None,
    documents: Path | None = None,
    out: Path = Path("fit.safetensors"),
    k: int = 4096,
    rank: int = 128,
    layers: int = 256,
    max_queries: int = 200,
    max_documents: int = 400,
    max_tokens: int = 512,
    prompt_field: str = "",
    batch_tokens: int = 1024,
    reduction: str = "mean",
    dtype: str = "auto",
    products: str = "auto",
    seed: int = 0,
) -> None:
    """Fit `adapted` features to queries, documents, or both, once per model and corpus.

    Args:
        model: a folder, a name on the Hugging Face hub, `smollm2-135m-instruct` or `tiny`.
        queries: JSON lines with `prompt` and `completion`; plain, `.gz` or `.zst`.
        documents: JSON lines with `text`, likewise.
        out: the fit's file; it holds the model's hash and serves that model only.
        k: numbers per document.
        rank: basis vectors per layer before the coordinates are chosen, mean of its two sides.
        layers: how many layers, those with the most energy, may give coordinates.
        max_queries: of a longer file so many are drawn at random.
        max_documents: likewise for documents.
        max_tokens: longer texts are cut at the end.
        prompt_field: of the documents; what it holds is not scored where the text begins with it.
        batch_tokens: padded tokens per pass.
        reduction: a text's loss is the `mean` or the `sum` over its scored tokens.
        dtype: `bfloat16`, `float32` or `auto`, of the model.
        products: as in `jz3 score`.
        seed: of the draw and of the range finder.
    """
    from jz3.features.adapted import fit_adapted
    from jz3.features.extract import model_hash
    from jz3.gradients import linear_layers, set_products, tokenize_query, tokenize_text
    from jz3.models import ModelConfig, load_on_device, load_tokenizer, resolve_model
    from jz3.stage import progress_bar

    if queries is None and documents is None:
        raise ValueError("jz3 fit needs --queries, --documents, or both")
    for name, value in (
        ("k", k),
        ("rank", rank),
        ("layers", layers),
        ("max-queries", max_queries),
        ("max-documents", max_documents),
        ("max-tokens", max_tokens),
        ("batch-tokens", batch_tokens),
    ):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    folder = resolve_model(ModelConfig(name=model, dtype=dtype))
    tokenizer = load_tokenizer(folder)
    asked = _tokens(
        queries,
        ("prompt", "completion"),
        max_queries,
        seed,
        lambda row: tokenize_query(tokenizer, row.where, row.meta["prompt"], row.text, max_tokens),
    )
    texts = _tokens(
        documents,
        ("text",),
        max_documents,
        seed,
        lambda row: tokenize_text(
            tokenizer, row.where, row.text, max_tokens, prompt=row.meta.get(prompt_field, "")
        ),
        (prompt_field,) if prompt_field else (),
    )
    loaded = load_on_device(folder, dtype)
    set_products(loaded, products)
    with progress_bar(2 * (len(asked) + len(texts)), "fit: texts") as advance:
        made = fit_adapted(
            loaded,
            model_hash(folder),
            linear_layers(loaded),
            asked,
            texts,
            k=k,
            rank=rank,
            max_layers=layers,
            batch_tokens=batch_tokens,
            reduction=reduction,
            seed=seed,
            advance=advance,
        )
    digest = made.save(out)
    print(
        f"{out}: {made.k} coordinates of {len(made.layers)} layers, {made.k // 4} bytes a document at 2 bits, "
        f"fitted to {len(asked)} queries and {len(texts)} documents, hash {digest}"
    )


def _tokens(
    path: Path | None,
    fields: tuple[str, ...],
    limit: int,
    seed: int,
    tokenize: Callable[[SourceText], Any],
    optional: tuple[str, ...] = (),
) -> list[Any]:
    """Read and tokenise a file's rows, at most `limit` of them; unusable ones are counted and told.

    The last of `fields` is a row's text. The draw needs the number of rows, so that the file is read twice;
    in memory are the drawn texts and, of the other rows, their places in the draw alone.
    """
    from jz3.seeding import rng

    if path is None:
        return []
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.suffix == ".parquet":
        raise ValueError(f"{path} is a Parquet file; jz3 fit reads JSON lines, convert it to those")
    source = SourceConfig(
        name="fit",
        kind="jsonl",
        paths=(str(path),),
        text_field=fields[-1],
        keep_fields=(*fields[:-1], *optional),
    )
    places = np.argsort(
        rng(seed, "fit", path.name).permutation(sum(1 for _ in read_jsonl_file(path, source)))
    )
    drawn: list[tuple[int, Any]] = []
    unusable: Counter[str] = Counter()
    first: dict[str, str] = {}
    kept: set[str] = set()
    for place, row in zip(places, read_jsonl_file(path, source), strict=True):
        if isinstance(row, SourceText):
            kept.update(row.meta)
            if len(drawn) == limit and -place < drawn[0][0]:
                continue
            row = _tokenized(row, fields, tokenize)
        if isinstance(row, Reject):
            unusable[row.reason] += 1
            first.setdefault(row.reason, f"{row.where}: {row.detail}" if row.detail else row.where)
        elif len(drawn) < limit:
            heapq.heappush(drawn, (-int(place), row))
        else:
            heapq.heapreplace(drawn, (-int(place), row))
    reasons = "; ".join(
        f"{count} x {reason}, first {first[reason]}" for reason, count in unusable.most_common()
    )
    if not drawn:
        raise Jz3Error(f"{path} holds no usable row with {' and '.join(fields)} ({reasons})")
    if missing := [name for name in optional if name not in kept]:
        raise Jz3Error(f"--prompt-field: no row of {path} has the field {missing[0]!r}")
    if unusable:
        print(f"{path}: {sum(unusable.values())} rows are unusable: {reasons}")
    return [tokens for _, tokens in sorted(drawn, key=lambda pair: -pair[0])]


def _tokenized(row: SourceText, fields: tuple[str, ...], tokenize: Callable[[SourceText], Any]) -> Any:
    """Tokenise a row, or say why it can't be used."""
    from jz3.gradients import RefusedText

    for name in fields[:-1]:
        if name not in row.meta:
            return reject("missing_field", row.where, f"no field {name!r}")
    try:
        return tokenize(row)
    except RefusedText as error:
        return reject(error.reason, row.where, str(error))
