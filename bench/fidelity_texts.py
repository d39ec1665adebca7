"""The texts and queries of bench/fidelity.py: real mathematics, one half for the fit, the other measured."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.corpus.config import SourceConfig
from jz3.corpus.sources import read_texts
from jz3.files import hash_text
from jz3.gradients import Tokens, tokenize_query, tokenize_text
from jz3.records import Reject
from jz3.seeding import rng
from jz3.targets import clean_solution
from jz3.templates import prompt_for

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = ("cot_pretrain_sampled", "tool_pretrain_sampled", "finetune_sampled")
PACKAGES = ("sympy", "scipy", "networkx", "mpmath")
QUERIES = {
    "gsm8k": ("targets/gsm8k_train.jsonl", "question", "answer"),
    "math": ("eval/math-oai.jsonl", "problem", "solution"),
}
SHORTEST = 16
"""Tokens of a text or of a query's solution, at least."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The four parts; queries per task."""

    fit_documents: list[Tokens]
    documents: list[Tokens]
    fit_queries: dict[str, list[Tokens]]
    queries: dict[str, list[Tokens]]


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of the samples and of the packages' docstrings."""
    for name in SAMPLES:
        for line in (folder / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield name, row["input"] + row["output"]
    for package in PACKAGES:
        for record in read_texts(SourceConfig(name=package, kind="docstrings")):
            if not isinstance(record, Reject):
                yield "docstrings", record.text


def take(rows: Sequence[tuple[str, Any]], count: int, seen: bool, label: str, tokenize: Any) -> list[Tokens]:
    """Draw `count` usable rows of the half that the fit may see, or of the other one."""
    half = [(key, row) for key, row in rows if (int(key, 16) % 2 == 0) == seen]
    found: list[Tokens] = []
    for i in rng(0, "fidelity", label, seen).permutation(len(half)):
        if len(found) == count:
            break
        try:
            tokens = tokenize(*half[i])
        except ValueError:
            # Too short, or a prompt that leaves no room: the next one takes its place.
            continue
        if len(tokens.ids) - tokens.start >= SHORTEST:
            found.append(tokens)
    if len(found) < count:
        raise SystemExit(f"{label}: only {len(found)} of {count} texts are to be had")
    return found


def load_texts(folder: Path, tokenizer: Any, arguments: argparse.Namespace) -> Texts:
    """Read, split and tokenise documents and queries."""
    limits = {True: arguments.fit_tokens or arguments.tokens, False: arguments.tokens}
    sources: dict[str, list[tuple[str, str]]] = {}
    for source, text in read_documents(folder):
        sources.setdefault(source, []).append((hash_text(text), text))
    problems: dict[str, list[tuple[str, Any]]] = {}
    for task, (file, problem, solution) in QUERIES.items():
        rows = [json.loads(x) for x in (folder / file).read_text(encoding="utf-8").splitlines()]
        problems[task] = [(hash_text(r[problem]), (r[problem], r[solution])) for r in rows]

    def documents(count: int, seen: bool) -> list[Tokens]:
        def document(key: str, text: str) -> Tokens:
            return tokenize_text(tokenizer, key, text, limits[seen])

        each = -(-count // len(sources))
        parts = [take(rows, each, seen, source, document) for source, rows in sources.items()]
        # Alternating, so that the first pieces of a long run are a sample of all.
        return [t for group in zip(*parts, strict=True) for t in group][:count]

    def queries(count: int, seen: bool) -> dict[str, list[Tokens]]:
        def query(key: str, row: tuple[str, str]) -> Tokens:
            prompt, solution = prompt_for(row[0], "cot"), clean_solution(row[1])[0]
            return tokenize_query(tokenizer, key, prompt, solution, limits[seen])

        each = -(-count // len(problems))
        return {task: take(rows, each, seen, task, query) for task, rows in problems.items()}

    return Texts(
        documents(arguments.fit_documents, True),
        documents(arguments.documents, False),
        queries(arguments.fit_queries, True),
        queries(arguments.queries, False),
    )
