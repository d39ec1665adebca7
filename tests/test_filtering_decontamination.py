"""Evaluation questions are found in training rows, and common formulas alone are not."""

import re
from pathlib import Path

import pytest

from jz3.errors import Jz3Error
from jz3.files import read_jsonl, write_jsonl
from jz3.filtering import decontaminate
from jz3.filtering.config import EvaluationFile, FilteringConfig
from jz3.filtering.decontaminate import DecontaminationIndex, build_index, evaluation_questions, words_of

QUESTION = (
    "Tina makes $18.00 an hour. If she works more than 8 hours per shift, "
    "how much does she earn in five days of ten hours?"
)


def index(*questions: str) -> DecontaminationIndex:
    made = DecontaminationIndex(13, 6)
    for question in questions:
        made.add("suite", question)
    return made


def test_words_ignore_how_a_formula_is_set() -> None:
    assert words_of("Find $\\dfrac{1}{2}$ of  THE sum!") == ["find", "\\frac", "1", "2", "of", "the", "sum"]
    assert words_of("1.5 + 2 = 3.5") == ["1.5", "+", "2", "=", "3.5"]
    assert words_of("a -------- b") == ["a", "-", "b"]
    assert words_of("") == []


def test_a_question_is_found_inside_a_longer_text() -> None:
    hits = index("Another question about the price of seven apples in a shop.", QUESTION).find(
        f"Here is a story.\n{QUESTION.upper()} And more."
    )
    assert [(h.suite, h.question, h.share) for h in hits] == [("suite", 1, 1.0)]
    assert hits[0].phrases == len(words_of(QUESTION)) - 12
    assert hits[0].span.startswith("tina makes 18.00 an hour")


def test_a_short_question_must_be_contained_whole() -> None:
    short = index("What is the value of $2^{87} + 3$?")
    assert short.find("Tell me: what is the value of 2^{87}+3 ? Thanks")[0].share == 1.0
    assert short.find("What is the value of 2^{88} + 3?") == []


def test_a_question_with_a_changed_number_is_covered_in_part() -> None:
    hits = index(QUESTION).find(QUESTION.replace("five days", "six days"))
    assert 0.5 < hits[0].share < 1.0


def test_boilerplate_covers_little_of_a_question() -> None:
    plate = (
        "Enter your answer in the form Ax + By + Cz + D = 0 where A, B, C, D are integers such that A > 0."
    )
    hits = index(
        "Find the equation of the plane through the points P, Q and R that lie on the sphere given before. "
        + plate
    ).find("Find a plane that is parallel to the first plane of this exercise. " + plate)
    assert hits and hits[0].share < FilteringConfig().min_question_share


def test_a_tiny_question_must_be_the_whole_text() -> None:
    tiny = index("Find $2 + 3$.", "$")
    assert [(h.suite, h.question, h.share) for h in tiny.find("find 2 + 3")] == [("suite", 0, 1.0)]
    assert tiny.find("To find 2 + 3 we add.") == tiny.find("Find 2 + 4.") == tiny.find("!") == []
    assert dict(tiny.ignored) == {"suite": 2} and tiny.questions() == {"suite": 2}


def test_a_text_that_shares_nothing_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for every length that a question's phrases have: millions of rows are read."""
    made = index(*(" ".join(QUESTION.split()[:count]) for count in range(6, 20)))
    hashed = []
    real = decontaminate._hash
    monkeypatch.setattr(decontaminate, "_hash", lambda *asked: hashed.append(asked) or real(*asked))
    assert not made.find(" ".join(f"word{i}" for i in range(1000))) and not hashed
    text = "so we are asked. " + QUESTION + " The end, as we know."
    assert made.find(text)[0].share == 1.0 and len(hashed) < 20 * len(words_of(QUESTION))


def test_evaluation_files(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    write_jsonl(path, [{"body": "Seven apples.", "question": "How many?"}])
    assert list(evaluation_questions(EvaluationFile(path=str(path), fields=("body", "question")))) == [
        "Seven apples. How many?"
    ]
    with pytest.raises(Jz3Error, match="'text'.*body, question"):
        list(evaluation_questions(EvaluationFile(path=str(path), fields=("text",))))
    path.write_text('{"question": "Why?"}', encoding="utf-8-sig")
    assert list(evaluation_questions(EvaluationFile(path=str(path)))) == ["Why?"]
    for broken in ("{broken\n", "[" * 100_000):
        path.write_text(broken)
        with pytest.raises(Jz3Error, match="not valid JSON"):
            list(evaluation_questions(EvaluationFile(path=str(path))))


def test_evaluation_files_that_protect_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set.jsonl.*fields must name"):
        EvaluationFile(path="set.jsonl", fields=())
    path = tmp_path / "set.jsonl"
    for rows in ([], [{"question": "Find 2 + 3."}, {"question": ""}]):
        write_jsonl(path, rows)
        config = FilteringConfig(evaluation_files=(EvaluationFile(path=str(path), name="t"),))
        with pytest.raises(Jz3Error, match="set.jsonl.*no question of 6 words.*min_question_words"):
            build_index(config, [{"task": "t", "problem": QUESTION}])
    assert build_index(FilteringConfig(min_question_words=4, evaluation_files=config.evaluation_files), [])


def test_known_test_questions_in_the_fine_tuning_sample(shared_data: Path) -> None:
    """Four rows hold an exact test question; one MATH question has a single number changed."""
    fields = {
        "asdiv": ("body", "question"),
        "math-oai": ("problem",),
        "minerva_math": ("problem",),
        "gsm-hard": ("input",),
    }
    files = sorted((shared_data / "eval").glob("*.jsonl"))
    config = FilteringConfig(
        evaluation_files=tuple(
            EvaluationFile(path=str(f), fields=fields.get(f.stem, ("question",))) for f in files
        )
    )
    made = build_index(config, [])
    found = {}
    for sample, most in (("finetune", 1000), ("cot_pretrain", 1000), ("tool_pretrain", 1000)):
        hits = []
        for number, row in enumerate(read_jsonl(shared_data / "samples" / f"{sample}_sampled.jsonl")):
            question = re.sub(r"(?s)^## Question\n(.*)\n\n##[^\n]*\n$", r"\1", row["input"])
            best = made.find(question)[:1]
            hits += [
                (number, best[0].suite, best[0].share) for h in best if h.share >= config.min_question_share
            ]
        found[sample] = hits[:most]
    exact = [(n, suite) for n, suite, share in found["finetune"] if share == 1.0]
    assert exact == [(347, "mmlu_stem"), (463, "mmlu_stem"), (619, "mmlu_stem"), (805, "asdiv")]
    assert [(n, suite) for n, suite, share in found["finetune"] if share < 1.0] == [(412, "math-oai")]
    assert found["cot_pretrain"] == found["tool_pretrain"] == []
