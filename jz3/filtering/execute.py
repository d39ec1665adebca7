"""Tool solutions: run the code, compare what it prints with what the solution says it prints."""

import ast
import contextlib
import dataclasses
import re
import warnings
from typing import Any

from jz3.filtering.config import FilteringConfig
from jz3.grading.answer import (
    Grader,
    answer_like_printed,
    fenced_blocks,
    outputs_match,
    plain_number,
    tidy_answer,
)
from jz3.grading.sandbox import Execution, Sandbox
from jz3.records import Problem

MARK = "\x1e"
"""Printed between the blocks of a solution, so that one run shows what each of them prints."""
MAX_KEPT = 500


def program(solution: str) -> tuple[str, list[str]]:
    """Join the code blocks of a solution to one program; each block sees the names of those before.

    Returns:
        The program, and the stated outputs, one for each block.
    """
    blocks = fenced_blocks(solution)
    code = [content for kind, content in blocks if kind == "python"]
    return f"\nprint({MARK!r}, end='')\n".join(code), [
        content for kind, content in blocks if kind == "output"
    ]


def compare(stated: list[str], done: Execution) -> str:
    """Return why an execution contradicts the stated outputs, or ""."""
    if not done.ok:
        return f"code_{done.reason}"
    real = done.stdout.split(MARK)
    if len(real) != len(stated) or not all(outputs_match(s, r) for s, r in zip(stated, real, strict=True)):
        return "output_differs"
    return ""


def computes(code: str) -> bool:
    """Tell whether a program does more than print constants (a finding, not a reason to refuse)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences in the model's code
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    harmless = {"print", "str", "round", "int", "float"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.While, ast.comprehension)):
            return True
        if isinstance(node, ast.BinOp) and not (
            isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        ):
            return True
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in harmless):
            return True
    return False


class Executor:
    """Runs shards of tool rows; opens its sandboxes when there is work. Use it as a context manager.

    Args:
        config: the filters' settings.
        grader: decides whether an answer is what was printed.
    """

    def __init__(self, config: FilteringConfig, grader: Grader) -> None:
        self.config = config
        self._grader = grader
        self._sandboxes: list[Sandbox] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, rows: list[Problem]) -> list[dict[str, Any]]:
        """Execute the rows' code.

        Returns:
            For each row `id`, `reason` (empty if all agrees), `detail` and `checks`.
        """
        if not self._sandboxes:
            for i in range(self.config.executions):
                settings = dataclasses.replace(self.config.sandbox, seed=self.config.sandbox.seed + i)
                self._sandboxes.append(self._stack.enter_context(Sandbox(settings)))
        programs = [program(row.solution) for row in rows]
        done = self._sandboxes[0].run_many([code for code, _ in programs])
        reasons = [compare(stated, d) for (_, stated), d in zip(programs, done, strict=True)]
        matches = [not reason for reason in reasons]
        for sandbox in self._sandboxes[1:]:
            left = [i for i, reason in enumerate(reasons) if not reason]
            for i, again in zip(left, sandbox.run_many([programs[i][0] for i in left]), strict=True):
                if compare(programs[i][1], again):
                    reasons[i] = "not_reproducible"
        agree = answers_printed(
            self._grader, [(r.answer, d.stdout.replace(MARK, "\n")) for r, d in zip(rows, done, strict=True)]
        )
        found = []
        for i, row in enumerate(rows):
            checks = {
                "sandbox_level": done[i].level,
                "execution": done[i].reason,
                "output_match": _yes(matches[i]),
                "answer_printed": _yes(agree[i]),
                "computes": _yes(computes(programs[i][0])),
            }
            reason = reasons[i] or ("" if agree[i] else "answer_not_printed")
            detail = _detail(reason, done[i]) if reason else ""
            found.append({"id": row.id, "reason": reason, "detail": detail, "checks": checks})
        return found


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _detail(reason: str, done: Execution) -> str:
    if reason.startswith("code_"):
        return done.stderr.strip().rpartition("\n")[2][:MAX_KEPT]
    return f"it prints: {done.stdout.replace(MARK, '').strip()[:MAX_KEPT]}"


def answers_printed(grader: Grader, pairs: list[tuple[str, str]]) -> list[bool]:
    """Tell for pairs (answer, output) whether the answer is in the output.

    A number must be one of the printed ones, or what one of them rounds to; anything else must equal
    a line of the output, or the part of it behind a colon or an equals sign.
    """
    found = [answer_like_printed(answer, output) for answer, output in pairs]
    asked: list[tuple[int, tuple[str, str]]] = []
    for i, (answer, output) in enumerate(pairs):
        if not found[i] and plain_number(tidy_answer(answer)) is None:
            asked.extend((i, (answer, candidate)) for candidate in _candidates(output))
    for (i, _), equal in zip(asked, grader.equal_many([pair for _, pair in asked]), strict=True):
        found[i] = found[i] or equal
    return found


def _candidates(output: str) -> list[str]:
    """Return the texts of the last lines of an output that may be an answer."""
    found: dict[str, None] = {}
    for line in [line.strip() for line in output.splitlines() if line.strip()][-3:]:
        for text in (
            line,
            re.split(r":\s", line)[-1],
            re.split(r"(?<![<>=!])=(?!=)", line)[-1],
            re.split(r"\b(?:is|are)\s", line)[-1],
        ):
            text = re.sub(r"\*I\b|(?<=\d)j\b", "i", text.strip().rstrip("."))
            if text and len(text) <= 300:
                found[text] = None
                found[text.strip("[]")] = None
    return list(found)
