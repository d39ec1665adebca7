"""The prompt shapes shared by targets, training and evaluation, as in the paper's released data."""

import re

QUESTION = "## Question"
HEADINGS = {"cot": "## Solution", "tool": "## Code Solution"}


def prompt_for(problem: str, kind: str) -> str:
    """Return what a model is given to solve `problem`.

    Args:
        problem: the bare problem.
        kind: `cot` (natural language) or `tool` (Python).

    Returns:
        `## Question`, the problem, and the heading under which the solution goes.
    """
    return f"{QUESTION}\n{problem.strip()}\n\n{HEADINGS[kind]}\n"


_FRAMED = re.compile(r"\s*## Question[ \t]*\n(.*?)\n\s*## (?:[\w-]+ )?Solution\s*", re.DOTALL)


def bare_problem(text: str) -> str:
    """Return the problem of a text that `prompt_for` or the paper's released data have framed, else the text itself."""
    framed = _FRAMED.fullmatch(text)
    return (framed[1] if framed else text).strip()
