"""The teacher behind an endpoint: faults, budget, pace, nothing bought twice, the key kept secret."""

import dataclasses
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint

from jz3 import distillation
from jz3.distillation import DistillationConfig, TeacherConfig
from jz3.distillation.endpoint import EndpointTeacher, key_of, most_usd
from jz3.distillation.teachers import Request
from jz3.errors import Jz3Error
from jz3.files import write_jsonl
from jz3.records import Doc, Prompt
from jz3.stage import StageContext

SECRET = "sk-test-7f3a9c5e1b2d4860"
PROMPTS = 12


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A key in the environment, and a proxy that reaches nothing on this machine."""
    monkeypatch.setenv("JZ3_TEST_KEY", SECRET)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield


def settings(server: FakeEndpoint, folder: Path, **changes: Any) -> TeacherConfig:
    base = TeacherConfig(
        base_url=server.url,
        model="fake",
        api_key_env="JZ3_TEST_KEY",
        cache=str(folder / "cache.sqlite"),
        requests_per_minute=0.0,
        backoff_seconds=0.01,
        timeout_seconds=5.0,
        concurrency=4,
    )
    return dataclasses.replace(base, **changes)


def requests(count: int = PROMPTS) -> list[Request]:
    return [
        Request(
            prompt=Prompt(id=f"p{i}", doc_id=f"d{i}", kind="cot", level="amc8", text=f"Prompt {i}"), text="t"
        )
        for i in range(count)
    ]


def ask(config: TeacherConfig, folder: Path, wanted: list[Request]) -> tuple[list[Any], Any]:
    teacher = EndpointTeacher(config, folder)
    done: list[int] = []
    try:
        replies = teacher.answer(wanted, done.append)
        assert sum(done) == len(wanted), "the progress bar doesn't reach its end"
        return replies, teacher.spending()
    finally:
        teacher.close()


def context(folder: Path, config: DistillationConfig, count: int = 40) -> StageContext:
    recipe: Any = SimpleNamespace(seed=0, distillation=config, corpus=SimpleNamespace(sources=()))
    ctx = StageContext(recipe=recipe, run_dir=folder, name="distillation")
    ctx.out.mkdir(parents=True, exist_ok=True)
    docs = [Doc(id=f"{i:016x}", text=f"Text {i}", source="t", tokens=2).to_json() for i in range(count)]
    write_jsonl(folder / "corpus" / "docs.jsonl", docs)
    write_jsonl(folder / "selection" / "selected.jsonl", docs[: count // 4])
    return ctx


def test_answers_come_in_order_and_a_second_run_buys_nothing(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        config = settings(server, tmp_path, temperature=0.25, max_tokens=77)
        first, spent = ask(config, tmp_path / "a", requests())
        assert [r.text.startswith("[Problem]") for r in first] == [True] * PROMPTS
        assert server.requests == spent.calls == PROMPTS and spent.from_cache == 0
        assert (spent.prompt_tokens, spent.completion_tokens) == (100 * PROMPTS, 50 * PROMPTS)
        assert spent.usd == pytest.approx(PROMPTS * (100 * 2.5 + 50 * 10) / 1e6)
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("fake", 0.25, 77)
        again, spent = ask(config, tmp_path / "b", requests())
        assert again == first and server.requests == PROMPTS, "paid twice"
        assert (spent.calls, spent.usd, spent.from_cache) == (0, 0.0, PROMPTS)
        ask(dataclasses.replace(config, temperature=0.5), tmp_path / "c", requests(1))
        assert server.requests == PROMPTS + 1, "another temperature is another question"


def test_equal_prompts_are_asked_once(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        twin = requests(1) * 3
        replies, _ = ask(settings(server, tmp_path), tmp_path, twin)
        assert len(replies) == 3 and server.requests == 1


FAULTS = ("429", "500", "503", "cut", "drop", "no_choices", "hang", "408")


def test_every_fault_is_retried_until_it_is_answered(tmp_path: Path) -> None:
    def behave(prompt: str, attempt: int) -> str:
        return FAULTS[int(prompt.split()[1]) % len(FAULTS)] if attempt <= 2 else "ok"

    with FakeEndpoint(behave) as server:
        replies, spent = ask(settings(server, tmp_path, timeout_seconds=1.5), tmp_path, requests(len(FAULTS)))
    assert [r.failure for r in replies] == [""] * len(FAULTS)
    assert set(server.received.values()) == {3} and spent.calls == 3 * len(FAULTS)
    assert set(server.completed.values()) == {1}


def test_backoff_grows_and_retry_after_is_kept(tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, attempt: "500" if attempt <= 3 else "ok") as server:
        ask(settings(server, tmp_path, backoff_seconds=0.1), tmp_path, requests(1))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3 and gaps[0] >= 0.05 and gaps[1] >= 0.1 and gaps[2] >= 0.2
    with FakeEndpoint(lambda prompt, attempt: "429" if attempt == 1 else "ok") as server:
        server.retry_after = 0.6
        ask(settings(server, tmp_path, cache=str(tmp_path / "other.sqlite")), tmp_path, requests(1))
        assert server.times[1] - server.times[0] >= 0.6


def test_a_rate_limit_below_the_configured_one_is_found(tmp_path: Path) -> None:
    """A new account's is: each worker alone would ask until its repeats or the budget of calls are used up."""
    answered = [0.0]
    lock = threading.Lock()

    def limited(prompt: str, attempt: int) -> str:
        with lock:
            if time.monotonic() - answered[0] < 0.1:
                return "429"
            answered[0] = time.monotonic()
            return "ok"

    with FakeEndpoint(limited) as server:
        config = settings(server, tmp_path, concurrency=16, requests_per_minute=6000.0, retries=5)
        replies, spent = ask(config, tmp_path, requests(60))
    assert not any(r.failure for r in replies)
    assert spent.calls <= 2.5 * 60


