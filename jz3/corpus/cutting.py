"""Cut texts at paragraph, sentence and formula boundaries to a limit in model tokens."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jz3.corpus.spans import protected_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenCounter = Callable[[Sequence[str]], list[int]]

WEAK, SENTENCE, PARAGRAPH = 1, 2, 3
"""How good a place to cut is. Weak: after a displayed formula or a heading."""

_BREAK = re.compile(
    r"""
    (?P<paragraph>\n[ \t]*(?:\n[ \t]*)+)
  | (?P<item>\n(?=[ \t]*(?:[-*+•][ \t]|:\w[^\n:]*:|\#{1,6}[ \t]|\\item\b|\\(?:sub)*section\b|\.\.[ \t]
                          |[*`\w][\w*`,. ]{0,60}[ ]:[ ])))
  | (?P<number>\n(?=[ \t]*(?:\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{2,4})\)|\d{1,3}\.)[ \t]))
  | (?P<sentence>[.!?…]{1,8}["'”’)\]*_]{0,8}(?=\s))
  | (?P<wide>[。！？｡]+["'”’」』）]{0,8})
    """,
    re.VERBOSE,
)
_UNDERLINE = re.compile(r"([=\-~^\"'*+#`])\1{2,}[ \t]*")
_ABBREVIATIONS = frozenset(
    """al approx assoc ca cf ch chap cor def defn dept dr ed eds eq eqn eqns eqs esp etc ex fig figs inc
    jr lem ltd mr mrs ms no nos nr ns p par pp prof prop ref refs resp sec sect sr st thm univ viz vol
    vs""".split()
)
_WORD_BEFORE = re.compile(r"[^\s(\[{\"'“‘$`~]+\Z")
_BATCH = 64
_SLACK = 4
"""Tokens by which the sum over parts may pass the limit before the exact count decides: it counts
white space that the finished piece lacks."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text."""

    text: str
    tokens: int
    fits: bool
    """False if it has no boundary inside and is longer than the limit."""


def token_counter(tokenizer: "PreTrainedTokenizerBase") -> TokenCounter:
    """Return a function that counts the tokens of each of several texts, special tokens not added."""

    def count(texts: Sequence[str]) -> list[int]:
        rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in rows["input_ids"]]

    return count


def cut(text: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[str]:
    """Cut a text into pieces of at most `max_tokens`, never inside a formula, code block or sentence.

    Args:
        text: the text; its formulas may be LaTeX or reST.
        tokenizer: the tokenizer whose tokens count.
        max_tokens: the limit.

    Returns:
        The pieces in order; together they are the text but for whitespace.

    Raises:
        ValueError: a formula, block or sentence alone is longer than the limit. `pieces` gives
            such a stretch as a piece that doesn't fit instead.
    """
    found = []
    for piece in pieces(text, token_counter(tokenizer), max_tokens):
        if not piece.fits:
            raise ValueError(
                f"{piece.tokens} tokens without a boundary, limit {max_tokens}: {piece.text[:60]!r}; "
                "raise max_tokens or leave this text out"
            )
        found.append(piece.text)
    return found


def pieces(text: str, count: TokenCounter, max_tokens: int) -> Iterator[Piece]:
    """Cut a text lazily; a stretch without a boundary that is too long comes as a piece with fits=False.

    Each piece is as long as the limit allows, but ends with a paragraph if that costs less than
    half of it.

    Args:
        text: the text.
        count: the token counter; a piece is measured as it is returned, so that the limit is exact.
        max_tokens: the limit.

    Yields:
        Pieces in order; together they are the text but for whitespace (common indentation and
        blank ends are removed).
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) <= 8 * max_tokens:
        whole = _tidy(text, 0, len(text))
        tokens = count([whole])[0]
        if not whole or tokens <= max_tokens:
            if whole:
                yield Piece(whole, tokens, True)
            return
    marks = boundaries(text)
    ends = [position for position, _ in marks]
    sizes: list[int] = []
    first, begin = 0, 0
    while first < len(marks):
        total, last = 0, first
        while last < len(marks):
            if last == len(sizes):
                starts = [0, *ends] if last == 0 else ends[last - 1 :]
                batch = zip(starts, ends[last : last + _BATCH], strict=False)
                sizes.extend(count([text[a:b] for a, b in batch]))
            total += sizes[last]
            if total > max_tokens + _SLACK and last > first:
                break
            last += 1
        chosen = _choose(marks, sizes, first, last)
        while True:
            piece = _tidy(text, begin, ends[chosen])
            tokens = count([piece])[0] if piece else 0
            if tokens <= max_tokens or chosen == first:
                break
            chosen = _choose(marks, sizes, first, chosen)
        if piece:
            yield Piece(piece, tokens, tokens <= max_tokens)
        first, begin = chosen + 1, ends[chosen]


def _choose(marks: list[tuple[int, int]], sizes: list[int], first: int, stop: int) -> int:
    """The index in first..stop-1 of the boundary to cut at."""
    total = sum(sizes[first:stop])
    best, filled = stop - 1, total
    for index in range(stop - 1, first - 1, -1):
        if 2 * filled < total:
            break
        if marks[index][1] > marks[best][1]:
            best = index
        filled -= sizes[index]
    if marks[best][1] == WEAK:
        return next((i for i in range(stop - 1, first - 1, -1) if marks[i][1] > WEAK), best)
    return best


def _tidy(text: str, begin: int, end: int) -> str:
    """text[begin:end] without blank ends and common indentation."""
    part = text[begin:end].rstrip()
    body = part.lstrip()
    lead = part[: len(part) - len(body)]
    if begin and "\n" not in lead:
        return body
    return textwrap.dedent(lead.rpartition("\n")[2] + body)


def boundaries(text: str) -> list[tuple[int, int]]:
    """Find where a text may be cut.

    Args:
        text: lines ended by a line feed.

    Returns:
        (position, strength) in order, none inside a protected span; the last is the text's end.
    """
    spans = protected_spans(text)
    found: dict[int, int] = {}
    for span in spans:
        if span.display:
            tail = text[max(span.start, span.end - 8) : span.end].rstrip("$`])}\\ ")
            found[span.end] = SENTENCE if tail.endswith(".") else WEAK
    index = 0
    for match in _BREAK.finditer(text):
        by_sign = match.lastgroup in ("sentence", "wide")
        position = match.end() if by_sign else match.start()
        while index < len(spans) and spans[index].end <= position:
            index += 1
        if index < len(spans) and spans[index].start < position:
            continue
        strength = SENTENCE
        if match.lastgroup == "sentence":
            strength = SENTENCE if _ends_sentence(text, match.start(), position) else 0
        elif match.lastgroup == "number" and text[position - 1 : position].isalnum():
            strength = 0
        elif not by_sign and _after_heading(text, position):
            strength = WEAK
        elif match.lastgroup == "paragraph":
            strength = PARAGRAPH
        if strength:
            found[position] = max(strength, found.get(position, 0))
    found.pop(0, None)
    found[len(text)] = PARAGRAPH
    return sorted(found.items())


def _after_heading(text: str, position: int) -> bool:
    start = text.rfind("\n", 0, position) + 1
    line = text[start:position].strip()
    return line.startswith("#") or bool(_UNDERLINE.fullmatch(line))


def _ends_sentence(text: str, start: int, end: int) -> bool:
    """Whether the sign at text[start:end] ends a sentence, and not an abbreviation or an initial."""
    after = text[end : end + 80].lstrip()[:1]
    if after.islower():
        return False
    if text[start] != ".":
        return True
    word = _WORD_BEFORE.search(text[max(0, start - 30) : start])
    if word is None:
        return True
    before = word.group()
    if before.lower().rstrip(".") in _ABBREVIATIONS or re.fullmatch(r"(?:\w\.)+\w", before):
        return before.lower() == "etc" and after.isupper()
    if len(before) == 1 and before.isalpha():
        return before.islower() and not after.isdigit()
    line = text.rfind("\n", 0, start) + 1
    return not (before.isdigit() and not text[line : start - len(before)].strip())
