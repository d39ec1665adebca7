"""The filters refuse what they name, keep what is good, and the stage writes what it promises."""

import dataclasses
import json
import random
import shutil
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import readers

from jz3.errors import Jz3Error
from jz3.evaluation import BenchmarkConfig, EvaluationConfig
from jz3.evaluation.benchmarks import questions_hash
from jz3.files import read_jsonl, write_jsonl
from jz3.filtering import run, stage
from jz3.filtering.config import EvaluationFile, FilteringConfig
from jz3.filtering.execute import Executor, computes, program
from jz3.filtering.text import TEXT_FILTERS, prose, repeated_share
from jz3.grading.answer import Grader, code_blocks, extract_boxed, output_blocks
from jz3.records import Problem, Query
from jz3.stage import StageContext

CONFIG = FilteringConfig()
FARMER = (
    "A farmer sells 17 sheep on Monday and twice as many on each of the next three days. How many in total?"
)
GOOD = "Tom has 12 boxes with 3 pens each. How many pens does he have?"


def problem(question: str = GOOD, solution: str = "12 * 3 = 36. So \\boxed{36}.", **fields: Any) -> Problem:
    """A good row, changed where a test wants it."""
    values: dict[str, Any] = {
        "id": f"{len(question)}-{abs(hash((question, solution)))}",
        "prompt_id": "p",
        "doc_id": "d",
        "kind": "cot",
        "level": "grade_school",
        "origin": "synthesiser:test",
        "answer": extract_boxed(solution),
        **fields,
    }
    return Problem(problem=question, solution=solution, **values)


def tool(code: str, output: str, answer: str, question: str = GOOD, **fields: Any) -> Problem:
    solution = f"```python\n{code}\n```\n```output\n{output}\n```\nThe answer is $\\boxed{{{answer}}}$."
    return problem(question, solution, kind="tool", level="tool", **fields)


def first_reason(row: Problem, config: FilteringConfig = CONFIG) -> str:
    return next((reason for check in TEXT_FILTERS if (reason := check(row, config))), "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (problem(), ""),
        (problem(question=" \n"), "empty_problem"),
        (problem(solution=""), "empty_solution"),
        (problem(kind="other"), "unknown_kind"),
        (problem(level="phd"), "unknown_level"),
        (problem(kind="tool"), "no_code"),
        (problem(solution="```python\n1\n```\nSo \\boxed{1}", kind="tool"), "no_output"),
        (
            problem(solution="```output\n1\n```\n```python\n1\n```\n\\boxed{1}", kind="tool"),
            "unpaired_blocks",
        ),
        (problem(question="What is 1?"), "short_problem"),
        (problem(solution="x " * 7000 + "\\boxed{1}"), "long_solution"),
        (problem(meta={"finish": "length"}), "truncated"),
        (problem(question="У Тома 12 коробок. Сколько у него ручек? What?"), "language"),
        (problem(question="Let α + β = 3 and αβ = 2 with α < β. Find 2β − α."), ""),
        (problem(solution="12 * 3 = 36, \ufffd\ufffd\ufffd \\boxed{36}"), "damaged_text"),
        (problem(solution="12 * 3 is the result, 36."), "no_boxed_answer"),
        (problem(answer="37"), "answer_differs_from_box"),
        (problem(question="Tom has 12 boxes with 3 pens in each box."), "no_question"),
        (problem(question="There are real a and b with f(x) = 2x + 1. Enter the pair (a, b)."), ""),
        (problem(question="Rewrite the sum of 2x and 3x as a multiple of x."), ""),
        (problem(question="Find the area of the triangle shown in the figure below."), "missing_figure"),
        (problem(question="Using the table below:\n|--|--|\n| 1 | 2 |\nfind the sum of the row."), ""),
        (problem(question="Let f(x) = x^2. (a) Find f(2). (b) Find f(3)."), "multi_part"),
        (problem(question="How many pens has Tom? How many has Ann?"), "multi_part"),
        (problem(question="Do this.\n1. Find the sum of 2 and 3.\n2. Calculate the product."), "multi_part"),
        (problem(question="Given:\n1. f(0) = 0\n2. f(x+1) = f(x) + 2\nFind the value of f(9)."), ""),
        (problem(question="Which is the largest? (A) 1 (B) 2 (C) 3"), ""),
        (problem(question="Prove that the sum of two odd numbers is even."), "proof"),
        (problem(question="Tom has 12 pens. Is that more than ten pens?"), "yes_no"),
        (problem(question="Determine whether 17 is a prime number or not."), "yes_no"),
        (problem(question="Is it known how many pens Tom has, and what is the number?"), ""),
        (problem(question="Tom has 12 pens. Can you help him to count two dozen?"), ""),
        (problem(solution="The claim holds: \\boxed{\\text{Yes}}"), "yes_no"),
        (problem(solution="It is 35. Wait, that is wrong. It is \\boxed{36}"), "self_correction"),
        (problem(solution="We made a mistake above. So \\boxed{36}"), "self_correction"),
        (problem(solution="By contradiction, the standard error is given by \\boxed{36}"), ""),
        (problem(solution="So \\boxed{36}. This problem is suitable for AMC 8 contestants."), "meta_talk"),
        (problem(solution="As an AI, I find \\boxed{36}"), "meta_talk"),
        (problem(question="A survey of 30 middle school students asks 12 of them. How many are left?"), ""),
        (problem(solution="We add one to it and get the next. " * 20 + "\\boxed{36}"), "repetition"),
        (problem(solution="The number is 1" + "0" * 60 + " so \\boxed{36}"), "repetition"),
    ],
)
def test_text_filters(row: Problem, reason: str) -> None:
    assert first_reason(row) == reason


