"""Answers are found, outputs compared and equality decided as stated."""

import time
from collections.abc import Iterator

import pytest

from jz3.errors import Jz3Error
from jz3.grading import answer as module
from jz3.grading.answer import (
    Grader,
    answer_like_printed,
    code_blocks,
    compare_plainly,
    extract_answer,
    extract_boxed,
    fenced_blocks,
    find_answer,
    output_blocks,
    outputs_match,
    plain_number,
    tidy_answer,
)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seconds=3, workers=2) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"} } { \boxed{6}", "6"),
        (r"\boxed{}", ""),
        ("nothing", ""),
        (r"\boxed{ 1 }", "1"),
        (r"\boxes{9}", ""),
        (r"\boxed{a \boxed{7} b}", "7"),
        (r"\boxed{a {\boxed{8}} b} c", "8"),
        (r"\boxed{a \boxed{} b}", r"a \boxed{} b"),
        (r"\boxed{1 \{ 2 \} 3}", r"1 \{ 2 \} 3"),
    ],
)
def test_extract_boxed(text: str, boxed: str) -> None:
    assert extract_boxed(text) == boxed


def test_extraction_is_linear_in_the_text() -> None:
    start = time.perf_counter()
    assert extract_boxed("\\boxed{" * 140_000) == ""
    assert extract_boxed("\\boxed{" * 50_000 + "1" + "}" * 50_000) == "1"
    assert find_answer("{" * 1_000_000 + "answer is " * 1000).source in ("none", "sentence")
    assert find_answer("answer: \\[ " * 500 + "answer:" + "\n" * 40_000).source == "sentence"
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("text", "answer", "source"),
    [
        ("#### 3\nThe answer is 4. \\boxed{5}", "5", "boxed"),
        ("The answer is 4.\n#### 1,234", "1,234", "hashes"),
        ("The answer is: 4.5. Then 7 more words", "4.5", "sentence"),
        ("The final answer is $\\frac{1}{2}$.", "\\frac{1}{2}", "sentence"),
        ("the answer is 3. No, the answer is 12 apples.", "12 apples", "sentence"),
        ("**Answer:** 9", "9", "sentence"),
        ("we get 3, then -1,200.50 dollars", "-1,200.50", "last_number"),
        ("it is 3/4 of 25%", "25%", "last_number"),
        ("The answer is:\n\n5", "5", "sentence"),
        ("The answer is:\n\\[\n x = 5\n\\]\nDone", "x = 5", "sentence"),
        ("The answer is $\\$18$ a day.", "\\$18", "sentence"),
        ("The answer is $5 for each, $10 in all", "$5 for each, $10 in all", "sentence"),
        ("The answers are 3 and 4.", "3 and 4", "sentence"),
        ("no number", "", "none"),
        ("", "", "none"),
    ],
)
def test_find_answer(text: str, answer: str, source: str) -> None:
    found = find_answer(text)
    assert (found.text, found.source) == (answer, source)
    assert extract_answer(text) == answer


def test_blocks_come_in_order_with_their_kind() -> None:
    text = "a\n```python\nx = 1\nprint(x)\n```\n```output\n1\n```\nb\n"
    text += "```py\nprint(2)```\n ```output\n2\n ```\n```cpp\nno\n```"
    assert code_blocks(text) == ["x = 1\nprint(x)\n", "print(2)"]
    assert output_blocks(text) == ["1\n", "2\n"]
    assert [kind for kind, _ in fenced_blocks(text)] == ["python", "output", "python", "output"]
    assert code_blocks("```python\nnever closed") == []


