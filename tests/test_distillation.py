"""Distillation without an endpoint: prompts, parser, offline and recorded teacher, the stage."""

import dataclasses
import json
import logging
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jz3 import distillation
from jz3.corpus.config import SourceConfig
from jz3.distillation import DistillationConfig, ReplyError, TeacherConfig, fill, format_reply, parse_reply
from jz3.distillation.offline import FAMILIES, GENERAL, STAND_IN, topic_of
from jz3.distillation.parser import REASONS
from jz3.distillation.prompts import NAMES, template
from jz3.distillation.recorded import RecordedTeacher
from jz3.distillation.teachers import Request
from jz3.errors import Jz3Error
from jz3.files import write_jsonl
from jz3.records import LEVELS, Doc, Problem, Prompt, Reject
from jz3.stage import StageContext
from jz3.worked import families, topic, worked_problems
from jz3.worked.base import pieces

OFFLINE = TeacherConfig(kind="offline")
TOOL = "```python\nprint(6 * 7)\n```\n```output\n42\n```\nThe answer is \\boxed{42}."


def doc(number: int, text: str = "") -> Doc:
    text = text or f"Text {number} on the greatest common divisor of two integers."
    return Doc(id=f"{number:016x}", text=text, source="test", tokens=9)


def run(
    folder: Path,
    config: DistillationConfig,
    docs: list[Doc],
    selected: list[Doc],
    seed: int = 0,
    sources: tuple[SourceConfig, ...] = (),
) -> tuple[dict[str, Any], StageContext]:
    recipe: Any = SimpleNamespace(seed=seed, distillation=config, corpus=SimpleNamespace(sources=sources))
    ctx = StageContext(recipe=recipe, run_dir=folder, name="distillation")
    ctx.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "corpus" / "docs.jsonl", (d.to_json() for d in docs))
    write_jsonl(folder / "selection" / "selected.jsonl", (d.to_json() for d in selected))
    return distillation.run(ctx), ctx


def rows(ctx: StageContext, name: str, kind: Any) -> list[Any]:
    return [kind.from_json(json.loads(line)) for line in (ctx.out / f"{name}.jsonl").read_text().splitlines()]


def files(ctx: StageContext) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(ctx.out.glob("*.jsonl"))}


# Prompts


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_is_complete_and_short(name: str) -> None:
    text = template(name)
    for part in ("[Problem]:", "[Solution]:", "\\boxed{}", "self-contained", "Text:\n{text}\n"):
        assert part in text, part
    assert pieces(text) <= 140, "a small synthesiser must afford the prompt"
    assert ("```python" in text and "```output" in text) == (name == "tool")


def test_prompts_of_the_levels_differ() -> None:
    assert len({template(name) for name in NAMES}) == len(LEVELS) + 1
    assert [
        f.stem for f in sorted((Path(distillation.__file__).parent.parent / "prompts").glob("*.md"))
    ] == sorted(NAMES)


def test_a_text_is_filled_in_literally() -> None:
    text = r"Let {text} be {0}, \1 and %s; {text} again."
    filled = fill("college", text)
    before, after = template("college").split("{text}")
    assert filled == before + text + after
    with pytest.raises(ValueError, match="'primary'"):
        fill("primary", "x")


# Parser

markup = st.text(max_size=200).filter(
    lambda t: not set("[`\\") & set(t) and t.strip() and not t.strip().endswith(("---", "***", "___"))
)


@given(problem=markup, steps=markup, kind=st.sampled_from(["cot", "tool"]))
def test_a_formatted_reply_is_read_back_as_it_was(problem: str, steps: str, kind: str) -> None:
    solution = f"{steps}\n{TOOL}" if kind == "tool" else f"{steps} so \\boxed{{\\frac{{1}}{{2}}}}."
    parsed = parse_reply(format_reply(problem, solution), kind)
    assert (parsed.problem, parsed.solution) == (problem.strip(), solution.strip())
    assert parsed.answer == ("42" if kind == "tool" else "\\frac{1}{2}")


@given(st.text(max_size=300) | st.text(alphabet="[]/:*`#\\{} \nProblemSolutionboxed1", max_size=200))
def test_any_text_gives_a_reply_or_a_documented_reason(text: str) -> None:
    for kind in ("cot", "tool"):
        try:
            parsed = parse_reply(text, kind)
        except ReplyError as error:
            assert error.reason in REASONS and error.detail
        else:
            assert parsed.problem and parsed.solution and parsed.answer


