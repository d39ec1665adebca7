"""Evaluation: likelihoods against a plain reference, intervals, benchmark files, grading, the whole stage."""

import dataclasses
import json
import math
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jz3.errors import Jz3Error
from jz3.evaluation import BenchmarkConfig, EvaluationConfig, mean_nll, run
from jz3.evaluation.benchmarks import questions_hash, spread
from jz3.evaluation.choices import with_choices
from jz3.evaluation.intervals import accuracy, mean
from jz3.evaluation.stage import _check_benchmarks, _model_key, grade
from jz3.files import read_jsonl, write_json, write_jsonl
from jz3.models import TINY, ModelConfig, load_model, load_tokenizer
from jz3.records import Query
from jz3.stage import StageContext
from jz3.templates import prompt_for
from jz3.training import TrainingConfig

WORDS = "the farmer picks apples from rows and fields so that each number is a sum of two values".split()
NEAR = [
    ("rounded", "45.678912", "45.68"),
    ("rounded", "5667062", "5{,}667{,}100\\text{ km}"),
    ("rounded", "45.678912", "45.7"),
    ("rounded", "0", "0.00001"),
    ("exact", "45.678912", "45.68"),
]
"""Task, right answer, given answer."""


def query(
    key: str, task: str = "t", length: int = 8, answer: str = "4", completion: str | None = None
) -> Query:
    draw = np.random.default_rng(sum(map(ord, key)))
    problem = " ".join(draw.choice(WORDS, length))
    return Query(
        id=key,
        task=task,
        problem=problem,
        prompt=prompt_for(problem, "cot"),
        completion=" ".join(draw.choice(WORDS, 2 * length)) if completion is None else completion,
        answer=answer,
        role="eval",
    )


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_model(tiny_model, "float32"), load_tokenizer(tiny_model)


def plain_nll(model: Any, tokenizer: Any, asked: Query) -> float:
    import torch

    head = tokenizer(asked.prompt).input_ids
    tail = tokenizer(asked.completion, add_special_tokens=False).input_ids
    with torch.no_grad():
        chances = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    return -float(np.mean([chances[len(head) + i - 1, token] for i, token in enumerate(tail)]))


def test_mean_nll_equals_the_plain_computation(loaded: tuple[Any, Any]) -> None:
    queries = [query(f"q{i}", length=3 + 7 * (i % 5)) for i in range(11)]
    expected = [plain_nll(*loaded, q) for q in queries]
    assert mean_nll(*loaded, queries, batch_tokens=600) == pytest.approx(expected, rel=1e-4)
    assert mean_nll(*loaded, queries, batch_tokens=1) == pytest.approx(expected, rel=1e-4)
    assert (
        mean_nll(*loaded, queries[::-1], batch_tokens=600)
        == mean_nll(*loaded, queries, batch_tokens=600)[::-1]
    )


