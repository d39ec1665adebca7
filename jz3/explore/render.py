"""HTML of the page's parts; every text is escaped, pictures are inline, nothing is loaded."""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jz3.index.scores import ScoreTable
from jz3.records import Doc

COLOURS = ("#2f6f8f", "#c8553d", "#6a994e", "#8d6a9f", "#b08968", "#777777")
SOURCES = 2 * len(COLOURS)
"""Sources that the picture of their mix tells apart, at most."""
HELPS, HURTS = "47, 111, 143", "200, 85, 61"


def card(rank: int, score: float, doc: Doc, body: str, width: float) -> str:
    """Return a text's card.

    Args:
        rank: its place.
        score: its score.
        doc: the text.
        body: HTML of the text, from `plain` or `highlighted`.
        width: of the score's bar, 0 to 1.
    """
    bar = f'<span class="jz3-bar"><span style="width:{100 * min(max(width, 0), 1):.0f}%"></span></span>'
    return (
        f'<article class="jz3-card"><header><span class="jz3-rank">{rank}</span>{bar}'
        f'<span class="jz3-score">{score:+.4f}</span><span class="jz3-source">{html.escape(doc.source)}</span>'
        f'<span class="jz3-id">{html.escape(doc.id)} &middot; {doc.tokens} tokens</span></header>'
        f'<pre class="jz3-text">{body}</pre></article>'
    )


def plain(text: str) -> str:
    """Return a text as HTML."""
    return html.escape(text)


def highlighted(text: str, pieces: Sequence[str], values: Sequence[float]) -> str:
    """Return a text as HTML with every token tinted by its value: blue adds to the score, red takes from it.

    Args:
        text: the whole text; what lies behind the last token stays plain.
        pieces: the tokens' characters, the beginning of `text` together.
        values: of every token, see jz3.explain.
    """
    largest = max((abs(v) for v in values), default=0.0) or 1.0
    parts, place = [], 0
    for piece, value in zip(pieces, values, strict=True):
        colour = HELPS if value > 0 else HURTS
        # The root shows the weak tokens beside the few strongest.
        strength = 0.75 * (abs(value) / largest) ** 0.5
        parts.append(
            f'<span title="{value:+.5f}" style="background:rgba({colour},{strength:.2f})">{html.escape(piece)}</span>'
        )
        place += len(piece)
    parts.append(html.escape(text[place:]))
    return "".join(parts)


LEGEND = (
    f'<p class="jz3-legend">Tokens <span style="background:rgba({HELPS}, .55)">add to</span> or '
    f'<span style="background:rgba({HURTS}, .55)">take from</span> the cosine of the two gradients; '
    "point at one for its value.</p>"
)


def message(text: str, kind: str = "note") -> str:
    """Return a line of text in a box; `kind` is note or error."""
    return f'<p class="jz3-message jz3-{kind}">{html.escape(text)}</p>'


def histograms(table: ScoreTable) -> str:
    """Return one histogram of scores per task."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(table.tasks), 1, sharex=True, squeeze=False)[:, 0]
        for i, (axis, task) in enumerate(zip(axes, table.tasks, strict=True)):
            counts, edges = table.histogram(task)
            axis.stairs(counts, edges, fill=True, color=COLOURS[i % len(COLOURS)])
            axis.axvline(float(table.scores(task).mean()), color="black", linewidth=0.8)
            axis.set_title(task, loc="left", fontsize=9)
            axis.set_ylabel("texts", fontsize=8)
        axes[-1].set_xlabel("influence: mean cosine of gradients; the line is the mean", fontsize=8)

    return _picture(draw, 7.2, 0.6 + 1.5 * len(table.tasks), "Scores per target")


def source_mix(table: ScoreTable, k: int) -> str:
    """Return the share of every source in the corpus and among the best k texts of every task.

    Of many sources (by default every file is one) those with the largest shares, and the others together.
    """
    mix = table.mix(k)
    names = table.sources
    shares = np.array([[row[name] for name in names] for row in mix.values()])
    if len(names) > SOURCES:
        most = np.argsort(-shares.max(0), kind="stable")
        kept, rest = np.sort(most[: SOURCES - 1]), most[SOURCES - 1 :]
        names = [*(names[i] for i in kept), f"{len(rest):,} others"]
        shares = np.column_stack([shares[:, kept], shares[:, rest].sum(1)])

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        left = np.zeros(len(mix))
        for i, (source, share) in enumerate(zip(names, shares.T, strict=True)):
            alpha = 1.0 if i < len(COLOURS) else 0.5
            axis.barh(list(mix), share, left=left, color=COLOURS[i % len(COLOURS)], alpha=alpha, label=source)
            left += share
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of the texts", fontsize=8)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02))

    return _picture(draw, 7.2, 0.9 + 0.38 * len(mix), "Sources")


def _picture(draw: Callable[[Any], None], width: float, height: float, caption: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context({"text.parse_math": False}):  # names of sources and targets may hold dollar signs
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return (
        f'<figure class="jz3-picture"><figcaption>{caption}</figcaption>{svg[svg.index("<svg") :]}</figure>'
    )
