"""What the page shows, without the page: answers as HTML, one model pass at a time."""

import threading
from dataclasses import dataclass
from pathlib import Path

from jz3.errors import Jz3Error
from jz3.explain import token_strings, token_values
from jz3.explore import render
from jz3.explore.scores import ScoreTable
from jz3.files import read_json
from jz3.gradients import Tokens, start_tokens, tokenize_text
from jz3.index.query import Match, Searcher
from jz3.records import Doc, Query
from jz3.stage import StageContext

FOUND = 100
"""Texts that a look-up finds, to be paged through."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A look-up, kept between its pages."""

    tokens: Tokens
    matches: list[Match]
    about: str


class View:
    """A run as the page sees it; calls may come from several threads."""

    def __init__(self, ctx: StageContext) -> None:
        """Load the model, the index and the scores.

        Raises:
            Jz3Error: the run has no index.
        """
        self.ctx = ctx
        self.searcher = Searcher(ctx)
        scores = ctx.run_dir / "influence" / "scores.parquet"
        self.scores = ScoreTable(scores) if scores.is_file() else None
        # Hooks sit on the model, so that two passes at once would mix their gradients.
        self._lock = threading.Lock()

    def header(self) -> str:
        """Return the page's heading."""
        index = read_json(self.ctx.path("index", "index.json"))
        documents = self.searcher.index.documents if self.searcher.index else len(self.searcher.store)
        facts = (
            Path(self.ctx.recipe.model.name).name,
            f"{documents:,} texts",
            f"index {index['factory']}, recall@100 {index['recall_at_100']:.3f}",
        )
        spans = "".join(f"<span>{render.plain(fact)}</span>" for fact in facts)
        return (
            f'<div class="jz3-head"><h1>jz3 explore: {render.plain(self.ctx.recipe.name)}</h1>{spans}</div>'
        )

    def examples(self, count: int = 3) -> list[list[str]]:
        """Return some target problems with their solutions, one of every task first."""
        path = self.ctx.run_dir / "targets" / "queries.jsonl"
        if not path.is_file():
            return []
        by_task: dict[str, list[str]] = {}
        for row in self.ctx.rows("targets", "queries.jsonl"):
            query = Query.from_json(row)
            if query.role == "unseen":
                by_task.setdefault(query.task, [query.problem, query.completion])
        return list(by_task.values())[:count]

    def ask(self, problem: str, solution: str) -> Answer:
        """Look a problem up.

        Raises:
            ValueError: the problem is empty or too short.
        """
        with self._lock:
            tokens = self.searcher.tokens(problem, solution)
            found = self.searcher.ask(problem, solution, FOUND)
        scored = "its solution's" if solution.strip() else "all its"
        about = (
            f"{len(found.matches)} texts for {len(tokens.ids)} tokens ({scored} tokens scored): gradient "
            f"{found.gradient_seconds * 1e3:.0f} ms, search {found.search_seconds * 1e3:.1f} ms"
        )
        return Answer(tokens, found.matches, about)

    def found(self, answer: Answer, start: int, count: int, explain: bool) -> str:
        """Return a page of an answer's texts, with tinted tokens if `explain`."""
        best = max((m.score for m in answer.matches), default=1.0)
        cards = []
        for rank, match in enumerate(answer.matches[start : start + count], start + 1):
            body = self._explained(match.doc, answer.tokens) if explain else render.plain(match.doc.text)
            cards.append(render.card(rank, match.score, match.doc, body, match.score / max(best, 1e-9)))
        legend = render.LEGEND if explain else ""
        return f"{render.message(answer.about)}{legend}{''.join(cards)}"

    def _explained(self, doc: Doc, query: Tokens) -> str:
        searcher = self.searcher
        text = tokenize_text(searcher.tokenizer, doc.id, doc.text, self.ctx.recipe.corpus.max_tokens)
        reduction = self.ctx.recipe.features.reduction
        with self._lock:
            values = token_values(searcher.model, searcher.layers, text, [query], reduction=reduction)[0]
        # Start tokens stand for no characters.
        head = len(start_tokens(searcher.tokenizer))
        pieces = [""] * head + token_strings(searcher.tokenizer, doc.text, text.ids[head:])
        return render.highlighted(doc.text, pieces, values.tolist())

    def table(self) -> ScoreTable:
        """Return the scores.

        Raises:
            Jz3Error: the run has none.
        """
        if self.scores is None:
            raise Jz3Error(
                f"no scores in this run yet; run `jz3 influence {self.ctx.run_dir}` and start again"
            )
        return self.scores

    def ranked(self, task: str, worst: bool, start: int, count: int) -> str:
        """Return a page of a task's best or worst texts."""
        table = self.table()
        best = max(float(table.scores(task).max()), 1e-9)
        rows = table.page(task, worst, start, count)
        cards = []
        for rank, key, score in rows:
            doc = self.searcher.docs.get(key)
            cards.append(render.card(rank, score, doc, render.plain(doc.text), score / best))
        return "".join(cards)

    def pictures(self) -> str:
        """Return the histograms of the scores and the mix of sources."""
        table = self.table()
        mix = render.source_mix(table, self.ctx.recipe.selection.k)
        return f'<div class="jz3-pictures">{render.histograms(table)}{mix}</div>'