@pytest.mark.parametrize(
    ("setting", "row"),
    [
        ("reject_multi_part", problem(question="How many pens has Tom? How many has Ann?")),
        ("reject_yes_no", problem(question="Tom has 12 pens. Is that more than ten pens?")),
        ("reject_proofs", problem(question="Prove that the sum of two odd numbers is even.")),
        ("reject_self_corrections", problem(solution="Oops, it is \\boxed{36}")),
        ("reject_meta_talk", problem(solution="As an AI, I find \\boxed{36}")),
    ],
)
def test_filters_can_be_turned_off(setting: str, row: Problem) -> None:
    assert first_reason(row)
    assert first_reason(row, dataclasses.replace(CONFIG, **{setting: False})) == ""


def test_a_model_that_repeats_a_sign_costs_no_time() -> None:
    start = time.monotonic()
    assert first_reason(problem(question="What is it?\n1. " + ", " * 600 + "x")) == "repetition"
    assert time.monotonic() - start < 2


def test_prose_and_repetition() -> None:
    assert prose("a\n```python\nx\n```\nb") == "a\n\n\nb"
    assert prose("a ```python\nnever closed").strip() == "a"
    assert repeated_share("one two three four five six seven eight " * 6) == 1.0
    assert repeated_share("") == 0.0
    assert repeated_share(" ".join(str(i) for i in range(200))) == 0.0


def test_program_shares_names_between_blocks() -> None:
    row = "```python\nx = 2\nprint(x)\n```\n```output\n2\n```\nthen\n```python\nprint(x + 1)\n```\n```output\n3\n```"
    code, stated = program(row)
    assert stated == ["2\n", "3\n"] and code.count("print(x") == 2


@pytest.mark.parametrize(
    ("code", "answer"),
    [("print(42)", False), ("print('x = ' + str(42))", False), ("x = 42\nprint(f'{x}')", False), ("print(6 * 7)", True),
     ("print(sum([1, 2]))", True), ("for i in range(3): pass\nprint(i)", True), ("1 +", False)],
)  # fmt: skip
def test_computes(code: str, answer: bool) -> None:
    assert computes(code) is answer


@pytest.fixture(scope="module")
def grader() -> Any:
    with Grader(workers=2) as opened:
        yield opened


