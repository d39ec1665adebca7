"""Targets: the problems the model is to get better at, and what goes with them.

Every task gives queries that the fit and the selection see (`fit`), queries kept back to measure
fidelity (`unseen`) and problems for evaluation only (`eval`). A control with nothing mathematical in
it shows what chance looks like, and the instruction data make the second stage of the training.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.files import hash_text, write_jsonl
from jz3.records import Query, Reject
from jz3.seeding import seed_for
from jz3.targets.config import ControlConfig, InstructionConfig, TaskConfig
from jz3.templates import bare_problem, prompt_for

if TYPE_CHECKING:
    from jz3.config import Recipe
    from jz3.stage import StageContext
    from jz3.worked import WorkedProblem

EVAL_SHARE = 4
"""One in four problems of a file (by hash) is for evaluation, if there is no file of its own for it."""
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_THOUSANDS = re.compile(r"[^\d(\[{]*\d{1,3}(?:,\d{3})+(?:\.\d+)?[^\d,]*")
_GSM8K_ANSWER = re.compile(r"\s*####[ \t]*(?P<answer>[^\n]+?)\s*\Z")


def run(ctx: "StageContext") -> dict[str, Any]:
    """Write queries.jsonl, eval.jsonl, instruction.jsonl and rejects.jsonl.

    Returns:
        Rows per task and role, rows per form of the instruction data, rejects by reason.

    Raises:
        Jz3Error: a file is missing or gives fewer usable problems than asked for.
    """
    config = ctx.recipe.targets
    rejects: list[Reject] = []
    queries: list[Query] = []
    evaluation: list[Query] = []
    counts: dict[str, dict[str, int]] = {}
    for task in config.tasks:
        rows = _worked_task(task, ctx.seed) if task.kind == "worked" else _file_task(task, ctx.seed, rejects)
        counts[task.name] = dict(Counter(row.role for row in rows))
        queries += [row for row in rows if row.role != "eval"]
        evaluation += [row for row in rows if row.role == "eval"]
    control = _control(config.control, ctx.seed, rejects)
    taken = {row.problem for row in (*queries, *evaluation)}
    instruction: list[Query] = []
    for source in config.instruction:
        instruction += _instruction(source, ctx.seed, taken, instruction, rejects)
    write_jsonl(ctx.out / "queries.jsonl", (row.to_json() for row in (*queries, *control)))
    write_jsonl(ctx.out / "eval.jsonl", (row.to_json() for row in evaluation))
    write_jsonl(ctx.out / "instruction.jsonl", (row.to_json() for row in instruction))
    write_jsonl(ctx.out / "rejects.jsonl", (row.to_json() for row in rejects))
    return {
        "tasks": counts,
        "control": len(control),
        "instruction": dict(
            Counter("tool" if "```python" in row.completion else "cot" for row in instruction)
        ),
        "rejected": dict(sorted(Counter(row.reason for row in rejects).items())),
    }


def check_files(recipe: "Recipe") -> None:
    """Look for the files of the targets as the stage will.

    Raises:
        Jz3Error: one is missing or a Parquet file.
    """
    from jz3.corpus.config import SourceConfig
    from jz3.corpus.readers import find_files

    config = recipe.targets
    wanted = [(row, row.name, row.path) for row in (*config.tasks, *config.instruction)]
    wanted += [(task, task.name, task.eval_path) for task in config.tasks]
    wanted += [(config.control, "control", config.control.path)] if config.control.count else []
    for row, name, path in wanted:
        if row.kind == "jsonl" and path:
            for file in find_files(SourceConfig(name="targets", kind="jsonl", paths=(path,))):
                refuse_parquet(repr(name), file)


def refuse_parquet(name: str, path: Path) -> None:
    """Raise a Jz3Error if a file of `name`, a target or the like, is a Parquet file."""
    if path.suffix == ".parquet":
        raise Jz3Error(f"{name}: {path} is a Parquet file; targets are JSON lines, convert it to those")


def clean_solution(solution: str, answer: str = "") -> tuple[str, str]:
    """Bring a solution into the project's form.

    Calculator annotations (`<<48/2=24>>`) go, since a model would be drawn to texts that look like
    them instead of to the mathematics; GSM8K's last line `#### 18` becomes a sentence with \\boxed{18}.

    Args:
        solution: the solution as its data set has it.
        answer: the bare answer, if known apart from the solution.

    Returns:
        The solution, and the answer (empty if it is stated nowhere).
    """
    from jz3.grading.answer import extract_boxed

    text = _ANNOTATION.sub("", solution).strip()
    match = _GSM8K_ANSWER.search(text)
    if match:
        text = text[: match.start()].rstrip()
        stated = match["answer"]
        # Other commas stand between several answers.
        answer = answer or (stated.replace(",", "") if _THOUSANDS.fullmatch(stated) else stated)
    if not text:
        return "", answer
    boxed = extract_boxed(text)
    if not boxed and answer:
        text = f"{text}\nThe answer is \\boxed{{{answer}}}."
    return text, answer or boxed


def _query(task: str, role: str, problem: str, completion: str, answer: str, kind: str) -> Query:
    # Instruction data may hold several solutions of a problem.
    solution = [completion] if role == "instruction" else []
    return Query(
        id=hash_text("\x1f".join([task, role, problem, *solution])),
        task=task,
        problem=problem,
        prompt=prompt_for(problem, kind),
        completion=completion,
        answer=answer,
        role=role,
    )


def _tool_rows(count: int, families: int, share: float) -> list[bool]:
    """Say which rows are programs, so that every family, coming round in turn, has its share of them."""
    turns = [i // families + i % families for i in range(count)]
    return [int((turn + 1) * share) > int(turn * share) for turn in turns]


def _worked_query(task: str, role: str, problem: "WorkedProblem", tool: bool) -> Query:
    kind, completion = ("tool", problem.tool) if tool else ("cot", problem.cot)
    return _query(task, role, problem.question, completion, problem.answer, kind)


def _draw(
    families: Sequence[str], seed: int, count: int, split: str, taken: set[str]
) -> list["WorkedProblem"]:
    """Draw problems from the families in turn, none of which is taken already."""
    from jz3.worked import worked_problems

    columns = []
    for number, family in enumerate(families):
        share = count // len(families) + (number < count % len(families))
        # Taken problems may stand in the way, at most all of them.
        drawn = worked_problems(family, seed, share, split)
        while share and sum(p.question not in taken for p in drawn) < share:
            drawn = worked_problems(family, seed, len(drawn) + share, split)
        columns.append([p for p in drawn if p.question not in taken][:share])
    rows = max(map(len, columns), default=0)
    return [column[i] for i in range(rows) for column in columns if i < len(column)]


def _worked_task(task: TaskConfig, seed: int) -> list[Query]:
    key = seed_for(seed, "targets", task.name)
    seen = _draw(task.families, key, task.fit + task.unseen, "train", set())
    held = _draw(task.families, key, task.eval, "eval", set())
    tool = _tool_rows(len(seen), len(task.families), task.tool_share)
    rows = [
        _worked_query(task.name, "fit" if i < task.fit else "unseen", p, tool[i]) for i, p in enumerate(seen)
    ]
    return rows + [_worked_query(task.name, "eval", p, False) for p in held]


def _instruction(
    source: InstructionConfig, seed: int, taken: set[str], earlier: Sequence[Query], rejects: list[Reject]
) -> list[Query]:
    """Read or draw a source's rows but for taken problems and what earlier sources hold."""
    key = seed_for(seed, "targets", "instruction", source.name)
    if source.kind == "worked":
        drawn = _draw(source.families, key, source.count, "train", taken | {row.problem for row in earlier})
        tool = _tool_rows(len(drawn), len(source.families), source.tool_share)
        return [_worked_query(source.name, "instruction", p, t) for p, t in zip(drawn, tool, strict=True)]
    before = len(rejects)
    # Another solution is worth having from another file as from the same one.
    solved = {(row.problem, row.completion) for row in earlier}
    found = []
    for row in _read(source, source.path, rejects):
        if row.problem in taken or (row.problem, row.completion) in solved:
            whose = (
                "a target's or an evaluation's"
                if row.problem in taken
                else "with its solution an earlier source's"
            )
            detail = f"also {whose} problem"
            rejects.append(_reject("taken", f"{source.path}: {row.id}", detail, row.problem))
        else:
            found.append(row)
    # By the solution too, or all those of a problem would be drawn together.
    found.sort(key=lambda row: seed_for(key, row.problem, row.completion))
    if len(found) < (source.count or 1):
        asked = f", {source.count} asked" if source.count else ""
        raise Jz3Error(
            f"instruction {source.name!r}: {source.path} has {len(found)} usable rows{asked}{_first(rejects[before:])}"
        )
    return [
        _query(
            source.name,
            "instruction",
            row.problem,
            row.completion,
            row.answer,
            "tool" if "```python" in row.completion else "cot",
        )
        for row in found[: source.count or None]
    ]