@pytest.mark.parametrize(
    ("stated", "real", "same"),
    [
        ("5", "5\n", True),
        ("a  b\n", "a b", True),
        ("3.14", "3.14159", True),
        ("3.14", "3.15", False),
        ("3.1415926", "3.14159265358", True),
        ("0.33", "0.3333333", True),
        ("1000", "1200", False),
        ("123456789", "123456788", False),
        ("3", "3.2", False),
        ("4.0", "4", True),
        ("1e-11", "1.0000000000000001e-11", True),
        ("x = 2.50", "x = 2.5", True),
        ("x = 2.5", "y = 2.5", False),
        ("[1, 2]", "[1, 2, 3]", False),
        ("", "5", False),
        ("True", "False", False),
        ("2.0", "-2.0", False),
        ("$9,581.70", "$-3,669.59", False),
        ("x1 = 2", "x2 = 2", False),
        ("Room #: 2", "Room 2: 2", False),
        ("Room #: 2", "Room #: 2.0", True),
        ("1e999", "5.0", False),
    ],
)
def test_outputs_match(stated: str, real: str, same: bool) -> None:
    assert outputs_match(stated, real) is same


@pytest.mark.parametrize(
    ("answer", "output", "printed"),
    [
        ("9,581.70", "value: 9581.7", True),
        ("27.73 \\, \\text{s}", "27.72588", True),
        ("41.81^\\circ", "41.8103", True),
        ("10,000\\ V", "10000", True),
        ("1.05 \\times 10^{-34}", "h = 1.05e-34 Js", True),
        ("\\text{Subject 3}", "Subject 3", True),
        ("\\text{True}", "Is it so? False", False),
        ("3/4", "3/4", True),
        ("0.5", "5", False),
        ("50", "0.5", False),
        ("2x", "2", False),
        ("7", "17", False),
        ("13\\%", "13.0", True),
    ],
)
def test_answer_like_printed(answer: str, output: str, printed: bool) -> None:
    assert answer_like_printed(answer, output) is printed


def test_plain_numbers() -> None:
    assert plain_number("1,234.5") == plain_number("1234.50")
    assert plain_number("-3/4") == plain_number("-0.75")
    assert plain_number("1e3") == 1000
    for text in ("", ".", "/", "1/0", "12,34", "x", "1" * 200, "1e999999"):
        assert plain_number(text) is None


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ("5", "5.", True),
        ("$\\frac{1}{2}$", "0.5", True),
        ("1/2", "\\frac12", True),
        ("1,234", "1234", True),
        ("1\\,234\\,000", "1234000", True),
        ("10\\ 000", "10,000", True),
        ("\\$5", "5", True),
        ("12 apples", "12", True),
        ("25", "$25 dollars", True),
        ("25", "25 dollars per day", True),
        ("\\frac{5}{2}", "2.5 km/h", True),
        ("1250", "1,250, which is a lot", True),
        ("25", "26 dollars", False),
        ("2", "2 and a half", False),
        ("2000000", "2 million", False),
        ("5\\text{ cm}", "5", True),
        ("50\\%", "50%", True),
        ("0.5", "50", False),
        ("50", "0.5", False),
        ("5", "500", False),
        ("x=5", "5", True),
        ("(1,2)", "(1, 2)", True),
        ("[1,2]", "(1,2)", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("x^2+1", "1 + x**2", True),
        ("2\\sqrt{2\\sqrt{6} + 5}", "2*sqrt(2*sqrt(6) + 5)", True),
        ("\\begin{pmatrix} -5 \\\\ 9 \\end{pmatrix}", "Matrix([[-5], [9]])", True),
        ("\\text{Yes}", "yes", True),
        ("\\{\\text{red},\\text{blue}\\}", "\\{\\text{red}, \\text{green}\\}", False),
        ("\\{\\text{red},\\text{blue}\\}", "\\left\\{\\text{blue}, \\text{red}\\right\\}", True),
        ("3\\text{ red}, 4\\text{ blue}", "3", False),
        ("3\\text{ red}, 4\\text{ blue}", "3\\text{ red},4\\text{ blue}", True),
        ("\\sqrt{2}", "\\sqrt{2}\\text{ cm, about}", True),
        ("even", "odd", False),
        ("3.14", "3.1416", False),
        ("5", "", False),
        ("", "", False),
        ("x", "y", False),
    ],
)
def test_equality(grader: Grader, gold: str, prediction: str, equal: bool) -> None:
    assert grader.equal(gold, prediction) is equal


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ("4.5e33", "4.5\\times 10^{33}", True),
        ("4.5e33", "4.5 \\cdot 10^{32}", False),
        ("1e-5", "10^{-5}", True),
        ("1.6e-19", "1.6 \\times 10^{-19} \\text{ C}", True),
        ("1.6\\times 10^{-19}", "9.1\\times 10^{-31}", False),
        ("0.0000001", "0.0000002", False),
        ("1/12", "0.083333", True),
        ("1/12", "0.0833", False),
        ("1.5", "1 1/2", True),
        ("10000", "10\\,000", True),
        ("0", "10\\,000", False),
        ("18", "18 dollars", True),
        ("18 eggs per day", "18", True),
        ("18", "\\text{18 eggs}", True),
        ("12.5", "\\mathbf{12.5}", True),
        ("60", "60 km/h", True),
        ("18", "19 dollars", False),
        ("18", "18 million", None),
        ("3", "3 dozen eggs", None),
        ("2", "2 xy", None),
        ("18 cents", "18 dollars", None),
        ("25", "25 percent", None),
    ],
)
def test_numbers_are_compared_by_value(gold: str, prediction: str, equal: bool | None) -> None:
    assert compare_plainly(tidy_answer(gold), tidy_answer(prediction)) is equal