def test_a_refused_request_is_a_reject_while_few_and_stops_the_run_when_many(tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, attempt: "400" if prompt == "Prompt 3" else "ok") as server:
        replies, _ = ask(settings(server, tmp_path, max_failed_share=0.1), tmp_path / "a", requests())
        assert [r.failure for r in replies].count("refused") == 1 and "HTTP 400" in replies[3].detail
        assert server.received["Prompt 3"] == 1, "a refusal is not repeated"
        with pytest.raises(Jz3Error, match=r"1 requests failed for good, max_failed_share allows 0"):
            ask(settings(server, tmp_path, max_failed_share=0.0), tmp_path / "b", requests())


def test_a_dead_endpoint_stops_the_run_soon_and_says_what_is_left(tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, attempt: "500") as server:
        config = settings(server, tmp_path, retries=1, concurrency=2)
        with pytest.raises(Jz3Error, match=rf"HTTP 500.*left to ask: {PROMPTS} of {PROMPTS}"):
            ask(config, tmp_path, requests())
        assert server.requests <= 6


@pytest.mark.parametrize("fault", ["401", "403", "404", "quota"])
def test_a_wrong_key_or_an_empty_account_stops_at_once(tmp_path: Path, fault: str) -> None:
    with FakeEndpoint(lambda prompt, attempt: fault) as server:
        with pytest.raises(Jz3Error, match=r"the endpoint http://127.0.0.1.* says HTTP 4"):
            ask(settings(server, tmp_path), tmp_path, requests())
        assert server.requests <= 4, "no more than are in flight together"


def test_the_budget_of_calls_is_never_exceeded(tmp_path: Path) -> None:
    def behave(prompt: str, attempt: int) -> str:
        return "ok" if attempt > 1 else "500"

    with FakeEndpoint(behave, delay=0.01) as server:
        config = settings(server, tmp_path, max_calls=9, concurrency=8)
        for _ in range(2):  # a second start of the same run has no new budget
            with pytest.raises(
                Jz3Error, match=r"budget of 9 calls.*by this run: 9 calls.*left to ask: \d+ of 12"
            ):
                ask(config, tmp_path, requests())
            assert server.requests == 9
        left = PROMPTS - len(server.completed)
        replies, spent = ask(dataclasses.replace(config, max_calls=100), tmp_path / "new", requests())
        assert all(r.text for r in replies) and set(server.completed.values()) == {1}
        assert spent.from_cache == PROMPTS - left


def test_the_budget_of_money_is_never_exceeded_and_used_up_to_the_last_call(tmp_path: Path) -> None:
    with FakeEndpoint(delay=0.01) as server:
        config = settings(server, tmp_path, max_tokens=1000, concurrency=8)
        real = (100 * 2.5 + 50 * 10) / 1e6
        booked = most_usd(config, "Prompt 10")
        assert booked > 10 * real
        # Room for two bookings at a time; what a call doesn't cost goes back, so that all fit.
        enough = dataclasses.replace(config, max_usd=2.1 * booked)
        replies, spent = ask(enough, tmp_path / "a", requests())
        assert (
            all(r.text for r in replies)
            and spent.usd == pytest.approx(PROMPTS * real)
            and server.most_at_once <= 2
        )
        before = server.requests
        with pytest.raises(Jz3Error, match=r"\$\d.*left to ask: \d+"):
            other = dataclasses.replace(
                config, max_usd=booked + 3.5 * real, cache=str(tmp_path / "other.sqlite")
            )
            ask(other, tmp_path / "b", requests())
        assert server.requests - before == 4, "the fifth could have cost more than was left"
        with pytest.raises(Jz3Error, match="0 calls"):
            ask(dataclasses.replace(config, max_usd=0.0, temperature=0.1), tmp_path / "c", requests())


