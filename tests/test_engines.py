"""Engines: batching, randomness, stop texts, limits; the OpenAI client against a local server; the tool loop."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jz3.engines import EngineConfig, Generation, Request, Sampling, open_engine
from jz3.engines.on_demand import engine_on_demand
from jz3.engines.openai_engine import OpenAIEngine, is_local
from jz3.engines.text import cut_at_stop
from jz3.engines.tool_loop import generate_with_tools
from jz3.errors import Jz3Error
from jz3.seeding import rng

PROMPTS = (
    "The answer is",
    "## Question\nHow many apples does a farmer pick?\n\n## Solution\n",
    "x",
    "First multiply the rows",
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    opened = open_engine(EngineConfig(batch_size=3), tiny_model, "float32")
    yield opened
    opened.close()


def requests(count: int) -> list[Request]:
    return [
        Request(id=f"r{i}", prompt=PROMPTS[i % len(PROMPTS)] + " and" * (i // 2), seed=i)
        for i in range(count)
    ]


def test_greedy_equals_generate_of_transformers(engine: Any, tiny_model: Path) -> None:
    import torch

    from jz3.models import load_model, load_tokenizer

    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    asked = requests(7)
    given = engine.generate(asked, Sampling(max_new_tokens=12))
    assert [g.id for g in given] == [r.id for r in asked]
    for request, generation in zip(asked, given, strict=True):
        ids = tokenizer(request.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            reference = model.generate(  # pyright: ignore[reportCallIssue]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        assert generation.text == tokenizer.decode(reference[0, ids.shape[1] :])
        assert (generation.finish, generation.prompt_tokens, generation.new_tokens) == (
            "length",
            ids.shape[1],
            12,
        )


def test_sampled_text_does_not_depend_on_batch_or_order(engine: Any, tiny_model: Path) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=1.0, top_p=0.9)
    asked = requests(9)
    together = {g.id: g for g in engine.generate(asked, sampling)}
    assert {g.id: g for g in engine.generate(asked[::-1], sampling)} == together
    single = open_engine(EngineConfig(batch_size=1), tiny_model, "float32")
    assert {g.id: g for g in single.generate(asked, sampling)} == together
    single.close()
    assert len({g.text for g in together.values()}) == len(asked)
    other = [Request(id=r.id, prompt=r.prompt, seed=r.seed + 1000) for r in asked]
    assert all(g.text != together[g.id].text for g in engine.generate(other, sampling))


def test_end_token_ends_a_row_and_the_others_go_on(engine: Any) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    asked = requests(5)
    before = engine.generate(asked, sampling)
    victim = engine._tokenizer(before[2].text, add_special_tokens=False).input_ids[5]
    kept = engine._ends
    engine._ends = frozenset({victim})
    try:
        after = engine.generate(asked, sampling)
    finally:
        engine._ends = kept
    assert after[2].finish == "stop" and after[2].new_tokens < 40
    for old, new in zip(before, after, strict=True):
        assert old.text.startswith(new.text)
        assert new.finish == "stop" or new == old


def test_stop_text_is_cut_off_even_across_tokens(engine: Any) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    whole = engine.generate(requests(4), sampling)
    for place, generation in enumerate(whole):
        readable = generation.text.split("\ufffd")[0]
        stop = readable[-3:]
        if len(stop) < 3:
            continue
        cut = engine.generate(
            requests(4), Sampling(max_new_tokens=40, temperature=1.0, stop=("never", stop))
        )[place]
        assert (cut.text, cut.finish) == (generation.text[: generation.text.find(stop)], "stop")
        assert cut.new_tokens < 40
        break
    else:
        pytest.fail("no readable continuation to cut")


def test_prompt_beyond_the_context_is_an_outcome(engine: Any) -> None:
    kept, engine._context = engine._context, 20
    try:
        long = Request(id="long", prompt="apples " * 50)
        short = Request(id="short", prompt="The")
        given = engine.generate([long, short], Sampling(max_new_tokens=100))
    finally:
        engine._context = kept
    assert (given[0].text, given[0].finish, given[0].new_tokens) == ("", "too_long", 0)
    assert given[0].prompt_tokens >= 50
    assert given[1].finish == "length" and given[1].prompt_tokens + given[1].new_tokens == 20


def test_empty_prompt_and_empty_list(engine: Any) -> None:
    assert engine.generate([], Sampling()) == []
    (empty,) = engine.generate([Request(id="e", prompt="")], Sampling(max_new_tokens=3))
    assert empty.prompt_tokens == 1 and empty.finish in ("stop", "length")


def test_pick_follows_the_distribution_and_the_nucleus() -> None:
    import torch

    from jz3.engines.transformers_engine import pick

    chances = torch.tensor([0.45, 0.05, 0.3, 0.2])
    rows = chances.log().repeat(4000, 1)

    def shares(**settings: Any) -> np.ndarray:
        drawn = pick(rows, [rng(i) for i in range(len(rows))], Sampling(**settings))
        return np.bincount(drawn, minlength=4) / len(rows)

    assert np.abs(shares(temperature=1.0) - chances.numpy()).max() < 0.03
    assert np.abs(shares(temperature=1.0, top_p=0.7) - [0.6, 0, 0.4, 0]).max() < 0.03
    sharp = (chances**2 / (chances**2).sum()).numpy()
    assert np.abs(shares(temperature=0.5) - sharp).max() < 0.03
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]
    wide = torch.zeros(1, 6000)
    assert pick(wide, [rng(1)], Sampling(temperature=1.0, top_p=0.9999))[0] < 6000


def test_pick_refuses_nan() -> None:
    import torch

    from jz3.engines.transformers_engine import pick

    with pytest.raises(Jz3Error, match="NaN"):
        pick(torch.tensor([[0.0, float("nan")]]), [rng(0)], Sampling())


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"stop": ("",)}],
)
def test_bad_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0]):
        Sampling(**settings)


def test_unknown_engine_and_missing_package_are_named(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="engine must be one of transformers, vllm, openai, got 'vlm'"):
        open_engine(EngineConfig(name="vlm"), tiny_model)
    try:
        import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(Jz3Error, match=r"jz3\[synth\]"):
            open_engine(EngineConfig(name="vllm"), tiny_model)


def test_the_gpus_memory_is_given_back_before_an_engine_is_opened(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses to start where this process holds on to what earlier models took."""
    done: list[str] = []

    class Opened:
        def info(self) -> dict[str, Any]:
            return {}

        def close(self) -> None: ...

    def opened(*_: Any) -> Opened:
        done.append("opened")
        return Opened()

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr("jz3.engines.on_demand.open_engine", opened)
    with engine_on_demand(EngineConfig(), tiny_model, "float32", tmp_path / "note.json") as engine:
        engine.get()
    assert done == ["emptied", "opened"]


