"""Which tokens of a text help a target: the cosine of gradients, token by token.

A text's gradient is a sum over its tokens, G = sum_t g_t a_t^T in every layer, so that its mean cosine
with the queries q of a target splits into one value per token:

    value_t = mean_q sum_m (g_t^T G_q a_t) / (||G|| ||G_q||)        sum_t value_t = mean_q cos(G, G_q)

with g_t^T G_q a_t = sum_u (g_t . g_u) (a_t . a_u) over the query's tokens u. No gradient is formed.
Token t's value is what is learnt at its place: from reading it, when predicting what follows.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.arguments import borrowed, check_model, check_pairs, several
from jz3.files import write_text
from jz3.gradients import (
    Tokens,
    linear_layers,
    make_batches,
    query_products,
    run_pass,
    start_tokens,
    tokenize_query,
    tokenize_text,
)
from jz3.gradients.tokens import parts_of
from jz3.ops.checks import check_int
from jz3.printable import printable

if TYPE_CHECKING:
    import torch
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Values = list[tuple[str, float]]


class _TextSink:
    """Keeps one text's factors and adds up the squared norm of its gradient."""

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Any, Any]] = {}
        self.square: Any = 0.0

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        return _wide(a)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        a, g = kept[0], _wide(g)[0]
        self.factors[name] = a, g
        self.square = self.square + ((a @ a.T) * (g @ g.T)).sum()


class _QuerySink:
    """Adds up every query's products with the text's tokens, and its squared norm."""

    def __init__(self, text: dict[str, tuple[Any, Any]]) -> None:
        self._text = text
        self.products: Any = 0.0
        self.square: Any = 0.0

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        return _wide(a)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        a, g = kept, _wide(g)
        text_a, text_g = self._text[name]
        self.square = self.square + ((a @ a.mT) * (g @ g.mT)).sum((1, 2))
        self.products = self.products + ((a @ text_a.T) * (g @ text_g.T)).sum(1)

    def take(self) -> Any:
        """Return [B, T], each row divided by its query's norm."""
        rows = self.products / self.square.sqrt()[:, None]
        self.products = self.square = 0.0
        return rows


def _wide(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_values(
    model: "PreTrainedModel",
    layers: dict[str, "torch.nn.Module"],
    text: Tokens,
    queries: Sequence[Tokens],
    *,
    batch_tokens: int = 2048,
    reduction: str = "mean",
) -> "torch.Tensor":
    """Split the cosines of a text with queries into values per token.

    Args:
        model: frozen, in evaluation mode.
        layers: all layers whose gradients count, from `linear_layers`.
        text: the tokenised text; its factors are held, 1.2 MB a token for SmolLM2-135M.
        queries: Q tokenised queries.
        batch_tokens: padded tokens per pass.
        reduction: see GradientPass.

    Returns:
        [Q, T] float32; row q sums to cos(G, G_q).

    Raises:
        ValueError: there is no query, a layer is an expert of a mixture or runs several times for a token, or a
            gradient is zero or not finite.
    """
    import torch

    from jz3.gradients.experts import ExpertLinear

    if not queries:
        raise ValueError("there is no query to explain the text by")
    if experts := [name for name, layer in layers.items() if isinstance(layer, ExpertLinear)]:
        # An expert sees only the tokens that were sent to it, in an order of its own.
        raise ValueError(
            f"texts can't be explained token by token with a mixture of experts: {experts[0]} and "
            f"{len(experts) - 1} more layers see only a part of the tokens; take a dense model"
        )
    # Of the text too, as there is only one: the passes of either kind want the weights in another layout.
    own = query_products(model)
    sink = _TextSink()
    for _ in run_pass(model, layers, sink, make_batches([text], batch_tokens), reduction, products=own):
        pass
    if several := [name for name, (a, _) in sink.factors.items() if len(a) != len(text.ids)]:
        raise ValueError(
            f"texts can't be explained token by token with {type(model).__name__}: {several[0]} and "
            f"{len(several) - 1} more layers don't run once for every token"
        )
    _check_norm(f"text {text.id}", sink.square)
    values = torch.zeros(len(queries), len(text.ids), dtype=torch.float32)
    products, batches = _QuerySink(sink.factors), make_batches(queries, batch_tokens)
    for batch, _ in run_pass(model, layers, products, batches, reduction, products=own):
        square = products.square
        for row, position in enumerate(batch.positions):
            _check_norm(f"query {queries[position].id}", square[row])
        values[batch.positions] = (products.take() / sink.square.sqrt()).float().cpu()
    return values


def explain(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    queries: Sequence[tuple[str, str]],
    *,
    max_tokens: int = 512,
    batch_tokens: int = 2048,
    reduction: str = "mean",
    prompt: str = "",
) -> Values:
    """Say what each token of a text is worth for a target.

    value_t = mean_q sum_m (g_t^T G_q a_t) / (||G|| ||G_q||)

    Args:
        model: a Hugging Face causal language model; it is frozen and in evaluation mode meanwhile, and left as it
            was.
        tokenizer: its tokenizer.
        text: the text; every token after the first, or after `prompt`, is scored.
        queries: (prompt, completion) pairs; a pair with an empty prompt is a text scored whole.
        max_tokens: longer texts and queries are cut at the end.
        batch_tokens: padded tokens per pass.
        reduction: a text's loss is the `mean` or the `sum` over its scored tokens.
        prompt: what the text begins with and is not scored.

    Returns:
        (the token's characters, its value) in order; the characters join to the text (its part within
        `max_tokens`), the values sum to the text's mean cosine with the queries.

    Raises:
        TypeError: `model` or `tokenizer` is none, the text no str, or a query no pair of them.
        ValueError: the text or a query is too short, a number is out of range, there is no query, the model is a
            mixture of experts or runs a layer several times for a token, or a gradient is zero or not finite.
    """
    check_model(model, tokenizer)
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {text!r:.60}")
    queries = several(queries)
    check_pairs(queries)
    max_tokens = check_int("explain", "max_tokens", max_tokens, 2, 1 << 30)
    batch_tokens = check_int("explain", "batch_tokens", batch_tokens, 1, 1 << 30)
    with borrowed(model):
        start_tokens.cache_clear()  # the tokenizer may have been set up anew
        tokens = tokenize_text(tokenizer, "0", text, max_tokens, "begin", prompt)
        asked = [
            tokenize_query(tokenizer, str(i), question, completion, max_tokens)
            if question
            else tokenize_text(tokenizer, str(i), completion, max_tokens)
            for i, (question, completion) in enumerate(queries)
        ]
        layers = linear_layers(model)
        values = token_values(model, layers, tokens, asked, batch_tokens=batch_tokens, reduction=reduction)
    pieces = pieces_of(tokenizer, text, prompt, len(tokens.ids))
    return list(zip(pieces, values.mean(0).tolist(), strict=True))


def pieces_of(tokenizer: "PreTrainedTokenizerBase", text: str, prompt: str, count: int) -> list[str]:
    """Return the characters of the first `count` tokens of `tokenize_text`; start tokens stand for none."""
    pieces = [""] * len(start_tokens(tokenizer))
    for ids, piece in parts_of(tokenizer, text, prompt, count)[0]:
        pieces += token_strings(tokenizer, piece, ids[: count - len(pieces)])
    return pieces


def token_strings(tokenizer: "PreTrainedTokenizerBase", text: str, ids: Sequence[int]) -> list[str]:
    """Return the characters that each token stands for; a character of several tokens goes to the last."""
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in found["offset_mapping"][: len(ids)]]
        # Byte-level tokens of one character all have its whole span.
        stops = [e if i + 1 == len(ends) or ends[i + 1] > e else 0 for i, e in enumerate(ends)]
        pieces, position = [], 0
        for stop in stops:
            pieces.append(text[position : max(stop, position)])
            position = max(stop, position)
        return pieces
    return [str(tokenizer.decode([i])) for i in ids]


