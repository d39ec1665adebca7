"""Targets: splits that never mix, solutions in the project's form, counted rejects."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jz3 import targets
from jz3.errors import Jz3Error
from jz3.grading.answer import extract_boxed
from jz3.records import Query, Reject
from jz3.scoring.config import ScoreSettings
from jz3.scoring.targets import read_target
from jz3.seeding import seed_for
from jz3.stage import StageContext
from jz3.targets import ControlConfig, InstructionConfig, TargetsConfig, TaskConfig, clean_solution
from jz3.targets.stage import _is_eval
from jz3.templates import prompt_for
from jz3.worked import worked_problems

NO_CONTROL = ControlConfig(count=0)
WORKED = InstructionConfig(name="worked", kind="worked", families=("gcd", "products", "lcm"), count=30)


def run(folder: Path, config: TargetsConfig, seed: int = 0) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    recipe: Any = SimpleNamespace(seed=seed, targets=config)
    ctx = StageContext(recipe=recipe, run_dir=folder / f"run{seed}", name="targets")
    ctx.out.mkdir(parents=True, exist_ok=True)
    summary = targets.run(ctx)
    rows: dict[str, list[Any]] = {}
    for name, kind in (("queries", Query), ("eval", Query), ("instruction", Query), ("rejects", Reject)):
        lines = (ctx.out / f"{name}.jsonl").read_text().splitlines()
        rows[name] = [kind.from_json(json.loads(line)) for line in lines]
    return summary, rows


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def sums(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {
            "question": f"What is {i} + 1?",
            "answer": f"It is {i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}",
        }
        for i in range(start, start + count)
    ]


def test_worked_tasks_instruction_and_control(tmp_path: Path) -> None:
    config = TargetsConfig(
        tasks=(
            TaskConfig(name="words", kind="worked", families=("gsm_symbolic",), fit=6, unseen=3, eval=5),
            TaskConfig(
                name="numbers",
                kind="worked",
                families=("gcd", "lcm"),
                fit=9,
                unseen=2,
                eval=6,
                tool_share=0.5,
            ),
        ),
        control=ControlConfig(count=8, max_chars=300),
        instruction=(WORKED,),
    )
    summary, rows = run(tmp_path, config)
    assert summary["tasks"] == {
        "words": {"fit": 6, "unseen": 3, "eval": 5},
        "numbers": {"fit": 9, "unseen": 2, "eval": 6},
    }
    assert Counter(q.role for q in rows["queries"]) == {"fit": 15, "unseen": 5, "control": 8}
    assert {q.role for q in rows["eval"]} == {"eval"} and {q.role for q in rows["instruction"]} == {
        "instruction"
    }
    everything = [q for name in ("queries", "eval", "instruction") for q in rows[name]]
    problems = [q.problem for q in everything]
    assert len(set(problems)) == len(problems), "a problem has two roles"
    assert len({q.id for q in everything}) == len(everything)
    for q in everything:
        if q.role == "control":
            assert q.prompt and q.completion and len(q.prompt) < len(q.completion) <= 300
        else:
            tool = "```python" in q.completion
            assert q.prompt == f"## Question\n{q.problem}\n\n## {'Code Solution' if tool else 'Solution'}\n"
            assert extract_boxed(q.completion) == q.answer
    numbers = [q for q in rows["queries"] if q.task == "numbers"]
    assert abs(sum("```python" in q.completion for q in numbers) - len(numbers) / 2) <= 1
    assert summary["instruction"] == {"cot": 15, "tool": 15}
    key = seed_for(0, "targets", "instruction", "worked")
    for family in WORKED.families:
        pool = {p.question for p in worked_problems(family, key, 60)}
        forms = {"```python" in q.completion for q in rows["instruction"] if q.problem in pool}
        assert forms == {True, False}, f"{family} has only one form"


def test_one_family_gets_both_forms(tmp_path: Path) -> None:
    source = InstructionConfig(name="worked", kind="worked", families=("gcd",), count=20)
    task = TaskConfig(name="t", kind="worked", families=("lcm",), fit=1, unseen=0, eval=1)
    summary, _ = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=(source,)))
    assert summary["instruction"] == {"cot": 10, "tool": 10}


def test_instruction_repeats_no_target_even_of_a_small_family(tmp_path: Path) -> None:
    task = TaskConfig(name="coins", kind="worked", families=("coin_flip",), fit=100, unseen=20, eval=20)
    source = InstructionConfig(name="coins_too", kind="worked", families=("coin_flip", "gcd"), count=160)
    _, rows = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=(source,)))
    assert len(rows["instruction"]) == 160
    assert not {q.problem for q in rows["instruction"]} & {
        q.problem for q in (*rows["queries"], *rows["eval"])
    }


def test_a_file_is_split_by_hash_and_never_mixes_over_seeds(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "sums.jsonl", sums(400))
    task = TaskConfig(name="sums", path=path, fit=60, unseen=20, eval=40)
    config = TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=())
    runs = [run(tmp_path, config, seed)[1] for seed in (0, 1, 2)]
    seen = {q.problem for rows in runs for q in rows["queries"]}
    held = {q.problem for rows in runs for q in rows["eval"]}
    assert len(seen) > 80 and len(held) > 40 and not seen & held
    assert [q.problem for q in runs[0]["queries"]] != [q.problem for q in runs[1]["queries"]]
    again = run(tmp_path, config, 0)[1]
    assert again == runs[0]
    shuffled = jsonl(tmp_path / "other.jsonl", sums(400)[::-1])
    moved = TaskConfig(name="sums", path=shuffled, fit=60, unseen=20, eval=40)
    assert (
        run(tmp_path / "b", TargetsConfig(tasks=(moved,), control=NO_CONTROL, instruction=()))[1] == runs[0]
    )


def test_eval_file_of_its_own_keeps_its_problems_out_of_the_fit(tmp_path: Path) -> None:
    path, held = jsonl(tmp_path / "a.jsonl", sums(30)), jsonl(tmp_path / "b.jsonl", sums(10, 25))
    task = TaskConfig(name="sums", path=path, eval_path=held, fit=20, unseen=5, eval=10)
    summary, rows = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=()))
    assert not {q.problem for q in rows["queries"]} & {q.problem for q in rows["eval"]}
    assert summary["rejected"] == {"in_evaluation": 5}


def test_bad_rows_are_counted_with_file_and_line(tmp_path: Path) -> None:
    good = sums(80)
    bad = [
        "{broken",
        {"question": "No solution?"},
        {"question": "  ", "answer": "x"},
        {"question": "Only annotation?", "answer": "<<1+1=2>>\n#### 2"},
        {"question": "Blank?", "answer": " \n "},
        good[3],
        {"question": "In steps?", "answer": ["First add.", "So \\boxed{27}"]},
        {"question": "In fields?", "answer": {"text": "So \\boxed{27}"}},
    ]
    unanswered = [{"question": f"Show claim {i}.", "answer": "It is clear."} for i in range(40)]
    path = jsonl(tmp_path / "mixed.jsonl", good + bad + unanswered)
    task = TaskConfig(name="sums", path=path, fit=30, unseen=5, eval=10)
    summary, rows = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=()))
    counts = summary["rejected"]
    assert counts.pop("no_answer") == sum(_is_eval(r["question"]) for r in unanswered) > 0
    assert counts == {
        "malformed_json": 1,
        "missing_field": 1,
        "empty_text": 1,
        "empty_completion": 2,
        "duplicate": 1,
        "wrong_type": 2,
    }
    assert any("field 'answer'" in r.detail for r in rows["rejects"] if r.reason == "wrong_type")
    assert all(r.stage == "targets" and r.where for r in rows["rejects"])
    assert any(r.where == f"{path}:81" and r.reason == "malformed_json" for r in rows["rejects"])
    assert all(q.completion.strip() for q in rows["queries"])


@pytest.mark.parametrize(
    ("solution", "stated", "text", "answer"),
    [
        ("48/2=<<48/2=24>>24\n#### 1,024", "", "48/2=24\nThe answer is \\boxed{1024}.", "1024"),
        ("so $x = \\boxed{\\frac{1}{2}}$.", "", "so $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("It is two.", "2", "It is two.\nThe answer is \\boxed{2}.", "2"),
        ("It is two.", "", "It is two.", ""),
        (" <<1=1>> ", "", "", ""),
        ("Both.\n#### 12, 5", "", "Both.\nThe answer is \\boxed{12, 5}.", "12, 5"),
        ("Here.\n#### (100,200)", "", "Here.\nThe answer is \\boxed{(100,200)}.", "(100,200)"),
        ("A#### in words", "", "A\nThe answer is \\boxed{in words}.", "in words"),
    ],
)
def test_solutions_are_brought_into_one_form(solution: str, stated: str, text: str, answer: str) -> None:
    assert clean_solution(solution, stated) == (text, answer)


def test_control_from_a_file_and_instruction_from_a_file(tmp_path: Path) -> None:
    texts = jsonl(
        tmp_path / "t.jsonl", [{"text": f"Sentence {i} about gardens and boats. " * 5} for i in range(12)]
    )
    tool = {"question": "Two?", "answer": "```python\nprint(2)\n```\n```output\n2\n```\n\\boxed{2}"}
    teach = jsonl(tmp_path / "i.jsonl", [*sums(10), tool])
    task = TaskConfig(name="t", kind="worked", families=("gcd",), fit=1, unseen=0, eval=1)
    config = TargetsConfig(
        tasks=(task,),
        control=ControlConfig(kind="jsonl", path=texts, count=10, max_chars=100),
        instruction=(InstructionConfig(name="i", path=teach, count=11),),
    )
    summary, rows = run(tmp_path, config)
    assert summary["instruction"] == {"cot": 10, "tool": 1} and summary["control"] == 10
    for q in rows["queries"]:
        if q.role == "control":
            sentence = q.prompt[: q.prompt.index(" about")] + " about gardens and boats. "
            assert q.prompt + q.completion == (sentence * 5)[:100].strip()


def test_instruction_rows_that_are_taken_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", sums(40))
    task = TaskConfig(name="sums", path=path, fit=5, unseen=0, eval=3)
    source = InstructionConfig(name="i", path=path, count=32)
    summary, rows = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=(source,)))
    assert summary["instruction"] == {"cot": 32} and summary["rejected"] == {"taken": 8}
    assert {r.text for r in rows["rejects"]} == {q.problem for q in (*rows["queries"], *rows["eval"])}


def test_another_files_solution_of_a_problem_is_kept(tmp_path: Path) -> None:
    first, other = sums(6), [{**row, "answer": f"Otherwise: {row['answer']}"} for row in sums(4)]
    sources = tuple(
        InstructionConfig(name=name, path=jsonl(tmp_path / f"{name}.jsonl", rows), count=0)
        for name, rows in (("first", first[1:]), ("second", [*other, first[5]]))
    )
    seen, held = jsonl(tmp_path / "s.jsonl", sums(1, 50)), jsonl(tmp_path / "h.jsonl", first[:1])
    task = TaskConfig(name="sums", path=seen, eval_path=held, fit=1, unseen=0, eval=1)
    summary, rows = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=sources))
    assert Counter(q.task for q in rows["instruction"]) == {"first": 5, "second": 3}
    assert summary["rejected"] == {"taken": 2}
    assert [r.detail for r in rows["rejects"]] == [
        "also a target's or an evaluation's problem",
        "also with its solution an earlier source's problem",
    ]


def test_the_papers_instruction_data_are_read_as_they_are(tmp_path: Path) -> None:
    tool = "```python\nprint(2)\n```\n```output\n2\n```\nSo it is $\\boxed{2}$."
    rows = [
        {"input": "## Question\nWhat is 1 + 1?\n\n## Step-by-Step Solution\n", "output": "It is \\boxed{2}."},
        {"input": "## Question\nWhat is 1 + 1?\n\n## Code Solution\n", "output": tool},
        {"input": "## Question\nWhat is 1 + 1?\n\n## Solution\n", "output": "One more than 1: \\boxed{2}."},
        {"input": "## Question\nWhat is 1 + 1?\n\n## Solution\n", "output": "It is \\boxed{2}."},
        {"input": "## Question\nWhat is 0 + 1?\n\n## Solution\n", "output": "It is \\boxed{1}."},
    ]
    fields: Any = {
        "path": jsonl(tmp_path / "i.jsonl", rows),
        "problem_field": "input",
        "solution_field": "output",
    }
    seen, held = jsonl(tmp_path / "s.jsonl", sums(1, 5)), jsonl(tmp_path / "h.jsonl", sums(1))
    task = TaskConfig(name="sums", path=seen, eval_path=held, fit=1, unseen=0, eval=1)
    source = InstructionConfig(name="i", count=0, **fields)
    summary, found = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=(source,)))
    assert summary["instruction"] == {"cot": 2, "tool": 1}, "several solutions of a problem are kept"
    assert summary["rejected"] == {"duplicate": 1, "taken": 1}
    prompts = Counter(q.prompt for q in found["instruction"])
    question = "## Question\nWhat is 1 + 1?\n\n"
    assert prompts == {f"{question}## Solution\n": 2, f"{question}## Code Solution\n": 1}
    assert {q.problem for q in found["instruction"]} == {"What is 1 + 1?"}
    assert len({q.id for q in found["instruction"]}) == 3
    settings = ScoreSettings(problem_field="input", solution_field="output")
    (query, *_), _ = read_target("sums", Path(fields["path"]), settings)
    assert query.prompt == prompt_for(query.problem, "cot") and "#" not in query.problem
    with pytest.raises(ValueError, match="count must be positive"):
        InstructionConfig(name="i", kind="worked", families=("gcd",), count=0)
    empty = InstructionConfig(name="i", path=jsonl(tmp_path / "e.jsonl", [{"input": "?"}]), count=0)
    with pytest.raises(Jz3Error, match="has 0 usable rows"):
        run(tmp_path / "e", TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=(empty,)))


def test_rows_are_drawn_whatever_their_problem(tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"In way {way}: \\boxed{{{i + 1}}}"}
        for i in range(40)
        for way in range(8)
    ]
    source = InstructionConfig(name="i", path=jsonl(tmp_path / "i.jsonl", rows), count=40)
    task = TaskConfig(name="t", kind="worked", families=("gcd",), fit=1, unseen=0, eval=1)
    _, found = run(tmp_path, TargetsConfig(tasks=(task,), control=NO_CONTROL, instruction=(source,)))
    # 40 (1 - (1 - 1/40)^40) = 25.5 of 40 independent draws; five problems with all their solutions would be 5.
    assert len({q.problem for q in found["instruction"]}) > 18


def test_clear_errors(tmp_path: Path) -> None:
    short = TaskConfig(name="sums", path=jsonl(tmp_path / "s.jsonl", sums(8)), fit=50, unseen=0, eval=0)
    with pytest.raises(Jz3Error, match=r"'sums': 50 problems asked.*only \d usable"):
        run(tmp_path, TargetsConfig(tasks=(short,), control=NO_CONTROL, instruction=()))
    path = jsonl(tmp_path / "steps.jsonl", [{"question": f"q{i}", "answer": ["a"]} for i in range(9)])
    steps = TaskConfig(name="steps", path=path, fit=5, unseen=0, eval=0)
    with pytest.raises(
        Jz3Error, match=r"only 0 usable.*steps.jsonl:1: wrong_type field 'answer' must be a text"
    ):
        run(tmp_path, TargetsConfig(tasks=(steps,), control=NO_CONTROL, instruction=()))
    table = TaskConfig(name="table", path=jsonl(tmp_path / "t.parquet", sums(1)))
    with pytest.raises(Jz3Error, match=r"'table': .*t\.parquet is a Parquet file; targets are JSON lines"):
        run(tmp_path, TargetsConfig(tasks=(table,), control=NO_CONTROL, instruction=()))
    missing = TaskConfig(name="gone", path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(Jz3Error, match="gone.jsonl"):
        run(tmp_path, TargetsConfig(tasks=(missing,), control=NO_CONTROL, instruction=()))
    with pytest.raises(ValueError, match="'control' is taken"):
        TargetsConfig(tasks=(TaskConfig(name="control", path="x"),))
    with pytest.raises(ValueError, match="needs families"):
        TaskConfig(name="t", kind="worked")
    with pytest.raises(ValueError, match="'csv'"):
        TaskConfig(name="t", kind="csv", path="x")
    with pytest.raises(ValueError, match="no tasks"):
        TargetsConfig(tasks=())


def test_settings_come_from_toml_tables() -> None:
    from jz3.tables import from_table

    table = {
        "tasks": [{"name": "t", "kind": "worked", "families": ["gcd"], "fit": 2}],
        "control": {"count": 3},
    }
    config = from_table(TargetsConfig, table, "recipe")
    assert config.tasks[0].families == ("gcd",) and config.control.count == 3


def test_real_sets(tmp_path: Path, shared_data: Path) -> None:
    math: dict[str, Any] = {
        "problem_field": "problem",
        "solution_field": "solution",
        "answer_field": "answer",
    }
    config = TargetsConfig(
        tasks=(
            TaskConfig(
                name="gsm8k",
                path=str(shared_data / "targets" / "gsm8k_train.jsonl"),
                eval_path=str(shared_data / "eval" / "gsm8k.jsonl"),
                fit=1500,
                unseen=400,
                eval=1300,
            ),
            TaskConfig(
                name="math", path=str(shared_data / "eval" / "math-oai.jsonl"), fit=300, eval=90, **math
            ),
        ),
        control=NO_CONTROL,
        instruction=(),
    )
    summary, rows = run(tmp_path, config)
    assert sum(summary["rejected"].values()) <= 5
    for q in [*rows["queries"], *rows["eval"]]:
        assert "<<" not in q.completion and "####" not in q.completion
        assert extract_boxed(q.completion), q.completion
        if q.task == "gsm8k":
            assert q.completion.endswith(f"The answer is \\boxed{{{q.answer}}}.")
            assert float(q.answer) is not None


@pytest.mark.parametrize("name", ["quickstart", "tiny"])
def test_shipped_recipes_keep_the_corpus_families_apart(name: str) -> None:
    from jz3.config import shipped_recipe

    recipe = shipped_recipe(name)
    corpus = {family for source in recipe.corpus.sources for family in source.families}
    asked = {f for source in (*recipe.targets.tasks, *recipe.targets.instruction) for f in source.families}
    assert corpus and asked and not corpus & asked
