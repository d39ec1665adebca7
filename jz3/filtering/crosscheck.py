"""Answers of natural-language solutions against other solutions of the same problem."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import xxhash

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


def cross_check(rows: Sequence[Problem], config: FilteringConfig, grader: Grader) -> list[dict[str, Any]]:
    """Check the answer of every natural-language row against what else is known of its problem.

    Args:
        rows: the rows that passed the filters before, tool rows with executed code among them.
        config: `cross_check` and `require_cross_check` decide.
        grader: decides equality.

    Returns:
        For each row the `reason` to refuse it, or "", `detail` and `checks`.
    """
    import numpy as np

    if config.cross_check == "none":
        return [_finding()] * len(rows)
    # Most problems are there once, and then only their hash is kept.
    problems, compared = np.empty(len(rows), np.uint64), np.zeros(len(rows), bool)
    alone = _finding("no_cross_check" if config.require_cross_check else "", {config.cross_check: "none"})
    other = _finding()
    found: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        problems[i] = xxhash.xxh3_64_intdigest(normalise(row.problem).encode("utf-8", "surrogatepass"))
        compared[i] = bool(other_answers(row))
        found.append(alone if row.kind == "cot" else other)
    _, group, sizes = np.unique(problems, return_inverse=True, return_counts=True)
    compared |= sizes[group] > 1
    known = {i: row for i, row in enumerate(rows if compared.any() else ()) if compared[i]}
    groups: dict[int, list[int]] = defaultdict(list)
    for i in known:
        groups[int(group[i])].append(i)
    others: dict[int, list[str]] = {}
    for members in groups.values():
        for i in members:
            if known[i].kind != "cot":
                continue
            if config.cross_check == "tool":
                others[i] = [known[j].answer for j in members if known[j].kind == "tool"]
            else:
                others[i] = [known[j].answer for j in members if j != i] + other_answers(known[i])
    equal = iter(
        grader.equal_many([(known[i].answer, other) for i, given in others.items() for other in given])
    )
    for i, given in others.items():
        agreeing = sum(next(equal) for _ in given)
        if not given:
            continue
        if config.cross_check == "tool":
            found[i] = _finding("" if agreeing else "tool_disagrees", {"tool": f"{agreeing}/{len(given)}"})
        else:  # its own vote counts; a tie is no majority
            lost = 2 * (agreeing + 1) <= len(given) + 1
            found[i] = _finding("vote_lost" if lost else "", {"vote": f"{agreeing + 1}/{len(given) + 1}"})
    return found


def _finding(reason: str = "", checks: dict[str, str] | None = None) -> dict[str, Any]:
    checks = checks or {}
    return {"reason": reason, "detail": ", ".join(checks.values()), "checks": checks}
