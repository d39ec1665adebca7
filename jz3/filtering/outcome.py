"""What the filters leave: the rows kept and refused, every finding, and how many there are of each."""

import heapq
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jz3.evaluation.benchmarks import questions_hash
from jz3.files import jsonl_writer, write_json
from jz3.filtering.config import FilteringConfig
from jz3.filtering.decontaminate import DecontaminationIndex
from jz3.records import Problem, Query, Reject, Verdict
from jz3.stage import StageContext

if TYPE_CHECKING:
    import numpy as np

MAX_EXAMPLES = 50

Write = Callable[[dict[str, Any]], Any]


R = TypeVar("R", Problem, Query)


@dataclass(slots=True)
class Judged(Generic[R]):
    """A row, of the problems or of the instruction data, with what the filters found."""

    row: R
    reason: str = ""
    """Of the filter that refuses it."""
    detail: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    hits: list[dict[str, Any]] = field(default_factory=list)

    def note(self, finding: dict[str, Any]) -> None:
        """Add what a filter found: `reason` (empty if it keeps the row), `detail`, `checks`, `hits`."""
        self.checks.update(finding.get("checks", {}))
        self.hits += finding.get("hits", ())
        if finding[
            "reason"
        ]:  # which is the last that was found: no other filter is given a row that is refused
            self.reason, self.detail = finding["reason"], finding["detail"]


class Findings(Generic[R]):
    """What one filter after the other finds about rows.

    In memory are the reasons to refuse rows; all that was found is gone through again when it is written.
    """

    def __init__(self, rows: Sequence[R]) -> None:
        self._rows = rows
        self._reasons = [""] * len(rows)
        self._found: list[tuple[Iterable[int], Iterable[dict[str, Any]]]] = []

    def add(self, numbers: Iterable[int], findings: Iterable[dict[str, Any]]) -> None:
        """Add a filter's findings about rows that are left; their numbers rise, and both can be gone through again."""
        for i, finding in zip(numbers, findings, strict=True):
            self._reasons[i] = sys.intern(finding["reason"])
        self._found.append((numbers, findings))

    def left(self) -> "np.ndarray":
        """Return the numbers of the rows that no filter has refused so far."""
        import numpy as np

        return np.flatnonzero([not reason for reason in self._reasons])

    def judged(self) -> Iterator[Judged[R]]:
        """Give every row with what was found about it, in the filters' order."""
        found = heapq.merge(*(zip(*pair, strict=True) for pair in self._found), key=itemgetter(0))
        for row, (_, own) in zip(self._rows, itertools.groupby(found, key=itemgetter(0)), strict=True):
            item = Judged(row)
            for _, finding in own:
                item.note(finding)
            yield item


def write_outcome(
    context: StageContext,
    problems: Iterable[Judged[Problem]],
    instruction: Iterable[Judged[Query]],
    index: DecontaminationIndex,
    config: FilteringConfig,
) -> dict[str, Any]:
    """Write the stage's files, a row at a time, and return its counts."""
    out, counts, taught = context.out, _Counts(), _Group()
    hits: list[tuple[str, dict[str, Any]]] = []
    with ExitStack() as stack:
        kept, instructed, verdicts, rejects = (
            stack.enter_context(jsonl_writer(out / name))
            for name in ("kept.jsonl", "instruction.jsonl", "verdicts.jsonl", "rejects.jsonl")
        )
        for item in problems:
            verdict = Verdict(id=item.row.id, keep=not item.reason, reason=item.reason, checks=item.checks)
            verdicts(verdict.to_json())
            _keep_or_refuse(item, kept, rejects)
            counts.add(item, config)
            hits += [(item.row.id, hit) for hit in item.hits]
        for item in instruction:
            _keep_or_refuse(item, instructed, rejects)
            taught.add(item)
            hits += [(item.row.id, hit) for hit in item.hits]
    report = _contamination(hits, counts.every.count + taught.count, index, config)
    write_json(out / "decontamination.json", report)
    return {
        **counts.table(config),
        "instruction": taught.table(),
        "benchmarks": {b.name: questions_hash(b) for b in context.recipe.evaluation.benchmarks},
        "contaminated_by_set": {name: suite["rows"] for name, suite in report["sets"].items()},
    }


