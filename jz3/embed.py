"""The core in three calls, for pipelines of one's own: featurize, influence_scores, select."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import selection
from jz3.arguments import Pair, borrowed, check_model, check_pairs, several
from jz3.features import adapted, less, lora, sketch, trainer_checkpoint
from jz3.features.completion import Completion, fit_completion
from jz3.features.extract import Extracted, Projection, extract, weights_hash
from jz3.files import canonical_json, hash_text
from jz3.gradients import (
    Tokens,
    linear_layers,
    set_products,
    set_query_products,
    start_tokens,
    tokenize_query,
    tokenize_text,
)
from jz3.gradients.layers import plain_model
from jz3.modes import plain_modes
from jz3.ops.checks import check_int
from jz3.seeding import rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOST, _MOST_SEED = 1 << 30, 1 << 63
"""More than any of the numbers below can sensibly be, and any seed."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """Features fitted to queries and to a sample of the documents; see jz3.features.adapted."""

    queries: Sequence[Pair] = ()
    """Of the tasks that the features are for; may be empty."""
    documents: int = 400
    """How many of the documents the fit's sample holds."""
    k: int = 2048
    rank: int = 128
    layers: int = 256
    seed: int = 0
    completion: int = 32768
    """Coordinates beyond `k` that queries are computed on and that their features stand for as far as the sample
    allows (jz3.features.completion); 0 for none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", tuple(several(self.queries)))
        _settle(self, documents=0, k=1, rank=1, layers=1, completion=0, seed=-_MOST_SEED)


@dataclass(frozen=True, slots=True)
class Sketch:
    """Features that need no sample of anything; see jz3.features.sketch."""

    k: int = 8192
    left: int = 512
    right: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _settle(self, k=1, left=1, right=1, seed=-_MOST_SEED)


@dataclass(frozen=True, slots=True)
class Less:
    """Adam's direction on low-rank adapters, as LESS measures influence; see jz3.features.less."""

    folder: Path | str
    """Of the checkpoints; those of another model, other texts or other settings are left alone, a killed warm-up
    goes on, and what `Features.encode` needs later lies here."""
    checkpoints: Sequence[Path | str] = ()
    """Of a PEFT training with the Hugging Face Trainer (adapters and optimizer.pt); if there are any, nothing
    is warmed up."""
    learning_rates: Sequence[float] = ()
    """The weights of `checkpoints`; by default what their training logged."""
    k: int = 8192
    """Numbers per checkpoint."""
    shape: lora.LoraShape = lora.LoraShape()
    warm_up: lora.WarmUp = lora.WarmUp()
    direction: less.AdamDirection = less.AdamDirection()
    seed: int = 0

    def __post_init__(self) -> None:
        _settle(self, k=1, seed=-_MOST_SEED)
        if not isinstance(self.folder, (str, Path)):
            raise TypeError(f"Less: folder must be a str or Path, got {self.folder!r:.60}")
        for name in ("checkpoints", "learning_rates"):
            several = getattr(self, name)
            if isinstance(several, str) or not isinstance(several, Iterable):
                raise TypeError(f"Less: {name} must be several, got {several!r:.60}; put it into a list")
            object.__setattr__(self, name, tuple(several))
        if self.learning_rates and len(self.learning_rates) != len(self.checkpoints):
            raise ValueError(
                f"Less: learning_rates must be as many as checkpoints ({len(self.checkpoints)}), got "
                f"{len(self.learning_rates)}"
            )


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no one truth to compare by
class Features:
    """Features of documents, and what encodes further queries in the same way."""

    model: "PreTrainedModel" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    projection: Projection = field(repr=False)
    max_tokens: int
    reduction: str
    values: np.ndarray = field(repr=False)
    """[N, K] float32: projected gradients, each divided by the norm of the whole gradient (Less: of unit length)."""
    norm: np.ndarray = field(repr=False)
    """[N] float32 (Less: of the last checkpoint's direction)."""
    loss: np.ndarray = field(repr=False)
    """[N] float32, cross-entropy per text."""
    completion: Completion | None = field(default=None, repr=False)
    """What completes queries, of Adapted."""
    products: str = "exact"
    """In what the documents' passes multiplied."""

    @plain_modes()
    def encode(self, queries: Sequence[Pair]) -> np.ndarray:
        """Return the features [Q, K] float32 of queries.

        Raises:
            TypeError: a query is no pair of texts.
            ValueError: a query is too short, holds a token that the model lacks, or has a gradient that is zero or not
                finite.
        """
        queries = several(queries)
        tokens = _query_tokens(self.tokenizer, queries, self.max_tokens)
        _check_vocabulary(self.model, tokens, "query")
        # Training may have gone on since: dropout would make features of chance.
        with borrowed(self.model):
            set_query_products(self.model, self.products)
            found = extract(
                self.model,
                linear_layers(self.model),
                tokens,
                self.completion.fit if self.completion else self.projection,
                reduction=self.reduction,
                side="query",
            )
        folded = self.completion.fold(found.values) if self.completion else found.values
        values, norm = folded.numpy(), found.norm.numpy()
        bad = np.flatnonzero(~(np.isfinite(norm) & (norm > 0) & np.isfinite(values).all(1)))
        if len(bad):
            number = int(bad[0])
            raise ValueError(
                f"the gradient of query {number} has the norm {norm[number]}; leave it out: "
                f"{queries[number][1][:60]!r}"
            )
        return values


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Influence of N documents on each task."""

    values: np.ndarray
    """[N, tasks] float32, mean cosine with the task's queries."""
    tasks: tuple[str, ...]