def test_calls_that_may_have_been_charged_are_booked_in_full(tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt, attempt: "hang" if attempt == 1 else "ok") as server:
        config = settings(server, tmp_path, timeout_seconds=0.3)
        _, spent = ask(config, tmp_path, requests(1))
        assert spent.usd == pytest.approx(most_usd(config, "Prompt 0") + (100 * 2.5 + 50 * 10) / 1e6)


def test_without_usage_the_most_is_assumed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FakeEndpoint(lambda prompt, attempt: "no_usage") as server:
        replies, spent = ask(settings(server, tmp_path), tmp_path, requests(3))
    assert spent.completion_tokens == 3 * len(replies[0].text) and spent.prompt_tokens == 3 * len("Prompt 0")
    assert caplog.text.count("reports no usage") == 1


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"prompt_tokens": 7},
        {"prompt_tokens": 7, "completion_tokens": None},
        {"completion_tokens": 0.5},
        {"prompt_tokens": 7, "completion_tokens": -(10**9)},
        {"prompt_tokens": 10**30, "completion_tokens": 7},
        "7",
    ],
)
def test_an_incomplete_usage_loses_no_answer(
    tmp_path: Path, usage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeEndpoint(lambda prompt, attempt: json.dumps({"usage": usage})) as server:
        replies, spent = ask(settings(server, tmp_path), tmp_path, requests(2))
        assert server.requests == 2
    assert spent.completion_tokens == 2 * len(replies[0].text) and spent.prompt_tokens == 2 * len("Prompt 0")
    assert caplog.text.count("reports no usage") == 1


def test_content_in_parts_is_joined_and_one_without_text_is_asked_again(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "[Problem]: A"},
        {"type": "refusal"},
        {"type": "text", "text": " and B"},
    ]

    def behave(prompt: str, attempt: int) -> str:
        if prompt == "Prompt 0":
            return json.dumps({"content": parts})
        return json.dumps({"content": [{"type": "image"}]}) if attempt == 1 else "ok"

    with FakeEndpoint(behave) as server:
        replies, spent = ask(settings(server, tmp_path), tmp_path, requests(2))
        assert server.received == {"Prompt 0": 1, "Prompt 1": 2} and spent.calls == 3
    assert replies[0].text == "[Problem]: A and B" and replies[1].text.startswith("[Problem]")


def test_half_a_character_is_no_reason_to_pay_again(tmp_path: Path) -> None:
    with FakeEndpoint(lambda *_: json.dumps({"content": "[Problem]: A \ud83d or \ud83d\ude42"})) as server:
        replies, spent = ask(settings(server, tmp_path), tmp_path, requests(1))
    assert replies[0].text == "[Problem]: A \ufffd or \U0001f642" and spent.calls == 1


def test_pace_and_concurrency(tmp_path: Path) -> None:
    with FakeEndpoint(delay=0.05) as server:
        ask(settings(server, tmp_path, concurrency=3), tmp_path, requests())
        assert server.most_at_once == 3
    with FakeEndpoint() as server:
        config = settings(server, tmp_path, requests_per_minute=600.0, concurrency=8)
        ask(config, tmp_path, requests(6))
        assert server.times[-1] - server.times[0] >= 0.45


