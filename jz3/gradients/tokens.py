"""Texts as token numbers with the part whose loss counts, and batches of them."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PIECE = 8
"""Characters that are tokenised per token that is wanted, and by how much more if they are too few."""
MARGIN = 64
"""Tokens before the end of a piece that may differ from those of the whole text."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text with the part whose loss counts."""

    id: str
    ids: list[int]
    start: int
    """First scored token: 1 for a plain text, the completion's first token for a query."""
    cut: int = 0
    """Tokens that were left out at the end because the text was too long."""
    window: int = 0
    """A longer text than this is run in windows of so many tokens, gradients summed; 0: never."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of similar length, padded on the right: with causal attention no real token sees a pad."""

    positions: list[int]
    """Where each text stands in the sequence the batches were made of."""
    ids: "torch.Tensor"
    """[B, S] int64; the windows of the batch's one text if `windowed`."""
    lengths: "torch.Tensor"
    """[B] int64."""
    starts: "torch.Tensor"
    """[B] int64, see Tokens.start."""
    windowed: bool = False
    """All rows belong to one text; each begins with the last token of the row before."""


@functools.lru_cache(maxsize=16)
def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts before every text by default (a BOS, as a rule).

    Training and evaluation see them, so gradients do too; they are never scored.
    """
    plain: Any = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    marked: Any = tokenizer("a", verbose=False).input_ids
    for count in range(len(marked) - len(plain) + 1):
        if marked[count : count + len(plain)] == plain:
            return tuple(marked[:count])
    return ()


class RefusedText(ValueError):
    """A text or query that can't be scored; `reason` is a word for it, as rejects have it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def tokenize_text(
    tokenizer: "PreTrainedTokenizerBase",
    key: str,
    text: str,
    max_tokens: int,
    long: str = "truncate",
    prompt: str = "",
) -> Tokens:
    """Tokenise a corpus text: every token is scored, but for start tokens, a first one without any, and a prompt.

    Args:
        tokenizer: the model's.
        key: the text's id.
        text: the text.
        max_tokens: the longest sequence that the model is given, start tokens included.
        long: what becomes of a longer text: `truncate` (cut at its end, counted in `Tokens.cut`), `begin` (the
            same tokens, but what lies far behind the cut is neither tokenised nor counted) or `split` (run in
            windows, see `Tokens.window`; every token is scored once).
        prompt: if the text begins with it, whatever the white space, only what follows is scored.

    Returns:
        The tokens.

    Raises:
        RefusedText: there is nothing to predict, or the text is no valid Unicode.
        ValueError: `long` is none of these.
    """
    if long not in ("truncate", "begin", "split"):
        raise ValueError(f"long must be 'truncate', 'begin' or 'split', got {long!r}")
    _check_unicode(f"text {key}", text)
    most = max_tokens if long == "begin" else len(text)
    parts, unscored = parts_of(tokenizer, text, prompt, most)
    first = start_tokens(tokenizer)
    ids = [*first, *(i for part, _ in parts for i in part)]
    start = max(len(first) + unscored, 1)
    if len(ids) <= start:
        message = f"text {key} has {len(ids)} token(s); at least {start + 1} are needed"
        raise RefusedText("too_short", message)
    if long == "split":
        return Tokens(key, ids, start, window=max_tokens)
    if max_tokens <= start:
        message = f"text {key}: nothing is left to score within {max_tokens} token(s)"
        raise RefusedText("prompt_too_long", message)
    return Tokens(key, ids[:max_tokens], start, cut=max(0, len(ids) - max_tokens))


def first_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, count: int) -> tuple[list[int], str]:
    """Return at least the first `count` tokens of a text, or all if it has no more, and the piece they are of.

    The end of a piece of the text is tokenised otherwise than the same place of the whole, and so only what
    lies well before it counts.
    """
    size = PIECE * (count + MARGIN)
    while size < len(text):
        ids: Any = tokenizer(text[:size], add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= count + MARGIN:
            return ids, text[:size]
        size *= PIECE
    whole: Any = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return whole, text


def parts_of(
    tokenizer: "PreTrainedTokenizerBase", text: str, prompt: str, count: int
) -> tuple[list[tuple[list[int], str]], int]:
    """Return at least the first `count` tokens of a text, its prompt's as they are of the prompt alone.

    Returns:
        Tokens with the piece of the text that they are of: one for all, or prompt and rest apart where they would
        merge; and how many of the tokens are the prompt's.
    """
    before, after = split_prompt(text, prompt)
    whole = first_tokens(tokenizer, text, count)
    if not before:
        return [whole], 0
    head = first_tokens(tokenizer, before, count)
    size = len(head[0])
    if len(whole[0]) > size and whole[0][:size] == head[0]:
        return [whole], size
    return [head, first_tokens(tokenizer, after, count)], size


def split_prompt(text: str, prompt: str) -> tuple[str, str]:
    """Return what of a text is a prompt and what follows it; any white space is like any other."""
    words = prompt.split()
    if not words:
        return "", text
    if found := re.match(r"\s*" + r"\s+".join(map(re.escape, words)), text):
        size = found.end()
    else:  # A piece of a longer text may hold a part of the prompt alone.
        size = len(text) * " ".join(words).startswith(" ".join(text.split()))
    return text[:size], text[size:]


def completion_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: str) -> list[int]:
    """Tokenise a completion as the training does: in its context where that leaves the prompt's tokens, else by itself.

    By itself its first word is another token for tokenizers with a sign for a text's beginning (Llama 2, Mistral),
    one that neither training nor generation ever puts behind a prompt.
    """
    head: Any = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    whole: Any = tokenizer(prompt + completion, add_special_tokens=False, verbose=False).input_ids
    if whole[: len(head)] == head:
        return whole[len(head) :]
    alone: Any = tokenizer(completion, add_special_tokens=False, verbose=False).input_ids
    return alone


