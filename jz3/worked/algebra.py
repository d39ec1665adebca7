"""Families of algebra, geometry, calculus, probability and everyday counting."""

import math
import random
import re
from collections.abc import Iterator
from fractions import Fraction

from jz3.worked.base import Draft, entries, phrased

_TERM = re.compile(r"([+-]?) ?(\d+)?(?:(?<=\d)\*)?([A-Za-z])?(?:\*\*(\d+))?(?= |$)")
_PLURALS = {"fish": "fish", "sheep": "sheep", "deer": "deer", "shrimp": "shrimp", "louse": "lice"}


def simple_equations(seed: int) -> Iterator[Draft]:
    """Linear equations in one unknown."""
    settings = {"min_terms": 2, "max_terms": 2, "min_value": 2, "max_value": 40}
    for entry in entries("simple_equations", seed, operators_weights=[0.5, 0.5, 0.0], **settings):
        left, right = entry["metadata"]["equation"].split(" = ")
        name, total, value = entry["metadata"]["variable"], int(right), int(entry["answer"])
        if name in "eilo":
            continue
        terms = polynomial(left)
        slope, constant = terms[1], terms[0]
        moved = f"{total} - {constant}" if constant > 0 else f"{total} + {-constant}"
        shown = f"{show(terms, name)} = {total}"
        yield Draft(
            question=phrased(
                entry,
                f"Solve for {name}: {shown}.",
                f"Find the value of {name} in the equation {shown}.",
                f"Which {name} satisfies {shown}?",
            ),
            answer=str(value),
            steps=f"Move the constant: {show({1: slope}, name)} = {moved} = {total - constant}. "
            f"Divide by {slope}: {name} = {total - constant} / {slope} = {value}.",
            program=f"{name} = ({moved}) // {slope if slope > 0 else f'({slope})'}\nprint({name})",
        )


def polynomial_values(seed: int) -> Iterator[Draft]:
    """The value of a product of two polynomials at a small number."""
    source = random.Random(seed)
    questions = ("Let p(x) = ({})({}). What is p({})?", "Given p(x) = ({})({}), find p({}).")
    while True:
        first, second = _draw_polynomial(source, 2), _draw_polynomial(source, 2)
        at = source.randint(2, 4)
        one, two = value_at(first, at), value_at(second, at)
        yield Draft(
            question=source.choice(questions).format(show(first), show(second), at),
            answer=str(one * two),
            steps=f"At x = {at} the first factor is {one} and the second is {two}. "
            f"Their product is {one} * {paren(two)} = {one * two}.",
            program=f"x = {at}\nprint(({code(first)}) * ({code(second)}))",
        )


def complex_arithmetic(seed: int) -> Iterator[Draft]:
    """The real or imaginary part of a sum, difference or product of complex numbers."""
    for entry in entries("complex_arithmetic", seed, operations_weights=[0.3, 0.3, 0.4, 0.0]):
        meta = entry["metadata"]
        (a, b), (c, d), operation = map(int, meta["num1"]), map(int, meta["num2"]), meta["operation"]
        if not (b and d):
            continue
        imaginary = meta["source_index"] % 2 == 1
        left, right = complex_text(a, b), complex_text(c, d)
        if operation == "*":
            pieces = [(a, d), (b, c)] if imaginary else [(a, c), (b, d)]
            (p, q), (r, s) = pieces
            sign = "+" if imaginary else "-"
            value = p * q + r * s if imaginary else p * q - r * s
            working = (
                f"{p} * {paren(q)} {sign} {paren(r)} * {paren(s)} = {p * q} {sign} {paren(r * s)} = {value}"
            )
        else:
            p, q = (b, d) if imaginary else (a, c)
            value = p + q if operation == "+" else p - q
            working = f"{p} {operation} {paren(q)} = {value}"
        part = "imaginary" if imaginary else "real"
        expression = f"({left}) {operation} ({right})"
        yield Draft(
            question=f"What is the {part} part of {expression}, where i^2 = -1?",
            answer=str(value),
            steps=f"The {part} part comes from {working}.",
            program=f"z = {expression.replace('i', 'j')}\nprint(int(z.{'imag' if imaginary else 'real'}))",
        )