def test_execution(grader: Grader) -> None:
    rows = [
        tool("print(6 * 7)", "42", "42"),
        tool("print(6 * 7)", "43", "43"),
        tool("print(6 * 7)", "42", "41"),
        tool("6 * 7", "42", "42"),
        tool("import sympy\nprint(sympy.sqrt(8))", "2*sqrt(2)", "2\\sqrt{2}"),
        tool("import random\nprint(random.random() < 2, random.randint(0, 10**9))", "True 5", "5"),
        tool("print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})[0] * 0, 7)", "7", "7"),
        tool("raise ValueError('x')", "1", "1"),
        tool("while True: pass", "1", "1"),
        tool("print(20 / 3)", "6.67", "6.67"),
        problem(
            GOOD,
            "```python\nx = 2\nprint(x)\n```\n```output\n2\n```\n"
            "```python\nprint(x + 1)\n```\n```output\n3\n```\n\\boxed{3}",
            kind="tool",
            level="tool",
        ),
    ]  # fmt: skip
    sandbox = dataclasses.replace(CONFIG.sandbox, cpu_seconds=3, wall_seconds=10.0, workers=2)
    with Executor(dataclasses.replace(CONFIG, sandbox=sandbox), grader) as executor:
        found = executor.run(rows)
    reasons = [f["reason"] for f in found]
    assert reasons == [
        "", "output_differs", "answer_not_printed", "output_differs", "", "output_differs", "", "code_error",
        "code_timeout", "", "",
    ]  # fmt: skip
    assert found[0]["checks"]["sandbox_level"] in ("bwrap", "namespaces", "rlimits")
    assert (found[0]["checks"]["computes"], found[0]["checks"]["output_match"]) == ("yes", "yes")
    assert "42" in found[1]["detail"] and "ValueError: x" in found[7]["detail"]


def test_programs_of_chance_are_refused(grader: Grader) -> None:
    """The first execution is seeded, so its output can be stated; another seed prints something else."""
    code = "print(hash('jz3') % 1000)"
    with Executor(CONFIG, grader) as executor:
        stated = executor.run([tool(code, "0", "0")])[0]["detail"].removeprefix("it prints: ")
        found = executor.run([tool(code, stated, stated)])[0]
    assert found["reason"] == "not_reproducible" and found["checks"]["output_match"] == "yes"


@pytest.mark.parametrize(
    "wrong",
    [{"cross_check": "ask"}, {"ngram": 1}, {"executions": 0}, {"min_question_share": 1.5}, {"shard_size": 0}],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="filtering"):
        FilteringConfig(**wrong)


def context(
    folder: Path,
    rows: list[Problem],
    teacher: list[Problem],
    config: FilteringConfig,
    benchmarks: tuple[BenchmarkConfig, ...] = (),
) -> StageContext:
    """A run's folder with what the stage reads."""
    (folder / "filtering").mkdir(parents=True, exist_ok=True)
    query = Query(
        id="q0",
        task="held_out",
        problem=FARMER,
        prompt="",
        completion="",
        role="eval",
    )
    write_jsonl(folder / "synthesis" / "problems.jsonl", (r.to_json() for r in rows))
    write_jsonl(folder / "distillation" / "initial.jsonl", (r.to_json() for r in teacher))
    write_jsonl(folder / "distillation" / "boost.jsonl", ())
    write_jsonl(folder / "targets" / "eval.jsonl", [query.to_json()])
    write_jsonl(folder / "targets" / "instruction.jsonl", ())
    recipe: Any = types.SimpleNamespace(
        seed=0, filtering=config, evaluation=EvaluationConfig(benchmarks=benchmarks)
    )
    return StageContext(recipe=recipe, run_dir=folder, name="filtering")


def small(**fields: Any) -> FilteringConfig:
    sandbox = dataclasses.replace(CONFIG.sandbox, workers=2, preload=())
    return dataclasses.replace(CONFIG, sandbox=sandbox, shard_size=2, **fields)


