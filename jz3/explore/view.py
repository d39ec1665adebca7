"""What the page shows, without the page: answers as HTML, one model pass at a time."""

import threading
from dataclasses import dataclass
from pathlib import Path

from jz3.errors import Jz3Error
from jz3.explain import pieces_of
from jz3.explore import render
from jz3.files import read_json
from jz3.gradients import Tokens, tokenize_text
from jz3.index.collection import Collection
from jz3.index.query import Match, Searcher, index_command
from jz3.index.scores import ScoreTable
from jz3.records import Doc

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

    def __init__(self, collection: Collection) -> None:
        """Load what there is of scores, model and index; without an index all codes are scanned.

        Raises:
            Jz3Error: the run has neither features nor scores.
        """
        self.collection = collection
        self.scores = collection.scores()
        self.missing_features = collection.missing_features
        """Why no problem can be looked up, and the remedy."""
        if self.missing_features and self.scores is None:
            raise Jz3Error(self.missing_features)
        self._searcher = None
        if not self.missing_features:
            self._searcher = Searcher(collection, exact=not collection.is_indexed)
        # Hooks sit on the model, so that two passes at once would mix their gradients.
        self._lock = threading.Lock()

    @property
    def searcher(self) -> Searcher:
        """What looks problems up.

        Raises:
            Jz3Error: the run has no features.
        """
        if self._searcher is None:
            raise Jz3Error(self.missing_features)
        return self._searcher

    def header(self) -> str:
        """Return the page's heading."""
        collection, searcher = self.collection, self._searcher
        facts = [", ".join(Path(name).name for name in collection.models)]
        if searcher is None:
            facts += [f"{len(self.table()):,} texts", "no features"]
        elif searcher.index is None:
            facts += [
                f"{len(searcher.vectors):,} texts",
                f"exact scan (`{index_command(collection)}` is faster)",
            ]
        else:
            index = read_json(collection.index / "index.json")
            facts += [f"{searcher.index.documents:,} texts"]
            facts += [f"index {index['factory']}, recall@100 {index['recall_at_100']:.3f}"]
            if searcher.unindexed:
                facts += [
                    f"without {searcher.unindexed:,} newer texts (`{index_command(collection)}` adds them)"
                ]
        spans = "".join(f"<span>{render.plain(fact)}</span>" for fact in facts)
        return f'<div class="jz3-head"><h1>jz3 explore: {render.plain(collection.name)}</h1>{spans}</div>'

    def examples(self, count: int = 3) -> list[list[str]]:
        """Return some target problems with their solutions, one of every task, if possible unseen by the fit."""
        queries = self.collection.queries()
        unseen = [q for q in queries if q.role == "unseen"] or [q for q in queries if q.role == "fit"]
        by_task: dict[str, list[str]] = {}
        for query in unseen:
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
        tokenizer, prompt = searcher.tokenizer, doc.meta.get(self.collection.prompt_field, "")
        text = tokenize_text(tokenizer, doc.id, doc.text, searcher.document_tokens, "begin", prompt)
        with self._lock:
            values = searcher.token_values(text, query)
        pieces = pieces_of(tokenizer, doc.text, prompt, len(text.ids))
        return render.highlighted(doc.text, pieces, values.tolist())

    def table(self) -> ScoreTable:
        """Return the scores.

        Raises:
            Jz3Error: the run has none.
        """
        if self.scores is None:
            raise Jz3Error(
                f"no scores in this run yet; run `jz3 influence {self.collection.folder}` and start again"
            )
        return self.scores

    def ranked(self, task: str, worst: bool, start: int, count: int) -> str:
        """Return a page of a task's best or worst texts."""
        table = self.table()
        best = max(float(table.scores(task).max()), 1e-9)
        rows = table.page(task, worst, start, count)
        cards = []
        docs = self.collection.texts([key for _, key, _ in rows])
        for (rank, _, score), doc in zip(rows, docs, strict=True):
            cards.append(render.card(rank, score, doc, render.plain(doc.text), score / best))
        return "".join(cards)

    def pictures(self) -> str:
        """Return the histograms of the scores and the mix of sources."""
        table = self.table()
        mix = render.source_mix(table, self.collection.chosen)
        return f'<div class="jz3-pictures">{render.histograms(table)}{mix}</div>'