def test_hostile_answers_cost_time_but_not_the_caller(grader: Grader) -> None:
    before, start = grader.timeouts, time.monotonic()
    pairs = [
        ("9^{9^{9^{9}}}", "5"),
        ("9**9**9**9", "5"),
        ("5", "{" * 9000),
        ("5", "\\frac{" * 1000),
        ("5", "x" * 1_000_000),
        ("5\0", "6"),
        ("5", "\ud800"),
        ("5", "__import__('os').kill(1, 9)*2"),
        ("5", "\\boxed{\\left(\\right]"),
    ]
    assert grader.equal_many(pairs) == [False] * len(pairs)
    assert grader.timeouts > before
    assert time.monotonic() - start < 60
    assert grader.equal_many([("5", "5\0"), ("\\frac{4}{2}", "2")]) == [True, True]
    assert grader.equal("a" * 20_000, "a" * 20_000)


def test_answers_cannot_decide_for_themselves(grader: Grader) -> None:
    forged = ("sqrt(__import__('os').write(1, b'1') and __import__('os')._exit(0))",
              "2*exec(chr(112) + 'rint(1); raise SystemExit')",
              "Rational(1, exec('import os; os.write(1, b\"1\"); os._exit(0)'))*sqrt(2)")  # fmt: skip
    assert grader.equal_many([("\\sqrt{77}", answer) for answer in forged]) == [False] * 3
    alike = [
        ("1500\\sqrt{2}", "1.5e3*sqrt(2.)"),
        ("\\frac{1}{2} e^{2}", "exp(2)*Rational(1, 2)"),
        ("6\\pi", "pi*3!*1"),
    ]
    assert grader.equal_many(alike) == [True] * 3


def test_plain_pairs_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader() as lazy:
        monkeypatch.setattr(lazy, "_ask", lambda pairs: pytest.fail(f"asked for {pairs}"))
        assert lazy.equal_many([("5", "5"), ("5", "6"), ("x", "x"), ("0.50", "1/2"), ("1e3", "1,000")]) == [
            True,
            False,
            True,
            True,
            True,
        ]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARM_UP", "import a_library_that_is_not_there")
    with Grader(workers=1) as broken, pytest.raises(Jz3Error, match="math-verify"):
        broken.equal("\\frac{1}{2}", "x")
