"""Equations found in the prose of a worked solution, checked by arithmetic."""

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_TOKEN = re.compile(
    rf"(?P<number>{_NUMBER})(?P<percent>%?)"
    r"|(?P<unit>[-/](?=[A-Za-z]))"
    r"|(?P<operator>[-+*/×÷=]|(?<=[\d\s])x(?=[\s$€£\d]))"
    r"|(?P<bracket>[()])"
    r"|(?P<word>[A-Za-z][\w'’/-]*)"
)
_OPERATORS = {"×": "*", "x": "*", "÷": "/"}
MAX_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Equation:
    """`left = value`, where `left` is an arithmetic expression without brackets."""

    left: tuple[str, ...]
    """Numbers and the operators + - * / in turn."""
    value: Fraction


def numbers(text: str) -> list[Fraction]:
    """Return the numbers that `text` mentions in digits."""
    return [_value(m) for m in re.findall(_NUMBER, text)]


def evaluate(tokens: tuple[str, ...]) -> Fraction | None:
    """Evaluate numbers and operators in turn, exactly; None if that divides by zero."""
    total, sign = Fraction(0), 1
    term = _value(tokens[0])
    for operator, number in zip(tokens[1::2], tokens[2::2], strict=True):
        value = _value(number)
        if operator == "*":
            term *= value
        elif operator == "/":
            if not value:
                return None
            term /= value
        else:
            total, sign, term = total + sign * term, 1 if operator == "+" else -1, value
    return total + sign * term


def check_equations(text: str) -> list[Equation] | None:
    """Find every equation of a solution and check it.

    Units and other words between numbers are passed over; an equation's left side is the longest
    alternation of numbers and operators that ends at its equals sign.

    Args:
        text: the solution.

    Returns:
        The equations in order, or None if one is false, says nothing (48 = 48), or can't be read
        as plain arithmetic (brackets, percent signs, unknowns, long decimals).
    """
    found: list[Equation] = []
    for line in text.splitlines():
        tokens: list[str] = []
        for match in _TOKEN.finditer(line):
            if match["bracket"] or match["percent"]:
                return None
            if match["number"]:
                if len(match["number"].partition(".")[2]) > MAX_DECIMALS:
                    return None
                tokens.append(match["number"].replace(",", ""))
            elif match["operator"]:
                tokens.append(_OPERATORS.get(match["operator"], match["operator"]))
        for place, token in enumerate(tokens):
            if token != "=":
                continue
            left, right = _expression(tokens[:place][::-1])[::-1], _expression(tokens[place + 1 :])
            if not _whole(tokens, place, left, right):
                return None
            value = evaluate(right)
            if len(left) == 1 or len(right) > 1 or value is None or evaluate(left) != value:
                return None
            found.append(Equation(left, value))
    return found


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _expression(tokens: list[str]) -> tuple[str, ...]:
    """Return the longest prefix in which numbers and operators alternate, beginning with a number."""
    taken: list[str] = []
    for token in tokens:
        if token == "=" or (token in "+-*/") != (len(taken) % 2 == 1):
            break
        taken.append(token)
    return tuple(taken)


def _whole(tokens: list[str], place: int, left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Tell whether both sides are expressions that no operator dangles from."""
    before = tokens[place - len(left) - 1] if place > len(left) else ""
    return len(left) % 2 == 1 and len(right) % 2 == 1 and before not in set("+-*/")