@pytest.mark.parametrize(
    "text",
    [
        "[Problem]: What is 6 times 7?\n[Solution]: It is \\boxed{42}.",
        "Sure, here it is!\n\n**[Problem]:** What is 6 times 7?\n\n**[Solution]:** It is \\boxed{42}.",
        "**[Problem]**: What is 6 times 7?\n**[Solution]**: It is \\boxed{42}.",
        "[Problem Description] What is 6 times 7? [/Problem Description]\n[Solution] It is \\boxed{42}. [/Solution] ..",
        "[problem]\nWhat is 6 times 7?\n[/problem]\n[solution]\nIt is \\boxed{42}.\n[/solution]",
        "### Problem\nWhat is 6 times 7?\n\n### Solution\nIt is \\boxed{42}.",
        "## Problem: What is 6 times 7?\n## Solution: It is \\boxed{42}.",
        "**Problem:** What is 6 times 7?\n\n**Solution:** It is \\boxed{42}.",
        "Problem: What is 6 times 7?\nSolution: It is \\boxed{42}.",
        "**New Problem**\nWhat is 6 times 7?\n**Solution**\nIt is \\boxed{42}.",
        "# [Problem]: What is 6 times 7?\r\n\r\n# [Solution]: It is \\boxed{42}.",
        "[Problem]: What is 6 times 7? [Solution]: It is \\boxed{42}.",
        "[Problem:] What is 6 times 7?\n\n[Solution:] It is \\boxed{42}.",
        "```\n[Problem]: What is 6 times 7?\n\n[Solution]: It is \\boxed{42}.\n```",
        "```markdown\n**Problem:** What is 6 times 7?\n\n**Solution:** It is \\boxed{42}.\n```\n",
        "---\n\n**[Problem]:** What is 6 times 7?\n\n---\n\n**[Solution]:** It is \\boxed{42}.\n\n---",
    ],
)
def test_replies_of_many_styles_are_read(text: str) -> None:
    parsed = parse_reply(text, "cot")
    assert (parsed.problem, parsed.solution, parsed.answer) == (
        "What is 6 times 7?",
        "It is \\boxed{42}.",
        "42",
    )


def test_a_tool_reply_in_a_fence_of_its_own_is_read() -> None:
    reply = f"[Problem]: What is 6 times 7?\n\n[Solution]:\n{TOOL}"
    assert parse_reply(f"```\n{reply}\n```", "tool") == parse_reply(reply, "tool")


def test_words_inside_a_bracketed_reply_are_no_markers() -> None:
    text = "[Problem]: A\nProblem: is this one?\n\n[Solution]: First.\n**Solution:** then \\boxed{1}"
    parsed = parse_reply(text, "cot")
    assert (
        parsed.problem == "A\nProblem: is this one?"
        and parsed.solution == "First.\n**Solution:** then \\boxed{1}"
    )


@pytest.mark.parametrize(
    ("reason", "text", "kind"),
    [
        ("empty", " \n ", "cot"),
        ("no_problem", "What is 1 + 1? \\boxed{2}", "cot"),
        ("no_problem", "[Problem]:\n\n[Solution]: \\boxed{2}", "cot"),
        ("no_problem", "[Solution]: \\boxed{2}\n[Problem]: late", "cot"),
        ("no_solution", "[Problem]: What is 1 + 1? \\boxed{2}", "cot"),
        ("no_solution", "[Problem]: What is 1 + 1?\n[Solution]:  ", "cot"),
        (
            "several_problems",
            "[Problem]: A\n[Solution]: \\boxed{1}\n[Problem]: B\n[Solution]: \\boxed{2}",
            "cot",
        ),
        ("answer_in_problem", "[Problem]: Is it \\boxed{2}?\n[Solution]: \\boxed{2}", "cot"),
        ("no_boxed_answer", "[Problem]: A\n[Solution]: It is 2.", "cot"),
        ("no_boxed_answer", "[Problem]: A\n[Solution]: It is \\boxed{ }.", "cot"),
        ("truncated", "[Problem]: A\n[Solution]: It is \\boxed{2", "cot"),
        ("truncated", "[Problem]: A\n[Solution]: ```python\nprint(1", "tool"),
        ("no_code", "[Problem]: A\n[Solution]: It is \\boxed{2}.", "tool"),
        ("no_code", "[Problem]: A\n[Solution]: ```output\n2\n```\n\\boxed{2}", "tool"),
        ("no_output", "[Problem]: A\n[Solution]: ```python\nprint(2)\n```\n\\boxed{2}", "tool"),
        ("no_boxed_answer", "[Problem]: A\n[Solution]: ```python\nprint(2)\n```\n```output\n2\n```", "tool"),
    ],
)
def test_unusable_replies_have_their_reason(reason: str, text: str, kind: str) -> None:
    with pytest.raises(ReplyError) as error:
        parse_reply(text, kind)
    assert error.value.reason == reason