def test_info_names_versions_and_model(engine: Any, tiny_model: Path) -> None:
    info = engine.info()
    assert (info["name"], info["model"], info["dtype"]) == ("transformers", tiny_model.name, "float32")
    assert set(info["versions"]) == {"torch", "transformers"}
    json.dumps(info)


def test_cut_at_stop_takes_the_first_of_several() -> None:
    assert cut_at_stop("one two three", ("three", "two")) == ("one ", True)
    assert cut_at_stop("one", ("two",)) == ("one", False)


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
        return 200, completion("x")

    monkeypatch.setenv("MY_KEY", "secret-1")
    with completions_server(answer) as url:
        keyed = openai_engine(url, api_key_env="MY_KEY")
        keyed.generate([Request(id="a", prompt="p")], Sampling())
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


class Script:
    """An engine that follows a script: what it says next, given all that stands behind the prompt."""

    def __init__(self, lines: dict[str, str]) -> None:
        self.lines = lines
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        self.asked.extend(requests)
        given = []
        for request in requests:
            ending = max((end for end in self.lines if request.prompt.endswith(end)), key=len)
            text, stopped = cut_at_stop(self.lines[ending], sampling.stop)
            finish = "length" if text.endswith("...") else "stop"
            new = len(text.split())
            given.append(Generation(id=request.id, text=text, finish=finish, prompt_tokens=5, new_tokens=new))
        return given

    def info(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Any]:
    from jz3.grading.sandbox import Sandbox, SandboxConfig

    with Sandbox(
        SandboxConfig(packages=(), preload=(), cpu_seconds=2, wall_seconds=20.0, workers=1)
    ) as opened:
        yield opened