def _keep_or_refuse(item: Judged[Problem] | Judged[Query], kept: Write, rejects: Write) -> None:
    row = item.row
    if not item.reason:
        kept(row.to_json())
        return
    problem = isinstance(row, Problem)
    reject = Reject(
        id=row.id,
        stage="filtering",
        reason=item.reason,
        detail=item.detail,
        where=row.prompt_id if problem else f"instruction {row.task}",
        text=f"{row.problem}\n\n{row.solution if problem else row.completion}"[:4000],
    )
    rejects(reject.to_json())


@dataclass(slots=True)
class _Group:
    """How many of some rows there are, and why they are refused."""

    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, item: Judged[Problem] | Judged[Query]) -> None:
        self.count += 1
        if item.reason:
            self.reasons[item.reason] += 1

    def table(self) -> dict[str, Any]:
        refused = dict(sorted(self.reasons.items()))
        return {"in": self.count, "kept": self.count - self.reasons.total(), "rejected": refused}


@dataclass(slots=True)
class _Counts:
    """What is counted of the problems."""

    every: _Group = field(default_factory=_Group)
    by_origin: defaultdict[str, _Group] = field(default_factory=lambda: defaultdict(_Group))
    kept_by_kind: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)
    words: Counter[bool] = field(default_factory=Counter)
    """Of the natural-language solutions kept, how many had another answer to agree with, and how many hadn't."""

    def add(self, item: Judged[Problem], config: FilteringConfig) -> None:
        row, checks = item.row, item.checks
        self.every.add(item)
        self.by_origin[row.origin].add(item)
        if "execution" in checks:
            self.levels[checks["sandbox_level"]] += 1
            self.executed["output_match"] += checks["output_match"] == "yes"
            self.executed["constant_only"] += checks["computes"] == "no"
        if not item.reason:
            self.kept_by_kind[row.kind] += 1
            if row.kind == "cot":
                self.words[checks.get(config.cross_check, "none") != "none"] += 1

    def table(self, config: FilteringConfig) -> dict[str, Any]:
        return {
            **self.every.table(),
            "kept_by_kind": dict(sorted(self.kept_by_kind.items())),
            "by_origin": {origin: group.table() for origin, group in sorted(self.by_origin.items())},
            "sandbox": {
                "level": dict(sorted(self.levels.items())),
                "executed": self.levels.total(),
                "output_match": self.executed["output_match"],
                "constant_only": self.executed["constant_only"],
            },
            "cross_check": {
                "by": config.cross_check,
                "compared": self.words[True],
                "not_compared": self.words[False],
            },
        }


def _contamination(
    found: list[tuple[str, dict[str, Any]]], rows: int, index: DecontaminationIndex, config: FilteringConfig
) -> dict[str, Any]:
    """Report for each evaluation set which of its questions were met, refused or only brushed."""
    sets: dict[str, Any] = {}
    for name, questions in sorted(index.questions().items()):
        hits = [(row, h) for row, h in found if h["suite"] == name]
        over = [(row, h) for row, h in hits if h["share"] >= config.min_question_share]
        sets[name] = {
            "questions": questions,
            "questions_too_short": index.ignored.get(name, 0),
            "rows": len(over),
            "questions_met": len({h["question"] for _, h in over}),
            "rows_below_share": len(hits) - len(over),
            "examples": [
                {"id": row, **{k: v for k, v in h.items() if k != "suite"}} for row, h in over[:MAX_EXAMPLES]
            ],
        }
    return {
        "ngram": config.ngram,
        "min_question_share": config.min_question_share,
        "rows": rows,
        "sets": sets,
    }