def test_a_reply_that_reached_its_length_limit_is_truncated() -> None:
    with pytest.raises(ReplyError) as error:
        parse_reply(format_reply("A", "\\boxed{1}"), "cot", finish="length")
    assert error.value.reason == "truncated"


def test_code_fences_are_named_alike() -> None:
    for code, output in (("Python", "output"), ("py", "text"), ("python3", ""), ("python", "plaintext")):
        solution = f"Try.\n```{code}\nprint(6 * 7)\n```\nIt prints\n```{output}\n42\n```\nSo \\boxed{{42}}."
        parsed = parse_reply(f"[Problem]: A\n[Solution]: {solution}", "tool")
        assert parsed.solution == (
            "Try.\n```python\nprint(6 * 7)\n```\nIt prints\n```output\n42\n```\nSo \\boxed{42}."
        )


# Offline teacher


@pytest.mark.parametrize("family", families())
def test_the_topic_of_a_worked_problem_is_its_own(family: str) -> None:
    problems = worked_problems(family, 4, 40)
    right = sum(topic_of(f"{p.question}\n{p.cot}") == topic(family) for p in problems)
    assert right >= 34, Counter(topic_of(f"{p.question}\n{p.cot}") for p in problems)


def test_the_topic_of_documentation() -> None:
    assert topic_of("Compute the definite integral of f; the derivative is taken by SymPy.") == "calculus"
    assert topic_of("Returns the roots of a polynomial over a ring.") == "algebra"
    assert topic_of("Open a socket and send bytes to the server.") == GENERAL
    assert topic_of("Draw from the binomial distribution.") == "probability"
    assert set(FAMILIES) == {topic(f) for f in families()}
    for name, members in FAMILIES.items():
        assert set(members) == {f for f in families() if topic(f) == name}


def test_what_is_selected_decides_what_is_taught(tmp_path: Path) -> None:
    words = [doc(100 + i, p.question) for i, p in enumerate(worked_problems("gsm_symbolic", 8, 24))]
    primes = [doc(200 + i, p.question) for i, p in enumerate(worked_problems("count_primes", 8, 24))]
    config = DistillationConfig(teacher=OFFLINE, initial=0, boost=24)
    told = {}
    for name, selected in (("words", words), ("primes", primes)):
        summary, ctx = run(tmp_path / name, config, [doc(1)], selected)
        told[name] = summary["by_topic"]
        assert {p.meta["family"] for p in rows(ctx, "boost", Problem)} <= set(families())
    assert told["words"].get("word problems", 0) >= 20
    assert told["primes"] == {"number theory": 24}