def number_sequence(seed: int) -> Iterator[Draft]:
    """The next term of a sequence with one simple rule."""
    for entry in entries("number_sequence", seed, min_terms=4, max_terms=7, max_complexity=1):
        rule, terms = entry["metadata"]["rule"], entry["metadata"]["sequence"]
        shown, last, value = terms[:-1], terms[-2], terms[-1]
        match = re.fullmatch(r"(add|multiply by) (-?\d+)|double|add previous", rule)
        if not match or len(set(shown)) == 1:
            continue
        if rule == "add previous":
            reason, working = "Every term is the sum of the two before it", f"{terms[-3]} + {paren(last)}"
        elif match[1] == "add":
            reason = f"The difference of neighbouring terms is always {match[2]}"
            working = f"{last} + {paren(int(match[2]))}"
        else:
            factor = int(match[2] or 2)
            reason, working = f"Every term is {factor} times the one before it", f"{last} * {paren(factor)}"
        listed = ", ".join(map(str, shown))
        yield Draft(
            question=phrased(
                entry, f"What comes next in the sequence {listed}?", f"Find the next term: {listed}, ..."
            ),
            answer=str(value),
            steps=f"{reason}. The next term is {working} = {value}.",
            program=f"print({working})",
        )


def simple_geometry(seed: int) -> Iterator[Draft]:
    """The missing angle of a convex polygon."""
    for entry in entries("simple_geometry", seed, min_sides=3, max_sides=6):
        sides, angles = entry["metadata"]["n_sides"], [int(a) for a in entry["metadata"]["known_angles"]]
        total, known = 180 * (sides - 2), sum(angles)
        missing = total - known
        # A polygon with an angle of 180 degrees or more is not convex.
        if not 0 < missing < 180 or max(angles) >= 180:
            continue
        figure = {3: "triangle", 4: "convex quadrilateral", 5: "convex pentagon", 6: "convex hexagon"}[sides]
        listed = ", ".join(map(str, angles[:-1])) + f" and {angles[-1]}"
        yield Draft(
            question=phrased(
                entry,
                f"The known angles of a {figure} are {listed} degrees. How large is the missing one?",
                f"The other angles of a {figure} measure {listed} degrees. Find the missing angle in degrees.",
            ),
            answer=str(missing),
            steps=f"The angles add up to 180 * ({sides} - 2) = {total} degrees. The known ones add up to {known}. "
            f"{total} - {known} = {missing}.",
            program=f"print(180 * ({sides} - 2) - ({' + '.join(map(str, angles))}))",
        )


def polynomial_integrals(seed: int) -> Iterator[Draft]:
    """Definite integrals of polynomials with integer antiderivatives."""
    source = random.Random(seed)
    questions = (
        "Integrate f(x) = {} from 0 to {}.",
        "Find the integral of {} over [0, {}].",
    )
    while True:
        antiderivative = {p: c for p, c in _draw_polynomial(source, 4).items() if p}
        if not antiderivative:
            continue
        upper = source.randint(1, 3)
        value = value_at(antiderivative, upper)
        derivative = {p - 1: c * p for p, c in antiderivative.items()}
        yield Draft(
            question=source.choice(questions).format(show(derivative), upper),
            answer=str(value),
            steps=f"An antiderivative is F(x) = {show(antiderivative)}. F({upper}) - F(0) = {value} - 0 = {value}.",
            program=f"def F(x):\n    return {code(antiderivative)}\nprint(F({upper}) - F(0))",
        )


def coin_flip(seed: int) -> Iterator[Draft]:
    """The probability of a number of heads."""
    for entry in entries("coin_flip", seed, min_trials=3, max_trials=16):
        meta = entry["metadata"]
        flips, heads, exact = meta["num_trials"], meta["k_heads"], meta["problem_type"] == "exact"
        counts = [heads] if exact else list(range(heads, flips + 1))
        if len(counts) > 4 or len(counts) == flips + 1:
            continue
        ways = [math.comb(flips, k) for k in counts]
        chance = Fraction(sum(ways), 2**flips)
        named = ", ".join(f"C({flips}, {k}) = {w}" for k, w in zip(counts, ways, strict=True))
        total = f" In all that is {sum(ways)} outcomes." if len(ways) > 1 else ""
        asked = "exactly" if exact else "at least"
        noun = "head" if heads == 1 else "heads"
        fraction = f"{sum(ways)}/{2**flips}"
        program = f"math.comb({flips}, {heads})" if exact else (
            f"sum(math.comb({flips}, k) for k in range({heads}, {flips + 1}))"
        )  # fmt: skip
        yield Draft(
            question=phrased(
                entry,
                f"What is the probability of {asked} {heads} {noun} in {flips} flips of a fair coin? Give a fraction.",
                f"How likely are {asked} {heads} {noun} in {flips} flips of a fair coin, as a fraction?",
            ),
            answer=str(chance),
            steps=f"Count the outcomes: {named}.{total} {flips} flips have 2^{flips} = {2**flips} outcomes, so the "
            f"probability is {fraction if fraction == str(chance) else f'{fraction} = {chance}'}.",
            program=f"import math\nfrom fractions import Fraction\nprint(Fraction({program}, 2**{flips}))",
        )


