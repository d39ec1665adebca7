"""Synthesis: which texts and levels are asked for, what becomes of the replies, resuming."""

import dataclasses
import json
import re
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jz3.config import SynthesisConfig
from jz3.engines import EngineConfig, Generation
from jz3.engines.text import cut_at_stop
from jz3.errors import Jz3Error
from jz3.files import read_jsonl, write_json, write_jsonl
from jz3.grading.sandbox import SandboxConfig
from jz3.models import TINY, ModelConfig
from jz3.records import LEVELS, Doc, Problem, Prompt, Reject
from jz3.stage import StageContext
from jz3.synthesis import run
from jz3.training import SynthesiserConfig

SANDBOX = SandboxConfig(packages=(), preload=(), workers=1)
FILES = ("prompts.jsonl", "problems.jsonl", "rejects.jsonl")


class Writer:
    """A synthesiser whose replies are known: good and bad ones by the text of the prompt."""

    calls = 0

    def generate(self, requests: list[Any], sampling: Any) -> list[Generation]:
        Writer.calls += 1
        given = []
        for request in requests:
            found = re.search(r"text number (\d+)", request.prompt)
            assert found
            number = int(found[1])
            finish, tool = "stop", "```python" in request.prompt
            reply = f"[Problem]: What is {number} + 1?\n\n[Solution]: "
            if tool and request.prompt.endswith("```\n"):
                reply = f"It is \\boxed{{{number + 1}}}."
            elif tool:
                reply += f"```python\nprint({number} + 1)\n```\n```output\n-5\n```\nIt is \\boxed{{-5}}."
            elif number % 5 == 1:
                reply = "No idea."
            elif number % 5 == 2:
                finish = "length"
            elif number % 5 == 3:
                reply, finish = "", "too_long"
            else:
                reply += f"One more is \\boxed{{{number + 1}}}."
            text = cut_at_stop(reply, sampling.stop)[0]
            given.append(Generation(id=request.id, text=text, finish=finish, prompt_tokens=10, new_tokens=4))
        return given

    def info(self) -> dict[str, Any]:
        return {"name": "writer"}

    def close(self) -> None:
        """Nothing is open."""


def context(folder: Path, docs: int = 40, used: int = 10, **settings: Any) -> StageContext:
    rows = [Doc(id=f"{i:016x}", text=f"text number {i}", source="s", tokens=3) for i in range(docs)]
    write_jsonl(folder / "corpus" / "docs.jsonl", [row.to_json() for row in rows])
    prompts = [Prompt(id=f"p{i}", doc_id=rows[i].id, kind="cot", level="aime", text="x") for i in range(used)]
    write_jsonl(folder / "distillation" / "prompts.jsonl", [prompt.to_json() for prompt in prompts])
    (folder / "synthesiser" / "model").mkdir(parents=True, exist_ok=True)
    settings = {"count": 30, "tool_share": 0.2, "shard_size": 7, "sandbox": SANDBOX, **settings}
    recipe: Any = types.SimpleNamespace(
        seed=3,
        synthesis=SynthesisConfig(**settings),
        synthesiser=SynthesiserConfig(),
        model=ModelConfig(name=TINY, dtype="float32"),
    )
    return StageContext(recipe=recipe, run_dir=folder, name="synthesis")


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    monkeypatch.setattr("jz3.engines.on_demand.open_engine", lambda *_: Writer())
    Writer.calls = 0
    return Writer


def read(ctx: StageContext, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(ctx.out / name))


def test_unused_texts_come_first_and_shares_are_kept(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path, count=45)
    summary = run(ctx)
    prompts = [Prompt.from_json(row) for row in read(ctx, "prompts.jsonl")]
    numbers = [int(prompt.doc_id, 16) for prompt in prompts]
    assert set(numbers[:30]) == set(range(10, 40)), "texts that distillation used come last"
    assert set(numbers[30:40]) == set(range(10)) and numbers[40:] == numbers[:5]
    assert numbers[:30] != sorted(numbers[:30])
    assert Counter(prompt.kind for prompt in prompts) == {"cot": 36, "tool": 9}
    assert {prompt.level for prompt in prompts if prompt.kind == "cot"} <= set(LEVELS)
    assert len({prompt.level for prompt in prompts}) > 5
    assert len({prompt.id for prompt in prompts}) == 45
    for prompt, number in zip(prompts, numbers, strict=True):
        assert f"text number {number}\n" in prompt.text and "{text}" not in prompt.text
    assert (summary["prompts"], summary["texts"], summary["asked"]) == (45, 40, 45)


