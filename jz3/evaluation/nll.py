"""The negative log-likelihood of reference solutions."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jz3.engines.text import context_length, prompt_ids
from jz3.gradients.tokens import completion_ids
from jz3.records import Query

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_BATCH = 512
"""Padded tokens that keep a processor busy, so that more are worth no padding."""
PADDING = 0.1
"""Share of the tokens that padding may add to larger batches."""


def encode(tokenizer: "PreTrainedTokenizerBase", query: Query) -> tuple[list[int], list[int]]:
    """Return the tokens of a query's prompt (never empty) and of its completion (without an end token)."""
    return prompt_ids(tokenizer, query.prompt), completion_ids(tokenizer, query.prompt, query.completion)


def mean_nll(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    queries: Sequence[Query],
    batch_tokens: int = 4096,
) -> list[float]:
    """Return for every query the mean negative log-likelihood of its completion's tokens.

    -(1/C) sum_t log p(c_t | prompt, c_<t), in nats per token; the logits are normalised in float32.

    Args:
        model: a causal language model in evaluation mode, on the device to compute on.
        tokenizer: its tokenizer.
        queries: prompts and completions; the end token is not scored.
        batch_tokens: padded tokens of a batch, at least one query.

    Returns:
        One number per query, in order; NaN for one whose completion has no token, or whose text
        exceeds the model's context.
    """
    import torch

    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    context = context_length(model.config)
    rows = [encode(tokenizer, query) for query in queries]
    values = [math.nan] * len(rows)
    places = [i for i, (head, tail) in enumerate(rows) if tail and len(head) + len(tail) <= context]
    lengths = [len(head) + len(tail) for head, tail in rows]
    places.sort(key=lambda i: (lengths[i], i))
    with torch.inference_mode():
        while places:
            count = _batch_size([lengths[i] for i in places], batch_tokens)
            batch, places = places[:count], places[count:]
            for i, value in zip(batch, _batch_nll(model, [rows[i] for i in batch]), strict=True):
                values[i] = value
    return values


def _batch_size(lengths: Sequence[int], batch_tokens: int) -> int:
    """Return how many of the texts, shortest first, are scored together."""
    real = 0
    for count, length in enumerate(lengths):
        padded = (count + 1) * length
        real += length
        wasteful = padded > SMALL_BATCH and padded > (1 + PADDING) * real
        if count and (padded > batch_tokens or wasteful):
            return count
    return len(lengths)


def _batch_nll(model: "PreTrainedModel", rows: list[tuple[list[int], list[int]]]) -> list[float]:
    import torch

    width = max(len(head) + len(tail) for head, tail in rows)
    kept = max(len(tail) for _, tail in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for r, (head, tail) in enumerate(rows):
        ids[r, width - len(head) - len(tail) :] = torch.tensor([*head, *tail])
        mask[r, width - len(head) - len(tail) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    # Padding on the left lines the completions up at the end, so that only their logits are computed.
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=kept + 1,
    ).logits
    values = []
    for r, (_, tail) in enumerate(rows):
        scores = logits[r, -len(tail) - 1 : -1].float()
        values.append(float(torch.nn.functional.cross_entropy(scores, ids[r, -len(tail) :])))
    return values
