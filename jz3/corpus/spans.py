"""Where a text must not be cut: inside formulas, code, tables and doctest blocks."""

import re
from bisect import bisect_left
from collections import defaultdict
from typing import NamedTuple


class Span(NamedTuple):
    """A stretch text[start:end] that stays whole."""

    start: int
    end: int
    display: bool
    """Whether it stands by itself (a displayed formula, a block), so that a cut after it is sound."""


_BLOCK_DIRECTIVES = (
    "math|code-block|code|sourcecode|parsed-literal|literalinclude|doctest|testcode|testoutput|plot|ipython"
)
_TABLE_ROW = r"[ \t]*(?:\|[^\n]*\||\+[-=+: ]+\+)[ \t]*"
_OPENER = re.compile(
    rf"""
    ^(?P<fence>[ \t]*(?:`{{3,}}(?![^\n]*`)|~{{3,}}))
  | ^(?P<doctest>[ \t]*>>>(?:[ ][^\n]*)?(?:\n(?![ \t]*(?:\n|\Z))[^\n]+)*)
  | ^(?P<directive>[ \t]*\.\.[ \t]+(?:{_BLOCK_DIRECTIVES})[ ]?::[^\n]*)
  | ^(?P<table>{_TABLE_ROW}(?:\n{_TABLE_ROW})+)$
  | ^(?P<columns>[ \t]*=+(?:[ \t]+=+)+[ \t]*(?:\n(?![ \t]*(?:\n|\Z))[^\n]+)*)
  | (?P<literal>::)[ \t]*$
  | (?P<bracket>\\{{1,2}}\[) | (?P<paren>\\{{1,2}}\()
  | \\begin\{{(?P<begin>[^{{}}\n]{{1,40}})\}}
  | (?P<escape>\\.)
  | (?P<dollars>\$\$)
  | (?P<spaced>\$[ ](?=[^$\n]*[\\^_=<>+{{}}])[^$\n]{{1,200}}?[ ]\$(?![\d$]))
  | (?P<dollar>\$(?=[^\s$]))
  | (?P<ticks>`+)
    """,
    re.VERBOSE | re.MULTILINE,
)
_BLANK = re.compile(r"\n[ \t]*\n")
_FENCE_LINE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{([^{}\n]{1,40})\}")
_CLOSERS = {
    "dollars": re.compile(r"(?<!\\)(?:\\\\)*\$\$"),
    "dollar": re.compile(r"(?:(?<![\s\\$])|(?<=\\\\))\$(?![\d$])"),
    "\\[": re.compile(r"(?<!\\)(?:\\\\)*\\\]"),
    "\\(": re.compile(r"(?<!\\)(?:\\\\)*\\\)"),
    "\\\\[": re.compile(r"(?<!\\)\\\\\]"),
    "\\\\(": re.compile(r"(?<!\\)\\\\\)"),
}
_OPENERS = {
    "\\[": re.compile(r"(?<!\\)(?:\\\\)*\\\["),
    "\\(": re.compile(r"(?<!\\)(?:\\\\)*\\\("),
    "\\\\[": re.compile(r"(?<!\\)\\\\\["),
    "\\\\(": re.compile(r"(?<!\\)\\\\\("),
}

_PROSE_ENVIRONMENTS = frozenset(
    """abstract acknowledgements appendix center claim conjecture corollary definition description document
    enumerate example exercise figure flushleft flushright frame itemize lemma minipage note prop proof
    proposition question quotation quote remark solution table theorem thm titlepage""".split()
)
"""LaTeX environments that hold sentences rather than a formula; they may be cut between sentences."""


