"""The protocol of a teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jz3.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and the bare text inside it."""

    prompt: Prompt
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a teacher answered to one request."""

    text: str
    finish: str = "stop"
    """`stop`, `length`, or whatever the endpoint says."""
    failure: str = ""
    """Why there is no text: `refused`, `teacher_failed` or `no_recorded_reply`; empty if there is one."""
    detail: str = ""
    """More about the failure."""
    meta: dict[str, str] = field(default_factory=dict)
    """Goes into the problem's `meta`, e.g. the teacher's model, `family`, `stand_in`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What the replies cost."""

    calls: int = 0
    """Requests sent, repeats included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    from_cache: int = 0
    """Different replies that were bought before this run."""


class Teacher(Protocol):
    """Writes problems."""

    name: str
    """Goes into every problem's `origin`."""
    stand_in: str
    """A label for the report if this is no real teacher, else empty."""

    def answer(self, requests: Sequence[Request], advance: Callable[[int], None]) -> list[Reply]:
        """Answer every request, in order; `advance` is told the number of replies just got."""
        ...

    def spending(self) -> Spending:
        """Say what this run's replies cost so far, earlier starts of the run included."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...