def test_a_text_is_used_again_at_levels_that_it_has_not_had(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path, docs=6, used=0, count=6 * len(LEVELS), tool_share=0.0)
    run(ctx)
    asked = Counter((row["doc_id"], row["level"]) for row in read(ctx, "prompts.jsonl"))
    assert len(asked) == 6 * len(LEVELS) and set(asked.values()) == {1}
    ctx = context(tmp_path / "more", docs=6, used=0, count=18, tool_share=0.0, levels=LEVELS[:2])
    assert run(ctx)["prompts"] == 18, "all levels are used up"


def test_each_turn_asks_other_texts_for_python(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path, docs=6, used=0, count=12, tool_share=0.5)
    run(ctx)
    tools = [row["doc_id"] for row in read(ctx, "prompts.jsonl") if row["kind"] == "tool"]
    assert len(tools) == len(set(tools)) == 6


def test_a_prompt_that_the_teacher_was_given_is_not_given_again(tmp_path: Path, writer: type[Writer]) -> None:
    """The synthesiser has been trained to answer it as the teacher did."""
    ctx = context(tmp_path, docs=16, used=0, count=16, tool_share=0.25, levels=LEVELS[:2])
    docs = [row["id"] for row in read_jsonl(tmp_path / "corpus" / "docs.jsonl")]
    given = set(zip(docs, ("tool", *LEVELS[:2], "tool") * 4, strict=True))
    prompts = [Prompt(id=d, doc_id=d, kind="cot", level=level, text="x").to_json() for d, level in given]
    write_jsonl(tmp_path / "distillation" / "prompts.jsonl", prompts)
    run(ctx)
    asked = {(row["doc_id"], row["level"]) for row in read(ctx, "prompts.jsonl")}
    assert len(asked) == 16 and not asked & given
    assert sum(level == "tool" for _, level in asked) in (3, 4)


def test_problems_name_the_model_that_became_the_synthesiser(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path)
    recipe: Any = types.SimpleNamespace(
        **vars(ctx.recipe) | {"synthesiser": SynthesiserConfig(base="some/math-7b")}
    )
    run(dataclasses.replace(ctx, recipe=recipe))
    assert {row["origin"] for row in read(ctx, "problems.jsonl")} == {"synthesiser:math-7b"}


def test_replies_become_problems_or_counted_rejects(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path)
    summary = run(ctx)
    json.dumps(summary)
    prompts = {row["id"]: row for row in read(ctx, "prompts.jsonl")}
    problems = [Problem.from_json(row) for row in read(ctx, "problems.jsonl")]
    rejects = [Reject.from_json(row) for row in read(ctx, "rejects.jsonl")]
    numbers = [int(row["doc_id"], 16) for row in prompts.values() if row["kind"] == "cot"]
    reasons = Counter(reject.reason for reject in rejects)
    assert reasons == {
        "no_problem": sum(n % 5 == 1 for n in numbers),
        "truncated": sum(n % 5 == 2 for n in numbers),
        "prompt_too_long": sum(n % 5 == 3 for n in numbers),
    }
    assert summary["rejected"] == dict(sorted(reasons.items()))
    assert summary["parsed"] == len(problems) and len(problems) + len(rejects) == summary["asked"] == 30
    assert sum(part["asked"] for part in summary["by_level"].values()) == 30
    assert summary["by_kind"]["tool"]["parsed"] == 6 == summary["executed_blocks"]["ok"]
    for problem in problems:
        number = int(problem.doc_id, 16)
        assert (problem.problem, problem.answer) == (f"What is {number} + 1?", str(number + 1))
        assert problem.origin == "synthesiser:tiny"
        assert (problem.kind, problem.level) == (
            prompts[problem.prompt_id]["kind"],
            prompts[problem.prompt_id]["level"],
        )
        if problem.kind == "tool":
            assert f"```output\n{number + 1}\n```" in problem.solution, "the output is what the code prints"
    assert summary["sandbox_levels"] and summary["engine"] == {"name": "writer"}
    assert all(reject.where in prompts and reject.stage == "synthesis" for reject in rejects)


