"""The stage `filtering`: every filter in order, each refusal counted, every finding kept.

The instruction data are the user's own and only compared with the evaluation questions.

Order: fields, language, length, boxed answer, solvability, repetition (`text`); arithmetic;
contamination; execution of tool solutions; cross-check of the others; duplicates last, so that a
duplicate gives way only to a row that is kept.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import xxhash

from jz3.corpus.config import MinHashConfig
from jz3.corpus.dedup import Deduplicator
from jz3.errors import Jz3Error
from jz3.files import canonical_json
from jz3.filtering.arithmetic import wrong_equations
from jz3.filtering.config import FilteringConfig
from jz3.filtering.crosscheck import cross_check
from jz3.filtering.decontaminate import DecontaminationIndex, Hit, build_index
from jz3.filtering.execute import Executor
from jz3.filtering.outcome import Findings, write_outcome
from jz3.filtering.text import TEXT_FILTERS, fields_present, length, prose
from jz3.grading.answer import Grader
from jz3.grading.sandbox import MOST_WORKERS, cores
from jz3.processes import end_with
from jz3.records import Problem, Query
from jz3.rows import Rows
from jz3.stage import StageContext

if TYPE_CHECKING:
    import numpy as np

READ_SHARD = 2048
FEW = 4 * READ_SHARD
"""Rows that this process alone reads as soon as others would be ready."""


def filter_problems(context: StageContext) -> dict[str, Any]:
    """Run the stage.

    Reads synthesis/problems.jsonl, distillation/initial.jsonl and boost.jsonl, targets/eval.jsonl and
    instruction.jsonl, and the benchmarks; writes kept.jsonl, instruction.jsonl, verdicts.jsonl,
    rejects.jsonl and decontamination.json.
    """
    config = context.recipe.filtering
    rows, with_code = _input(context, config)
    index = build_index(config, context.rows("targets", "eval.jsonl"), context.recipe.evaluation.benchmarks)
    instruction = Rows([context.path("targets", "instruction.jsonl")], Query.from_json)
    with _readers(config, index, max(len(rows), len(instruction))) as pool:
        beside = canonical_json(index.digests)
        read = context.shards("read", rows, READ_SHARD, _read_part, "problems", beside, pool)
        compared = context.shards(
            "instruction", instruction, READ_SHARD, _compare_part, "instruction rows", beside, pool
        )
    findings = Findings(rows)
    findings.add(range(len(rows)), read)
    with Grader(level=config.sandbox.level, workers=config.sandbox.workers) as grader:
        with Executor(config, grader) as executor:
            tools = findings.left()
            tools = tools[with_code[tools]]
            done = context.shards(
                "executed", rows.take(tools), config.shard_size, executor.run, "tool solutions"
            )
        findings.add(tools, done)
        left = findings.left()
        findings.add(left, cross_check(rows.take(left), config, grader))
    left = findings.left()
    repeated = _duplicates(rows.take(left), config)
    findings.add(left[list(repeated)], repeated.values())
    taught = Findings(instruction)
    taught.add(range(len(instruction)), compared)
    return write_outcome(context, findings.judged(), taught.judged(), index, config)


def _input(context: StageContext, config: FilteringConfig) -> tuple[Rows[Problem], "np.ndarray"]:
    """Return the teacher's rows, then the synthesiser's, and which of them are solved by a program."""
    import numpy as np

    files = (
        [("distillation", "initial.jsonl"), ("distillation", "boost.jsonl")]
        if config.include_distillation
        else []
    )
    paths = [context.path(stage, name) for stage, name in [*files, ("synthesis", "problems.jsonl")]]
    rows = Rows(paths, Problem.from_json)
    ids, contents = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
    with_code = np.empty(len(rows), bool)
    for i, row in enumerate(rows):
        ids[i] = xxhash.xxh3_64_intdigest(row.id.encode())
        contents[i] = xxhash.xxh3_64_intdigest(canonical_json(row.to_json()).encode())
        with_code[i] = row.kind == "tool"
    _, first, group = np.unique(ids, return_index=True, return_inverse=True)
    for i in np.flatnonzero(contents != contents[first[group]]).tolist():
        stage = rows.path(i).parent.name
        raise Jz3Error(f"two different problems have the id {rows[i].id!r}; run the stage {stage!r} again")
    first.sort()
    return rows.take(first), with_code[first]


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


def _duplicates(rows: Rows[Problem], config: FilteringConfig) -> dict[int, dict[str, Any]]:
    """Return findings by the numbers of the rows that repeat the problem of an earlier one of the same kind."""
    near = config.near_duplicate
    settings = MinHashConfig(enabled=near > 0, threshold=near or 1.0)
    kept = {kind: Deduplicator(settings) for kind in ("cot", "tool")}
    repeated = {}
    for i, row in enumerate(rows):
        if found := kept[row.kind].admit(row.problem, row.id):
            reason, of = found
            repeated[i] = {"reason": reason, "detail": f"of {of}", "checks": {"duplicate_of": of}}
    return repeated
