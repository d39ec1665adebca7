"""`jz3 query`: the texts of a corpus that help most with a problem."""

import io
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jz3.corpus.readers import open_lines
from jz3.errors import Jz3Error
from jz3.explain import token_values
from jz3.features.extract import Projection, extract, open_sink
from jz3.files import read_json
from jz3.gradients import Tokens, linear_layers, set_query_products, tokenize_query, tokenize_text
from jz3.index.build import describe
from jz3.index.collection import Collection, Encoding
from jz3.index.search import MOST, SearchIndex
from jz3.models import load_on_device, load_tokenizer
from jz3.ops.checks import check_int
from jz3.printable import printable
from jz3.records import Doc
from jz3.templates import prompt_for

if TYPE_CHECKING:
    import torch

SHOWN = 300
PROBLEM, SOLUTION = ("problem", "question", "text"), ("solution", "completion", "answer")
"""Fields of a file of problems, the first that is there counts."""


@dataclass(frozen=True, slots=True)
class Match:
    """A text found for a problem."""

    doc: Doc
    score: float
    """Cosine of its gradient with the problem's; of several checkpoints the mean by weight."""


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a query."""

    matches: list[Match]
    """Best first."""
    gradient_seconds: float
    """For the problem's own gradient pass."""
    search_seconds: float
    """For the search and the look-up of the texts."""


class Encoder:
    """A model and its projection: what turns problems into features."""

    def __init__(self, encoding: Encoding, projection: Projection) -> None:
        """Load the model."""
        self.encoding, self.projection = encoding, projection
        self.model = load_on_device(encoding.model, encoding.dtype)
        set_query_products(self.model, encoding.products)
        self.layers = linear_layers(self.model)
        self._sink = open_sink(projection, self.model)

    def features(self, problems: Sequence[Tokens]) -> "torch.Tensor":
        """Return the features [Q, K] float32 of tokenised problems; rows that have none are not finite."""
        found = extract(
            self.model,
            self.layers,
            problems,
            self.projection,
            reduction=self.encoding.reduction,
            side="query",
            sink=self._sink,
        )
        return found.values

    def token_values(self, text: Tokens, query: Tokens) -> "torch.Tensor":
        """Return what the tokens of a text [T] add to its cosine with a query, see `jz3.explain.token_values`."""
        return token_values(self.model, self.layers, text, [query], reduction=self.encoding.reduction)[0]


def index_command(collection: Collection) -> str:
    """Return the command that builds what `collection` searches."""
    _, _, number = collection.index.name.partition("-")
    return f"jz3 index {collection.folder}" + (f" --checkpoint {number}" if number else "")


class Searcher:
    """Everything that answers queries about a collection, loaded once: models, projections, index."""

    def __init__(self, collection: Collection, exact: bool = False) -> None:
        """Load the model and open the index.

        Args:
            collection: whose index is built (for the exact scan, whose features are there).
            exact: scan all codes instead of asking the index.

        Raises:
            Jz3Error: the features are missing, the index isn't built, or they are of another model.
        """
        self.collection, self.exact = collection, exact
        if collection.missing_features:
            raise Jz3Error(collection.missing_features)
        if not exact and not collection.is_indexed:
            raise Jz3Error(
                f"{collection.folder} has no index yet; run `{index_command(collection)}`, or give --exact"
            )
        members = range(len(collection.weights))
        self.encoders = [Encoder(collection.encoding(n), collection.projection(n)) for n in members]
        self.vectors = collection.vectors([encoder.projection for encoder in self.encoders])
        self.index = None
        if not exact:
            self.index = SearchIndex.open(collection.index, self.vectors.identity, collection.probes)
        collection.prepare_texts()
        encoding = self.encoders[0].encoding
        self.query_tokens, self.document_tokens = encoding.query_tokens, encoding.document_tokens
        self.tokenizer = load_tokenizer(encoding.tokenizer)

    @property
    def unindexed(self) -> int:
        """How many documents of the store came after the index was built, which doesn't find them."""
        return 0 if self.index is None else max(len(self.vectors) - self.index.documents, 0)

    def tokens(self, text: str, solution: str = "") -> Tokens:
        """Tokenise a problem: with a solution only its tokens are scored, without one all of `text`.

        Raises:
            ValueError: the text is empty, too short to have a gradient, or no valid Unicode.
        """
        if not text.strip():
            raise ValueError("the text to look up is empty")
        limit = self.query_tokens
        if solution.strip():
            return tokenize_query(self.tokenizer, "query", prompt_for(text, "cot"), solution, limit)
        return tokenize_text(self.tokenizer, "query", text, limit)

    def encode(self, tokens: Tokens) -> "torch.Tensor":
        """Return the features [1, K] float32 of a tokenised problem."""
        values = self.features([tokens])
        if not bool(values.isfinite().all()):
            raise ValueError("the text's gradient is zero or not finite, so that no text can help with it")
        return values

    def features(self, problems: Sequence[Tokens]) -> "torch.Tensor":
        """Return the features [Q, K] float32 of tokenised problems; rows that have none are not finite."""
        return self.vectors.weighted([encoder.features(problems) for encoder in self.encoders])

    def token_values(self, text: Tokens, query: Tokens) -> "torch.Tensor":
        """Return what the tokens of a text [T] add to the cosine of its gradient with the query's.

        Raises:
            ValueError: see `jz3.explain.token_values`.
        """
        import torch

        values = [encoder.token_values(text, query) for encoder in self.encoders]
        return (torch.stack(values) * torch.tensor(self.collection.weights)[:, None]).sum(0)

    def nearest(self, values: "torch.Tensor", k: int) -> list[Match]:
        """Return the at most k best texts for one problem's features [1, K]."""
        k = check_int("query", "k", k, 1, MOST)
        if self.index is None:
            scores, ids = self.vectors.scan(values, min(k, max(len(self.vectors), 1)))
        else:
            scores, ids = self.index.search(values.numpy(), k)
        pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        found = [(key, score) for key, score in pairs if score > float("-inf")]
        docs = self.collection.texts([key for key, _ in found])
        return [Match(doc, score) for doc, (_, score) in zip(docs, found, strict=True)]

    def ask(self, text: str, solution: str, k: int) -> Found:
        """Return the texts that help most with a problem, and the times it took.

        Args:
            text: the problem (or any text).
            solution: its solution, if known, see `tokens`.
            k: how many texts.
        """
        start = time.perf_counter()
        values = self.encode(self.tokens(text, solution))
        middle = time.perf_counter()
        matches = self.nearest(values, k)
        return Found(matches, middle - start, time.perf_counter() - middle)