def test_without_execution_the_models_own_output_stays(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path, execute_tools=False, tool_share=1.0, count=3)
    assert run(ctx)["parsed"] == 3
    assert {row["answer"] for row in read(ctx, "problems.jsonl")} == {"-5"}


def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path)
    summary = run(ctx)
    before = [(ctx.out / name).read_bytes() for name in FILES]
    first = writer.calls
    (ctx.out / "shards" / "cot" / "000002.jsonl").unlink()
    (ctx.out / "problems.jsonl").unlink()
    assert run(ctx) == summary
    assert [(ctx.out / name).read_bytes() for name in FILES] == before
    assert writer.calls == first + 1, "only the missing shard is written again"
    other = context(tmp_path / "other", shard_size=100)
    run(other)
    assert [(other.out / name).read_bytes() for name in FILES] == before
    first = writer.calls
    write_json(tmp_path / "synthesiser" / "model" / "training.json", {"key": "trained anew"})
    assert run(ctx) == summary
    assert writer.calls > first, "what another synthesiser wrote is not kept"


def test_order_of_the_corpus_does_not_matter(tmp_path: Path, writer: type[Writer]) -> None:
    ctx = context(tmp_path / "a")
    turned = context(tmp_path / "b")
    path = tmp_path / "b" / "corpus" / "docs.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    run(ctx)
    run(turned)
    assert [(ctx.out / name).read_bytes() for name in FILES] == [
        (turned.out / name).read_bytes() for name in FILES
    ]


def test_samples_differ_under_a_real_model_and_repeat(tmp_path: Path, tiny_model: Path) -> None:
    ctx = context(tmp_path, count=4, samples=2, max_new_tokens=8, tool_share=0.5, tool_temperature=1.0)
    (tmp_path / "synthesiser" / "model").rmdir()
    (tmp_path / "synthesiser" / "model").symlink_to(tiny_model)
    summary = run(ctx)
    rejects = read(ctx, "rejects.jsonl")
    assert summary["asked"] == 8 == len(rejects) and len({row["id"] for row in rejects}) == 8
    assert len({row["text"] for row in rejects}) == 8, "every reply has randomness of its own"
    assert summary["engine"]["name"] == "transformers" and 55 <= summary["new_tokens"] <= 64
    config = dataclasses.replace(ctx.recipe.synthesis, engine=EngineConfig(batch_size=1), shard_size=1)
    recipe: Any = types.SimpleNamespace(**vars(ctx.recipe) | {"synthesis": config})
    again = StageContext(recipe=recipe, run_dir=tmp_path, name="synthesis")
    before = (ctx.out / "rejects.jsonl").read_bytes()
    for path in (ctx.out / "shards").rglob("*.jsonl"):
        path.unlink()
    run(again)
    assert (ctx.out / "rejects.jsonl").read_bytes() == before, "neither batch nor shard size changes a reply"


def test_empty_corpus_and_bad_settings_are_refused(tmp_path: Path, writer: type[Writer]) -> None:
    with pytest.raises(Jz3Error, match="no text"):
        run(context(tmp_path, docs=0, used=0))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"count": 0}, "count must be at least 1"),
        ({"tool_share": 1.5}, "tool_share"),
        ({"levels": ("school",)}, "levels must be some of"),
        ({"tool_top_p": 0.0}, "top_p"),
    )
    for settings, said in cases:
        with pytest.raises(ValueError, match=said):
            SynthesisConfig(**settings)


def test_a_prompt_that_an_endpoint_refuses_is_a_reject_with_its_reason() -> None:
    from jz3.synthesis import _Item, _row

    prompt = Prompt(id="p", doc_id="d", kind="cot", level="amc8", text="Write.")
    reply = Generation(id="i", text="", finish="refused", prompt_tokens=0, new_tokens=0)
    row = _row(_Item(prompt, "i"), reply, "synthesiser:m")
    assert row["problem"] is None and row["reject"]["reason"] == "refused"
