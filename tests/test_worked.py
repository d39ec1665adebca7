"""Worked problems: every solution is right, every output block is real, train and eval are apart."""

import itertools
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from jz3 import worked
from jz3.grading.answer import code_blocks, extract_boxed, output_blocks
from jz3.worked import gsm
from jz3.worked.base import MAX_PIECES, pieces, printed
from jz3.worked.equations import check_equations

FAMILIES = worked.families()
ARITHMETIC = r"[-\d+*/ ().^]+"


def stated_equations(text: str) -> list[tuple[str, str]]:
    """Both sides of every equation between plain numbers, found without the package's own reader."""
    found = []
    for sentence in re.split(r"[.,:](?:\s|$)|\n", text):
        sides = sentence.replace("×", "*").replace(" x ", " * ").split("=")
        for left, right in itertools.pairwise(sides):
            a = re.search(rf"(?<![A-Za-z\d(,^*/]){ARITHMETIC}$", left)
            b = re.match(rf"{ARITHMETIC}(?![A-Za-z\d^])", right)
            if a and b and re.search(r"\d", a[0]) and re.search(r"\d", b[0]):
                found.append((a[0].strip(), b[0].strip()))
    return found


def value(expression: str) -> Fraction | None:
    try:
        return Fraction(
            eval(re.sub(r"(\d+)", r"Fraction(\1)", expression.replace("^", "**")), {"Fraction": Fraction})
        )
    except SyntaxError:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_are_right_and_short(family: str) -> None:
    problems = worked.worked_problems(family, 11, 40)
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 40
    checked = 0
    for p in problems:
        assert extract_boxed(p.cot) == extract_boxed(p.tool) == p.answer
        assert p.cot.endswith(f"\\boxed{{{p.answer}}}.") and p.tool.endswith(f"\\boxed{{{p.answer}}}.")
        assert output_blocks(p.tool)[-1].strip() == p.answer
        assert max(pieces(p.cot), pieces(p.tool)) <= MAX_PIECES
        assert p.topic == worked.topic(family) and p.family == family
        assert (
            "####" not in p.cot
            and "<<" not in p.cot
            and "Give " not in p.question.replace("Give a fraction", "")
        )
        for left, right in stated_equations(p.cot) if family != "gsm_symbolic" else []:
            a, b = value(left), value(right)
            assert a is None or b is None or a == b, f"{left} = {right} in {p.cot}"
            checked += a is not None and b is not None
    if family not in ("count_primes", "gsm_symbolic"):
        assert checked >= 20, "the checker found hardly an equation"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gsm_symbolic"])
def test_program_and_steps_agree_on_every_draft(family: str) -> None:
    drafts = itertools.islice(worked._drafts(family, 5, "train"), 120)
    assert [d.question for d in drafts if printed(d.program).strip() != d.answer] == []


def test_output_blocks_are_what_python_prints() -> None:
    for family in FAMILIES:
        problem = worked.worked_problems(family, 3, 1)[0]
        (code,) = code_blocks(problem.tool)
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30)
        assert done.stdout == output_blocks(problem.tool)[0], family


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_eval_share_nothing(family: str) -> None:
    train = [p for seed in (0, 1) for p in worked.worked_problems(family, seed, 60)]
    held = [p for seed in (0, 1) for p in worked.worked_problems(family, seed, 20, "eval")]
    assert not {p.question for p in train} & {p.question for p in held}


def test_word_problems_of_both_splits_come_from_different_templates() -> None:
    def shape(question: str) -> set[str]:
        words = re.sub(r"[^a-z ]", "", question.lower()).split()
        return {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}

    train = [shape(p.question) for p in worked.worked_problems("gsm_symbolic", 0, 200)]
    for problem in worked.worked_problems("gsm_symbolic", 0, 40, "eval"):
        own = shape(problem.question)
        assert max(len(own & other) / len(own) for other in train) < 0.6, problem.question


