"""Benchmark files in every layout, their choices, and what can't be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from jz3.errors import Jz3Error
from jz3.evaluation import load_benchmark
from jz3.evaluation.choices import choices_of, chosen_letter, with_choices
from jz3.templates import prompt_for

LAYOUTS = [
    (
        {"question": "Q?", "answer": "Half is 48/2 = <<48/2=24>>24.\n#### 1,024"},
        ("Q?", "Half is 48/2 = 24.\nThe answer is \\boxed{1024}.", "1024"),
    ),
    ({"problem": "P", "solution": "S", "answer": "\\frac{1}{2}", "level": 2}, ("P", "S", "\\frac{1}{2}")),
    ({"problem": "P", "solution": "so \\boxed{1.6} cm", "type": "x"}, ("P", "so \\boxed{1.6} cm", "1.6")),
    ({"body": "Two red.", "question": "How many?", "answer": "9 (apples)"}, ("Two red. How many?", "", "9")),
    (
        {"question": "Q", "options": ["A)5(\u221a3 + 1)", "B)6"], "correct": "B", "rationale": "R"},
        ("Q\nAnswer Choices:\n(A) 5(\u221a3 + 1)\n(B) 6", "R", "B"),
    ),
    (
        {"question": "Q", "options": "A) $f(-6)=0$ B) $f(6)=-6$", "Answer": "A"},
        ("Q\nAnswer Choices:\n(A) $f(-6)=0$\n(B) $f(6)=-6$", "", "A"),
    ),
    (
        {"question": "Q", "options": "A. 1,190 B. vitamin D. or E C. 3", "Answer": "C"},
        ("Q\nAnswer Choices:\n(A) 1,190\n(B) vitamin D. or E\n(C) 3", "", "C"),
    ),
    (
        {"question": "Q", "choices": ["one", "two\nlines"], "answer": 1, "type": "x"},
        ("Q\nAnswer Choices:\n(A) one\n(B) two lines", "", "B"),
    ),
    ({"input": "I", "code": "...", "target": -9867630.0}, ("I", "", "-9867630")),
    ({"input": "I", "target": 0.5}, ("I", "", "0.5")),
    (
        {"Body": "Tom has 8 pens", "Question": "How many are left?", "Equation": "...", "Answer": "5.0"},
        ("Tom has 8 pens. How many are left?", "", "5"),
    ),
    ({"content": "C", "answer": "$\\frac{1}{2}$", "steps": ["..."]}, ("C", "", "$\\frac{1}{2}$")),
    (
        {"question": "Q?", "choices": None, "table": "a | 1", "table_title": "T", "answer": "1,000"},
        ('Read the following table regarding "T" and answer a question:\na | 1\nQ?', "", "1,000"),
    ),
    (
        {"question": "Q?", "choices": ["up", "down"], "table": "a | 1", "table_title": None, "answer": "up"},
        ("Read the following table and answer a question:\na | 1\nQ? Choose one of: up, down.", "", "up"),
    ),
]


@pytest.mark.parametrize(("row", "expected"), LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (read,) = load_benchmark("b", path)
    assert (read.problem, read.completion, read.answer) == expected
    assert (read.id, read.task, read.role) == ("b-00001", "b", "eval")
    assert read.prompt == prompt_for(expected[0], "cot")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("{broken\n", ":1 is not JSON"),
        ("[" * 100_000, ":1 is not JSON"),
        ('{"question": "a", "answer": "#### 1"}\n[1]\n', ":2 is no JSON object"),
        ('{"title": "x"}\n', "known layouts"),
        ('{"question": "Q", "answer": "steps\\n#### "}\n', ":1 has no answer"),
        ('{"question": "Q", "choices": ["a"], "answer": 3}\n', "none of the 1 choices"),
        ('{"question": "Q", "options": "1 2 3", "Answer": "A"}\n', "not marked"),
        ('{"question": 5, "answer": 7}\n', "can't be read"),
        ('{"question": null, "answer": "#### 1"}\n', ":1 .*problem None is no text"),
        ('{"problem": "P", "solution": null, "answer": "1"}\n', ":1 .*solution None is no text"),
        ('{"problem": "P", "solution": "S", "answer": null}\n', ":1 .*answer None is no text"),
        ('{"question": "Q", "options": "A) 1 B) 2", "Answer": null}\n', ":1 .*answer None is no text"),
        ('{"question": "Q", "options": "AB", "correct": "A", "rationale": "R"}\n', ":1 .*'AB' is no list"),
        ('{"question": "Q", "choices": "ab", "answer": 1}\n', ":1 .*choices 'ab' is no list"),
        ('{"input": 5, "target": 1}\n', ":1 .*problem 5 is no text"),
    ],
)
def test_bad_benchmarks_are_refused_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(text)
    with pytest.raises(Jz3Error, match=said) as caught:
        load_benchmark("b", path)
    assert str(path) in str(caught.value)
    with pytest.raises(Jz3Error, match="can't be read"):
        load_benchmark("b", tmp_path / "absent.jsonl")


def test_benchmark_with_a_byte_order_mark_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    row = {"problem": "P", "solution": "S", "answer": 7}
    (tmp_path / "b.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")
    [read] = load_benchmark("b", "~/b.jsonl")
    assert (read.problem, read.answer) == ("P", "7")


def test_real_benchmarks_are_read_whole(shared_data: Path) -> None:
    from jz3.grading.answer import extract_answer

    sizes = {
        "gsm8k": 1319, "math-oai": 500, "asdiv": 2215, "aqua": 254,
        "minerva_math": 272, "sat_math": 32, "gsm-hard": 1319, "mmlu_stem": 3018,
    }  # fmt: skip
    for name, size in sizes.items():
        queries = load_benchmark(name, shared_data / "eval" / f"{name}.jsonl")
        assert len(queries) == size
        if name in ("aqua", "sat_math", "mmlu_stem"):
            assert all(q.answer in choices_of(q.problem) for q in queries)
        if name == "gsm8k":
            assert all(extract_answer(q.completion) == q.answer and "<<" not in q.completion for q in queries)
    assert len(load_benchmark("gsm8k", shared_data / "eval" / "gsm8k.jsonl", limit=10)) == 10


CHOICES = {"A": "5 apples", "B": "x^2", "C": "None of these"}


@pytest.mark.parametrize(
    ("output", "prediction", "letter"),
    [
        ("so \\boxed{B}", "B", "B"),
        ("so \\boxed{\\text{(C)}}", "\\text{(C)}", "C"),
        ("The answer is (A) 5 apples.", "(A) 5 apples", "A"),
        ("I think that the answer is B because 7 is prime", "7", "B"),
        ("so \\boxed{x^2}", "x^2", "B"),
        ("(C)\n", "", "C"),
        ("The correct option is **C**.", "", "C"),
        ("Option C is correct, not x^2", "x^2", "C"),
        ("so \\boxed{12}", "12", ""),
        ("nothing", "", ""),
    ],
)
def test_choice_is_found_by_letter_or_text(output: str, prediction: str, letter: str) -> None:
    def equal(pairs: list[tuple[str, str]]) -> list[bool]:
        return [a == b for a, b in pairs]

    assert chosen_letter(output, prediction, CHOICES, equal) == letter


def test_choices_that_differ_in_their_unit_alone_are_told_apart() -> None:
    units = {"A": "5 hours", "B": "5 days"}
    assert chosen_letter("so \\boxed{5 days}", "5 days", units, lambda pairs: [True] * len(pairs)) == "B"


def test_choices_survive_the_round_trip() -> None:
    assert choices_of(with_choices("Which?", ["one", "(B) two"])) == {"A": "one", "B": "(B) two"}
    assert choices_of("What is (A) here?") == {}
