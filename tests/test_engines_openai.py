"""The engine of OpenAI-compatible endpoints, on a server of this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jz3.engines import EngineConfig, Request, Sampling
from jz3.engines.openai_engine import OpenAIEngine, is_local
from jz3.errors import Jz3Error


@contextmanager
def completions_server(
    answer: Callable[[dict[str, Any], dict[str, str]], tuple[int, dict[str, Any]]],
) -> Iterator[str]:
    """Serve /v1/completions on loopback by a function of body and headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = answer(body, {k.lower(): v for k, v in self.headers.items()})
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (429, 500):
                self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str, finish: str = "stop") -> dict[str, Any]:
    return {
        "id": "c",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def openai_engine(url: str, **settings: Any) -> OpenAIEngine:
    return OpenAIEngine(EngineConfig(name="openai", base_url=url, model="m", **settings))


def test_openai_sends_every_setting_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    seen: list[dict[str, Any]] = []

    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, dict[str, Any]]:
        seen.append(body)
        return 200, completion(f"<{body['prompt']}>END", "length" if body["prompt"] == "p1" else "stop")

    with completions_server(answer) as url:
        asked = [Request(id=f"r{i}", prompt=f"p{i}", seed=(1 << 40) + i) for i in range(12)]
        sampling = Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, stop=("END",))
        given = openai_engine(url, batch_size=4).generate(asked, sampling)
    assert [g.text for g in given] == [f"<p{i}>" for i in range(12)]
    assert {g.finish for g in given} == {"stop"}
    assert (given[0].prompt_tokens, given[0].new_tokens) == (7, 3)
    body = next(b for b in seen if b["prompt"] == "p3")
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["stop"]) == (9, 0.5, 0.9, ["END"])
    assert body["seed"] == 3


def test_openai_bounds_requests_in_flight() -> None:
    gate, lock, flying, most = threading.Barrier(3), threading.Lock(), 0, 0

    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, dict[str, Any]]:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        gate.wait(timeout=30)
        with lock:
            flying -= 1
        return 200, completion("x")

    with completions_server(answer) as url:
        asked = [Request(id=str(i), prompt="p") for i in range(9)]
        assert len(openai_engine(url, batch_size=3).generate(asked, Sampling())) == 9
    assert most == 3


def test_openai_retries_then_tells() -> None:
    calls: dict[str, int] = {}

    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, dict[str, Any]]:
        calls[body["prompt"]] = calls.get(body["prompt"], 0) + 1
        if body["prompt"] == "never" or calls[body["prompt"]] < 3:
            return 429, {"error": {"message": "slow down"}}
        return 200, completion("fine", "length")

    with completions_server(answer) as url:
        good = openai_engine(url, retries=3).generate([Request(id="a", prompt="later")], Sampling())
        assert (good[0].text, good[0].finish, calls["later"]) == ("fine", "length", 3)
        with pytest.raises(Jz3Error, match="429 slow down"):
            openai_engine(url, retries=1).generate([Request(id="b", prompt="never")], Sampling())
        assert calls["never"] == 2


def test_openai_prompt_beyond_the_context_is_an_outcome() -> None:
    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, dict[str, Any]]:
        tokens = len(body["prompt"])
        if tokens + body["max_tokens"] <= 50:
            return 200, completion(f"{body['max_tokens']}", "length")
        said = f"This model's maximum context length is 50 tokens. However, your prompt contains {tokens} input tokens"
        return 400, {"error": {"message": said, "type": "BadRequestError"}}

    with completions_server(answer) as url:
        asked = [Request(id="fits", prompt="x" * 30), Request(id="not", prompt="x" * 60)]
        given = openai_engine(url).generate(asked, Sampling(max_new_tokens=40))
    assert (given[0].text, given[0].finish) == ("20", "length")
    assert (given[1].text, given[1].finish, given[1].prompt_tokens) == ("", "too_long", 60)


@pytest.mark.parametrize(
    "said",
    [
        "You passed {} input tokens and requested {} output tokens. However, the model's context length is only 900 "
        "tokens, resulting in a maximum input length of {} tokens.",
        "This model's maximum context length is 900 tokens. However, your prompt contains at least {} input tokens.",
    ],
)
def test_openai_finds_the_room_where_a_server_does_not_count_the_whole_prompt(said: str) -> None:
    """vLLM cuts a prompt behind the first token too many, and counts no further."""
    calls = 0

    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, dict[str, Any]]:
        nonlocal calls
        calls += 1
        tokens, new = len(body["prompt"]), body["max_tokens"]
        if tokens + new <= 900:
            reply = completion(str(new), "length")
            return 200, reply | {"usage": reply["usage"] | {"prompt_tokens": tokens}}
        counted = min(tokens, 900 - new + 1)
        return 400, {"error": {"message": said.format(counted, new, 900 - new), "type": "BadRequestError"}}

    asked = [Request(id="fits", prompt="x" * 600), Request(id="over", prompt="x" * 950)]
    with completions_server(answer) as url:
        fits, over = openai_engine(url).generate(asked, Sampling(max_new_tokens=800))
    assert (fits.text, fits.finish) == ("300", "length")
    assert (over.text, over.finish) == ("", "too_long")
    assert calls == 5


