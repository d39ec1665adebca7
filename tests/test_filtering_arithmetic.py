"""Wrong sums are found, and right ones and what is no sum are let be."""

from pathlib import Path

import pytest

from jz3.files import read_jsonl
from jz3.filtering.arithmetic import find_equations, wrong_equations
from jz3.filtering.text import prose


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("2 + 3 = 5 and so 2*3 = 7, 1 and 1/4 = 2", 1, 1),
        ("We have 3 \\times 4 = 13 \\text{ cm}", 0, 1),
        ("\\frac{1}{2} + \\frac{1}{3} = \\frac{5}{6}", 1, 0),
        ("$5 + $3 = $9", 0, 1),
        ("<<48/2=24>>24", 1, 0),
        ("2^{10} = 1024, 2^3 = 9", 1, 1),
        ("1,200 + 300 = 1,500", 1, 0),
        ("3 + 4 = 7 = 5 + 2", 2, 0),
        ("211 - 347 = -136. -136 - 515 = -651", 2, 0),
        ("10 / 3 = 3.33, 2/3 = 0.66, 2/3 = 0.7", 3, 0),
        ("10 / 3 = 3.4, 2/3 = 0.68", 0, 2),
        ("3.33 * 3 = 10, 0.666 * 3 = 2, 16.67 * 6 = 100", 3, 0),
        ("12.50 * 40 = 502, 1849.75 + 2652.5 = 4491.75", 0, 2),
        ("1. 3 + 4 = 8\n- 5 + 1 = 6\nStep 3: 1 + 1 = 3", 1, 2),
        ("(2)(3) = 7", 0, 1),
        ("Day 3 = 5 + 4", 0, 0),
        ("x + 3 = 7, 2x + 3 = 8, x_1 + 2 = 3", 0, 0),
        ("f(2) + 1 = 9, \\sqrt{9} + 3 = 7, log 10 + 2 = 5", 0, 0),
        ("17 / 5 = 3 remainder 2, 17/5 = 3 \\text{ remainder } 2", 0, 0),
        ("1/3 = 0.\\overline{3}, 5/9 = 0.\\dot{5}, 3 * 4 = 13.\\) So", 0, 1),
        ("50 * 20% = 10, 101_2 + 1 = 6, 5! + 1 = 9", 0, 0),
        ("-2^2 = 4, 6/2(1+2) = 1", 0, 0),
        ("trying 2 + 2 = 5, which is false", 0, 0),
        ("9^9^9 = 5, 9^(9^9) = 1, 1/0 = 3", 0, 0),
        ("((((1/3)^64)^64)^64)^2 = 5", 0, 0),
        ("5 + 3i = 8, 5 - 3 = 2i", 0, 0),
        ("at 08:00 + 2 = 10:00, 0900-0130 = 0730", 0, 0),
        ("", 0, 0),
    ],
)
def test_arithmetic(text: str, right: int, wrong: int) -> None:
    equations = find_equations(text)
    assert (sum(e.right for e in equations), sum(not e.right for e in equations)) == (right, wrong), equations


def test_arithmetic_is_safe_and_fast() -> None:
    for text in (
        "(" * 5000 + "1 = 2",
        "1+" * 5000 + "1 = 2",
        " " * 100_000,
        "9" * 5000 + " + 1 = 2",
        "2^64^64 = 1",
        "=" * 5000,
    ):
        wrong_equations(text)
    assert wrong_equations("1 + 1 = 2")[0] == 1


def test_arithmetic_on_real_solutions(shared_data: Path) -> None:
    """GSM8K's reference solutions are nearly always right: a false alarm would show here."""
    checked = wrong = 0
    for row in read_jsonl(shared_data / "targets" / "gsm8k_train.jsonl"):
        count, bad = wrong_equations(row["answer"])
        checked, wrong = checked + count, wrong + len(bad)
    assert checked > 5000 and wrong / checked < 0.003
    flagged = rows = 0
    for row in read_jsonl(shared_data / "samples" / "cot_pretrain_sampled.jsonl"):
        count, bad = wrong_equations(prose(row["output"]))
        rows, flagged = rows + (count > 0), flagged + bool(bad)
    assert 0.08 < flagged / rows < 0.25  # the unchecked synthetic rows really are wrong that often