def _file_task(task: TaskConfig, seed: int, rejects: list[Reject]) -> list[Query]:
    before = len(rejects)
    rows = list(_read(task, task.path, rejects))
    if task.eval_path:
        held = list(_read(task, task.eval_path, rejects))
        problems = {row.problem for row in held}
        seen = []
        for row in rows:
            if row.problem in problems:
                rejects.append(
                    _reject("in_evaluation", f"{task.path}: {row.id}", "also in eval_path", row.problem)
                )
            else:
                seen.append(row)
    else:
        held = [row for row in rows if _is_eval(row.problem)]
        seen = [row for row in rows if not _is_eval(row.problem)]
    graded = []
    for row in held:
        if row.answer:
            graded.append(row)
        else:
            detail = "an evaluation problem needs its answer: \\boxed{}, #### or answer_field"
            rejects.append(
                _reject("no_answer", f"{task.eval_path or task.path}: {row.id}", detail, row.completion)
            )
    for name, found, asked in (("fit and unseen", seen, task.fit + task.unseen), ("eval", graded, task.eval)):
        if len(found) < asked:
            hint = "" if task.eval_path else f" (one in {EVAL_SHARE} problems of the file is for evaluation)"
            raise Jz3Error(
                f"target {task.name!r}: {asked} problems asked for {name}, but there are only "
                f"{len(found)} usable ones{hint}; lower the count or add problems{_first(rejects[before:])}"
            )
        found.sort(key=lambda row: seed_for(seed, "targets", task.name, row.problem))
    rows = [
        dataclasses.replace(row, role="fit" if i < task.fit else "unseen")
        for i, row in enumerate(seen[: task.fit + task.unseen])
    ]
    rows += [dataclasses.replace(row, role="eval") for row in graded[: task.eval]]
    return [_query(row.task, row.role, row.problem, row.completion, row.answer, "cot") for row in rows]


