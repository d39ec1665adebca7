"""`jz3 fit`: the fit file of `adapted` features from files of queries, documents, or both."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from jz3.errors import Jz3Error
from jz3.files import hash_text, read_jsonl


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
        queries: JSON lines with `prompt` and `completion`.
        documents: JSON lines with `text`.
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
        products: `exact`, `int8`, `int16` or `auto`, as in `jz3 score`.
        seed: of the draw and of the range finder.
    """
    from jz3.features.adapted import fit_adapted
    from jz3.features.extract import model_hash
    from jz3.gradients import linear_layers, set_products, tokenize_query, tokenize_text
    from jz3.models import ModelConfig, best_device, load_model, load_tokenizer, resolve_model
    from jz3.stage import progress_bar

    if queries is None and documents is None:
        raise ValueError("jz3 fit needs --queries, --documents, or both")
    folder = resolve_model(ModelConfig(name=model, dtype=dtype))
    tokenizer = load_tokenizer(folder)
    asked = _tokens(
        queries,
        ("prompt", "completion"),
        max_queries,
        seed,
        lambda key, row: tokenize_query(tokenizer, key, row["prompt"], row["completion"], max_tokens),
    )
    texts = _tokens(
        documents,
        ("text",),
        max_documents,
        seed,
        lambda key, row: tokenize_text(
            tokenizer, key, row["text"], max_tokens, prompt=str(row.get(prompt_field) or "")
        ),
    )
    loaded: Any = load_model(folder, dtype)
    loaded = loaded.to(best_device())
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
    tokenize: Callable[[str, dict[str, str]], Any],
) -> list[Any]:
    """Read and tokenise a file's rows, at most `limit` of them; unusable ones are counted and told."""
    from jz3.seeding import rng

    if path is None:
        return []
    rows = list(read_jsonl(path))
    found: list[Any] = []
    unusable: Counter[str] = Counter()
    for i in rng(seed, "fit", path.name).permutation(len(rows)):
        if len(found) == limit:
            break
        row = rows[i]
        if not (isinstance(row, dict) and all(isinstance(row.get(f), str) for f in fields)):
            unusable[f"no text under {' and '.join(fields)}"] += 1
            continue
        try:
            found.append(tokenize(hash_text("\n".join(row[f] for f in fields)), row))
        except ValueError as error:
            unusable[" ".join(str(error).split()[2:])] += 1
    if unusable:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in unusable.most_common(3))
        print(f"{path}: {sum(unusable.values())} rows are unusable: {reasons}")
    if not found:
        raise Jz3Error(f"{path} holds no usable row with {' and '.join(fields)}")
    return found
