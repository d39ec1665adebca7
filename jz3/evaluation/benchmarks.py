"""Benchmark files in the field layouts of their originals, read as queries."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error
from jz3.evaluation.choices import with_choices, without_choices
from jz3.evaluation.config import BenchmarkConfig
from jz3.files import canonical_json, hash_text
from jz3.records import Query
from jz3.templates import prompt_for

ANNOTATION = re.compile(r"<<[^<>]*>>")
"""GSM8K's calculator annotations, e.g. <<48/2=24>>."""
OPTION = re.compile(r"(?:^|(?<=\s))([A-Z])[).]\s")
Parts = tuple[str, str, str]
"""Problem, reference solution (empty if there is none) and answer."""


def load_benchmark(name: str, path: Path | str, limit: int = 0) -> list[Query]:
    """Read a benchmark.

    The layout of a row is told by its fields: GSM8K (`question`, `answer`), MATH (`problem`,
    `solution`, `answer`), OCW (`problem`, `solution`), ASDiv (`body`, `question`, `answer`), AQuA
    (`question`, `options`, `correct`), SAT (`question`, `options`, `Answer`), MMLU (`question`,
    `choices`, `answer`), gsm-hard and MAWPS (`input`, `target`), SVAMP (`Body`, `Question`, `Answer`),
    CARP (`content`, `answer`), TabMWP (`table`, `question`, `answer`).

    Args:
        name: the task's name; ids are `<name>-<line>`.
        path: a JSON-lines file.
        limit: take so many rows, spread evenly over the file; 0 is all.

    Raises:
        Jz3Error: the file is missing or empty, or a line can't be read; an evaluation set is used
            whole or not at all.
    """
    path = Path(path).expanduser()
    try:
        # Some editors put a byte order mark first.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Jz3Error(f"benchmark {name!r}: {path} can't be read ({error})") from error
    queries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            problem, solution, answer = _read_row(line, f"benchmark {name!r}: {path}:{number}")
            queries.append(
                Query(
                    id=f"{name}-{number:05d}",
                    task=name,
                    problem=problem,
                    prompt=prompt_for(problem, "cot"),
                    completion=solution,
                    answer=answer,
                    role="eval",
                )
            )
    if not queries:
        raise Jz3Error(f"benchmark {name!r}: {path} has no rows")
    return spread(queries, limit)


def benchmark_questions(benchmark: BenchmarkConfig) -> list[str]:
    """Return all problems of a benchmark, whatever its limit, as the training data is kept free of them."""
    # Who copies a question seldom writes the choices in the same way.
    return [without_choices(q.problem) for q in load_benchmark(benchmark.name, benchmark.path)]


def questions_hash(benchmark: BenchmarkConfig) -> str:
    """Return the hash of all problems of a benchmark."""
    return hash_text(canonical_json(benchmark_questions(benchmark)))