def _is_eval(problem: str) -> bool:
    """Tell by the problem's hash alone, so that no run's seed makes an evaluation problem a target."""
    return int(hash_text(problem), 16) % EVAL_SHARE == 0


def _read(config: TaskConfig | InstructionConfig, path: str, rejects: list[Reject]) -> Iterator[Query]:
    """Read problems with solutions; what can't be used becomes a reject."""
    from jz3.corpus.config import SourceConfig
    from jz3.corpus.readers import find_files, read_jsonl_file

    fields = tuple(f for f in (config.solution_field, config.answer_field) if f)
    source = SourceConfig(
        name="targets", kind="jsonl", paths=(path,), text_field=config.problem_field, keep_fields=fields
    )
    seen: set[tuple[str, ...]] = set()
    for file in find_files(source):
        refuse_parquet(repr(config.name), file)
        for item in read_jsonl_file(file, source):
            if isinstance(item, Reject):
                rejects.append(dataclasses.replace(item, stage="targets"))
                continue
            problem = bare_problem(item.text)
            missing = [f for f in fields if f not in item.meta]
            completion, answer = "", ""
            if not missing and not item.nested:
                stated = item.meta[config.answer_field].strip() if config.answer_field else ""
                completion, answer = clean_solution(item.meta[config.solution_field], stated)
            same = (problem, completion) if isinstance(config, InstructionConfig) else (problem,)
            if missing:
                rejects.append(_reject("missing_field", item.where, f"no field {missing[0]!r}", problem))
            elif item.nested:
                detail = f"field {item.nested[0]!r} must be a text, got a list or an object"
                rejects.append(_reject("wrong_type", item.where, detail, problem))
            elif not completion:
                rejects.append(_reject("empty_completion", item.where, "the solution is empty", problem))
            elif same in seen:
                what = "problem with the same solution" if len(same) > 1 else "problem"
                rejects.append(
                    _reject("duplicate", item.where, f"the same {what} stands further up", problem)
                )
            else:
                seen.add(same)
                yield _query(config.name, "fit", problem, completion, answer, "cot")


