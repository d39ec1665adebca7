"""The synthesiser and the final training are run on what the stages before them wrote."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jz3.errors import Jz3Error
from jz3.files import read_jsonl, write_jsonl
from jz3.models import ModelConfig, load_model
from jz3.records import Problem, Prompt, Query
from jz3.stage import StageContext
from jz3.training import (
    SynthesiserConfig,
    TrainingConfig,
    run_synthesiser,
    run_training,
)


def context(run_dir, name, **sections):
    """A stage's context with the tiny model; the recipe's other sections aren't looked at."""
    (run_dir / name).mkdir(parents=True, exist_ok=True)
    recipe = SimpleNamespace(seed=3, model=ModelConfig(name="tiny", dtype="float32"), **sections)
    return StageContext(recipe=cast(Any, recipe), run_dir=run_dir, name=name)


def problem(number, prompt_id="p0", kind="cot"):
    return Problem(
        id=f"q{number}",
        prompt_id=prompt_id,
        doc_id="d",
        kind=kind,
        level="college",
        problem=f"What is {number} + 1?",
        solution=f"It is \\boxed{{{number + 1}}}.",
        answer=str(number + 1),
        origin="teacher:test",
    ).to_json()


def distilled(run_dir, initial, boost):
    prompts = [
        Prompt(id=f"p{i}", doc_id="d", kind="cot", level="college", text=f"Write a problem. {i}\n").to_json()
        for i in range(2)
    ]
    write_jsonl(run_dir / "distillation" / "prompts.jsonl", prompts)
    write_jsonl(run_dir / "distillation" / "initial.jsonl", initial)
    write_jsonl(run_dir / "distillation" / "boost.jsonl", boost)


SMALL = {"learning_rate": 3e-3, "max_length": 128, "batch_packs": 2, "save_every": 0, "epochs": 2}


def test_synthesiser_is_trained_then_boosted(tmp_path):
    distilled(tmp_path, [problem(i) for i in range(30)], [problem(i, "p1") for i in range(30, 50)])
    summary = run_synthesiser(context(tmp_path, "synthesiser", synthesiser=SynthesiserConfig(**SMALL)))
    assert set(summary["phases"]) == {"initial", "boost"} and not summary["notes"]
    assert summary["phases"]["initial"]["rows"] == 30 and summary["phases"]["boost"]["rows"] == 20
    assert summary["phases"]["boost"]["loss_last"] < summary["phases"]["initial"]["loss_first"]
    log = list(read_jsonl(tmp_path / "synthesiser" / "log.jsonl"))
    assert [row["phase"] for row in log] == sorted((row["phase"] for row in log), reverse=True)
    assert len(log) == summary["steps"] and {"step", "phase", "loss", "lr", "tokens"} <= set(log[0])
    before = (tmp_path / "synthesiser" / "log.jsonl").read_bytes()
    run_synthesiser(context(tmp_path, "synthesiser", synthesiser=SynthesiserConfig(**SMALL)))
    assert (tmp_path / "synthesiser" / "log.jsonl").read_bytes() == before, "as after a kill behind the model"
    assert load_model(tmp_path / "synthesiser" / "model", "float32")
    json.dumps(summary)


def test_synthesiser_rows_are_the_prompt_and_the_formatted_reply(tmp_path, monkeypatch):
    import jz3.training.stages as stages

    distilled(tmp_path, [problem(4, "p1")], [problem(5)])
    seen = {}

    def fake(model, phases, settings, out, **_):
        seen.update(phases={p.name: list(p.rows) for p in phases}, out=out)
        raise Jz3Error("seen")

    monkeypatch.setattr(stages, "train", fake)
    for boost, names in (("continue", ["initial", "boost"]), ("retrain", ["initial and boost"])):
        with pytest.raises(Jz3Error, match="seen"):
            run_synthesiser(context(tmp_path, "synthesiser", synthesiser=SynthesiserConfig(boost=boost)))
        assert list(seen["phases"]) == names
        pairs = [row for name in names for row in seen["phases"][name]]
        assert pairs == [
            ("Write a problem. 1\n", "[Problem]: What is 4 + 1?\n\n[Solution]: It is \\boxed{5}."),
            ("Write a problem. 0\n", "[Problem]: What is 5 + 1?\n\n[Solution]: It is \\boxed{6}."),
        ]
    assert seen["out"] == tmp_path / "synthesiser" / "model"


