"""The stage `filtering`: every filter in order, each refusal counted, every finding kept.

The instruction data are the user's own and only compared with the evaluation questions.

Order: fields, language, length, boxed answer, solvability, repetition (`text`); arithmetic;
contamination; execution of tool solutions; cross-check of the others; duplicates last, so that a
duplicate gives way only to a row that is kept.
"""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor as PoolExecutor
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from jz3.corpus.config import MinHashConfig
from jz3.corpus.dedup import Deduplicator
from jz3.errors import Jz3Error
from jz3.evaluation.benchmarks import questions_hash
from jz3.files import canonical_json, write_json, write_jsonl
from jz3.filtering.arithmetic import wrong_equations
from jz3.filtering.config import FilteringConfig
from jz3.filtering.crosscheck import cross_check
from jz3.filtering.decontaminate import DecontaminationIndex, Hit, build_index
from jz3.filtering.execute import Executor
from jz3.filtering.text import TEXT_FILTERS, fields_present, length, prose
from jz3.grading.answer import Grader
from jz3.grading.sandbox import MOST_WORKERS, cores
from jz3.processes import end_with
from jz3.records import Problem, Query, Reject, Verdict
from jz3.stage import StageContext

READ_SHARD = 2048
FEW = 4 * READ_SHARD
"""Rows that this process alone reads as soon as others would be ready."""
MAX_EXAMPLES = 50


@dataclass(slots=True)
class Judged:
    """A row with what the filters found so far."""

    row: Problem
    reason: str = ""
    detail: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    hits: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, reason: str, detail: str = "") -> None:
        """Note the reason unless an earlier filter has refused the row."""
        if reason and not self.reason:
            self.reason, self.detail = reason, detail


def filter_problems(context: StageContext) -> dict[str, Any]:
    """Run the stage.

    Reads synthesis/problems.jsonl, distillation/initial.jsonl and boost.jsonl, targets/eval.jsonl and
    instruction.jsonl, and the benchmarks; writes kept.jsonl, instruction.jsonl, verdicts.jsonl,
    rejects.jsonl and decontamination.json.
    """
    config = context.recipe.filtering
    judged = [Judged(row) for row in _input(context, config)]
    index = build_index(config, context.rows("targets", "eval.jsonl"), context.recipe.evaluation.benchmarks)
    instructed = [Query.from_json(row) for row in context.rows("targets", "instruction.jsonl")]
    with _readers(config, index, max(len(judged), len(instructed))) as pool:
        asked = READ_SHARD, _read_part, "problems", canonical_json(index.digests), pool
        found = context.shards("read", [j.row for j in judged], *asked)
        instruction = _instruction(context, instructed, index, pool)
    for item, result in zip(judged, found, strict=True):
        item.checks.update(result["checks"])
        item.hits = result["hits"]
        item.refuse(result["reason"], result["detail"])
    with Grader(level=config.sandbox.level, workers=config.sandbox.workers) as grader:
        with Executor(config, grader) as executor:
            tools = [j for j in judged if not j.reason and j.row.kind == "tool"]
            done = context.shards(
                "executed", [j.row for j in tools], config.shard_size, executor.run, "tool solutions"
            )
        for item, result in zip(tools, done, strict=True):
            item.checks.update(result["checks"])
            item.refuse(result["reason"], result["detail"])
        left = [j for j in judged if not j.reason]
        for item, (reason, checks) in zip(
            left, cross_check([j.row for j in left], config, grader), strict=True
        ):
            item.checks.update(checks)
            item.refuse(reason, ", ".join(checks.values()))
    _refuse_duplicates(judged, config)
    return _write(context, judged, instruction, index, config)


def _input(context: StageContext, config: FilteringConfig) -> list[Problem]:
    """Return the teacher's rows, then the synthesiser's."""
    files = (
        [("distillation", "initial.jsonl"), ("distillation", "boost.jsonl")]
        if config.include_distillation
        else []
    )
    rows: dict[str, Problem] = {}
    for stage, name in [*files, ("synthesis", "problems.jsonl")]:
        for number, value in enumerate(context.rows(stage, name), 1):
            try:
                row = Problem.from_json(value)
            except ValueError as error:
                raise Jz3Error(
                    f"{context.path(stage, name)}:{number}: {error}; run the stage {stage!r} again"
                ) from error
            if rows.setdefault(row.id, row) != row:
                raise Jz3Error(
                    f"two different problems have the id {row.id!r}; run the stage {stage!r} again"
                )
    return list(rows.values())