def test_openai_other_refusals_and_absence_are_errors() -> None:
    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, dict[str, Any]]:
        return 404, {"error": {"message": "The model `m` does not exist."}}

    with completions_server(answer) as url, pytest.raises(Jz3Error, match="404 The model `m` does not exist"):
        openai_engine(url).generate([Request(id="a", prompt="p")], Sampling())
    with pytest.raises(Jz3Error, match="no answer after 0 retries"):
        openai_engine(url, retries=0).generate([Request(id="a", prompt="p")], Sampling())


def test_openai_key_comes_from_the_environment_and_stays_out_of_info(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def answer(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        seen.append(headers.get("authorization", ""))
        return 200, completion("x\ud83d")

    monkeypatch.setenv("MY_KEY", "secret-1")
    refusal = {"error": {"message": "no model for the key secret-1"}}
    with completions_server(lambda *_: (404, refusal)) as url:
        named = openai_engine(url.replace("//", "//me:p@ss-secret@"), api_key_env="MY_KEY")
        with pytest.raises(Jz3Error, match=r"http://127.0.0.1:\d+/v1 refused .* the key \*\*\*") as error:
            named.generate([Request(id="a", prompt="p")], Sampling())
    assert "secret" not in str(error.value) + json.dumps(named.info())
    with pytest.raises(ValueError, match="not the key itself") as error:
        openai_engine(url, api_key_env="sk-secret-1")
    assert "secret" not in str(error.value)
    with completions_server(answer) as url:
        keyed = openai_engine(url, api_key_env="MY_KEY")
        [got] = keyed.generate([Request(id="a", prompt="p")], Sampling())
    assert got.text == "x\ufffd"  # half a character could not be written to a file
    assert seen == ["Bearer secret-1"]
    assert "secret" not in json.dumps(keyed.info())
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(Jz3Error, match="MY_KEY"):
        openai_engine("https://api.example.org/v1", api_key_env="MY_KEY")
    assert (
        is_local("http://localhost:1/v1") and is_local("http://10.1.2.3/v1") and is_local("http://[::1]:8/v1")
    )
    assert not is_local("https://8.8.8.8/v1") and not is_local("https://localhost.example.org/v1")


def test_openai_needs_endpoint_and_model() -> None:
    with pytest.raises(ValueError, match="base_url"):
        OpenAIEngine(EngineConfig(name="openai", model="m"))
    with pytest.raises(ValueError, match="needs model"):
        OpenAIEngine(EngineConfig(name="openai", base_url="http://127.0.0.1:1/v1"))


def test_one_refused_prompt_does_not_lose_the_answers_to_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """It would be refused again and again, after the others were paid for once more."""

    def answer(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if body["prompt"] in bad:
            return 400, {"error": {"message": "the content filter was triggered"}}
        return 200, completion(body["prompt"] + "!")

    bad = {"3"}
    requests = [Request(id=f"r{i}", prompt=str(i)) for i in range(20)]
    with completions_server(answer) as url:
        engine = OpenAIEngine(EngineConfig(name="openai", base_url=url, model="m"))
        found = engine.generate(requests, Sampling())
        assert [g.text for g in found] == ["" if i == 3 else f"{i}!" for i in range(20)]
        assert found[3].finish == "refused" and found[4].finish == "stop"
        assert "content filter was triggered (r3)" in caplog.text
        bad |= {"7"}
        with pytest.raises(Jz3Error, match="refused a request: 400 the content filter"):
            engine.generate(requests, Sampling())
        with pytest.raises(Jz3Error, match="refused a request"):
            engine.generate(requests[3:4], Sampling())


def test_an_error_does_not_wait_for_the_other_answers() -> None:
    held, over = threading.Event(), threading.Event()

    def answer(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if body["prompt"] == "slow":
            held.set()
            over.wait(30)
            return 200, completion("!")
        held.wait(30)
        return 403, {"error": {"message": "no"}}

    with completions_server(answer) as url:
        engine = OpenAIEngine(EngineConfig(name="openai", base_url=url, model="m"))
        requests = [Request(id=prompt, prompt=prompt) for prompt in ("slow", "bad")]
        begun = time.monotonic()
        try:
            with pytest.raises(Jz3Error, match="refused a request: 403"):
                engine.generate(requests, Sampling())
            assert time.monotonic() - begun < 20
        finally:
            over.set()