def test_no_long_run_of_words_of_an_eval_question_is_in_train() -> None:
    def runs(question: str) -> set[str]:
        words = question.split()
        return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}

    for family in FAMILIES:
        held = set().union(*(runs(p.question) for p in worked.worked_problems(family, 2, 40, "eval")))
        train = set().union(*(runs(p.question) for p in worked.worked_problems(family, 2, 150)))
        assert not held & train, family


def test_same_seed_same_problems_and_a_larger_draw_begins_alike() -> None:
    few, many = (worked.worked_problems("gcd", 9, n) for n in (10, 30))
    assert many[:10] == few
    assert worked.worked_problems("gcd", 10, 10) != few


def test_two_hundred_problems_take_less_than_two_seconds() -> None:
    worked.worked_problems("gsm_symbolic", 0, 1)  # the first call imports reasoning-gym
    for family in ("gsm_symbolic", "simple_equations", "polynomial_integrals"):
        start = time.process_time()
        worked.worked_problems(family, 21, 200)
        assert time.process_time() - start < 2, family


def test_the_recorded_templates_are_the_sound_ones() -> None:
    assert gsm.sound_templates() == gsm.TEMPLATES
    assert len(gsm.TEMPLATES) >= 30


def entry(question: str, cot: str, answer: str) -> dict:
    return {"question": question, "answer": answer, "metadata": {"answer_cot": f"{cot}\n#### {answer}"}}


def test_a_sound_entry_becomes_a_linked_program() -> None:
    question = "Ann has 48 red cards and half as many blue ones. How many cards?"
    draft = gsm.check_entry(
        entry(question, "She has 48/2=<<48/2=24>>24 blue cards\nIn all 48 + 24 = 72 cards", "72")
    )
    assert draft is not None
    assert draft.program == "x1 = 48 / 2\nx2 = 48 + x1\nprint(round(x2))"
    assert draft.steps == "She has 48/2=24 blue cards.\nIn all 48 + 24 = 72 cards."


@pytest.mark.parametrize(
    ("question", "cot", "answer"),
    [
        ("Ann gets 192 emails, 25% need no reply.", "She receives 48=48 emails\nSo 192 - 48 = 144", "144"),
        ("Ann has 100 cards and gives away 66%.", "That is 0.66*80 = 52 cards", "52"),
        ("Ann has 3 cards and buys 4.", "3 + 4 = 8", "8"),
        ("Ann has 3 cards and buys 4 more.", "3 + 4 = 7", "8"),
        ("Ann has 3 cards and buys some.", "3 + 4 = 7", "7"),
        ("Ann pays £3 and then £4 more.", "£3 + $4 = $7", "7"),
        ("Ann ran 2 as many miles as Bob, who ran 3 miles.", "2 * 3 = 6", "6"),
        ("Ann has 18 litres and 0.6666666666 of it.", "18 x 0.6666666666 = 12", "12"),
        ("Ann has 2 rooms of 3 by 4.", "2(3 + 4) = 14", "14"),
        ("Ann has 3 cards.", "Nothing to compute", "3"),
    ],
)
def test_unsound_entries_are_refused(question: str, cot: str, answer: str) -> None:
    assert gsm.check_entry(entry(question, cot, answer)) is None


def test_equations_pass_over_units_and_words() -> None:
    found = check_equations(
        "First: 135 clam / 15 clam/minute = 9 minutes. A pack of 5, so $1,200 - 3 x $100 = $900"
    )
    assert found is not None
    assert [(e.left, e.value) for e in found] == [
        (("135", "/", "15"), 9),
        (("1200", "-", "3", "*", "100"), 900),
    ]
    assert check_equations("3 + 4 = 8") is None
    assert check_equations("T = 5 + T = 9") is None


def test_wrong_calls_name_the_value() -> None:
    with pytest.raises(ValueError, match="'algebra9'.*gsm_symbolic"):
        worked.worked_problems("algebra9", 0, 1)
    with pytest.raises(ValueError, match="'test'"):
        worked.worked_problems("gcd", 0, 1, "test")
    with pytest.raises(ValueError, match="gave only .* of 5000"):
        worked.worked_problems("coin_flip", 0, 5000)
