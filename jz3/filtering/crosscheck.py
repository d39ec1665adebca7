"""Answers of natural-language solutions against other solutions of the same problem."""

import json
from collections import defaultdict
from collections.abc import Sequence

from jz3.corpus.dedup import normalise
from jz3.filtering.config import FilteringConfig
from jz3.grading.answer import Grader
from jz3.records import Problem


def other_answers(row: Problem) -> list[str]:
    """Return the answers of further solutions that travel with a row: `meta["answers"]`, a JSON list."""
    try:
        found = json.loads(row.meta.get("answers", "[]"))
    except ValueError:
        return []
    return [a for a in found if isinstance(a, str) and a.strip()] if isinstance(found, list) else []


def cross_check(
    rows: Sequence[Problem], config: FilteringConfig, grader: Grader
) -> list[tuple[str, dict[str, str]]]:
    """Check the answer of every natural-language row against what else is known of its problem.

    Args:
        rows: the rows that passed the filters before, tool rows with executed code among them.
        config: `cross_check` and `require_cross_check` decide.
        grader: decides equality.

    Returns:
        For each row the reason to refuse it, or "", and its findings.
    """
    if config.cross_check == "none":
        return [("", {})] * len(rows)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[normalise(row.problem)].append(i)
    others: list[list[str]] = [[] for _ in rows]
    for members in groups.values():
        for i in members:
            if rows[i].kind != "cot":
                continue
            if config.cross_check == "tool":
                others[i] = [rows[j].answer for j in members if rows[j].kind == "tool"]
            else:
                others[i] = [rows[j].answer for j in members if j != i] + other_answers(rows[i])
    pairs = [(rows[i].answer, other) for i, known in enumerate(others) for other in known]
    equal = iter(grader.equal_many(pairs))
    found: list[tuple[str, dict[str, str]]] = []
    for row, known in zip(rows, others, strict=True):
        if row.kind != "cot":
            found.append(("", {}))
            continue
        agreeing = sum(next(equal) for _ in known)
        if not known:
            found.append(
                ("no_cross_check" if config.require_cross_check else "", {config.cross_check: "none"})
            )
        elif config.cross_check == "tool":
            found.append(("" if agreeing else "tool_disagrees", {"tool": f"{agreeing}/{len(known)}"}))
        else:  # its own vote counts; a tie is no majority
            lost = 2 * (agreeing + 1) <= len(known) + 1
            found.append(("vote_lost" if lost else "", {"vote": f"{agreeing + 1}/{len(known) + 1}"}))
    return found