def test_tool_loop_writes_what_the_code_prints(sandbox: Any) -> None:
    script = Script(
        {
            "P:": "[Solution]: ```python\nx = 6 * 7\nprint(x)\n```\n```output\n999\n```\nnonsense",
            "```output\n42\n```\n": "So far.\n```python\nprint(x + 1)\n```\n```output\n0",
            "```output\n43\n```\n": "The answer is \\boxed{43}.",
        }
    )
    (trace,) = generate_with_tools(script, sandbox, [Request(id="a", prompt="P:", seed=5)], Sampling())
    assert trace.text == (
        "[Solution]: ```python\nx = 6 * 7\nprint(x)\n```\n```output\n42\n```\n"
        "So far.\n```python\nprint(x + 1)\n```\n```output\n43\n```\nThe answer is \\boxed{43}."
    )
    assert (trace.rounds, trace.finish, trace.prompt_tokens) == (3, "stop", 5)
    assert [(b.output, b.ok) for b in trace.executed] == [("42", True), ("43", True)]
    assert trace.executed[0].level == sandbox.level
    assert len({request.seed for request in script.asked}) == 3


def test_tool_loop_tells_the_error_and_goes_on_without_the_failed_block(sandbox: Any) -> None:
    script = Script(
        {
            "P:": "```python\nprint('before')\nprint(undefined)\n```",
            "is not defined\n```\n": "Again:\n```python\nprint(2)\n```\n",
            "```output\n2\n```\n": "Done.",
        }
    )
    (trace,) = generate_with_tools(script, sandbox, [Request(id="a", prompt="P:")], Sampling())
    assert "```output\nbefore\nNameError: name 'undefined' is not defined\n```\nAgain:" in trace.text
    assert trace.text.endswith("```output\n2\n```\nDone.")
    assert [b.reason for b in trace.executed] == ["error", "ok"]


def test_tool_loop_runs_blocks_without_an_output_of_their_own_too(sandbox: Any) -> None:
    script = Script(
        {
            "P:": "First:\n```python\nx = 6\n```\nThen:\n```python\nprint(x)\n```\n```output\n",
            "```output\n6\n```\n": "```python\ny = x\n```\n```python\nprint(x + y)\n```",
            "```output\n12\n```\n": "Done.",
        }
    )
    (trace,) = generate_with_tools(script, sandbox, [Request(id="a", prompt="P:")], Sampling())
    assert [(b.code, b.output) for b in trace.executed] == [
        ("x = 6\nprint(x)\n", "6"),
        ("y = x\nprint(x + y)\n", "12"),
    ]


def test_tool_loop_limits_rounds_and_output(sandbox: Any) -> None:
    script = Script({"P:": "```python\nprint('x' * 1000)\n```", "```\n": "more\n```python\nprint(1)\n```"})
    (trace,) = generate_with_tools(
        script, sandbox, [Request(id="a", prompt="P:")], Sampling(), rounds=3, output_limit=50
    )
    assert (trace.rounds, trace.finish, len(trace.executed)) == (3, "rounds", 3)
    assert trace.executed[0].output == "x" * 50
    with pytest.raises(ValueError, match="rounds"):
        generate_with_tools(script, sandbox, [], Sampling(), rounds=0)


def test_tool_loop_runs_only_a_finished_block_at_the_end(sandbox: Any) -> None:
    script = Script(
        {
            "cut:": "```python\nprint(1)\n```\n...",
            "words:": "No code. ```output\n3\n```",
            "open:": "```python\nprint(1)\n",
            "behind:": "```python\nprint(1)\n```\nThe answer is 1.\n```",
        }
    )
    asked = [Request(id=name, prompt=name) for name in ("cut:", "words:", "open:", "behind:")]
    traces = generate_with_tools(script, sandbox, asked, Sampling())
    assert [(t.id, t.rounds, t.executed) for t in traces] == [(r.id, 1, ()) for r in asked]
    assert [t.finish for t in traces] == ["length", "stop", "stop", "stop"]
    assert traces[1].text == "No code. "


def test_tool_loop_stops_endless_code(sandbox: Any) -> None:
    script = Script({"P:": "```python\nwhile True: pass\n```", "long\n```\n": "I give up."})
    (trace,) = generate_with_tools(script, sandbox, [Request(id="a", prompt="P:")], Sampling())
    assert trace.executed[0].reason == "timeout" and trace.text.endswith("I give up.")


def test_a_hybrid_model_goes_on_when_a_row_of_its_batch_has_ended(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from jz3.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=40,
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # The context ends the longer prompts first.
    asked = [Request(id=str(i), prompt="and the number" * (1 + i), seed=i) for i in range(3)]
    texts = []
    for batch in (1, 3):
        engine = open_engine(EngineConfig(batch_size=batch), tmp_path, "float32")
        given = engine.generate(asked, Sampling(max_new_tokens=30))
        texts.append([(g.text, g.new_tokens) for g in given])
        engine.close()
    assert texts[0] == texts[1]
    assert len({tokens for _, tokens in texts[0]}) > 1
