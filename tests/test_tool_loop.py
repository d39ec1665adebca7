"""Python blocks that are executed while a model writes."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from jz3.engines import Generation, Request, Sampling
from jz3.engines.text import cut_at_stop
from jz3.engines.tool_loop import generate_with_tools


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


def test_many_openings_take_linear_time(sandbox: Any) -> None:
    """A model that repeats itself: 250 kB of blocks that are never closed."""
    script = Script({"P:": "```python\n" * 25_000})
    start = time.process_time()
    (trace,) = generate_with_tools(script, sandbox, [Request(id="a", prompt="P:", seed=5)], Sampling())
    assert trace.executed == () and time.process_time() - start < 10
