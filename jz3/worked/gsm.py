"""Word problems of reasoning-gym's gsm_symbolic, with only the templates whose solutions hold."""

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from jz3.worked.base import MAX_PIECES, Draft, pieces
from jz3.worked.equations import Equation, check_equations, numbers

TEMPLATES = (
    6, 7, 8, 9, 10, 12, 13, 16, 20, 23, 26, 28, 30, 31, 33, 34, 38, 39, 40, 41, 43, 44, 45, 47, 48, 54, 56, 57, 58, 59,
    62, 67, 69, 71, 72, 78, 88, 91,
)  # fmt: skip
"""What `sound_templates` returns for reasoning-gym 0.1.25 (a test compares them)."""
CHECK_DRAWS = 40
"""How often a template is drawn to find out whether it is sound."""
CLOSING = 13
"""Pieces of the closing sentence, with a number of up to six digits."""

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"\n?####[^\n]*\s*$")
_TRAILING_ZERO = re.compile(r"(?<=\d)\.0+(?!\d)")
_BARE_FACTOR = re.compile(r"\b\d+(?:\.\d+)? (?:as many|as much|the amount|the number)\b|\w \d+\.(?= |$)")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")
_ARTICLE = re.compile(r"\b([Aa])n? (?=([A-Za-z]+))")
_WORDS = {
    "one": 1, "two": 2, "twice": 2, "double": 2, "twins": 2, "pair": 2, "half": 2, "three": 3,
    "third": 3, "triple": 3, "triplets": 3, "four": 4, "quarter": 4, "five": 5, "six": 6, "seven": 7,
    "week": 7, "weekly": 7, "weeks": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
    "dozen": 12, "dozens": 12, "year": 12, "hour": 60, "hours": 60, "cents": 100, "average": 2,
}  # fmt: skip


def drafts(templates: tuple[int, ...], seed: int) -> Iterator[Draft]:
    """Yield word problems from the given templates; a draw whose solution fails a check is passed over."""
    generators = _generators()
    source = random.Random(seed)
    while True:
        template = source.choice(templates)
        draft = check_entry(generators[template](random.Random(source.getrandbits(48)), 1.0))
        if draft is not None:
            yield draft


def sound_templates() -> tuple[int, ...]:
    """Draw every template many times and return those of which every draw passes `check_entry`."""
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    generators = _generators()
    return tuple(
        t
        for t in tasks_ok
        if all(check_entry(generators[t](random.Random(i), 1.0)) for i in range(CHECK_DRAWS))
    )


def check_entry(entry: dict[str, Any]) -> Draft | None:
    """Turn an entry into a draft if its solution is sound.

    Sound means: every equation of the solution is true and says something, its numbers come from
    the question, from an earlier equation or from a unit (7 days a week), the last equation gives
    the answer, one currency throughout, no factor without its "times".
    """
    question = _tidy(entry["question"])
    steps = _tidy(_FINAL.sub("", _ANNOTATION.sub("", entry["metadata"]["answer_cot"])))
    answer = _TRAILING_ZERO.sub("", entry["answer"])
    equations = check_equations(steps)
    if not equations or equations[-1].value != Fraction(answer) or _BARE_FACTOR.search(question):
        return None
    if len(set(re.findall("[$€£]", question + steps))) > 1 or pieces(steps) > MAX_PIECES - CLOSING:
        return None
    known = _known(question)
    program = _program(equations, known)
    return None if program is None else Draft(question=question, answer=answer, steps=steps, program=program)


def _generators() -> dict[int, Any]:
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
        GSMSymbolicDataset,
        GSMSymbolicDatasetConfig,
    )

    return GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0, size=1)).generators


def _tidy(text: str) -> str:
    """Mend what a template's gaps leave behind: 220.0, a apple, lower-case sentences, no full stop."""
    text = _ARTICLE.sub(_article, _TRAILING_ZERO.sub("", text))
    text = re.sub(r"(?<=[A-Za-z]):(?=\d)", ": ", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    lines = (_SENTENCE_START.sub(lambda m: m[0].upper(), line) for line in lines if line)
    return "\n".join(line + "." if line[-1].isalnum() else line for line in lines)


def _article(match: re.Match[str]) -> str:
    word = match[2].lower()
    vowel = (
        word[0] in "aeiou" and not word.startswith(("uni", "use", "eu", "one")) or word in ("hour", "honest")
    )
    return f"{match[1]}n " if vowel and len(word) > 1 else f"{match[1]} "


def _known(question: str) -> set[Fraction]:
    """Return the values a solution may use: the question's numbers, also as shares, and its units."""
    known = set(numbers(question))
    for percent in map(Fraction, re.findall(r"(\d+(?:\.\d+)?)%", question)):
        known |= {percent / 100, 1 - percent / 100, 1 + percent / 100, Fraction(100)}
    words = {Fraction(_WORDS[w]) for w in re.findall(r"[a-z]+", question.lower()) if w in _WORDS}
    return known | words | {1 / w for w in words}


def _program(equations: list[Equation], known: set[Fraction]) -> str | None:
    """Write the equations as a program that names its results; None if a number has no origin."""
    lines: list[str] = []
    results: dict[Fraction, str] = {}
    for number, equation in enumerate(equations, 1):
        parts: list[str] = []
        for token in equation.left:
            if token in "+-*/" or Fraction(token) in known:
                parts.append(token)
            elif Fraction(token) in results:
                parts.append(results[Fraction(token)])
            else:
                return None
        lines.append(f"x{number} = {' '.join(parts)}")
        results[equation.value] = f"x{number}"
    last = f"x{len(equations)}"
    inexact = any("/" in line or "." in line for line in lines)
    if not inexact:
        shown = last
    elif equations[-1].value.denominator == 1:
        shown = f"round({last})"
    else:
        shown = f"round({last}, 2)"
    return "\n".join([*lines, f"print({shown})"])
