"""The typed rows that travel between stages."""

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

R = TypeVar("R", bound="Record")


class Record:
    """Shared by all rows: to and from JSON objects, with the types checked."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls: type[R], row: dict[str, Any]) -> R:
        """Build the row from a JSON object.

        Raises:
            ValueError: a field is missing, unknown or of another type; the message names it.
        """
        hints = _hints(cls)
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        unknown = sorted(set(row) - {f.name for f in fields})
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}")
        for f in fields:
            if f.name not in row:
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                    raise ValueError(f"{cls.__name__} lacks the field {f.name!r}")
            elif not _fits(row[f.name], hints[f.name]):
                raise ValueError(
                    f"{cls.__name__}.{f.name} must be {_name(hints[f.name])}, got {row[f.name]!r:.80}"
                )
        return cls(**row)


@functools.cache
def _hints(cls: type[Record]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(_fits(v, arguments[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doc(Record):
    """A text of the corpus."""

    id: str
    """16 hexadecimal digits: xxh3 of the text; the store keeps it as a 64-bit integer."""
    text: str
    source: str
    """Where it comes from, e.g. `sympy` or a file's name."""
    tokens: int
    """Its length in the model's tokens."""
    generated: bool = False
    """True if a program wrote it (worked problems of reasoning-gym)."""
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query(Record):
    """A target problem with its reference solution: what the texts are to help with."""

    id: str
    task: str
    """The target's name; scores are kept per task."""
    problem: str
    """The bare problem."""
    prompt: str
    """What the model is given, usually `jz3.templates.prompt_for(problem, kind)`."""
    completion: str
    """The reference solution."""
    answer: str = ""
    """The final answer alone, for grading; empty if unknown."""
    role: str = "fit"
    """`fit`: seen by the fit and by selection; `unseen`: fidelity only; `control`: negative
    control; `eval`: evaluation only; `instruction`: second stage of the training mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Record):
    """A request for a problem: one text under one level's prompt."""

    id: str
    doc_id: str
    kind: str
    """`cot` (natural language) or `tool` (Python)."""
    level: str
    """One of the eight levels, or `tool`."""
    text: str
    """The whole prompt, the document's text filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Record):
    """A problem with its solution, as a teacher or a synthesiser wrote it."""

    id: str
    prompt_id: str
    doc_id: str
    kind: str
    level: str
    problem: str
    solution: str
    answer: str
    """The content of the solution's last \\boxed{}; empty if there is none."""
    origin: str
    """Who wrote it: `teacher:<name>` or `synthesiser:<name>`."""
    meta: dict[str, str] = field(default_factory=dict)
    """Provenance, e.g. the teacher's model, its finish reason, `stand_in`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject(Record):
    """A record that a stage refused, kept with the reason."""

    id: str
    stage: str
    reason: str
    """A short, countable name, e.g. `no_boxed_answer`."""
    detail: str = ""
    where: str = ""
    """File and line for input; the prompt's id for generated text."""
    text: str = ""
    """What was refused (at most 4,000 characters)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Record):
    """What the filters found about a problem; scores stay columns, not only keep or drop."""

    id: str
    keep: bool
    reason: str
    """The first filter that refused it, or empty."""
    checks: dict[str, str] = field(default_factory=dict)
    """Every filter's finding, e.g. `sandbox_level`, `output_match`, `votes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Record):
    """One evaluated problem."""

    id: str
    model: str
    """`base` or `trained`."""
    setting: str
    """`nl` or `tool`."""
    task: str
    correct: bool
    prediction: str
    answer: str
    output: str
    rounds: int = 1
    """Generate-execute rounds used in the tool setting."""


LEVELS = ("grade_school", "middle_school", "high_school", "college", "amc8", "amc10", "amc12", "aime")
"""The eight education levels of JiuZhang3.0's prompts (Figure 2 of arXiv 2405.14365)."""