def command(
    collection: Collection,
    text: str | None,
    file: Path | None,
    solution: str,
    k: int,
    exact: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Answer one problem, a file of problems, or what is typed until the end of the input.

    A file's answers are JSON lines; a line that is no problem becomes one with an `error`.
    """
    if text is not None and file:
        raise ValueError("give either --text or --file, not both")
    if solution and text is None:
        raise ValueError("--solution needs its --text")
    if file and not file.is_file():
        raise ValueError(f"{file} is no file")
    # Before models and index are loaded.
    if k < 1:
        raise ValueError(f"--k must be at least 1, got {k}")
    if text is not None and not text.strip():
        raise ValueError("--text is empty: what is to be looked up?")
    start = time.perf_counter()
    searcher = Searcher(collection, exact)
    if exact:
        about = f"exact scan of {len(searcher.vectors):,} documents"
    else:
        about = describe(read_json(collection.index / "index.json"))
        if searcher.unindexed:
            about += f"; WITHOUT {searcher.unindexed:,} newer documents, until `{index_command(collection)}` adds them"
    _note(f"{collection.name}: {about}; loaded in {time.perf_counter() - start:.1f} s")
    if file:
        _answer_file(searcher, file, k, say)
        return
    if text is not None:
        _show(searcher.ask(text, solution, k), say)
        return
    for problem in _typed():
        try:
            _show(searcher.ask(problem, "", k), say)
        except (ValueError, Jz3Error) as error:
            _note(f"jz3: {error}")


def _typed() -> Iterator[str]:
    """Yield the lines that are typed, until end of input or an empty line."""
    _note("type a problem; an empty line ends")
    while True:
        try:
            line = input("problem> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def _show(found: Found, say: Callable[[str], None]) -> None:
    for rank, match in enumerate(found.matches, 1):
        say(printable(f"{rank}. cosine {match.score:.4f}  {match.doc.source}  {match.doc.id}"))
        say("   " + printable(" ".join(match.doc.text.split())[:SHOWN]))
    _note(f"gradient {found.gradient_seconds * 1e3:.0f} ms, search {found.search_seconds * 1e3:.1f} ms")


def _answer_file(searcher: Searcher, path: Path, k: int, say: Callable[[str], None]) -> None:
    failed = count = 0
    gradient = search = 0.0
    for number, line in _lines(path):
        if not line.strip():
            continue
        count += 1
        try:
            problem, solution = _problem(line)
            found = searcher.ask(problem, solution, k)
        except ValueError as error:
            failed += 1
            # It may quote half a character, which can't be written.
            told = str(error).encode("utf-8", "replace").decode()
            say(json.dumps({"line": number, "error": told}, ensure_ascii=False))
            continue
        gradient, search = gradient + found.gradient_seconds, search + found.search_seconds
        matches = [
            {"id": m.doc.id, "score": m.score, "source": m.doc.source, "text": m.doc.text}
            for m in found.matches
        ]
        say(json.dumps({"line": number, "problem": problem, "matches": matches}, ensure_ascii=False))
    if failed == count:
        raise Jz3Error(f"{path} holds no problem that could be answered")
    done = count - failed
    _note(
        f"{count} problems, {failed} not answered; per problem: gradient {gradient / done * 1e3:.0f} ms, "
        f"search {search / done * 1e3:.1f} ms"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of a file's lines, plain, `.gz` or `.zst`, with or without a byte order mark.

    Bytes that are no UTF-8 become half characters, which the tokenizer's check refuses.
    """
    try:
        with io.TextIOWrapper(open_lines(path), encoding="utf-8-sig", errors="surrogateescape") as stream:
            yield from enumerate(stream, 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Jz3Error(f"{path} can't be read: {error}") from error


def _problem(line: str) -> tuple[str, str]:
    """Return problem and solution of a line, an object with some of the fields PROBLEM and SOLUTION."""
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a line must be a JSON object, got {type(row).__name__}")
    problem = next((row[k] for k in PROBLEM if row.get(k)), None)
    solution = next((row[k] for k in SOLUTION if row.get(k)), "")
    if not isinstance(problem, str) or not isinstance(solution, str):
        raise ValueError(
            f"a line needs one of {', '.join(PROBLEM)} and may have one of {', '.join(SOLUTION)}; it has "
            f"{', '.join(map(str, row)) or 'none'}"
        )
    return problem, solution


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
