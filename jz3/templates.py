"""The prompt shapes shared by targets, training and evaluation, as in the paper's released data."""

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