def _control(config: ControlConfig, seed: int, rejects: list[Reject]) -> list[Query]:
    """Build the control's queries: the first third of a text is the prompt, the rest the completion."""
    found: list[Query] = []
    if not config.count:
        return found
    before = len(rejects)
    for where, text in _control_texts(config, seed, rejects):
        text = text[: config.max_chars].strip()
        cut = _boundary(text)
        prompt, completion = text[:cut], text[cut:]
        if not prompt.strip() or not completion.strip():
            rejects.append(_reject("empty_completion", where, "too short to be cut in two", text))
            continue
        identity = hash_text("control\x1f" + text)
        found.append(
            Query(
                id=identity,
                task="control",
                problem=prompt,
                prompt=prompt,
                completion=completion,
                role="control",
            )
        )
        if len(found) == config.count:
            return found
    raise Jz3Error(
        f"control: {config.count} texts asked, only {len(found)} usable; lower control.count{_first(rejects[before:])}"
    )


def _control_texts(config: ControlConfig, seed: int, rejects: list[Reject]) -> Iterator[tuple[str, str]]:
    """Yield where each control text comes from, and the text; repeats are passed over."""
    from jz3.corpus.config import SourceConfig
    from jz3.corpus.docstrings import Docstring, docstrings
    from jz3.corpus.readers import find_files, read_jsonl_file

    seen: set[str] = set()
    if config.kind == "docstrings":
        for item in docstrings(config.package, seed, "control"):
            if isinstance(item, Docstring) and item.text not in seen:
                seen.add(item.text)
                yield item.where, item.text
        return
    source = SourceConfig(name="control", kind="jsonl", paths=(config.path,), text_field=config.text_field)
    texts: list[tuple[int, str, str]] = []
    for file in find_files(source):
        refuse_parquet("control", file)
        for row in read_jsonl_file(file, source):
            if isinstance(row, Reject):
                rejects.append(dataclasses.replace(row, stage="targets"))
            elif row.text not in seen:
                seen.add(row.text)
                texts.append((seed_for(seed, "targets", "control", row.text), row.where, row.text))
    yield from ((where, text) for _, where, text in sorted(texts))


def _boundary(text: str) -> int:
    """Return where to cut: at the white space nearest to a third of the text."""
    third = len(text) // 3
    spaces = [m.end() for m in re.finditer(r"\s+", text)]
    return min(spaces, key=lambda place: abs(place - third), default=0)


def _first(rejects: list[Reject]) -> str:
    """Return the end of a message that names the first reject, nothing if there is none."""
    return (
        f"; first reject: {rejects[0].where}: {rejects[0].reason} {rejects[0].detail}".rstrip()
        if rejects
        else ""
    )


def _reject(reason: str, where: str, detail: str, text: str) -> Reject:
    return Reject(
        id=hash_text(where + "\n" + text),
        stage="targets",
        reason=reason,
        detail=detail,
        where=where,
        text=text[:4000],
    )