def render(values: Values) -> "Text":
    """Return the text for a terminal: green helps, red harms, the stronger the deeper."""
    from rich.style import Style
    from rich.text import Text

    text = Text()
    for piece, strength in _strengths(values):
        level = round(abs(strength) * 160)
        colour = f"#{0:02x}{level:02x}{0:02x}" if strength > 0 else f"#{level:02x}{0:02x}{0:02x}"
        text.append(printable(piece), Style(color="#ffffff", bgcolor=colour) if level > 8 else Style())
    return text


def write_html(path: Path | str, values: Values, title: str, about: str) -> None:
    """Write a page of its own with the coloured text; a token's value shows under the pointer.

    Args:
        path: the file.
        values: from `explain`.
        title: the heading.
        about: a paragraph below it, e.g. the problem.
    """
    spans = []
    for (piece, value), (_, strength) in zip(values, _strengths(values), strict=True):
        colour = f"rgba({'0,140,60' if strength > 0 else '210,40,40'},{abs(strength):.2f})"
        spans.append(f'<span style="background:{colour}" title="{value:+.5f}">{html.escape(piece)}</span>')
    total = sum(value for _, value in values)
    write_text(
        Path(path),
        PAGE.format(
            title=html.escape(title), about=html.escape(about), total=f"{total:+.4f}", text="".join(spans)
        ),
    )


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222 }}
pre {{ white-space: pre-wrap; font: inherit; line-height: 1.9 }}
.about {{ white-space: pre-wrap; color: #555 }}
</style></head><body>
<h1>{title}</h1>
<p class="about">{about}</p>
<p>Cosine of gradients {total}. Green tokens add to it, red ones take from it; point at one for its value.</p>
<pre>{text}</pre>
</body></html>
"""


def _strengths(values: Values) -> list[tuple[str, float]]:
    largest = max((abs(value) for _, value in values), default=0.0) or 1.0
    return [(piece, value / largest) for piece, value in values]


def _check_norm(what: str, square: Any) -> None:
    if not (math.isfinite(float(square)) and float(square) > 0):
        raise ValueError(f"the squared gradient norm of {what} is {float(square)}; leave it out")