ROWS = [
    problem(id="s0"),
    problem(solution="12 * 3 = 35. So \\boxed{35}.", question="Other: " + GOOD, id="s1"),
    problem(solution="So all in all it is 36.", id="s2"),
    tool("print(12 * 3)", "36", "36", id="s3"),
    tool("print(12 * 3)", "35", "35", id="s4"),
    problem(solution="Each box has 3 pens, so \\boxed{36}.", id="s5"),
    problem(
        question=FARMER,
        solution="17 + 3 * 34 = 119, so \\boxed{119}",
        id="s6",
    ),
    tool(
        "print(5 - 2)",
        "3",
        "3",
        question="Ann has five pens and loses two of them. How many are left?",
        id="s7",
    ),
]


def test_the_stage(tmp_path: Path) -> None:
    pens = "Ann has 7 red and 8 blue pens. How many in all?"
    teacher = [problem(pens, "7 + 8 = 15: \\boxed{15}", id="t0", origin="teacher:offline")]
    ctx = context(tmp_path, ROWS, teacher, small())
    summary = run(ctx)
    kept = [Problem.from_json(r) for r in read_jsonl(ctx.out / "kept.jsonl")]
    assert [k.id for k in kept] == ["t0", "s0", "s3", "s7"]
    assert kept[1] == ROWS[0]
    assert summary["in"] == 9 and summary["kept"] == 4 and summary["kept_by_kind"] == {"cot": 2, "tool": 2}
    assert summary["rejected"] == {
        "contaminated": 1,
        "duplicate": 1,
        "no_boxed_answer": 1,
        "output_differs": 1,
        "wrong_arithmetic": 1,
    }
    assert summary["by_origin"]["teacher:offline"] == {"in": 1, "kept": 1, "rejected": {}}
    assert sum(summary["sandbox"]["level"].values()) == summary["sandbox"]["executed"] == 3
    assert summary["cross_check"] == {"by": "vote", "compared": 1, "not_compared": 1}
    verdicts = list(read_jsonl(ctx.out / "verdicts.jsonl"))
    assert [v["id"] for v in verdicts] == ["t0", *(r.id for r in ROWS)]
    assert {v["id"]: v["reason"] for v in verdicts}["s5"] == "duplicate"
    assert verdicts[2]["checks"]["equations"] == "0/1"
    rejects = {r["id"]: r for r in read_jsonl(ctx.out / "rejects.jsonl")}
    assert set(rejects) == {"s1", "s2", "s4", "s5", "s6"}
    assert rejects["s1"]["detail"] == "12 * 3 = 35" and "farmer" in rejects["s6"]["detail"]
    report = json.loads((ctx.out / "decontamination.json").read_text())
    assert report["sets"]["held_out"]["rows"] == 1
    assert report["sets"]["held_out"]["examples"][0]["id"] == "s6"


def test_benchmarks_are_kept_out_of_problems_and_instruction_data(tmp_path: Path) -> None:
    pens = "Ann has 7 red and 8 blue pens in a box. How many pens has she in all?"
    birds = "A tree holds 19 birds and 4 of them fly off to the lake. How many birds are left on the tree?"
    path = tmp_path / "test.jsonl"
    row = {"question": pens, "options": "A) 15 B) 14 C) 13", "Answer": "A"}
    write_jsonl(path, [row, {"question": birds, "answer": "19 - 4 = 15\n#### 15"}])
    rows = [problem(pens, "7 + 8 = 15: \\boxed{15}", id="s0"), problem(id="s1")]
    benchmark = BenchmarkConfig(name="school", path=str(path), limit=1)
    ctx = context(tmp_path / "run", rows, [], small(), (benchmark,))
    taught = Query(
        id="i0", task="taught", problem=GOOD, prompt="p", completion="It is 36.", role="instruction"
    )
    copied = dataclasses.replace(taught, id="i1", problem=f"{birds} Think well.", completion="19 - 4 = 15.")
    recited = dataclasses.replace(taught, id="i2", completion=f"Another one: {FARMER}")
    write_jsonl(
        tmp_path / "run" / "targets" / "instruction.jsonl",
        [copied.to_json(), taught.to_json(), recited.to_json()],
    )
    summary = run(ctx)
    assert (summary["in"], summary["kept"], summary["rejected"]) == (2, 1, {"contaminated": 1})
    assert summary["instruction"] == {"in": 3, "kept": 1, "rejected": {"contaminated": 2}}
    assert summary["contaminated_by_set"] == {"held_out": 1, "school": 2}
    assert list(read_jsonl(ctx.out / "instruction.jsonl")) == [taught.to_json()]
    rejects = {r["id"]: r for r in read_jsonl(ctx.out / "rejects.jsonl")}
    assert set(rejects) == {"s0", "i1", "i2"}
    assert rejects["i1"]["where"] == "instruction taught" and rejects["i1"]["detail"].startswith("school #1:")
    assert rejects["i1"]["text"].endswith("19 - 4 = 15.") and rejects["i2"]["detail"].startswith("held_out")
    assert summary["benchmarks"] == {"school": questions_hash(benchmark)}
    # What was read before a kill was compared with the questions of then.
    write_jsonl(path, [row, {"question": taught.problem, "answer": "#### 36"}])
    assert run(ctx)["instruction"]["rejected"] == {"contaminated": 2}
    assert {r["id"] for r in read_jsonl(ctx.out / "rejects.jsonl")} == {"s0", "s1", "i0", "i2"}