class _Finder:
    """Looks up the closing delimiters of one text; every list is made once, so a scan stays linear."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._positions: dict[str, list[tuple[int, int]]] = {}
        self._ticks: dict[int, list[int]] | None = None
        self._environments: dict[int, int] | None = None
        self._fences: list[tuple[int, int, str, bool]] | None = None
        self._no_fence_after: set[tuple[str, int]] = set()

    def _list(self, key: str, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
        if key not in self._positions:
            self._positions[key] = [m.span() for m in pattern.finditer(self.text)]
        return self._positions[key]

    def _next(self, key: str, pattern: re.Pattern[str], position: int) -> tuple[int, int] | None:
        found = self._list(key, pattern)
        index = bisect_left(found, (position, position))
        return found[index] if index < len(found) else None

    def same_paragraph(self, start: int, end: int) -> bool:
        blank = self._next("blank", _BLANK, start)
        return blank is None or blank[0] >= end

    def delimiter(self, opener: str, after: int) -> int | None:
        """End of the formula opened by `opener` just before `after`; None if it is unbalanced."""
        close = self._next(opener, _CLOSERS[opener], after)
        if close is None:
            return None
        again = self._next("open" + opener, _OPENERS[opener], after)
        return None if again and again[0] < close[0] else close[1]

    def dollars(self, after: int) -> int | None:
        close = self._next("dollars", _CLOSERS["dollars"], after)
        if close is None:
            return None
        odd = len(self._list("dollars", _CLOSERS["dollars"])) % 2
        return close[1] if not odd or self.same_paragraph(after, close[0]) else None

    def dollar(self, after: int) -> int | None:
        close = self._next("dollar", _CLOSERS["dollar"], after)
        return close[1] if close and self.same_paragraph(after, close[0]) else None

    def ticks(self, start: int, after: int) -> int | None:
        if self._ticks is None:
            self._ticks = defaultdict(list)
            for m in re.finditer("`+", self.text):
                self._ticks[len(m.group())].append(m.start())
        width = after - start
        runs = self._ticks[width]
        index = bisect_left(runs, after)
        if index == len(runs) or not self.same_paragraph(after, runs[index]):
            return None
        latex_quote = width == 2 and "''" in self.text[after : runs[index]]
        return None if latex_quote else runs[index] + width

    def environment(self, start: int) -> int | None:
        if self._environments is None:
            self._environments = {}
            stacks: dict[str, list[int]] = defaultdict(list)
            for m in _ENVIRONMENT.finditer(self.text):
                if m.group(1) == "begin":
                    stacks[m.group(2)].append(m.start())
                elif stacks[m.group(2)]:
                    self._environments[stacks[m.group(2)].pop()] = m.end()
        return self._environments.get(start)

    def fence(self, start: int, mark: str) -> int | None:
        if self._fences is None:
            lines = _FENCE_LINE.finditer(self.text)
            self._fences = [(m.start(), m.end(), m.group(1), not m.group(2).strip()) for m in lines]
        if (mark[0], len(mark)) in self._no_fence_after:
            return None
        index = bisect_left(self._fences, (start + 1,))
        for _, end, other, bare in self._fences[index:]:
            if bare and other[0] == mark[0] and len(other) >= len(mark):
                return end
        self._no_fence_after.add((mark[0], len(mark)))
        return None

    def indented_block(self, after: int, indent: int) -> int | None:
        """End of the lines after `after` that are indented by more than `indent`."""
        end, position = None, after
        while position < len(self.text):
            stop = self.text.find("\n", position)
            stop = len(self.text) if stop < 0 else stop
            line = self.text[position:stop].expandtabs()
            if line.strip():
                if len(line) - len(line.lstrip()) <= indent:
                    break
                end = stop
            position = stop + 1
        return end


def protected_spans(text: str) -> list[Span]:
    r"""Find the stretches of `text` that must stay whole.

    These are formulas (`$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin{..}..\end{..}` except
    environments of prose such as `theorem`), fenced code, code spans and reST roles, reST blocks
    (`.. math::`, literal blocks), doctest blocks and tables. An opening delimiter without its
    closing one protects nothing. A `$` before a price is told from a formula by pandoc's rule: no
    space after the opening one, none before the closing one, and no digit after that.

    Args:
        text: lines ended by `\n`.

    Returns:
        Spans in order, none inside another. Time is linear in the text's length but for
        logarithms.
    """
    finder, spans, position = _Finder(text), [], 0
    while match := _OPENER.search(text, position):
        kind = match.lastgroup
        start, after = match.span()
        end: int | None = None
        display = True
        if kind in ("doctest", "table", "columns"):
            end = after
        elif kind == "fence":
            end = finder.fence(start, match.group().strip())
        elif kind == "directive":
            line = match.group().expandtabs()
            end = finder.indented_block(after + 1, len(line) - len(line.lstrip())) or after
        elif kind == "literal":
            line = text[text.rfind("\n", 0, start) + 1 : start].expandtabs()
            if not line.lstrip().startswith(".. "):
                end = finder.indented_block(after + 1, len(line) - len(line.lstrip()))
        elif kind == "begin":
            prose = match.group("begin").rstrip("*").lower() in _PROSE_ENVIRONMENTS
            end = None if prose else finder.environment(start)
        elif kind in ("bracket", "paren"):
            end, display = finder.delimiter(match.group(), after), kind == "bracket"
        elif kind == "dollars":
            end = finder.dollars(after)
        elif kind != "escape":
            display = False
            if kind == "spaced":
                end = after
            elif kind == "dollar":
                end = finder.dollar(after)
            else:
                end = finder.ticks(start, after)
        if end is not None:
            spans.append(Span(start, end, display))
        position = end or after
    return spans