def read_rows(
    rows: list[Problem], config: FilteringConfig, index: DecontaminationIndex
) -> list[dict[str, Any]]:
    """Apply every filter that only reads; one finding for each row.

    Returns:
        Dictionaries with `reason` (of the first filter that refuses), `detail`, `checks` and `hits`.
    """
    return [_read(row, config, index) for row in rows]


def _read(row: Problem, config: FilteringConfig, index: DecontaminationIndex) -> dict[str, Any]:
    broken = fields_present(row, config) or length(row, config)
    if broken:  # the others may fail, or take long, on such a text
        return {"reason": broken, "detail": "", "checks": {"text": broken}, "hits": []}
    refused = [reason for check in TEXT_FILTERS if (reason := check(row, config))]
    checks = {"text": ",".join(refused) or "ok"}
    reason, detail = (refused[0], "") if refused else ("", "")
    count, wrong = wrong_equations(prose(row.solution))
    checks["equations"] = f"{count - len(wrong)}/{count}"
    if wrong and not reason:
        reason, detail = "wrong_arithmetic", wrong[0][:300]
    hits = _overlaps(row.problem, row.solution, index)
    checks["overlap"] = f"{hits[0].share:.2f}" if hits else "0"
    if not reason:
        reason, detail = _contaminated(hits, config)
    return {"reason": reason, "detail": detail, "checks": checks, "hits": _best(hits)}


def _overlaps(problem: str, solution: str, index: DecontaminationIndex) -> list[Hit]:
    hits = [h for text in (problem, prose(solution)) for h in index.find(text)]
    return sorted(hits, key=lambda h: -h.share)


def _contaminated(hits: list[Hit], config: FilteringConfig) -> tuple[str, str]:
    """Return reason and detail if the first hit covers enough of its question, else empty texts."""
    if hits and hits[0].share >= config.min_question_share:
        return "contaminated", f"{hits[0].suite} #{hits[0].question}: {hits[0].span}"
    return "", ""


def _best(hits: list[Hit]) -> list[dict[str, Any]]:
    """Return the first hit of each evaluation set, as it is kept."""
    best = {h.suite: h for h in reversed(hits)}
    return [{"suite": h.suite, "question": h.question, "phrases": h.phrases, "share": round(h.share, 4), "span": h.span}
            for _, h in sorted(best.items())]  # fmt: skip


@dataclass(slots=True)
class Instruction:
    """A row of the instruction data with the evaluation questions found in it."""

    row: Query
    reason: str
    detail: str
    hits: list[dict[str, Any]]


def _instruction(
    context: StageContext, rows: list[Query], index: DecontaminationIndex, pool: PoolExecutor | None
) -> list[Instruction]:
    asked = READ_SHARD, _compare_part, "instruction rows", canonical_json(index.digests), pool
    found = context.shards("instruction", rows, *asked)
    return [Instruction(row, **result) for row, result in zip(rows, found, strict=True)]


_reading: list[tuple[FilteringConfig, DecontaminationIndex]] = []
"""What this process reads rows with."""


@contextlib.contextmanager
def _readers(
    config: FilteringConfig, index: DecontaminationIndex, rows: int
) -> Iterator[ProcessPoolExecutor | None]:
    """Give the processes that read rows; none where there are few, which this one reads."""
    workers = config.workers or min(cores(), MOST_WORKERS)
    _reading[:] = [(config, index)]
    try:
        if rows <= FEW or workers == 1:
            yield None
            return
        with ProcessPoolExecutor(
            workers,
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(config, index, os.getpid()),
        ) as pool:
            try:
                yield pool
            except BrokenProcessPool as error:
                raise Jz3Error(
                    "filtering: a process that reads rows was killed, for want of memory perhaps; run again, it "
                    f"goes on from here, with fewer filtering.workers than {workers} if it is killed again"
                ) from error
            finally:  # an error needn't wait for the shards that are given ahead
                pool.shutdown(cancel_futures=True)
    finally:
        _reading.clear()


def _begin(config: FilteringConfig, index: DecontaminationIndex, parent: int) -> None:
    """Prepare a process that reads; it must not wait for ever once the parent is killed."""
    if not end_with(parent):
        os._exit(1)
    _reading[:] = [(config, index)]


def _read_part(rows: list[Problem]) -> list[dict[str, Any]]:
    return read_rows(rows, *_reading[0])


