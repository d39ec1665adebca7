"""Worked problems: school mathematics with checked step-by-step and Python solutions.

The parameters come from reasoning-gym (those of the two polynomial families are drawn here);
wording, steps and programs are written here, and every output block is what the program printed.
The quickstart uses them for its targets, its offline teacher and as part of its corpus, each with
families or seeds of its own.
"""

from collections.abc import Iterator

from jz3.files import hash_text
from jz3.seeding import seed_for
from jz3.worked import algebra, arithmetic, gsm
from jz3.worked.base import Draft, WorkedProblem, finish

__all__ = ["WorkedProblem", "families", "topic", "worked_problems"]

EVAL_SHARE = 4
"""One in four questions (by hash) or word-problem templates belongs to the split `eval`."""
_FAMILIES = {
    "gsm_symbolic": ("word problems", None),
    "leg_counting": ("word problems", algebra.leg_counting),
    "time_intervals": ("word problems", algebra.time_intervals),
    "chain_sum": ("arithmetic", arithmetic.chain_sum),
    "products": ("arithmetic", arithmetic.products),
    "fraction_simplification": ("arithmetic", arithmetic.fraction_simplification),
    "gcd": ("number theory", arithmetic.gcd),
    "lcm": ("number theory", arithmetic.lcm),
    "prime_factorization": ("number theory", arithmetic.prime_factorization),
    "count_primes": ("number theory", arithmetic.count_primes),
    "base_conversion": ("number theory", arithmetic.base_conversion),
    "simple_equations": ("algebra", algebra.simple_equations),
    "polynomial_values": ("algebra", algebra.polynomial_values),
    "complex_arithmetic": ("algebra", algebra.complex_arithmetic),
    "number_sequence": ("algebra", algebra.number_sequence),
    "simple_geometry": ("geometry", algebra.simple_geometry),
    "polynomial_integrals": ("calculus", algebra.polynomial_integrals),
    "coin_flip": ("probability", algebra.coin_flip),
}
_PATIENCE = 1000
"""Draws without a new problem after which a family counts as exhausted."""


def families() -> tuple[str, ...]:
    """Return the names of all families."""
    return tuple(_FAMILIES)


def topic(family: str) -> str:
    """Return the topic of a family, e.g. `number theory`."""
    _check(family)
    return _FAMILIES[family][0]


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
            problem = finish(family, _FAMILIES[family][0], draft)
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


def _check(family: str) -> None:
    if family not in _FAMILIES:
        raise ValueError(f"no family of worked problems {family!r}; there are {', '.join(_FAMILIES)}")


def _drafts(family: str, seed: int, split: str) -> Iterator[Draft]:
    drafts = _FAMILIES[family][1]
    if drafts is not None:
        return drafts(seed)
    return gsm.drafts(tuple(t for i, t in enumerate(gsm.TEMPLATES) if _is_eval(i) == (split == "eval")), seed)


def _in_split(family: str, draft: Draft, split: str) -> bool:
    """Tell whether a question belongs to the split; word problems are divided by template instead."""
    return _FAMILIES[family][1] is None or _is_eval(int(hash_text(draft.question), 16)) == (split == "eval")


def _is_eval(number: int) -> bool:
    return number % EVAL_SHARE == 0