def test_offline_stage_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    docs = [doc(i) for i in range(60)]
    selected = [docs[i] for i in (7, 3, 50, 21, 9, 11, 30, 31, 32, 33)]
    config = DistillationConfig(
        teacher=OFFLINE, initial=20, boost=10, tool_share=0.3, levels=("grade_school", "amc8", "aime")
    )
    summary, ctx = run(tmp_path / "a", config, docs, selected)
    prompts, initial, boost = (
        rows(ctx, "prompts", Prompt),
        rows(ctx, "initial", Problem),
        rows(ctx, "boost", Problem),
    )
    assert len(prompts) == 30 and len({p.id for p in prompts}) == 30
    chosen = [d.id for d in selected]
    assert [p.doc_id for p in boost] == chosen, "best first"
    assert not {p.doc_id for p in initial} & set(chosen) and len({p.doc_id for p in initial}) == 20
    assert [p.doc_id for p in initial] != sorted(p.doc_id for p in initial), "drawn, not the first ones"
    assert (
        Counter(p.kind for p in initial) == {"cot": 14, "tool": 6}
        and Counter(p.kind for p in boost)["tool"] == 3
    )
    assert {p.level for p in prompts if p.kind == "cot"} == {"grade_school", "amc8", "aime"}
    assert {p.level for p in prompts if p.kind == "tool"} == {"tool"}
    texts = {d.id: d.text for d in docs}
    assert all(p.text == fill(p.level, texts[p.doc_id]) for p in prompts)
    for p in (*initial, *boost):
        assert p.meta["stand_in"] == STAND_IN == "offline teacher, not GPT-4"
        assert (
            p.origin == "teacher:offline" and p.answer and ("```python" in p.solution) == (p.kind == "tool")
        )
    assert summary["stand_in"] == STAND_IN and summary["asked"] == summary["parsed"] == 30
    assert summary["rejected"] == {} and summary["usd"] == summary["calls"] == 0
    assert summary["sets"]["boost"] == {"asked": 10, "parsed": 10, "rejected": 0, "texts_lacking": 0}
    assert sum(level["asked"] for level in summary["by_level"].values()) == 30

    shuffled = docs[:]
    random.Random(1).shuffle(shuffled)
    again, other = run(tmp_path / "b", config, shuffled, selected)
    assert files(other) == files(ctx) and again == summary, "the corpus' order matters"
    assert run(tmp_path / "a", config, docs, selected)[0] == summary
    assert files(run(tmp_path / "c", config, docs, selected, seed=1)[1]) != files(ctx)

    caplog.set_level(logging.WARNING)
    more = DistillationConfig(teacher=OFFLINE, initial=100, boost=12)
    assert run(tmp_path / "d", more, docs, selected)[0]["sets"]["initial"]["texts_lacking"] == 50
    assert "100 texts asked for the initial set, there are 50" in caplog.text


def test_every_topic_of_text_gets_a_problem_of_it(tmp_path: Path) -> None:
    texts = {
        "Find the angle of a triangle.": "simple_geometry",
        "The integral of a function.": "polynomial_integrals",
    }
    selected = [doc(i, text) for i, text in enumerate(texts)]
    config = DistillationConfig(teacher=OFFLINE, initial=0, boost=2, tool_share=0.0)
    _, ctx = run(tmp_path, config, [doc(9)], selected)
    assert [p.meta["family"] for p in rows(ctx, "boost", Problem)] == list(texts.values())


def test_families_of_the_corpus_are_not_taught(tmp_path: Path) -> None:
    primes = [doc(i, p.question) for i, p in enumerate(worked_problems("count_primes", 8, 30))]
    primes += [doc(50, "Find the angle of a triangle."), doc(51, "A socket.")]
    used = ("count_primes", "gcd", "simple_geometry")
    source = SourceConfig(name="worked", kind="worked", families=used)
    config = DistillationConfig(teacher=OFFLINE, initial=0, boost=32)
    summary, _ = run(tmp_path, config, [doc(99)], primes, sources=(source,))
    assert summary["parsed"] == 32 and not set(summary["by_family"]) & set(used)
    everything = SourceConfig(name="worked", kind="worked", families=families())
    with pytest.raises(Jz3Error, match="no family left"):
        run(tmp_path, config, [doc(99)], primes, sources=(everything,))


# Recorded teacher


def test_recorded_replies_repeat_a_run_and_keep_its_label(tmp_path: Path) -> None:
    docs = [doc(i) for i in range(30)]
    offline = DistillationConfig(teacher=OFFLINE, initial=10, boost=5)
    first, ctx = run(tmp_path / "a", offline, docs, docs[:5])
    recorded = TeacherConfig(kind="recorded", recorded=str(ctx.out / "replies.jsonl"))
    summary, again = run(
        tmp_path / "b", DistillationConfig(teacher=recorded, initial=10, boost=5), docs, docs[:5]
    )
    assert summary["parsed"] == 15 and summary["stand_in"] == first["stand_in"] == STAND_IN
    for name in ("initial", "boost"):
        old, new = rows(ctx, name, Problem), rows(again, name, Problem)
        assert [(p.id, p.problem, p.solution, p.meta) for p in old] == [
            (p.id, p.problem, p.solution, p.meta) for p in new
        ]
        assert {p.origin for p in new} == {"teacher:recorded"}