@plain_modes()
def featurize(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    docs: Iterable[str],
    kind: Adapted | Sketch | Less | None = None,
    *,
    max_tokens: int = 512,
    batch_tokens: int = 4096,
    reduction: str = "mean",
    products: str = "auto",
) -> Features:
    """Compute gradient features of texts.

    phi_i = the kind's K numbers of G_i / ||G_i||, so that phi_i . phi_q is about cos(G_i, G_q); of Less, phi_i has
    Gamma_i instead of G_i, and the product is the mean of the checkpoints' cosines weighted by learning rate.

    Args:
        model: a Hugging Face causal language model; it is frozen and in evaluation mode meanwhile, and left as it
            was. Other threads that ask for features of it wait.
        tokenizer: its tokenizer.
        docs: N texts of at least two tokens; longer ones than `max_tokens` are cut at the end.
        kind: Adapted (the default, fitted to the documents alone), Sketch, or Less (warmed up on a share of the
            documents, or on the checkpoints that it names).
        max_tokens: tokens of a text or query.
        batch_tokens: padded tokens per pass.
        reduction: a text's loss is the `mean` or the `sum` over its scored tokens.
        products: in what the documents' passes multiply: `exact` (the model's dtype); of Llama-like models on a CPU
            also `int8_backward` (8 bits on the way back, with AVX-512 VNNI), `int8` (8 bits, faster and coarser) or
            `int16` (16 bits, with AVX2); or `auto`, the fastest here but `int8`. Less is always exact.

    Returns:
        The features, in the texts' order.

    Raises:
        TypeError: `model` or `tokenizer` is none, `kind` none of the three, a text no str, or a query no pair of them.
        ValueError: there is no text, one is too short or holds a token that the model lacks, or its gradient is not
            finite; a number is out of range.
        Jz3Error: a checkpoint that Less names doesn't fit, or the products can't be had.
    """
    kind = kind or Adapted()
    if not isinstance(kind, (Adapted, Sketch, Less)):
        raise TypeError(
            f"kind must be an Adapted, Sketch or Less, got {kind!r:.60}; for example jz3.Sketch()"
        )
    if isinstance(docs, str):
        raise TypeError(f"docs must be several texts, got one: {docs[:60]!r}; put it into a list")
    if not isinstance(docs, Iterable):
        raise TypeError(f"docs must be several texts, got {docs!r:.60}")
    if isinstance(docs, Mapping) or getattr(docs, "ndim", 1) != 1:
        # Gone through, they give their keys, or the names of their columns.
        raise TypeError(f"docs must be several texts, got a {type(docs).__name__}; give its texts alone")
    check_model(model, tokenizer)
    max_tokens = check_int("featurize", "max_tokens", max_tokens, 2, _MOST)
    batch_tokens = check_int("featurize", "batch_tokens", batch_tokens, 1, _MOST)
    docs = list(docs)
    if not docs:
        raise ValueError("docs is empty")
    if wrong := [i for i, text in enumerate(docs) if not isinstance(text, str)]:
        raise TypeError(
            f"text {wrong[0]} must be a str, got {docs[wrong[0]]!r:.60} ({len(wrong)} such texts); leave it out"
        )
    with borrowed(model):
        start_tokens.cache_clear()  # the tokenizer may have been set up anew
        # Of Less the passes run in a way of their own.
        products = set_products(model, "exact" if isinstance(kind, Less) else products)
        layers = linear_layers(model)
        texts = [tokenize_text(tokenizer, str(i), text, max_tokens) for i, text in enumerate(docs)]
        _check_vocabulary(model, texts, "text")
        projection: Projection
        completion: Completion | None = None
        if isinstance(kind, Sketch):
            projection = sketch.Sketch.of("", layers, kind.k, kind.left, kind.right, kind.seed)
        elif isinstance(kind, Less):
            projection = _less(model, texts, kind, batch_tokens)
        else:
            order = rng(kind.seed, "embed", "sample").permutation(len(texts))[: kind.documents]
            sample = [texts[i] for i in order]
            queries = _query_tokens(tokenizer, kind.queries, max_tokens)
            _check_vocabulary(model, queries, "query")
            fit = adapted.fit_adapted(
                model,
                "",
                layers,
                queries,
                sample,
                k=kind.k + kind.completion,
                rank=kind.rank,
                max_layers=kind.layers,
                reduction=reduction,
                seed=kind.seed,
            )
            projection = fit.top(min(kind.k, fit.k))
            if fit.k > projection.k and len(sample) > 1:
                completion = fit_completion(
                    model, layers, fit, kind.k, sample, batch_tokens=batch_tokens, reduction=reduction
                )
        found: Extracted = extract(
            model, layers, texts, projection, batch_tokens=batch_tokens, reduction=reduction
        )
    norm = found.norm.numpy()
    if not (np.isfinite(norm) & (norm > 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(norm) & (norm > 0)))[0])
        raise ValueError(f"the gradient of text {bad} is {norm[bad]}; leave it out: {docs[bad][:60]!r}")
    return Features(
        model,
        tokenizer,
        projection,
        max_tokens,
        reduction,
        found.values.numpy(),
        norm,
        found.loss.numpy(),
        completion,
        products,
    )