def tokenize_query(
    tokenizer: "PreTrainedTokenizerBase", key: str, prompt: str, completion: str, max_tokens: int
) -> Tokens:
    """Tokenise a prompt with its completion, followed by the end token: only the completion is scored.

    A sequence longer than `max_tokens` is cut at its end (counted in `Tokens.cut`).

    Raises:
        RefusedText: nothing of the completion is left to score, or a text is no valid Unicode.
    """
    _check_unicode(f"query {key}", prompt, completion)
    prefix = start_tokens(tokenizer)
    head = [*prefix, *tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids]
    tail = completion_ids(tokenizer, prompt, completion)
    if not tail:
        raise RefusedText("empty_completion", f"query {key} has an empty completion")
    if tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    return _scored_tail(key, head, tail, max_tokens)


def tokenize_chat(
    tokenizer: "PreTrainedTokenizerBase", key: str, messages: Sequence[dict[str, str]], max_tokens: int
) -> Tokens:
    """Tokenise a conversation by the tokenizer's chat template: only the last message is scored.

    Args:
        tokenizer: with a chat template.
        key: the conversation's id.
        messages: dictionaries with `role` and `content`; the last one is the assistant's.
        max_tokens: a longer sequence is cut at its end.

    Returns:
        The tokens; what the template itself puts before the answer is not scored.

    Raises:
        ValueError: there is no template or no answer.
        RefusedText: nothing of the answer is left to score, or a text is no valid Unicode.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use tokenize_query")
    if not messages or messages[-1].get("role") != "assistant" or not messages[-1].get("content"):
        raise ValueError(f"conversation {key} does not end with an answer of the assistant")

    def ids(part: Sequence[dict[str, str]], **options: Any) -> list[int]:
        text = tokenizer.apply_chat_template(list(part), tokenize=False, **options)
        _check_unicode(f"conversation {key}", str(text))
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # pyright: ignore[reportArgumentType, reportReturnType]

    head, whole = ids(messages[:-1], add_generation_prompt=True), ids(messages)
    if whole[: len(head)] != head:
        raise ValueError(f"conversation {key}: the template changes the prompt when the answer is there")
    return _scored_tail(key, head, whole[len(head) :], max_tokens)


def _check_unicode(what: str, *texts: str) -> None:
    """Refuse half characters, as JSON escapes can hold them; a tokenizer would raise a TypeError."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise RefusedText("invalid_unicode", f"{what} is no valid Unicode: {error.reason}") from error


def _scored_tail(key: str, head: list[int], tail: list[int], max_tokens: int) -> Tokens:
    ids = [*head, *tail]
    start = max(len(head), 1)
    if min(len(ids), max_tokens) <= start:
        message = f"query {key}: its prompt alone has {len(head)} tokens, the limit is {max_tokens}"
        raise RefusedText("prompt_too_long", message)
    return Tokens(key, ids[:max_tokens], start, cut=max(0, len(ids) - max_tokens))


def make_batches(texts: Sequence[Tokens], batch_tokens: int) -> list[Batch]:
    """Group texts by length into batches of at most `batch_tokens` padded tokens (at least one text).

    A batch that is at least half full takes no text that is shorter than 15/16 of its longest. A text that
    is run in windows has a batch of its own, whatever its length.
    """
    import torch

    batches: list[Batch] = []
    order: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: (-len(texts[i].ids), i)):
        if 0 < texts[i].window < len(texts[i].ids):
            batches.append(_windows(i, texts[i]))
        else:
            order.append(i)
    while order:
        width = len(texts[order[0]].ids)
        count = 1
        while count < len(order) and (count + 1) * width <= batch_tokens:
            if 2 * count * width >= batch_tokens and 16 * len(texts[order[count]].ids) < 15 * width:
                break
            count += 1
        rows, order = order[:count], order[count:]
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for r, i in enumerate(rows):
            ids[r, : len(texts[i].ids)] = torch.tensor(texts[i].ids)
        lengths = torch.tensor([len(texts[i].ids) for i in rows])
        starts = torch.tensor([texts[i].start for i in rows])
        batches.append(Batch(rows, ids, lengths, starts))
    return batches


def _windows(position: int, text: Tokens) -> Batch:
    """Cut a long text into windows that overlap by one token, which predicts the next window's first."""
    import torch

    if text.window < 2:
        raise ValueError(f"a window must hold at least 2 tokens, got {text.window}")
    begins = range(0, len(text.ids) - 1, text.window - 1)
    parts = [text.ids[b : b + text.window] for b in begins]
    ids = torch.zeros(len(parts), text.window, dtype=torch.int64)
    for r, part in enumerate(parts):
        ids[r, : len(part)] = torch.tensor(part)
    starts = torch.tensor([max(1, text.start - b) for b in begins])
    return Batch([position], ids, torch.tensor([len(p) for p in parts]), starts, windowed=True)