def test_a_recorded_reply_is_found_by_its_text_in_a_run_with_other_ids(tmp_path: Path) -> None:
    offline = DistillationConfig(teacher=OFFLINE, initial=0, boost=3)
    _, ctx = run(tmp_path, offline, [doc(i) for i in range(3)], [doc(i) for i in range(3)])
    prompts = rows(ctx, "prompts", Prompt)
    teacher = RecordedTeacher(ctx.out / "replies.jsonl")
    same = teacher.answer([Request(prompt=p, text="") for p in prompts], lambda _: None)
    other = [Request(prompt=dataclasses.replace(p, id=f"other {p.id}"), text="") for p in prompts]
    assert all(not reply.failure for reply in same)
    assert teacher.answer(other, lambda _: None) == same


def test_unusable_recorded_replies_become_counted_rejects(tmp_path: Path) -> None:
    docs = [doc(i) for i in range(6)]
    config = DistillationConfig(teacher=OFFLINE, initial=0, boost=6, tool_share=0.0)
    _, ctx = run(tmp_path / "a", config, docs, docs)
    prompts = rows(ctx, "prompts", Prompt)
    from jz3.files import hash_text

    good = format_reply("What is 6 times 7?", "It is \\boxed{42}.")
    replies = [
        {"prompt_id": prompts[0].id, "reply": "I can't help with that."},
        {"prompt_id": prompts[1].id, "reply": good, "finish": "length"},
        {"prompt_hash": hash_text(prompts[2].text), "reply": good},
        {"prompt_id": prompts[3].id, "reply": ""},
        {"prompt_id": prompts[4].id, "reply": "[Problem]: A\n[Solution]: 2"},
    ]
    write_jsonl(tmp_path / "replies.jsonl", replies)
    teacher = TeacherConfig(kind="recorded", recorded=str(tmp_path / "replies.jsonl"))
    again = DistillationConfig(teacher=teacher, initial=0, boost=6, tool_share=0.0)
    summary, ctx = run(tmp_path / "b", again, docs, docs)
    expected = {"empty": 1, "no_boxed_answer": 1, "no_problem": 1, "no_recorded_reply": 1, "truncated": 1}
    assert summary["rejected"] == expected and summary["parsed"] == 1 and summary["asked"] == 6
    rejects = rows(ctx, "rejects", Reject)
    assert {r.where for r in rejects} == {p.id for p in prompts} - {prompts[2].id}
    assert {r.stage for r in rejects} == {"distillation"} and "I can't help with that." in {
        r.text for r in rejects
    }


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[" * 100_000,
        '{"reply": ' + "1" * 5000 + "}",
        '{"prompt_id": "a"}',
        '{"reply": "a"}',
        '{"reply": "a", "prompt_id": "b", "meta": 1}',
    ],
)
def test_a_damaged_recording_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"prompt_id": "x", "reply": "y"}\n' + line + "\n")
    config = DistillationConfig(
        teacher=TeacherConfig(kind="recorded", recorded=str(path)), initial=1, boost=0
    )
    with pytest.raises(Jz3Error, match="replies.jsonl:2"):
        run(tmp_path, config, [doc(1)], [])


def test_missing_recording_and_nothing_to_ask(tmp_path: Path) -> None:
    gone = TeacherConfig(kind="recorded", recorded=str(tmp_path / "gone.jsonl"))
    with pytest.raises(Jz3Error, match="gone.jsonl"):
        run(tmp_path, DistillationConfig(teacher=gone, initial=1, boost=0), [doc(1)], [])
    with pytest.raises(Jz3Error, match="no text to ask about"):
        run(tmp_path, DistillationConfig(teacher=OFFLINE, initial=1, boost=1), [], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial": 0, "boost": 0}, "not both 0"),
        ({"tool_share": 1.5}, "1.5"),
        ({"levels": ("kindergarten",)}, "kindergarten"),
        ({"teacher": {"kind": "gpt"}}, "'gpt'"),
        ({"teacher": {"kind": "recorded"}}, "needs recorded"),
        ({"teacher": {"max_usd": -1.0}}, "max_usd"),
        ({"teacher": {"max_usd": float("nan")}}, "max_usd"),
        ({"teacher": {"concurrency": 0}}, "concurrency"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if "teacher" in settings:
            TeacherConfig(**settings["teacher"])
        DistillationConfig(**settings)