def influence_scores(features: Features, tasks: Mapping[str, Sequence[Pair]]) -> Scores:
    """Score documents for tasks: mean over a task's queries of the cosine of gradients.

    Args:
        features: of the documents.
        tasks: per task its queries.

    Returns:
        The scores, tasks in the mapping's order.

    Raises:
        TypeError: an argument or a query is of another kind.
        ValueError: there is no task, or one without a query.

    Source: LESS (arXiv 2402.04333), equation 5, one checkpoint.
    """
    if not isinstance(features, Features):
        raise TypeError(f"features must be what featurize returned, got {type(features).__name__}")
    if not isinstance(tasks, Mapping):
        raise TypeError(
            f'tasks must be a mapping of names to queries, got {tasks!r:.60}; for example {{"mine": ...}}'
        )
    groups = {name: several(queries) for name, queries in tasks.items()}
    if not groups or not all(groups.values()):
        raise ValueError(
            f"every task needs at least one query, got { ({n: len(q) for n, q in groups.items()})!r}"
        )
    columns = [features.values @ features.encode(queries).mean(0) for queries in groups.values()]
    return Scores(np.stack(columns, 1), tuple(groups))


def select(scores: Scores, k: int, combine: str = "mean") -> list[int]:
    """Choose the k best documents.

    Args:
        scores: from `influence_scores`.
        k: how many.
        combine: `mean`, `max` or `quota`, see jz3.selection.

    Returns:
        Row numbers, best first; equal scores in the documents' order.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: `combine` is unknown, `k` negative, or a score not finite.
    """
    if not isinstance(scores, Scores):
        raise TypeError(f"scores must be what influence_scores returned, got {type(scores).__name__}")
    k = check_int("select", "k", k, 0, _MOST)
    ids = [f"{i:016x}" for i in range(len(scores.values))]
    return selection.select(scores.values, ids, k, combine)


def _settle(kind: Adapted | Sketch | Less, **least: int) -> None:
    """Check the numbers of a kind's settings, which numpy may have made, and keep them as plain ones."""
    for name, low in least.items():
        high = _MOST_SEED if name == "seed" else _MOST
        number = check_int(type(kind).__name__, name, getattr(kind, name), low, high)
        object.__setattr__(kind, name, number)


def _less(model: "PreTrainedModel", texts: list[Tokens], kind: Less, batch_tokens: int) -> less.Less:
    """Warm adapters up or adopt a training's, in a folder of their own for this model, texts and settings."""
    name = weights_hash(model)
    if kind.checkpoints:
        about: list[Any] = [name, [str(c) for c in kind.checkpoints], list(kind.learning_rates)]
        paths = trainer_checkpoint.adopt_checkpoints(
            [Path(c) for c in kind.checkpoints],
            model,
            name,
            Path(kind.folder) / hash_text(canonical_json(about)),
            learning_rates=tuple(kind.learning_rates),
            direction=kind.direction,
        )
    else:
        about = [name, [t.ids for t in texts], asdict(kind.shape), asdict(kind.warm_up), kind.seed]
        paths = lora.warm_up(
            model,
            name,
            texts,
            Path(kind.folder) / hash_text(canonical_json(about)),
            shape=kind.shape,
            settings=kind.warm_up,
            batch_tokens=batch_tokens,
            seed=kind.seed,
        )
    return less.Less(name, paths, kind.k, kind.seed, kind.direction)


def _check_vocabulary(model: Any, texts: Sequence[Tokens], what: str) -> None:
    """Refuse tokens that the model has no embedding for: on a GPU they would end the process's use of it."""
    count = getattr(plain_model(model).get_input_embeddings(), "num_embeddings", None)
    for text in texts:
        if count is not None and (most := max(text.ids)) >= count:
            raise ValueError(
                f"{what} {text.id} holds the token {most}, the model has {count} embeddings: model and tokenizer "
                "don't belong together, or the model wants resize_token_embeddings"
            )


def _query_tokens(
    tokenizer: "PreTrainedTokenizerBase", queries: Sequence[Pair], max_tokens: int
) -> list[Tokens]:
    check_pairs(queries)
    return [tokenize_query(tokenizer, str(i), *pair, max_tokens) for i, pair in enumerate(queries)]