def _compare_part(rows: list[Query]) -> list[dict[str, Any]]:
    config, index = _reading[0]
    found = []
    for row in rows:
        hits = _overlaps(row.problem, row.completion, index)
        reason, detail = _contaminated(hits, config)
        found.append({"reason": reason, "detail": detail, "hits": _best(hits)})
    return found


def _refuse_duplicates(judged: list[Judged], config: FilteringConfig) -> None:
    """Refuse rows that repeat the problem of an earlier kept row of the same kind."""
    near = config.near_duplicate
    settings = MinHashConfig(enabled=near > 0, threshold=near or 1.0)
    kept = {kind: Deduplicator(settings) for kind in ("cot", "tool")}
    for item in judged:
        if not item.reason and (found := kept[item.row.kind].admit(item.row.problem, item.row.id)):
            item.checks["duplicate_of"] = found[1]
            item.refuse(found[0], f"of {found[1]}")


def _write(
    context: StageContext,
    judged: list[Judged],
    instruction: list[Instruction],
    index: DecontaminationIndex,
    config: FilteringConfig,
) -> dict[str, Any]:
    out = context.out
    write_jsonl(out / "kept.jsonl", (j.row.to_json() for j in judged if not j.reason))
    write_jsonl(out / "instruction.jsonl", (i.row.to_json() for i in instruction if not i.reason))
    verdicts = (Verdict(id=j.row.id, keep=not j.reason, reason=j.reason, checks=j.checks) for j in judged)
    write_jsonl(out / "verdicts.jsonl", (v.to_json() for v in verdicts))
    refused = [item for item in (*judged, *instruction) if item.reason]
    write_jsonl(out / "rejects.jsonl", (_reject(item).to_json() for item in refused))
    report = _contamination([*judged, *instruction], index, config)
    write_json(out / "decontamination.json", report)
    executed = [j for j in judged if "execution" in j.checks]
    words = [j.checks for j in judged if j.row.kind == "cot" and not j.reason]
    compared = sum(checks.get(config.cross_check, "none") != "none" for checks in words)
    return {
        "in": len(judged),
        "kept": sum(not j.reason for j in judged),
        "kept_by_kind": _count(j.row.kind for j in judged if not j.reason),
        "rejected": _count(j.reason for j in judged if j.reason),
        "by_origin": _by_origin(judged),
        "instruction": {
            "in": len(instruction),
            "kept": sum(not i.reason for i in instruction),
            "rejected": _count(i.reason for i in instruction if i.reason),
        },
        "sandbox": {
            "level": _count(j.checks["sandbox_level"] for j in executed),
            "executed": len(executed),
            "output_match": sum(j.checks["output_match"] == "yes" for j in executed),
            "constant_only": sum(j.checks["computes"] == "no" for j in executed),
        },
        # Of the natural-language solutions kept, how many had another answer to agree with.
        "cross_check": {
            "by": config.cross_check,
            "compared": compared,
            "not_compared": len(words) - compared,
        },
        "benchmarks": {b.name: questions_hash(b) for b in context.recipe.evaluation.benchmarks},
        "contaminated_by_set": {name: suite["rows"] for name, suite in report["sets"].items()},
    }


def _reject(item: Judged | Instruction) -> Reject:
    row = item.row
    problem = isinstance(row, Problem)
    return Reject(
        id=row.id,
        stage="filtering",
        reason=item.reason,
        detail=item.detail,
        where=row.prompt_id if problem else f"instruction {row.task}",
        text=f"{row.problem}\n\n{row.solution if problem else row.completion}"[:4000],
    )


def _count(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _by_origin(judged: list[Judged]) -> dict[str, Any]:
    groups: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        groups[item.row.origin].append(item)
    return {
        origin: {
            "in": len(items),
            "kept": sum(not j.reason for j in items),
            "rejected": _count(j.reason for j in items if j.reason),
        }
        for origin, items in sorted(groups.items())
    }


def _contamination(
    judged: list[Judged | Instruction], index: DecontaminationIndex, config: FilteringConfig
) -> dict[str, Any]:
    """Report for each evaluation set which of its questions were met, refused or only brushed."""
    sets: dict[str, Any] = {}
    for name, questions in sorted(index.questions().items()):
        hits = [(j.row.id, h) for j in judged for h in j.hits if h["suite"] == name]
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
        "rows": len(judged),
        "sets": sets,
    }
