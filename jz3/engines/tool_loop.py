"""Generate, execute, go on: continuations whose Python is really run and whose outputs are real."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jz3.engines.base import Engine, Generation, Request, Sampling
from jz3.seeding import seed_for

if TYPE_CHECKING:
    from jz3.grading.sandbox import Execution, Sandbox

OUTPUT_START, FENCE = "```output", "```"
OPENING = re.compile(r"```[ \t]*(?:python3?|py)[ \t]*\r?\n")
"""Begins a Python block; it may stand behind words, as in `[Solution]: ```python`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedBlock:
    """A block of code of a continuation and what it really gave."""

    code: str
    output: str
    """What was written into the continuation."""
    ok: bool
    reason: str
    """`ok`, `error`, `timeout`, `memory`, `output_limit` or `killed`, as the sandbox says."""
    level: str
    """How the sandbox isolated it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolTrace:
    """A continuation with the outputs of its code."""

    id: str
    text: str
    """Everything after the prompt: the model's words, its code, and the real outputs."""
    rounds: int
    """How often the model was asked to go on."""
    executed: tuple[ExecutedBlock, ...]
    finish: str
    """As in Generation, or `rounds`: the last round still ended in code."""
    prompt_tokens: int
    new_tokens: int
    """Tokens that the model wrote, without the outputs."""


@dataclass(slots=True)
class _State:
    request: Request
    text: str = ""
    rounds: int = 0
    finish: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    executed: list[ExecutedBlock] = field(default_factory=list)
    program: str = ""
    """The blocks that ran without an error so far, and what they printed."""
    printed: str = ""
    ran: int = 0
    """Where the text begins whose blocks have not run."""

    def next_request(self) -> Request:
        if not self.rounds:
            return self.request
        seed = seed_for(self.request.seed, "round", self.rounds)
        return Request(id=self.request.id, prompt=self.request.prompt + self.text, seed=seed)

    def extend(self, generation: Generation) -> None:
        if not self.rounds:
            self.prompt_tokens = generation.prompt_tokens
        self.rounds += 1
        self.text += generation.text
        self.new_tokens += generation.new_tokens
        self.finish = generation.finish


def generate_with_tools(
    engine: Engine,
    sandbox: "Sandbox",
    requests: Sequence[Request],
    sampling: Sampling,
    rounds: int = 4,
    output_limit: int = 400,
) -> list[ToolTrace]:
    """Continue prompts in rounds, running the Python block at which the model stops.

    A round ends when the model starts an output block (or ends its text) behind a finished Python
    block. The block, with those before it in the round, is run after the earlier ones of the same
    continuation that succeeded, as cells of a notebook are, and what it adds to the printed text goes
    into an output block; of an error, its last line.

    Args:
        engine: continues the prompts.
        sandbox: runs the code.
        requests: the prompts; each round of a request has a seed derived from the request's.
        sampling: for every round; its limit of new tokens counts per round.
        rounds: at most this many.
        output_limit: characters of an output block, as in the paper's evaluation (400).

    Returns:
        One trace per request, in order.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    stop = (*sampling.stop, OUTPUT_START)
    sampling = dataclasses.replace(sampling, stop=tuple(dict.fromkeys(stop)))
    states = [_State(request) for request in requests]
    active = states
    for _ in range(rounds):
        if not active:
            break
        for state, generation in zip(
            active, engine.generate([state.next_request() for state in active], sampling), strict=True
        ):
            state.extend(generation)
        waiting = [(state, code) for state in active if (code := _pending_code(state)) is not None]
        programs = [state.program + code for state, code in waiting]
        executions = sandbox.run_many(programs) if waiting else []
        for (state, code), execution in zip(waiting, executions, strict=True):
            _record(state, code, execution, output_limit)
            state.finish = "rounds"
        active = [state for state, _ in waiting]
    return [
        ToolTrace(
            id=state.request.id,
            text=state.text,
            rounds=state.rounds,
            executed=tuple(state.executed),
            finish=state.finish,
            prompt_tokens=state.prompt_tokens,
            new_tokens=state.new_tokens,
        )
        for state in states
    ]


def _pending_code(state: _State) -> str | None:
    """Return the Python block that ends a continuation and waits for its output, if there is one.

    Blocks of the same round before it, behind which the model asked for no output, come first.
    """
    from jz3.grading.answer import code_blocks

    if state.finish != "stop":
        return None
    text = state.text.rstrip()
    if not text.endswith(FENCE):
        return None
    text = text.removesuffix(FENCE)
    # The last one; one pattern for the whole block would look through the text from every opening.
    start = max((found.end() for found in OPENING.finditer(text)), default=len(text))
    last = text[start:]
    if FENCE in last or not last.strip():
        return None
    blocks = [*code_blocks(text[state.ran : start]), last]
    return "".join(block.rstrip() + "\n" for block in blocks)


def _record(state: _State, code: str, execution: "Execution", output_limit: int) -> None:
    printed = execution.stdout
    added = printed.removeprefix(state.printed)
    if execution.ok:
        state.program, state.printed = state.program + code, printed
        output = added.strip("\n")
    else:
        output = "\n".join(filter(None, [added.strip("\n"), error_line(execution)]))
    output = output[:output_limit].rstrip("\n")
    state.text = f"{state.text.rstrip()}\n{OUTPUT_START}\n{output}\n{FENCE}\n"
    state.ran = len(state.text)
    state.executed.append(
        ExecutedBlock(
            code=code, output=output, ok=execution.ok, reason=execution.reason, level=str(execution.level)
        )
    )


def error_line(execution: "Execution") -> str:
    """Return what a failed execution is told to the model: the error's last line, or the limit it met."""
    if execution.reason == "error":
        lines = [line for line in execution.stderr.splitlines() if line.strip()]
        if lines:
            return lines[-1].strip()
    return {
        "timeout": "TimeoutError: the code took too long",
        "memory": "MemoryError: the code used too much memory",
        "output_limit": "RuntimeError: the code printed too much",
    }.get(execution.reason, f"RuntimeError: the code was stopped ({execution.reason})")