def test_the_stage_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = context(tmp_path / "whole", ROWS, [], small())
    run(whole)
    broken = context(tmp_path / "broken", ROWS, [], small())
    calls: list[int] = []
    original = Executor.run

    def stop(self: Executor, rows: list[Problem]) -> list[dict[str, Any]]:
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(Executor, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    assert not (broken.out / "kept.jsonl").exists()
    run(broken)
    assert calls == [2, 1, 1]  # the finished shard isn't executed again
    for name in ("kept.jsonl", "verdicts.jsonl", "rejects.jsonl", "decontamination.json"):
        assert (whole.out / name).read_bytes() == (broken.out / name).read_bytes()


def test_many_rows_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes half a day for the paper's six million, beside idle GPUs."""
    alone = context(tmp_path / "alone", ROWS, [], small())
    taught = Query(id="i0", task="t", problem=FARMER, prompt="p", completion="It is 36.", role="instruction")
    write_jsonl(tmp_path / "alone" / "targets" / "instruction.jsonl", [taught.to_json()])
    run(alone)
    monkeypatch.setattr(stage, "READ_SHARD", 2)
    monkeypatch.setattr(stage, "FEW", 4)
    monkeypatch.setattr("jz3.stage.AHEAD", 2)
    monkeypatch.setattr(stage, "read_rows", None)  # of this process
    several = context(tmp_path / "several", ROWS, [], small(workers=2))
    write_jsonl(tmp_path / "several" / "targets" / "instruction.jsonl", [taught.to_json()])
    run(several)
    assert len(list((several.out / "read").iterdir())) == 4
    for name in ("kept.jsonl", "verdicts.jsonl", "rejects.jsonl", "decontamination.json"):
        assert (alone.out / name).read_bytes() == (several.out / name).read_bytes()


def test_a_killed_reader_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "FEW", 0)
    monkeypatch.setattr(stage, "_read_part", readers.killed)
    ctx = context(tmp_path, ROWS, [], small(workers=2))
    with pytest.raises(Jz3Error, match="reads rows was killed.*fewer filtering.workers than 2"):
        run(ctx)


def test_an_error_does_not_wait_for_rows_that_are_given_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "FEW", 0)
    monkeypatch.setattr(stage, "READ_SHARD", 1)
    monkeypatch.setattr(stage, "_read_part", readers.failing)
    rows = [dataclasses.replace(ROWS[0], id=f"{tmp_path}/{i}") for i in range(40)]
    with pytest.raises(OSError, match="no space"):
        run(context(tmp_path, rows, [], small(workers=2)))
    assert len(list(tmp_path.glob("*.read"))) < 20


def test_no_rows_at_all(tmp_path: Path) -> None:
    ctx = context(tmp_path, [], [], small())
    summary = run(ctx)
    assert (summary["in"], summary["kept"], summary["rejected"]) == (0, 0, {})
    for name in ("kept.jsonl", "verdicts.jsonl", "rejects.jsonl"):
        assert (ctx.out / name).read_bytes() == b""


