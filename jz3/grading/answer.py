r"""Answers: finding them in a solution, comparing stated with real output, and mathematical equality."""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from jz3.errors import Jz3Error
from jz3.grading.sandbox import Sandbox, SandboxConfig

MAX_CHARS = 10_000
"""A longer answer equals only itself."""
RELATIVE_TOLERANCE = 1e-6

log = logging.getLogger(__name__)

_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(python3?|py|output)[ \t]*\r?\n(.*?)(?:^[ \t]*```|```[ \t]*\r?$)",
    re.DOTALL | re.MULTILINE,
)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_SENTENCE = re.compile(
    r"\banswers?\s{0,9}(?:is|are|:|=)\s{0,9}:?"
    r"(?=[\s*]{0,9}(\$\$[\s\S]{1,999}?\$\$|\\\[[\s\S]{1,999}?\\\]|[^\s*:][^\n]{0,999}))",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$([\s\S]+?)\$\$|\$((?:\\.|[^$\\])+)(?<!\s)\$(?!\d)|\\\(([\s\S]+?)\\\)|\\\[([\s\S]+?)\\\]"
)
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?")
_PRINTED = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.?\d+)(?:[eE][-+]?\d+)?")
_TOKEN = re.compile(r"[^\s.,;:!?]+")
_SPACED = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")
"""White space between thousands, as in `10\\,000`."""
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SCIENTIFIC = re.compile(r"([-+]?[\d.]+)\s*(?:\\times|\\cdot)\s*10\^\{?([-+]?\d+)\}?(?:\s*\\.*)?")
_POWER = re.compile(
    r"(?:([-+]?[\d.]+)\s*(?:\\times|\\cdot|[*x\u00d7\u00b7])\s*)?10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))"
)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s*\{\s*(\d{1,20})\s*\}\s*\{\s*(\d{1,20})\s*\}")
_MIXED = re.compile(r"([-+]?)(\d{1,20}) +(\d{1,20}/\d{1,20})")
_STYLED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|boldsymbol|bm|underline)\s*\{([^{}]*)\}")
_MEASURED = re.compile(
    r"(.*[\d}]),?(?:\s|\\[,;: ]|~)*(?:\s((?:(?=[a-z]*[aeiou])[a-z]{3,}|[cdkm]m|ft|kg|mph|m/s)(?:[ /-]+[a-z]+)*)"
    r"|\\(?:text|mathrm|mbox)\s*\{([^{}\d]*)\})(?:\^\{?[23]\}?)?",
    re.IGNORECASE,
)
_NO_UNITS = re.compile(
    r"\b(?:hundreds?|thousands?|[mbtr]+illions?|dozens?|percent|pi|factorial|squared|cubed|half|halves|thirds?|"
    r"quarters?|fourths?|fifths?|tenths?|times|plus|minus|over|and|or|to|mod|choose|remainder|base|root|sqrt|sin|cos|tan|log|ln|exp|alpha|beta|gamma|"
    r"theta|lambda)\b",
    re.IGNORECASE,
)
"""Words behind a number that make another value of it."""
_UNIT = re.compile(
    r"(?<=\d)(?:\s|\\[,;: ]|~)*(?:%|\u00b0|\^\s*\{?\\circ\}?|\\degree|\\Omega|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}\S*"
    r"|(?<=[\s~])[A-Za-z\u00b5\u03a9]{1,12}(?:[/^]\S+)?)(?:\s*[A-Z])?$"
)
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d{1,3})?(?:/\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A final answer and where it was found."""

    text: str
    source: str
    """`boxed`, `hashes` (#### n), `sentence` (the answer is ...), `last_number`, or `none`."""


def extract_boxed(text: str) -> str:
    r"""Return the content of the last \boxed{...} whose braces balance, or "" if there is none.

    Of boxes within each other it is the inner one, unless that is empty.
    """
    starts: list[int] = []
    # What the last box holds, of every brace that is open and of the text itself.
    boxes = [""]
    found = ""
    for token in _BOX_TOKENS.finditer(text):
        if token[0].endswith("{") and token[0] != "\\{":
            starts.append(token.end() if len(token[0]) > 1 else -1)
            boxes.append("")
        elif token[0] == "}" and starts:
            start, inner = starts.pop(), boxes.pop()
            if start >= 0:
                found = boxes[-1] = inner or text[start : token.start()].strip()
            elif inner:
                boxes[-1] = inner
    return found


def find_answer(text: str) -> Answer:
    r"""Find the final answer of a solution.

    Tried in order: the last \boxed{}; the last line `#### n`; the last `the answer is ...`; the last
    number of all, which is a guess and therefore named in `source`.
    """
    boxed = extract_boxed(text)
    if boxed:
        return Answer(text=boxed, source="boxed")
    for pattern, source in ((_HASHES, "hashes"), (_SENTENCE, "sentence")):
        found = [_tidy(m[1]) for m in pattern.finditer(text)]
        if found and found[-1]:
            return Answer(text=found[-1], source=source)
    numbers = _NUMBER.findall(text)
    if numbers:
        return Answer(text=numbers[-1].replace("\u2212", "-"), source="last_number")
    return Answer(text="", source="none")


def extract_answer(text: str) -> str:
    """Return the final answer of a solution, "" if there is none; see `find_answer`."""
    return find_answer(text).text


def _tidy(text: str) -> str:
    """Cut an answer out of the rest of its sentence."""
    text = text.strip().strip("*").strip()
    if formula := _FORMULA.match(text):
        return next(filter(None, formula.groups())).strip()
    text = re.split(r"[.;!?](?:\s|$)", text, maxsplit=1)[0]
    return text.strip().strip("*").rstrip(".,").strip()


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a solution in order, as (`python` or `output`, content)."""
    return [("output" if m[1] == "output" else "python", m[2]) for m in _FENCE.finditer(text)]


def code_blocks(text: str) -> list[str]:
    """Return the contents of the ```python blocks, in order."""
    return [content for kind, content in fenced_blocks(text) if kind == "python"]


def output_blocks(text: str) -> list[str]:
    """Return the contents of the ```output blocks, in order."""
    return [content for kind, content in fenced_blocks(text) if kind == "output"]


def outputs_match(stated: str, real: str) -> bool:
    """Tell whether a stated output is what the program really printed.

    Equal after white space is evened out; or equal but for numbers that agree: integers exactly,
    others to a relative 1e-6 or as the real one rounded to the stated one's decimals.
    """
    left, right = stated.split(), real.split()
    if left == right:
        return True
    stated, real = " ".join(left), " ".join(right)
    if _PRINTED.split(stated) != _PRINTED.split(real):
        return False
    pairs = zip(_PRINTED.findall(stated), _PRINTED.findall(real), strict=True)
    return all(_printed_equal(s, r) for s, r in pairs)


def _printed_equal(stated: str, real: str) -> bool:
    if stated == real:
        return True
    if not set(".eE") & set(stated + real):
        return stated.lstrip("+") == real.lstrip("+")
    a, b = float(stated), float(real)
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    if a == b or abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b)):
        return True
    places = len(stated.partition(".")[2])
    if not places or "e" in stated.lower() or "e" in real.lower():
        return False
    return abs(a - b) <= 0.5 * 10**-places * (1 + 1e-9)


def answer_like_printed(answer: str, output: str) -> bool:
    r"""Tell whether a program's output holds the answer.

    A number, with or without a unit, must be a printed one or what a printed one rounds to; a fraction
    must be printed as such; words (`\text{...}`) must be printed.
    """
    answer = tidy_answer(answer)
    words = re.fullmatch(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", answer)
    if words or re.fullmatch(r"[A-Za-z][A-Za-z ]+", answer):
        wanted, printed = (
            " ".join(_TOKEN.findall(t.casefold())) for t in (words[1] if words else answer, output)
        )
        return bool(wanted) and f" {wanted} " in f" {printed} "
    output = _SEPARATOR.sub("", output)
    answer = _SEPARATOR.sub("", answer.replace("{,}", ","))
    power = _SCIENTIFIC.fullmatch(answer)
    number = f"{power[1]}e{power[2]}" if power else answer
    number = _UNIT.sub("", number).strip()
    if _PRINTED.fullmatch(number):
        return any(_same_number(number, printed) for printed in _PRINTED.findall(output))
    value = plain_number(number)
    return value is not None and any(plain_number(printed) == value for printed in _NUMBER.findall(output))


def _same_number(answer: str, printed: str) -> bool:
    exact = plain_number(answer), plain_number(printed)
    return (None not in exact and exact[0] == exact[1]) or _printed_equal(answer, printed)


def numbers_near(gold: str, prediction: str, tolerance: float) -> bool:
    """Tell whether two answers are numbers whose difference is at most `tolerance` times the first."""
    a, b = (plain_number(_UNIT.sub("", tidy_answer(text)).strip()) for text in (gold, prediction))
    return a is not None and b is not None and abs(a - b) <= Fraction(tolerance) * abs(a)


def plain_number(text: str) -> Fraction | None:
    r"""Return the value of a number or fraction (`1,234.5`, `\frac{3}{4}`, `1 1/2`, `2 \times 10^{3}`), else None."""
    text = text.replace("\u2212", "-").strip()
    if len(text) > 100 or not any(c.isdigit() for c in text):
        return None
    try:
        if power := _POWER.fullmatch(text):
            return Fraction(power[1] or 1) * Fraction(10) ** int(power[2] or power[3])
        if quotient := _FRACTION.fullmatch(text):
            return Fraction(int(quotient[1] + quotient[2]), int(quotient[3]))
        if mixed := _MIXED.fullmatch(text):
            return (-1 if mixed[1] == "-" else 1) * (int(mixed[2]) + Fraction(mixed[3]))
        if not _PLAIN.fullmatch(text):
            return None
        number, _, divisor = text.replace("{,}", "").replace(",", "").partition("/")
        return Fraction(number) / Fraction(divisor or 1)
    except (ValueError, ZeroDivisionError):
        return None


WARM_UP = r"""
import logging
logging.disable(logging.CRITICAL)
import json, re, sys
from tokenize import TokenError
from math_verify import parse, verify
from sympy import I
from sympy.parsing import sympy_parser

# SymPy evaluates texts as Python, so that an answer could print its own verdict. Without brackets nothing is called;
# with them only these functions, and there are no attributes.
CALLS = re.compile(r"(?:[-+*/^(),\[\]\s]|(?<!\w)(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|sqrt|cbrt|root|exp|log|ln|"
    r"sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|factorial|binomial|Abs|floor|ceiling|Matrix|Rational|"
    r"Fraction|Integer|pi|oo|E|I|i)(?!\w))*")
stringify = sympy_parser.stringify_expr
# What SymPy's parser raises of texts that are no such notation.
UNREAD = (SyntaxError, TokenError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError)

def checked(text, *rest):
    if not re.fullmatch(r"[-+*/^,\w\s]*", text) and not CALLS.fullmatch(text):
        raise SyntaxError("no plain expression")
    return stringify(text, *rest)

sympy_parser.stringify_expr = checked

def read(text):
    if "\\" not in text and re.search(r"\*|sqrt\(|^Matrix\(|^Rational\(|^Fraction\(", text):
        try:
            value = sympy_parser.parse_expr(text.replace("^", "**").replace("Fraction(", "Rational("), {"i": I})
            if not value.free_symbols:  # Math-Verify's symbols differ from SymPy's plain ones
                return [value]
        except UNREAD:
            pass  # read as LaTeX below
    if "\\" not in text:
        text = re.sub(r"\boo\b", r"\\infty ", re.sub(r"\bpi\b", r"\\pi ", text.replace("**", "^")))
    return parse("$" + text + "$", parsing_timeout=None)

# Texts with words, of which Math-Verify reads a part only, are compared as they are written; a set in any order.
def whole(text):
    words = re.sub(r"\\(?:left|right|text\w*|mathrm|mathbf|mbox)|[\\{}\s]", "", text.casefold()).split(",")
    return sorted(words) if re.match(r"(?:\\left\s*)?\\\{", text) else words

def cut(text, found):
    # Of \{\text{red},\text{blue}\} it reads \{, of 3\text{ red}, 4\text{ blue} the 3: all behind a number is its unit.
    left = found[-1] if found else ""
    outside = re.sub(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{[^{}]*\}|(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text)
    return isinstance(left, str) and re.search(r"\\(?:text|mathrm|mathbf|mbox)", text) and (
        left.count("{") != left.count("}") or left.count(",") < outside.count(","))

def equal(gold, prediction):
    one, other = read(gold), read(prediction)
    if cut(gold, one) or cut(prediction, other):
        return whole(gold) == whole(prediction)
    return bool(verify(one, other, timeout_seconds=None))

for gold, prediction in (("\\frac{1}{2}x+\\sqrt{2}", "0.5x+2^{0.5}"), ("(1,2)", "[1,2)"), ("x=1.5", "3/2"),
                         ("\\{1,2\\}", "\\{1\\}"), ("2*x", "sqrt(2)"), ("5\\text{ cm}", "50\\%"),
                         ("\\pi r^2", "1,000")):
    equal(gold, prediction)
sys.modules["jz3_equal"] = type(sys)("jz3_equal")
sys.modules["jz3_equal"].equal = equal
"""
SNIPPET = "import json, sys, jz3_equal\nprint(int(jz3_equal.equal(*json.load(sys.stdin))))"


class Grader:
    r"""Mathematical equality of final answers by Math-Verify; use it as a context manager.

    Each comparison that isn't plain runs in a process of its own inside the sandbox, so that no
    answer (9^{9^{9^9}}, a megabyte of braces) can hang, exhaust or attack the caller. A comparison
    that doesn't end in time counts as unequal. The gold answer's side matters (`x=5` is answered by
    `5`); a unit is ignored; 50% equals both 0.5 and 50 as in Math-Verify, but a bare number never
    equals another one a hundred times as large.

    Args:
        seconds: processor time for one comparison.
        workers: how many run at once; 0: one for each core, up to 64.
        level: the sandbox's level.
    """

    timeouts: int
    """Comparisons that were stopped, by time or memory; they count as unequal."""
    failures: int
    """Comparisons in which Math-Verify broke down; they count as unequal."""

    def __init__(self, seconds: int = 3, workers: int = 0, level: str = "auto") -> None:
        config = SandboxConfig(
            level=level,
            cpu_seconds=seconds,
            wall_seconds=4.0 * seconds,
            workers=workers,
            packages=("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath", "gmpy2"),
            preload=("math_verify",),
        )
        self.timeouts = 0
        self.failures = 0
        self._sandbox = Sandbox(config, WARM_UP)
        self._open = False
        self._known: dict[tuple[str, str], bool] = {}

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self._open:
            self._sandbox.close()
            self._open = False

    def equal(self, gold: str, prediction: str) -> bool:
        """Tell whether `prediction` is the answer `gold`."""
        return self.equal_many([(gold, prediction)])[0]

    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Compare pairs (gold, prediction) on all workers at once; one bool each, in order."""
        tidy = [(tidy_answer(gold), tidy_answer(prediction)) for gold, prediction in pairs]
        asked = [p for p in dict.fromkeys(tidy) if p not in self._known and compare_plainly(*p) is None]
        if asked:
            self._known.update(zip(asked, self._ask(asked), strict=True))
        return [self._known[p] if (plain := compare_plainly(*p)) is None else plain for p in tidy]

    def _ask(self, pairs: list[tuple[str, str]]) -> list[bool]:
        if not self._open:
            try:
                self._sandbox.__enter__()
            except Jz3Error as error:
                raise Jz3Error(
                    f"the grader can't start (is math-verify installed? pip install 'jz3[grading]'): {error}"
                ) from error
            self._open = True
        done = self._sandbox.run_many([SNIPPET] * len(pairs), [json.dumps(p) for p in pairs])
        self.timeouts += sum(d.reason in ("timeout", "memory", "killed") for d in done)
        broken = [d for d in done if d.reason in ("error", "output_limit")]
        if broken and not self.failures:
            log.warning(
                "Math-Verify failed on an answer, which counts as unequal: %s",
                broken[0].stderr[-200:].strip(),
            )
        self.failures += len(broken)
        return [d.ok and d.stdout.strip() == "1" for d in done]


def tidy_answer(text: str) -> str:
    """Take the delimiters, the closing full stop and stray white space off an answer."""
    text = " ".join(text.replace("\0", " ").split())
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
            text = text[len(start) : -len(end)]
    if text.endswith(".") and not text.endswith("\\."):
        text = text[:-1]
    if len(text) > MAX_CHARS:
        return text
    text = text.replace("\\%", "%").replace("\\$", "").replace("$", "").replace("\\!", "").strip()
    return _SPACED.sub("", text)


def compare_plainly(gold: str, prediction: str) -> bool | None:
    """Decide the easy cases without Math-Verify; None where it is needed."""
    if not gold or not prediction:
        return False
    if gold == prediction:
        return True
    if len(gold) > MAX_CHARS or len(prediction) > MAX_CHARS:
        return False
    a, b = plain_number(gold), plain_number(prediction)
    if a is None and b is not None:
        a = _measured_number(gold)
    elif b is None and a is not None:
        b = _measured_number(prediction)
    if a is None or b is None:
        return None
    # Math-Verify rounds to six decimals, by which all small numbers are the same.
    difference, size = abs(a - b), max(abs(a), abs(b))
    decimals = difference <= Fraction(1, 2 * 10**6) and difference <= size / 10**4
    return a == b or (a.denominator * b.denominator > 1 and (difference <= size / 10**6 or decimals))


def _measured_number(text: str) -> Fraction | None:
    """Return the value of a number in another type face or before a unit in words, else None."""
    if styled := _STYLED.fullmatch(text):
        text = styled[1].strip()
    measured = _MEASURED.fullmatch(text) if len(text) <= 200 else None
    if measured and not _NO_UNITS.search(measured[2] or measured[3] or ""):
        text = measured[1]
    return plain_number(text)