def test_the_key_is_nowhere_to_be_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def behave(prompt: str, attempt: int) -> str:
        return "echo_key" if attempt == 1 or "Text 7" in prompt else "ok"

    with FakeEndpoint(behave) as server:
        teacher = settings(server, tmp_path, retries=1, max_failed_share=0.5)
        ctx = context(tmp_path, DistillationConfig(teacher=teacher, initial=10, boost=10, tool_share=0.0))
        summary = distillation.run(ctx)
        assert summary["rejected"] == {"teacher_failed": 1}
        dead = settings(server, tmp_path, retries=0, max_failed_share=0.0, temperature=0.9)
        with pytest.raises(Jz3Error) as error:
            distillation.run(context(tmp_path / "b", DistillationConfig(teacher=dead, initial=10, boost=0)))
    assert "bad key Bearer ***" in str(error.value) and SECRET not in str(error.value)
    assert SECRET not in caplog.text and SECRET not in json.dumps(summary)
    found = [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert not found and list(tmp_path.rglob("*.sqlite"))


def test_a_missing_key_is_said_and_a_local_endpoint_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JZ3_TEST_KEY")
    with pytest.raises(Jz3Error, match="JZ3_TEST_KEY holds no API key"):
        EndpointTeacher(TeacherConfig(api_key_env="JZ3_TEST_KEY", cache=str(tmp_path / "c.sqlite")), tmp_path)
    with FakeEndpoint() as server:
        assert ask(settings(server, tmp_path), tmp_path, requests(1))[0][0].text


def test_dry_run_and_estimate_make_no_request(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        config = DistillationConfig(teacher=settings(server, tmp_path, max_tokens=2000), initial=20, boost=10)
        ctx = context(tmp_path, config)
        full = distillation.dry_run(ctx)
        assert server.requests == 0 and not (ctx.out / "ledger.sqlite").exists()
        assert full.calls == 30 and full.completion_tokens == 30 * 700 and full.within_budget
        assert full.usd == pytest.approx(
            (full.prompt_tokens * 2.5 + full.completion_tokens * 10) / 1e6, abs=1e-4
        )
        assert full.usd_at_most > full.usd > 0
        summary = distillation.run(ctx)
        assert summary["calls"] == server.requests == 30
        assert distillation.dry_run(ctx).calls == 0, "what is bought already costs nothing"
    paper = distillation.estimate(DistillationConfig())
    assert paper.calls == 9300 and paper.prompt_tokens > 9300 * 512 and 50 < paper.usd < 200
    assert not distillation.estimate(DistillationConfig(teacher=TeacherConfig(max_calls=9000))).within_budget
    assert distillation.estimate(DistillationConfig(teacher=TeacherConfig(kind="offline"))).usd == 0


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 30)
    with FakeEndpoint() as server, pytest.raises(Jz3Error, match="cache.sqlite") as error:
        ask(settings(server, tmp_path), tmp_path, requests(1))
    assert "move the file away" in str(error.value) and "free the disk" not in str(error.value)


RUN = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from jz3 import distillation
from jz3.distillation import DistillationConfig, TeacherConfig
from jz3.stage import StageContext
config = DistillationConfig(teacher=TeacherConfig(**json.loads(sys.argv[2])), initial=30, boost=10, tool_share=0.0)
recipe = SimpleNamespace(seed=0, distillation=config, corpus=SimpleNamespace(sources=()))
print(json.dumps(distillation.run(StageContext(recipe=recipe, run_dir=Path(sys.argv[1]), name="distillation"))))
"""


def test_kill_minus_nine_loses_only_what_is_in_flight(tmp_path: Path) -> None:
    def behave(prompt: str, attempt: int) -> str:
        return "no_boxed" if "Text 5" in prompt else "ok"

    with FakeEndpoint(behave, delay=0.05) as server:
        teacher = settings(server, tmp_path, concurrency=3, max_calls=60)
        context(tmp_path / "run", DistillationConfig())
        command = [sys.executable, "-c", RUN, str(tmp_path / "run"), json.dumps(dataclasses.asdict(teacher))]
        environment = {**os.environ, "PYTHONPATH": str(Path(distillation.__file__).parents[2])}
        for kills, target in enumerate((8, 20), 1):
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            deadline = time.monotonic() + 60
            while sum(server.completed.values()) < target and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.2)
            with sqlite3.connect(tmp_path / "cache.sqlite") as cache:
                kept = {row[0] for row in cache.execute("SELECT key FROM answers")}
            assert len(kept) >= target - 3 * kills
            bought = {p: n for p, n in server.received.items() if key_of(teacher, p) in kept}
            assert len(bought) == len(kept)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert {p: server.received[p] for p in bought} == bought, "a paid answer was bought again"
        assert server.requests - 40 <= 2 * 3, "more was lost than two kills had in flight"
        summary = json.loads(done.stdout)
        assert server.requests <= summary["calls"] <= 60, "a call is missing in the ledger"
        assert summary["asked"] == 40 and summary["from_cache"] == 0
        calm = settings(server, tmp_path, cache=str(tmp_path / "calm.sqlite"))
        ctx = context(
            tmp_path / "calm", DistillationConfig(teacher=calm, initial=30, boost=10, tool_share=0.0)
        )
        undisturbed = distillation.run(ctx)
    assert summary["rejected"] == undisturbed["rejected"] == {"no_boxed_answer": 1}
    for name in ("prompts", "initial", "boost", "rejects", "replies"):
        killed = (tmp_path / "run" / "distillation" / f"{name}.jsonl").read_bytes()
        assert killed == (ctx.out / f"{name}.jsonl").read_bytes(), name