def test_synthesiser_with_few_rows(tmp_path, caplog):
    distilled(tmp_path / "one", [problem(1)], [])
    summary = run_synthesiser(
        context(tmp_path / "one", "synthesiser", synthesiser=SynthesiserConfig(**SMALL))
    )
    assert summary["steps"] >= 1 and "from random texts alone" in summary["notes"][0]
    assert "from random texts alone" in caplog.text
    distilled(tmp_path / "none", [], [])
    with pytest.raises(Jz3Error, match="rejects.jsonl"):
        run_synthesiser(context(tmp_path / "none", "synthesiser", synthesiser=SynthesiserConfig(**SMALL)))
    distilled(tmp_path / "lost", [problem(1, "gone")], [])
    with pytest.raises(Jz3Error, match="unknown prompt 'gone'"):
        run_synthesiser(context(tmp_path / "lost", "synthesiser", synthesiser=SynthesiserConfig(**SMALL)))


def mixture(run_dir, kept, instruction):
    queries = [
        Query(
            id=f"i{i}", task="t", problem=f"{i}?", prompt=f"Q {i}\n", completion=f"A {i}", role="instruction"
        ).to_json()
        for i in range(instruction)
    ]
    write_jsonl(
        run_dir / "filtering" / "kept.jsonl",
        [problem(i, kind="tool" if i % 2 else "cot") for i in range(kept)],
    )
    write_jsonl(run_dir / "filtering" / "instruction.jsonl", queries)


def test_the_mixture_is_read_in_two_stages(tmp_path):
    mixture(tmp_path, 30, 20)
    summary = run_training(context(tmp_path, "training", training=TrainingConfig(**SMALL)))
    assert set(summary["phases"]) == {"synthetic", "instruction"} and not summary["notes"]
    assert summary["phases"]["synthetic"]["documents"] == 60
    log = list(read_jsonl(tmp_path / "training" / "log.jsonl"))
    assert [row["phase"] for row in log] == sorted((row["phase"] for row in log), reverse=True)
    assert load_model(tmp_path / "training" / "model", "float32")


def test_the_mixture_without_one_of_its_stages(tmp_path, caplog):
    mixture(tmp_path / "a", 0, 5)
    summary = run_training(context(tmp_path / "a", "training", training=TrainingConfig(**SMALL)))
    assert (
        "no synthetic problem was kept" in summary["notes"][0]
        and "no synthetic problem was kept" in caplog.text
    )
    assert {row["phase"] for row in read_jsonl(tmp_path / "a" / "training" / "log.jsonl")} == {"instruction"}
    assert summary["phases"]["synthetic"]["loss_first"] is None
    mixture(tmp_path / "b", 0, 0)
    with pytest.raises(Jz3Error, match="verdicts.jsonl"):
        run_training(context(tmp_path / "b", "training", training=TrainingConfig(**SMALL)))


def test_the_mixture_uses_the_solving_prompts(tmp_path, monkeypatch):
    import jz3.training.stages as stages

    mixture(tmp_path, 2, 1)
    seen = []
    monkeypatch.setattr(stages, "train", lambda model, phases, *_, **__: seen.extend(phases) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training(context(tmp_path, "training", training=TrainingConfig(**SMALL)))
    assert seen[0].rows[0] == ("## Question\nWhat is 0 + 1?\n\n## Solution\n", "It is \\boxed{1}.")
    assert seen[0].rows[1][0].endswith("## Code Solution\n")
    assert list(seen[1].rows) == [("Q 0\n", "A 0")]