def test_mean_nll_marks_what_cannot_be_scored(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    queries = [query("a", completion=""), query("b"), query("c", length=60)]
    values = mean_nll(model, tokenizer, queries)
    assert math.isnan(values[0]) and all(v > 0 for v in values[1:])
    fits = len(tokenizer(queries[1].prompt + queries[1].completion).input_ids) + 10
    monkeypatch.setattr(model.config, "max_position_embeddings", fits)
    values = mean_nll(model, tokenizer, queries)
    assert [math.isnan(v) for v in values] == [True, False, True]
    with pytest.raises(ValueError, match="batch_tokens"):
        mean_nll(model, tokenizer, queries, 0)


def test_wilson_interval_has_the_textbook_values() -> None:
    z = 1.959963984540054
    n, hits = 20, 5
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    found = accuracy([True] * hits + [False] * (n - hits))
    assert (found["accuracy"], found["n"]) == (0.25, 20)
    assert (found["low"], found["high"]) == pytest.approx((centre - half, centre + half))
    assert accuracy([False] * 10)["low"] == 0.0 and accuracy([False] * 10)["high"] > 0.2
    assert accuracy([]) == {"accuracy": None, "low": None, "high": None, "n": 0}


def test_mean_interval_is_students() -> None:
    found = mean([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (2.5, 2.5 - half, 2.5 + half), rel=1e-5
    )
    assert mean([2.0]) == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_spread_takes_from_the_whole_file() -> None:
    queries = [query(f"q{i}") for i in range(10)]
    assert [q.id for q in spread(queries, 3)] == ["q0", "q3", "q6"]
    assert spread(queries, 0) == spread(queries, 99) == queries


def test_answers_near_a_benchmarks_rounded_ones() -> None:
    from jz3.grading.answer import Grader

    queries = [query(str(i), task, answer=gold) for i, (task, gold, _) in enumerate(NEAR)]
    outputs = [f"So it is \\boxed{{{given}}}." for *_, given in NEAR]
    with Grader(seconds=2) as grader:
        verdicts = grade(queries, outputs, grader, {"rounded": 1e-4})
    assert [right for right, _ in verdicts] == [True, True, False, False, False]
    with pytest.raises(ValueError, match="benchmark 'b': tolerance must lie between 0 and 0.01, got 1"):
        BenchmarkConfig(name="b", path="x", tolerance=1)


def test_grade_compares_mathematically_and_choices_by_letter() -> None:
    from jz3.grading.answer import Grader

    problem = with_choices("Which is even?", ["3", "4"])
    queries = [
        dataclasses.replace(query("a"), answer="\\frac{1}{2}"),
        dataclasses.replace(query("b"), answer="12"),
        dataclasses.replace(query("c"), problem=problem, answer="B"),
        dataclasses.replace(query("d"), problem=problem, answer="B"),
        query("e"),
    ]
    outputs = ["So \\boxed{0.5}.", "The answer is 13.", "It is \\boxed{4}.", "The answer is (A).", "no idea"]
    with Grader() as grader:
        verdicts = grade(queries, outputs, grader)
    assert verdicts == [(True, "0.5"), (False, "13"), (True, "B"), (False, "A"), (False, "")]


@pytest.fixture
def context(tiny_model: Path, tmp_path: Path) -> StageContext:
    """A run whose trained model is the tiny one, moved away from the base."""
    model = load_model(tiny_model, "float32")
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    folder = tmp_path / "training" / "model"
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    rows = [query(f"q{i}", task=f"t{i % 2}", answer="7") for i in range(5)]
    rows.append(query("huge", length=3000))
    rows.append(query("bare", completion=""))
    write_jsonl(tmp_path / "targets" / "eval.jsonl", [q.to_json() for q in rows])
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text('{"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\\n#### 2"}\n')
    config = EvaluationConfig(
        max_new_tokens=6,
        rounds=2,
        shard_size=3,
        benchmarks=(BenchmarkConfig(name="gsm8k", path=str(benchmark)),),
    )
    recipe: Any = types.SimpleNamespace(
        name="test",
        seed=0,
        evaluation=config,
        training=TrainingConfig(),
        model=ModelConfig(name=TINY, dtype="float32"),
    )
    return StageContext(recipe=recipe, run_dir=tmp_path, name="evaluation")


def test_stage_counts_everything_and_resumes_to_the_same_files(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(context)
    json.dumps(summary)
    for model in ("base", "trained"):
        for setting in ("nl", "tool"):
            part = summary[model][setting]
            assert part["n"] == 7 and part["rejected"] == 1
            assert set(part["tasks"]) == {"t0", "t1", "t", "gsm8k"}
            assert part["low"] <= part["accuracy"] <= part["high"]
        assert summary[model]["nll"]["n"] == 6
    assert summary["rejected"] == {
        f"too_long:{m}:{s}": 1 for m in ("base", "trained") for s in ("nl", "tool")
    } | {"too_long:nll": 1}
    assert (summary["problems"], summary["without_reference"], summary["shots"]) == (8, 1, 0)
    results = list(read_jsonl(context.out / "results.jsonl"))
    assert len(results) == 4 * 7
    settings = {(model, setting) for model in ("base", "trained") for setting in ("nl", "tool")}
    assert {(r["model"], r["setting"]) for r in results} == settings
    pairs = list(read_jsonl(context.out / "nll.jsonl"))
    difference = np.array([p["base"] - p["trained"] for p in pairs])
    assert summary["nll_difference"]["mean"] == pytest.approx(difference.mean()) and abs(difference).min() > 0
    assert summary["nll_difference"]["low"] < difference.mean() < summary["nll_difference"]["high"]

    names = ("results.jsonl", "nll.jsonl", "rejects.jsonl")
    before = [(context.out / name).read_bytes() for name in names]
    for lost in ("base-tool/000001.jsonl", "trained-nll/000000.jsonl"):
        (context.out / "shards" / lost).unlink()
    assert run(context) == summary
    assert [(context.out / name).read_bytes() for name in names] == before

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished evaluation must not load a model")

    monkeypatch.setattr("jz3.engines.on_demand.open_engine", refuse)
    monkeypatch.setattr("jz3.inference.load_on_device", refuse)
    assert run(context) == summary


def test_what_was_evaluated_on_other_rows_or_another_model_is_not_reused(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = context.run_dir / "bench.jsonl"
    names: list[str] = []

    def note(ctx: StageContext, model: str, setting: str, queries: list[Query], *_: Any) -> list[Any]:
        def work(part: list[Query]) -> list[dict[str, Any]]:
            names.extend(f"{model} {setting} {q.answer}" for q in part if q.task == "gsm8k")
            return [{"result": None, "reject": None, "new_tokens": 0, "levels": []} for _ in part]

        return list(ctx.shards(f"shards/{model}-{setting}", queries, 3, work, "x", _model_key(ctx, model)))

    monkeypatch.setattr("jz3.evaluation.stage._solve", note)
    monkeypatch.setattr("jz3.evaluation.stage._score_references", lambda *a: [None] * len(a[3]))
    monkeypatch.setattr("jz3.engines.on_demand.open_engine", None)
    run(context)
    assert names == ["base nl 2", "base tool 2", "trained nl 2", "trained tool 2"] and not caplog.text
    bench.write_text('{"question": "What is 1 + 1?", "answer": "#### 3"}\n')
    names.clear()
    run(context)
    assert names == ["base nl 3", "base tool 3", "trained nl 3", "trained tool 3"]
    assert "shards/base-nl/000002.jsonl was made from other inputs" in caplog.text
    write_json(context.run_dir / "training" / "model" / "training.json", {"key": "another"})
    names.clear()
    run(context)
    assert names == ["trained nl 3", "trained tool 3"]
    first = context.out / "shards" / "base-nl" / "000002.jsonl"
    first.write_text("".join(first.read_text().splitlines(keepends=True)[1:]))
    run(context)
    assert len(names) == 2, "what an older version wrote, without a note of its inputs, is taken as it is"


def test_benchmarks_other_than_the_filters_kept_out_are_refused(context: StageContext) -> None:
    [benchmark] = context.recipe.evaluation.benchmarks
    noted = {"gsm8k": questions_hash(benchmark)}
    write_json(context.run_dir / "filtering" / "manifest.json", {"summary": {"benchmarks": noted}})
    bench = Path(benchmark.path)
    bench.write_text('{"question": "What is 1 + 1?", "answer": "#### 3"}\n')
    _check_benchmarks(context, context.recipe.evaluation)  # a corrected answer was never trained on
    bench.write_text(bench.read_text() + '{"question": "What is 2 + 2?", "answer": "#### 4"}\n')
    with pytest.raises(Jz3Error, match="'gsm8k': .*bench.jsonl has other questions than when the filters"):
        run(context)


def test_stage_scores_a_model_that_was_given_the_answers(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jz3.engines import Generation
    from jz3.engines.text import cut_at_stop

    class Oracle:
        def __init__(self, right: bool) -> None:
            self.right = right

        def generate(self, requests: list[Any], sampling: Any) -> list[Generation]:
            given = []
            for request in requests:
                text = "So \\boxed{7}." if self.right else "So \\boxed{8}."
                text = cut_at_stop(
                    f"{text}\n\n## Question\nAnother?\n\n## Solution\n\\boxed{{9}}", sampling.stop
                )[0]
                if request.prompt.endswith("## Code Solution\n"):
                    text = f"```python\nprint({'3 + 4' if self.right else '3 + 5'})\n```"
                elif request.prompt.endswith("```\n"):
                    text = "That is it."
                # Without an end, it goes on with a question of its own.
                text = cut_at_stop(f"{text}\n\n## Question\n2 + 7?\n\n\\boxed{{9}}", sampling.stop)[0]
                given.append(
                    Generation(id=request.id, text=text, finish="stop", prompt_tokens=3, new_tokens=2)
                )
            return given

        def info(self) -> dict[str, Any]:
            return {"name": "oracle"}

        def close(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(
        "jz3.engines.on_demand.open_engine",
        lambda config, folder, dtype: Oracle(folder.parent.name == "training"),
    )
    summary = run(context)
    for setting in ("nl", "tool"):
        assert summary["base"][setting]["accuracy"] == 0
        tasks = summary["trained"][setting]["tasks"]
        assert tasks["t0"]["accuracy"] == tasks["t1"]["accuracy"] == 1 and tasks["gsm8k"]["accuracy"] == 0
    assert summary["trained"]["tool"]["sandbox_levels"]
    assert {r["rounds"] for r in read_jsonl(context.out / "results.jsonl") if r["setting"] == "tool"} == {2}


def test_stage_refuses_twice_the_same_id_and_nothing_to_do(context: StageContext) -> None:
    write_jsonl(context.run_dir / "targets" / "eval.jsonl", [query("q").to_json(), query("q").to_json()])
    with pytest.raises(Jz3Error, match="share their id"):
        run(context)
    write_jsonl(context.run_dir / "targets" / "eval.jsonl", [])
    none: Any = types.SimpleNamespace(seed=0, evaluation=EvaluationConfig(), model=ModelConfig(name=TINY))
    with pytest.raises(Jz3Error, match="no problem to evaluate"):
        run(dataclasses.replace(context, recipe=none))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"settings": ("nl", "cot")}, "'cot' is unknown"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"benchmarks": (BenchmarkConfig(name="a", path="x"),) * 2}, "name of its own"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluationConfig(**settings)


def test_endpoint_cannot_evaluate_two_models() -> None:
    from jz3.engines import EngineConfig

    with pytest.raises(ValueError, match="transformers or vllm"):
        EvaluationConfig(engine=EngineConfig(name="openai"))


def test_the_base_model_may_get_examples(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from jz3.engines import Generation

    asked: list[list[str]] = []

    class Recorder:
        def __init__(self) -> None:
            asked.append([])

        def generate(self, requests: Any, sampling: Any) -> list[Generation]:
            asked[-1] += [request.prompt for request in requests]
            return [
                Generation(id=r.id, text="7", finish="stop", prompt_tokens=3, new_tokens=2) for r in requests
            ]

        def info(self) -> dict[str, Any]:
            return {"name": "recorder"}

        def close(self) -> None: ...

    def known(key: str, task: str, kind: str, role: str = "fit") -> dict[str, Any]:
        row = query(key, task=task)
        return dataclasses.replace(
            row, problem=key, prompt=prompt_for(key, kind), completion=f"By {key}.", role=role
        ).to_json()

    rows = [
        known("a", "t0", "cot"),
        known("b", "t0", "cot"),
        known("c", "t1", "cot"),
        known("d", "t0", "tool"),
    ]
    rows += [known("e", "t0", "cot", "unseen"), known("f", "control", "cot", "control")]
    write_jsonl(context.run_dir / "targets" / "queries.jsonl", rows)
    taught = [
        known("g", "i", "cot", "instruction"),
        *(known(key, "i", "tool", "instruction") for key in "hi"),
    ]
    write_jsonl(context.run_dir / "filtering" / "instruction.jsonl", taught)
    config = dataclasses.replace(context.recipe.evaluation, base_shots=2)
    context = dataclasses.replace(
        context, recipe=types.SimpleNamespace(**vars(context.recipe) | {"evaluation": config})
    )
    monkeypatch.setattr("jz3.engines.on_demand.open_engine", lambda *_: Recorder())
    summary = run(context)
    base, trained = asked
    assert (summary["shots"], summary["base_shots"]) == (0, {"nl": 2, "tool": 2})
    assert sorted(p.rpartition("## Question\n")[2] for p in base) == sorted(p[12:] for p in trained)
    shown = {key: f"## Question\n{key}\n\n## Solution\nBy {key}.\n\n\n" for key in "abc"}
    heads = {p[: p.rindex("## Question")] for p in base if p.endswith("## Solution\n")}
    assert {shown["a"] + shown["b"], shown["b"] + shown["a"]} & heads
    assert all(head.startswith(shown["c"]) or shown["c"] not in head for head in heads - {""})
    assert any(head.startswith(shown["c"]) for head in heads) and "By e." not in "".join(base)
    # The targets' own come first, then the instruction data's.
    python = "".join(f"## Question\n{key}\n\n## Code Solution\nBy {key}.\n\n\n" for key in "dh")
    assert all(p.startswith(f"{python}## Q") for p in base if "Code" in p)
    write_jsonl(context.run_dir / "filtering" / "instruction.jsonl", taught[:1])
    shutil.rmtree(context.out)
    assert run(context)["base_shots"] == {"nl": 2, "tool": 1}
    assert "1 of 2 examples (tool)" in caplog.text
