"""The target tasks of a run: files of problems with solutions, read into queries."""

import dataclasses
import json
import zlib
from collections import Counter
from pathlib import Path

from jz3.corpus.config import SourceConfig
from jz3.corpus.readers import open_lines, read_jsonl_file, reject
from jz3.errors import Jz3Error
from jz3.files import hash_text
from jz3.records import Query, Reject
from jz3.scoring.config import ScoreSettings
from jz3.seeding import seed_for
from jz3.targets import clean_solution, refuse_parquet
from jz3.templates import bare_problem, prompt_for

FIELDS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("problem", "solution"),
    ("question", "solution"),
    ("problem", "answer"),
    ("text", ""),
)
"""Pairs of fields that are known by themselves: what the model is given, and what is scored. `prompt`
and `completion` are taken as they are; of `text` everything is scored."""
PROBLEMS = ("question", "problem")
"""Fields that are taken for the problem of a solution that is named."""
STAGE = "targets"
_PEEK = 100


def read_target(name: str, path: Path, settings: ScoreSettings) -> tuple[list[Query], list[Reject]]:
    """Read the queries of a target, those that are drawn if there are more than wanted.

    Args:
        name: of the task; `control` for the negative control.
        path: a JSON-lines file, plain, `.gz` or `.zst`.
        settings: fields and number of queries.

    Returns:
        The queries in an order that depends on them alone, and what was refused.

    Raises:
        Jz3Error: the file is Parquet or holds no usable query; the message says why.
    """
    refuse_parquet(f"target {name!r}", path)
    problem, solution = _fields(name, path, settings)
    source = SourceConfig(
        name="targets",
        kind="jsonl",
        paths=(str(path),),
        text_field=problem,
        keep_fields=(solution,) if solution else (),
    )
    rejects: list[Reject] = []
    queries: dict[str, Query] = {}
    for item in read_jsonl_file(path, source):
        if isinstance(item, Reject):
            rejects.append(dataclasses.replace(item, stage=STAGE))
            continue
        if item.nested:
            detail = f"field {solution!r} must be a text, got a list or an object"
            rejects.append(
                dataclasses.replace(reject("wrong_type", item.where, detail, item.text), stage=STAGE)
            )
            continue
        asked = bare_problem(item.text)
        if not solution:
            prompt, completion = "", item.text.strip()
        elif (problem, solution) == FIELDS[0]:
            prompt, completion = item.text, item.meta.get(solution, "")
        else:
            prompt, completion = prompt_for(asked, "cot"), clean_solution(item.meta.get(solution, ""))[0]
        if not completion.strip():
            refused = reject(
                "no_completion", item.where, f"field {solution!r} is missing or empty", item.text
            )
            rejects.append(dataclasses.replace(refused, stage=STAGE))
            continue
        key = hash_text("\x1f".join([name, prompt, completion]))
        queries[key] = Query(
            id=key,
            task=name,
            problem=asked,
            prompt=prompt,
            completion=completion,
            role="control" if name == "control" else "fit",
        )
    if not queries:
        raise Jz3Error(f"target {name!r}: {path} holds no usable query ({summary(rejects)})")
    order = sorted(queries.values(), key=lambda q: (seed_for(settings.seed, "score", q.task, q.id), q.id))
    return order[: settings.queries or len(order)], rejects


def summary(rejects: list[Reject]) -> str:
    """Count rejects by reason in one line, with the place of the first."""
    if not rejects:
        return "it is empty"
    counts = Counter(r.reason for r in rejects)
    text = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    first = f"first at {rejects[0].where}" if rejects[0].where else "first"
    return f"{text}; {first}" + (f": {rejects[0].detail}" if rejects[0].detail else "")


def _fields(name: str, path: Path, settings: ScoreSettings) -> tuple[str, str]:
    """Return the fields of problem and solution; what isn't named is looked for in the file's first rows."""
    problem, solution = settings.problem_field, settings.solution_field
    if problem and solution and name != "control":
        return problem, solution
    seen = _seen(name, path, settings)
    if name == "control" and not all(_has(seen, field) for field in (problem, solution) if field):
        # The fields are named for the tasks, and the control's file may have others.
        if solution and _has(seen, solution) and not any(known in seen for known, _ in FIELDS):
            return solution, ""
        problem = solution = ""
    if problem and not solution:
        partners = [s for p, s in FIELDS if p == problem] + [s for _, s in FIELDS]
        solution = next((s for s in partners if s != problem and s in seen), "")
    elif solution and not problem:
        partners = [*(p for p, s in FIELDS if s == solution), *PROBLEMS]
        problem = next((p for p in partners if p != solution and p in seen), "")
        if not problem and name == "control":
            return solution, ""
        if not problem:
            raise Jz3Error(
                f"target {name!r}: --solution-field {solution!r} is given, and {path} has no field "
                f"{' or '.join(PROBLEMS)} for its problem (it has {_listed(seen)}); name it with --problem-field"
            )
    return (problem, solution) if problem else _known(name, path, seen)


def _seen(name: str, path: Path, settings: ScoreSettings) -> dict[str, None]:
    """Return the fields of a file's first rows."""
    seen: dict[str, None] = {}
    try:
        with open_lines(path) as stream:
            for _ in range(_PEEK):
                line = stream.readline(settings.max_line_bytes)
                try:
                    row = json.loads(line) if line.strip() else {}
                except (ValueError, RecursionError):
                    continue
                seen.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    except (OSError, EOFError, zlib.error) as error:
        raise Jz3Error(f"target {name!r}: {path} can't be read: {error}") from error
    return seen


def _has(seen: dict[str, None], field: str) -> bool:
    """Tell whether a field is there; as of the corpus it may be nested (a.b) or joined of several (a+b)."""
    names = [name.strip() for name in field.split("+")]
    return all(name in seen or name.partition(".")[0] in seen for name in names)


def _listed(seen: dict[str, None]) -> str:
    return ", ".join(map(str, seen)) or "none"


def _known(name: str, path: Path, seen: dict[str, None]) -> tuple[str, str]:
    """Return the first of the known pairs that a file has."""
    for pair in FIELDS:
        if all(not field or field in seen for field in pair):
            return pair
    if any(problem in seen for problem, _ in FIELDS[:-1]):
        # The reader rejects every row for the field that it lacks, and the message counts them.
        return next((p, s) for p, s in FIELDS if p in seen)
    if not seen:
        raise Jz3Error(
            f"target {name!r}: {path} holds no JSON object in its first {_PEEK} lines; targets are JSON lines"
        )
    raise Jz3Error(
        f"target {name!r}: {path} has the fields {_listed(seen)}; wanted are question "
        "and answer, problem and solution, prompt and completion or text: name others with "
        "--problem-field and --solution-field"
    )
