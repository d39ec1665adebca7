"""Solved problems in front of the one to solve, for a model that hasn't been taught the prompt."""

from collections.abc import Sequence

from jz3.records import Query
from jz3.seeding import rng
from jz3.templates import prompt_for


def examples_for(queries: Sequence[Query], task: str, kind: str, count: int, seed: int) -> list[str]:
    """Return the solved examples that go in front of a problem's prompt.

    Args:
        queries: the targets' own, of any role.
        task: of the problem; its own queries are drawn from first, those of other tasks make up the rest.
        kind: `cot` (solved in words) or `tool` (in Python).
        count: how many examples, fewer where there are not so many.
        seed: of the draw, which is the same for all problems of a task.

    Returns:
        Prompts with their solutions, each with blank lines behind it.
    """
    solved = [
        query
        for query in queries
        if query.role == "fit"
        and query.completion.strip()
        and query.prompt == prompt_for(query.problem, kind)
    ]
    places = rng(seed, "evaluation", "examples", task, kind).permutation(len(solved))
    drawn = sorted((solved[place] for place in places), key=lambda query: query.task != task)
    return [example(query) for query in drawn[:count]]


def example(query: Query) -> str:
    """Return a problem's prompt with its solution, and blank lines behind it."""
    return f"{query.prompt}{query.completion.strip()}\n\n\n"