def spread(queries: list[Query], limit: int) -> list[Query]:
    """Take `limit` queries at even distances (0: all), so that an ordered file is not cut at its easy end."""
    if limit <= 0 or limit >= len(queries):
        return list(queries)
    return [queries[i * len(queries) // limit] for i in range(limit)]


def _read_row(line: str, where: str) -> Parts:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Jz3Error(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise Jz3Error(f"{where} is no JSON object")
    for fields, read in LAYOUTS:
        if set(fields) <= set(row):
            try:
                parts = read(row)
                for part, text in zip(("problem", "solution", "answer"), parts, strict=True):
                    _expect(text, str, part)
            except (TypeError, ValueError, AttributeError, IndexError) as error:
                raise Jz3Error(
                    f"{where} has the fields {', '.join(fields)} but can't be read: {error}"
                ) from error
            problem, solution, answer = (text.strip() for text in parts)
            if not problem or not answer:
                raise Jz3Error(f"{where} has no {'problem' if not problem else 'answer'}")
            return problem, solution, answer
    known = "; ".join(", ".join(fields) for fields, _ in LAYOUTS)
    raise Jz3Error(f"{where} has the fields {', '.join(sorted(row))}; known layouts: {known}")


def _expect(value: Any, kind: type, what: str) -> Any:
    """Return the value if it is of this kind; what isn't would be graded or split as something else."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} {value!r} is no {'text' if kind is str else 'list'}")
    return value


def _gsm8k(row: dict[str, Any]) -> Parts:
    solution, found, answer = row["answer"].rpartition("####")
    if not found:
        return row["question"], "", row["answer"]
    answer = answer.strip().replace(",", "")
    steps = ANNOTATION.sub("", solution).strip()
    return row["question"], f"{steps}\nThe answer is \\boxed{{{answer}}}.", answer


def _math(row: dict[str, Any]) -> Parts:
    answer = row["answer"]
    return row["problem"], row["solution"], str(answer) if type(answer) in (int, float) else answer


def _ocw(row: dict[str, Any]) -> Parts:
    from jz3.grading.answer import extract_boxed

    return row["problem"], row["solution"], extract_boxed(row["solution"])


def _asdiv(row: dict[str, Any]) -> Parts:
    # The unit stands behind the number in brackets: "9 (apples)".
    answer = re.sub(r"\s*\([^()]*\)", "", row["answer"])
    return f"{row['body'].strip()} {row['question'].strip()}", "", answer


def _aqua(row: dict[str, Any]) -> Parts:
    options = [
        re.sub(r"^\(?[A-Z]\s*\)\s*", "", option) for option in _expect(row["options"], list, "options")
    ]
    return with_choices(row["question"], options), row["rationale"], row["correct"]


def _sat(row: dict[str, Any]) -> Parts:
    texts: list[str] = []
    end = 0
    for mark in OPTION.finditer(row["options"]):
        # A letter that is not the next one belongs to a choice's text.
        if mark[1] == chr(ord("A") + len(texts)):
            if texts:
                texts[-1] = row["options"][end : mark.start()].strip()
            texts.append("")
            end = mark.end()
    if len(texts) < 2:
        raise ValueError(f"options {row['options']!r} are not marked A) B) C) ...")
    texts[-1] = row["options"][end:].strip()
    return with_choices(row["question"], texts), "", row["Answer"]


def _mmlu(row: dict[str, Any]) -> Parts:
    choices, answer = _expect(row["choices"], list, "choices"), row["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r} is the number of none of the {len(choices)} choices")
    return with_choices(row["question"], choices), "", chr(ord("A") + answer)


def _gsm_hard(row: dict[str, Any]) -> Parts:
    return row["input"], "", _number(row["target"])


def _svamp(row: dict[str, Any]) -> Parts:
    body = row["Body"].strip()
    return f"{body}{'' if body.endswith('.') else '.'} {row['Question'].strip()}", "", _number(row["Answer"])


def _number(value: Any) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() else repr(number)


def _carp(row: dict[str, Any]) -> Parts:
    return row["content"], "", row["answer"]


def _tabmwp(row: dict[str, Any]) -> Parts:
    about = f' regarding "{row["table_title"]}"' if row.get("table_title") else ""
    problem = f"Read the following table{about} and answer a question:\n{row['table']}\n{row['question']}"
    if row.get("choices"):
        # Graded by the choice's text, which is what the answer holds.
        problem += f" Choose one of: {', '.join(map(str, _expect(row['choices'], list, 'choices')))}."
    return problem, "", row["answer"]


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Parts]], ...] = (
    (("body", "question", "answer"), _asdiv),
    (("question", "options", "correct", "rationale"), _aqua),
    (("question", "options", "Answer"), _sat),
    (("table", "question", "answer"), _tabmwp),
    (("question", "choices", "answer"), _mmlu),
    (("problem", "solution", "answer"), _math),
    (("problem", "solution"), _ocw),
    (("input", "target"), _gsm_hard),
    (("Body", "Question", "Answer"), _svamp),
    (("content", "answer"), _carp),
    (("question", "answer"), _gsm8k),
)
"""Field names and reader; the first whose fields are all there reads the row."""
