r"""Checking the simple sums that a solution writes down: `12 * 3 = 36`, `\frac{1}{2} + 0.25 = 0.75`."""

import ast
import itertools
import operator
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS = 60
MAX_EXPONENT = 64
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")
_POWER = re.compile(r"\^\s*\{([^{}]+)\}")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS}}}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
_LIST_MARK = re.compile(
    r"^[ \t]*(?:[-*\u2022+]+[ \t]+|\(?\d+[.)][ \t]+|(?:\*\*)?step\s+\d+\s*[-\u2013:.)]*(?:\*\*)?[ \t]*)+",
    re.IGNORECASE | re.MULTILINE,
)
_RUN = re.compile(r"(?:[\d+\-*/^() \t=]|\.(?=\d))+")
"""Digits and signs in a row; a full stop with no digit behind it ends a sentence, and the run."""
_DECIMAL = re.compile(r"\d*\.(\d+)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_DENIED = re.compile(r"\b(?:not|false|contradict\w*|impossible|incorrect|wrong|fails?)\b|n't", re.IGNORECASE)
"""What follows an equation that was only tried out."""
_UNSAFE_WORDS = frozenset(
    "of mod modulo sin cos tan cot sec csc arcsin arccos arctan log ln lg exp sqrt root plus minus times by over "
    "divided multiplied squared cubed per base factorial choose gcd lcm max min than remainder rem with".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """A checked equation."""

    text: str
    right: bool


def wrong_equations(text: str) -> tuple[int, list[str]]:
    """Evaluate every equation between plain numbers.

    Only what can be read without doubt is judged: a side that touches a variable, function, unit
    power or modulus is left out, and one side must hold an operation. A result may be rounded or cut
    to the decimals it is given with, and off by what the rounding of the numbers before it explains.

    Args:
        text: a solution in plain text or LaTeX, without code.

    Returns:
        How many equations were checked, and the wrong ones.
    """
    equations = find_equations(text)
    return len(equations), [e.text for e in equations if not e.right]


def find_equations(text: str) -> list[Equation]:
    """Return the equations that can be judged, in order."""
    text = _plain(text)
    found: list[Equation] = []
    for run in _RUN.finditer(text):
        if "=" not in run[0]:
            continue
        sides = run[0].split("=")
        values = [_value(side) for side in sides]
        if not _free_before(text, run.start(), sides[0]):
            values[0] = None
        if not _free_after(text, run.end(), sides[-1]):
            values[-1] = None
        for (left, a), (right, b) in itertools.pairwise(zip(sides, values, strict=True)):
            if a is None or b is None or not (_operates(left) or _operates(right)):
                continue
            equation = f"{left.strip()} = {right.strip().rstrip('.')}"
            if _DENIED.search(text[run.end() : run.end() + 60]):
                continue
            found.append(Equation(text=equation, right=_agree(left, a, right, b)))
    return found


def _plain(text: str) -> str:
    """Rewrite the LaTeX of sums as plain signs; whatever else stays, and ends a run."""
    text = _LIST_MARK.sub("", text)
    text = re.sub(r"&\s*=", "=", text).replace("&", "\n")
    text = re.sub(r"\\(?:left|right|,|;|!|:|quad|displaystyle)(?![A-Za-z])|\\\$|[$]|\u00a0", " ", text)
    text = re.sub(r"\\(?:times|cdot|ast)(?![A-Za-z])|[\u00d7\u00b7\u22c5]", "*", text)
    text = re.sub(r"\\div(?![A-Za-z])|\u00f7", "/", text).replace("\u2212", "-")
    text = _THOUSANDS.sub(lambda m: m[0].replace("{,}", "").replace(",", ""), text)
    for _ in range(3):
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    text = _SHORT_FRACTION.sub(r"(\1/\2)", text)
    return _POWER.sub(r"^(\1)", text)


def _free_before(text: str, start: int, side: str) -> bool:
    """Tell whether nothing before a run belongs to its first side."""
    if re.match(r"\s*(?:[+*/^)]|-\s)", side):
        return False
    before, separate = text[max(0, start - 80) : start], side[:1] in (" ", "\t")
    if not before or before[-1] in "\n;!?[{<>\u2192" or before.endswith(("\\(", "**")):
        return True
    if before[-1] in ",.:":
        return separate
    word = re.search(r"(\\?)([A-Za-z]+)$", before)
    if word is None or word[1] or not separate:
        return False
    # "Day 3 = 5 + 4" gives a name to a sum
    if word[2].lower() == "and" and re.match(r"\s*\d+\s*/\s*\d", side):
        return False  # "1 and 1/4"
    return len(word[2]) > 1 and word[2].lower() not in _UNSAFE_WORDS and _operates(side)


def _free_after(text: str, end: int, side: str) -> bool:
    """Tell whether nothing after a run belongs to its last side."""
    after = text[end : end + 20]
    word = re.match(r"[A-Za-z]+", after)
    if word:
        separate = side.rstrip() != side
        return separate and len(word[0]) > 1 and word[0].lower() not in _UNSAFE_WORDS
    if re.match(r"[,:]\d|\.\s*\\(?:overline|dot|bar)\b|\\text\{\s*(?:remainder|rem|mod)\b", after):
        return False
    closing = ("\\)", "\\]", "\\\\", "\\text", "\\mathrm", "\\mbox", "\\implies", "\\Rightarrow", "\\qquad")
    return not after or after[0] not in "%^_!{\\|<\u00b0\u221a\u00b2\u00b3" or after.startswith(closing)


def _operates(side: str) -> bool:
    return bool(re.search(r"[\d)]\s*[-+*/^]|\)\s*\(|\d\s*\(", side))


def _value(side: str) -> Fraction | None:
    """Evaluate one side exactly; None if it is no plain sum or its reading is doubtful."""
    side = side.strip()
    if side.endswith(".") and not side.endswith(".."):
        side = side[:-1]
    if (
        not side
        or len(side) > 300
        or _LONG_NUMBER.search(side)
        or re.search(r"\d\s+[\d.]|//|\*\s*\*|(?<![\d.])0\d", side)
    ):
        return None
    if re.search(r"(?:^|[-+*/(])\s*-\s*[\d.]+\s*\^", side) or (
        "/" in side and re.search(r"[\d)]\s*\(|\)\s*\d", side)
    ):
        return None  # -2^2 and 6/2(1+2) are read differently by different people
    side = re.sub(r"([\d)])\s*\(", r"\1*(", re.sub(r"\)\s*(\d)", r")*\1", side))
    side = side.replace("^", "**")
    try:
        return _evaluate(ast.parse(side, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            bits = max(left.numerator.bit_length(), left.denominator.bit_length())
            if right.denominator != 1 or abs(right) > MAX_EXPONENT or bits > 200:
                raise ValueError("power out of range")
            return left ** int(right)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    raise ValueError("not a plain sum")


def _agree(left: str, a: Fraction, right: str, b: Fraction) -> bool:
    if a == b:
        return True
    difference = abs(a - b)
    for side, other, stated, value in ((left, right, a, b), (right, left, b, a)):
        if not _operates(side) and "." in side:  # the result: rounded or cut to its decimals
            unit = Fraction(1, 10 ** len(side.strip().rstrip(".").partition(".")[2]))
            if 2 * difference <= unit or (abs(stated) < abs(value) and difference < unit):
                return True
        if "." in other and difference <= min(abs(a) / 200, _leeway(other, value)):
            return True  # it goes on from rounded numbers
    return False


def _leeway(side: str, value: Fraction) -> Fraction:
    """Return by how much a side may be off if each of its decimal numbers is, by a unit of its last place."""
    total = Fraction(0)
    for number in _DECIMAL.finditer(side):
        unit = Decimal(1).scaleb(-len(number[1]))
        moved = _value(f"{side[: number.start()]}{Decimal(number[0]) + unit:f}{side[number.end() :]}")
        total += abs(value) if moved is None else abs(moved - value)
    return total
