"""Families of arithmetic and number theory."""

import math
from collections.abc import Iterator
from typing import Any

from jz3.worked.base import Draft, entries, phrased


def chain_sum(seed: int) -> Iterator[Draft]:
    """Sums and differences of three or four numbers, from left to right."""
    for entry in entries("chain_sum", seed, min_terms=3, max_terms=4, min_digits=2, max_digits=3):
        expression = entry["metadata"]["expression"]
        parts = expression.split()
        total, steps = int(parts[0]), []
        for sign, number in zip(parts[1::2], parts[2::2], strict=True):
            result = total + int(number) if sign == "+" else total - int(number)
            steps.append(f"{total} {sign} {number} = {result}.")
            total = result
        yield Draft(
            question=phrased(entry, f"Calculate {expression}.", f"What is {expression}?"),
            answer=str(total),
            steps=" ".join(["Work from left to right:", *steps]),
            program=f"print({expression})",
        )


def products(seed: int) -> Iterator[Draft]:
    """Products of two numbers, one digit of the second factor at a time."""
    for entry in entries("products", seed, min_digits=2, max_digits=3):
        left, right = map(int, entry["metadata"]["expression"].split(" * "))
        digits = str(right)
        pieces = [int(d) * 10 ** (len(digits) - i - 1) for i, d in enumerate(digits) if d != "0"]
        if len(pieces) < 2:
            continue
        split = " + ".join(map(str, pieces))
        sums = " + ".join(str(left * p) for p in pieces)
        yield Draft(
            question=phrased(
                entry, f"Multiply {left} by {right}.", f"What is the product of {left} and {right}?"
            ),
            answer=str(left * right),
            steps=f"Split {right} into {split}. Then {left} * {right} = {sums} = {left * right}.",
            program=f"print({left} * {right})",
        )


def fraction_simplification(seed: int) -> Iterator[Draft]:
    """Fractions brought to lowest terms; the sum of both parts is asked for, as it tells whether they are lowest."""
    settings: dict[str, Any] = {
        "styles": ("plain",),
        "min_value": 2,
        "max_value": 40,
        "min_factor": 2,
        "max_factor": 12,
    }
    for entry in entries("fraction_simplification", seed, **settings):
        meta = entry["metadata"]
        top, bottom = meta["numerator"], meta["denominator"]
        factor = math.gcd(top, bottom)
        p, q = top // factor, bottom // factor
        if q == 1 or factor == 1:
            continue
        yield Draft(
            question=phrased(
                entry,
                f"Reduce the fraction {top}/{bottom} to lowest terms p/q. What is p + q?",
                f"In lowest terms, {top}/{bottom} = p/q. Find the sum of numerator and denominator, p + q.",
            ),
            answer=str(p + q),
            steps=f"The greatest common divisor of {top} and {bottom} is {factor}. {top} / {factor} = {p} and "
            f"{bottom} / {factor} = {q}, so the fraction is {p}/{q} and {p} + {q} = {p + q}.",
            program="from fractions import Fraction\n"
            f"f = Fraction({top}, {bottom})\nprint(f.numerator + f.denominator)",
        )


def gcd(seed: int) -> Iterator[Draft]:
    """Greatest common divisors by Euclid's algorithm."""
    for entry in entries("gcd", seed, min_value=12, max_value=400):
        small, large = sorted(entry["metadata"]["numbers"])
        answer = math.gcd(small, large)
        if answer in (1, small):
            continue
        steps, a, b = [], large, small
        while b:
            steps.append(f"{a} = {a // b} * {b} + {a % b}")
            a, b = b, a % b
        yield Draft(
            question=phrased(
                entry,
                f"Find the greatest common divisor of {large} and {small}.",
                f"What is the largest number that divides both {small} and {large}?",
            ),
            answer=str(answer),
            steps=f"Divide with remainder: {', '.join(steps)}. The last divisor is {answer}.",
            program=f"import math\nprint(math.gcd({large}, {small}))",
        )


def lcm(seed: int) -> Iterator[Draft]:
    """Least common multiples through the greatest common divisor."""
    for entry in entries("lcm", seed, min_value=4, max_value=90):
        a, b = entry["metadata"]["numbers"]
        divisor, answer = math.gcd(a, b), math.lcm(a, b)
        if a == b or divisor == 1:
            continue
        yield Draft(
            question=phrased(
                entry,
                f"Find the least common multiple of {a} and {b}.",
                f"What is the smallest positive number that both {a} and {b} divide?",
            ),
            answer=str(answer),
            steps=f"The greatest common divisor of {a} and {b} is {divisor}. The least common multiple is "
            f"{a} * {b} / {divisor} = {a * b} / {divisor} = {answer}.",
            program=f"import math\nprint(math.lcm({a}, {b}))",
        )


def prime_factorization(seed: int) -> Iterator[Draft]:
    """The largest prime factor, by dividing the small primes out."""
    for entry in entries("prime_factorization", seed, min_value=30, max_value=900):
        number, factors = entry["metadata"]["number"], sorted(entry["metadata"]["factors"])
        if len(factors) < 2:
            continue
        steps, rest = [], number
        for factor in factors[:-1]:
            steps.append(f"{rest} = {factor} * {rest // factor}")
            rest //= factor
        yield Draft(
            question=phrased(
                entry,
                f"What is the largest prime factor of {number}?",
                f"Find the greatest prime number that divides {number}.",
            ),
            answer=str(rest),
            steps=f"Divide by the smallest prime again and again: {', '.join(steps)}. Now {rest} is prime, "
            "so it is the largest prime factor.",
            program=f"n, p = {number}, 2\nwhile p < n:\n    if n % p == 0:\n        n //= p\n"
            "    else:\n        p += 1\nprint(n)",
        )


def count_primes(seed: int) -> Iterator[Draft]:
    """How many primes lie in a short interval."""
    for entry in entries("count_primes", seed, min_n=2, max_n=300):
        start, end, primes = (entry["metadata"][k] for k in ("start", "end", "primes"))
        if not 8 <= end - start <= 40 or len(primes) < 2:
            continue
        yield Draft(
            question=phrased(
                entry,
                f"How many prime numbers are there from {start} to {end}?",
                f"Count the primes p with {start} <= p <= {end}.",
            ),
            answer=str(len(primes)),
            steps=f"The primes from {start} to {end} are {', '.join(map(str, primes))}. That makes {len(primes)}.",
            program=f"primes = [n for n in range({start}, {end + 1}) if all(n % d for d in range(2, n))]\n"
            "print(len(primes))",
        )


def base_conversion(seed: int) -> Iterator[Draft]:
    """Numbers in another base written in base ten."""
    for entry in entries("base_conversion", seed, min_base=3, max_base=9, min_value=20, max_value=700):
        digits, base, value = (entry["metadata"][k] for k in ("source_repr", "source_base", "decimal_value"))
        places = range(len(digits) - 1, -1, -1)
        terms = [f"{d} * {base**p}" for d, p in zip(digits, places, strict=True)]
        parts = [str(int(d) * base**p) for d, p in zip(digits, places, strict=True)]
        yield Draft(
            question=phrased(
                entry,
                f"Write the base-{base} number {digits} in base 10.",
                f"Which decimal number is {digits} in base {base}?",
            ),
            answer=str(value),
            steps=f"Multiply every digit by its power of {base}: {' + '.join(terms)} = {' + '.join(parts)} = {value}.",
            program=f'print(int("{digits}", {base}))',
        )