def test_distillation_can_be_left_out(tmp_path: Path) -> None:
    ctx = context(tmp_path, [], [problem(id="t0")], small(include_distillation=False))
    shutil.rmtree(tmp_path / "distillation")
    assert run(ctx)["in"] == 0
    ctx = context(tmp_path, [], [], small())
    shutil.rmtree(tmp_path / "distillation")
    with pytest.raises(Jz3Error, match="run the stage 'distillation' first"):
        run(ctx)


def test_near_duplicates_give_way_to_kept_rows_only(tmp_path: Path) -> None:
    long = "A baker makes forty loaves every morning and sells five of them to each of the seven shops "
    long += "of the town near the river. "
    bad = problem(question=long + "How many are left?", solution="40 - 5 * 7 = 6, \\boxed{6}", id="bad")
    good = problem(question=long + "How many are left?", solution="40 - 5 * 7 = 5, \\boxed{5}", id="good")
    near = problem(
        question=long + "How many are left over?", solution="40 - 5 * 7 = 5, \\boxed{5}", id="near"
    )
    ctx = context(tmp_path, [bad, good, near], [], small(cross_check="none"))
    assert run(ctx)["rejected"] == {"near_duplicate": 1, "wrong_arithmetic": 1}
    assert [r["id"] for r in read_jsonl(ctx.out / "kept.jsonl")] == ["good"]


def test_a_row_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    other = problem(question="Other: " + GOOD, id="y")
    ctx = context(tmp_path, [other, problem(id="x"), other], [problem(id="x")], small(near_duplicate=0.0))
    summary = run(ctx)
    assert (summary["in"], summary["kept"], summary["rejected"]) == (2, 2, {})
    assert [r["id"] for r in read_jsonl(ctx.out / "kept.jsonl")] == ["x", "y"]


def test_broken_input_is_named(tmp_path: Path) -> None:
    ctx = context(tmp_path, [problem(id="x"), problem(id="x", solution="\\boxed{1}")], [], small())
    with pytest.raises(Jz3Error, match="same|two different problems"):
        run(ctx)
    write_jsonl(tmp_path / "synthesis" / "problems.jsonl", [{"id": "x"}])
    with pytest.raises(Jz3Error, match=r"problems.jsonl:1 is damaged \(Problem lacks"):
        run(ctx)
    ctx = context(
        tmp_path, [], [], small(evaluation_files=(EvaluationFile(path=str(tmp_path / "none.jsonl")),))
    )
    with pytest.raises(Jz3Error, match="none.jsonl"):
        run(ctx)


def sample(shared_data: Path, name: str, count: int) -> list[Problem]:
    """Rows of a sample of the paper's released data that hold code and its stated output."""
    rows = []
    for number, row in enumerate(read_jsonl(shared_data / "samples" / f"{name}_sampled.jsonl")):
        if len(code_blocks(row["output"])) == len(output_blocks(row["output"])) == 1:
            rows.append(problem("x", row["output"], kind="tool", level="tool", id=str(number)))
    return random.Random(0).sample(rows, min(count, len(rows)))


class NoGrader(Grader):
    """Answers are beside the point of these tests."""

    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [False] * len(pairs)


def matching(rows: list[Problem]) -> float:
    config = dataclasses.replace(CONFIG, executions=1)
    with Executor(config, NoGrader()) as executor:
        return sum(f["checks"]["output_match"] == "yes" for f in executor.run(rows)) / len(rows)


def test_fabricated_outputs_are_found(shared_data: Path) -> None:
    """38% of the tool sample's outputs match if bare last expressions count as printed; as scripts
    print, and with words compared as words, about 31%. Of the fine-tuning sample about 99% match."""
    assert 0.18 < matching(sample(shared_data, "tool_pretrain", 60)) < 0.48
    assert matching(sample(shared_data, "finetune", 40)) > 0.92


@pytest.mark.slow
def test_fabricated_outputs_are_found_in_all_rows(shared_data: Path) -> None:
    assert 0.28 < matching(sample(shared_data, "tool_pretrain", 1000)) < 0.40
    assert matching(sample(shared_data, "finetune", 1000)) > 0.98