def time_intervals(seed: int) -> Iterator[Draft]:
    """Minutes between two times of a day."""
    things = ("meeting", "flight", "video call", "concert", "bus ride", "lesson")
    # Only the time of day is used: reasoning-gym puts it on the present date.
    for entry in entries("time_intervals", seed, task_types=["time"]):
        start, end = (entry["metadata"][k].split()[1][:5] for k in ("start_time", "end_time"))
        (h1, m1), (h2, m2) = (map(int, t.split(":")) for t in (start, end))
        first, second = h1 * 60 + m1, h2 * 60 + m2
        if second - first < 5:
            continue
        thing = things[entry["metadata"]["source_index"] % len(things)]
        yield Draft(
            question=f"A {thing} begins at {start} and ends at {end}. How many minutes does it last?",
            answer=str(second - first),
            steps=f"In minutes after midnight it begins at {h1} * 60 + {m1} = {first} and ends at "
            f"{h2} * 60 + {m2} = {second}. {second} - {first} = {second - first}.",
            program=f"start = {h1} * 60 + {m1}\nend = {h2} * 60 + {m2}\nprint(end - start)",
        )


def leg_counting(seed: int) -> Iterator[Draft]:
    """Legs of a few kinds of animals."""
    for entry in entries("leg_counting", seed, min_animals=2, max_animals=3, max_instances=12):
        legs = _legs()
        animals = {
            a: n for a, n in entry["metadata"]["animals"].items() if legs[a] and a not in ("human", "insect")
        }
        if len(animals) < 2:
            continue
        named = [f"{n} {a if n == 1 else plural(a)}" for a, n in animals.items()]
        listed = ", ".join(named[:-1]) + f" and {named[-1]}"
        parts = [n * legs[a] for a, n in animals.items()]
        products = " + ".join(f"{n} * {legs[a]}" for a, n in animals.items())
        yield Draft(
            question=phrased(
                entry,
                f"How many legs do {listed} have in total?",
                f"A zoo keeps {listed}. Count all their legs.",
            ),
            answer=str(sum(parts)),
            steps="Legs per animal: "
            + ", ".join(f"{a} {legs[a]}" for a in animals)
            + f". {products} = {' + '.join(map(str, parts))} = {sum(parts)}.",
            program=f"print({products})",
        )


def polynomial(text: str) -> dict[int, int]:
    """Read an integer polynomial as SymPy prints it: power to coefficient."""
    found: dict[int, int] = {}
    for sign, number, symbol, power in _TERM.findall(text):
        if number or symbol:
            exponent = int(power or 1) if symbol else 0
            found[exponent] = found.get(exponent, 0) + int(f"{sign}{number or 1}")
    return found


def _draw_polynomial(source: random.Random, degree: int) -> dict[int, int]:
    """Draw two terms of different powers up to `degree`."""
    powers = source.sample(range(degree + 1), 2)
    return {p: source.choice((-1, 1)) * source.randint(1, 9) for p in sorted(powers, reverse=True)}


def code(terms: dict[int, int]) -> str:
    """Write a polynomial in x as Python, e.g. 3*x**2 - 4*x + 1."""
    return re.sub(r"(\d)x", r"\1*x", show(terms)).replace("^", "**")


def value_at(terms: dict[int, int], x: int) -> int:
    """Return the polynomial's value at x."""
    return sum(c * x**p for p, c in terms.items())


def show(terms: dict[int, int], name: str = "x") -> str:
    """Write a polynomial as school books do, e.g. 3x^2 - x + 4."""
    text = ""
    for power, factor in sorted(terms.items(), reverse=True):
        if not factor:
            continue
        letter = "" if power == 0 else name if power == 1 else f"{name}^{power}"
        number = "" if abs(factor) == 1 and letter else str(abs(factor))
        joint = ("-" if factor < 0 else "") if not text else (" - " if factor < 0 else " + ")
        text += joint + number + letter
    return text or "0"


def complex_text(real: int, imaginary: int) -> str:
    """Write a complex number, e.g. 3 - 2i."""
    return f"{real} {'-' if imaginary < 0 else '+'} {abs(imaginary)}i"


def paren(number: int) -> str:
    """Put a negative number in brackets."""
    return f"({number})" if number < 0 else str(number)


def plural(noun: str) -> str:
    """Return the plural of an animal's name."""
    for ending, replacement in _PLURALS.items():
        if noun.endswith(ending):
            return noun.removesuffix(ending) + replacement
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "ch", "x")) else "s")


def _legs() -> dict[str, int]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return ANIMALS
