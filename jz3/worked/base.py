"""What every family of worked problems shares: the draft, its execution and the finished problem."""

import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jz3.files import hash_text

MAX_PIECES = 105
"""The longest solution kept, in `pieces`; most are far shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkedProblem:
    """A problem with its answer and two correct solutions."""

    id: str
    """The family and the hash of the question."""
    family: str
    topic: str
    question: str
    answer: str
    cot: str
    """Step-by-step text that ends with the answer in \\boxed{}."""
    tool: str
    """A ```python block, the ```output block it really prints, and the answer in \\boxed{}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A problem before its program has run."""

    question: str
    answer: str
    steps: str
    """The worked steps, without the closing sentence."""
    program: str
    """Python that prints the answer."""


def entries(name: str, seed: int, **settings: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries of a reasoning-gym dataset one after the other."""
    import reasoning_gym

    size = 1 << 20
    dataset = reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    for index in range(size):
        yield dataset[index]


def phrased(entry: dict[str, Any], *questions: str) -> str:
    """Choose one of several wordings by the entry's index."""
    return questions[entry["metadata"]["source_index"] % len(questions)]


def pieces(text: str) -> int:
    """Count words, digits and signs: close to the tokens of a tokenizer that takes digits one by one."""
    return len(re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", text))


def printed(program: str) -> str:
    """Run a program written by this package and return what it prints, as Python prints it."""
    out = io.StringIO()
    exec(program, {"print": functools.partial(print, file=out)})
    return out.getvalue()


def finish(family: str, topic: str, draft: Draft) -> WorkedProblem | None:
    """Run the draft's program and put the problem together.

    Returns:
        The problem, or None if a solution is too long or the program doesn't print the answer.
    """
    output = printed(draft.program).strip()
    if output != draft.answer:
        return None
    closing = f"The answer is \\boxed{{{draft.answer}}}."
    cot = f"{draft.steps}\n{closing}"
    tool = f"```python\n{draft.program}\n```\n```output\n{output}\n```\n{closing}"
    if max(pieces(cot), pieces(tool)) > MAX_PIECES:
        return None
    return WorkedProblem(
        id=f"{family}-{hash_text(draft.question)}",
        family=family,
        topic=topic,
        question=draft.question,
        answer=draft.answer,
        cot=cot,
        tool=tool,
    )
