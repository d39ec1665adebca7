"""Worked problems: school mathematics with checked step-by-step and Python solutions.

The parameters come from reasoning-gym; wording, steps and programs are written here, and every
output block is what the program printed. The quickstart uses them for its targets, its offline
teacher and as part of its corpus, each with families or seeds of its own.
"""

from jz3.files import hash_text
from jz3.seeding import seed_for
from jz3.worked.base import Draft, Family, WorkedProblem, finish

__all__ = ["WorkedProblem", "families", "topic", "worked_problems"]

EVAL_SHARE = 4
"""One in four questions (by hash) or word-problem templates belongs to the split `eval`."""
_PATIENCE = 400
"""Draws without a new problem after which a family counts as exhausted."""


def families() -> tuple[str, ...]:
    """Return the names of all families."""
    return tuple(_TOPICS)


def topic(family: str) -> str:
    """Return the topic of a family, e.g. `number theory`."""
    _check(family)
    return _TOPICS[family]


def worked_problems(family: str, seed: int, count: int, split: str = "train") -> list[WorkedProblem]:
    """Draw unique worked problems of one family.

    Args:
        family: one of `families()`.
        seed: any integer; the same seed gives the same problems, and more of them begin alike.
        count: how many.
        split: `train` or `eval`. No question is in both; the word problems of both come from
            different templates.

    Returns:
        `count` problems with different questions.

    Raises:
        ValueError: the family or split is unknown, or the family has not that many problems.
    """
    _check(family)
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    found: dict[str, WorkedProblem] = {}
    misses = 0
    drafts = _drafts(family, seed_for(seed, "worked", family, split) >> 24, split)
    while len(found) < count:
        draft = next(drafts)
        problem = None
        if draft.question not in found and _in_split(family, draft, split):
            problem = finish(family, _TOPICS[family], draft)
        if problem is None:
            misses += 1
            if misses > _PATIENCE:
                raise ValueError(
                    f"the family {family!r} gave only {len(found)} of {count} different problems (split {split!r}); "
                    "ask for fewer or add another family"
                )
            continue
        found[draft.question] = problem
        misses = 0
    return list(found.values())
