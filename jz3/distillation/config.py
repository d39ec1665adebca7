"""Settings of the distillation: which teacher, how many texts, and how much may be spent."""

from dataclasses import dataclass, field

from jz3.engines.base import check_key_name
from jz3.records import LEVELS

TEACHERS = ("openai", "recorded", "offline")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Who writes the problems, and within which limits."""

    kind: str = "openai"
    """`openai` (any OpenAI-compatible endpoint), `recorded` (replies from a file) or `offline` (a
    program that stands in for a teacher; its rows say so)."""
    base_url: str = ""
    """openai: the endpoint, e.g. http://127.0.0.1:8000/v1; OpenAI's own if empty."""
    model: str = "gpt-4o"
    """openai: the served model's name."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key; a key is never read from a recipe."""
    max_calls: int = 10_000
    """openai: requests that this run may send in all, repeats after errors included (the paper's
    9,300 texts and some room)."""
    max_usd: float = 100.0
    """openai: money that this run may spend. Each request is booked beforehand at the most it can cost."""
    usd_per_million_prompt: float = 2.5
    """openai: price of a million prompt tokens."""
    usd_per_million_completion: float = 10.0
    """openai: price of a million completion tokens."""
    requests_per_minute: float = 150.0
    """openai: rate limit; 0 is none. 150 is the published code's."""
    concurrency: int = 16
    """openai: requests in flight at the same time."""
    retries: int = 6
    """openai: repeats of a request after 429, 5xx, a timeout or a lost connection."""
    backoff_seconds: float = 2.0
    """openai: wait before the first repeat; it doubles each time, up to a minute, with jitter."""
    timeout_seconds: float = 180.0
    """openai: longest wait for an answer."""
    max_failed_share: float = 0.02
    """openai: share of the requests that may fail for good (they become rejects) before the run stops."""
    temperature: float = 0.6
    """openai: as in the published code."""
    max_tokens: int = 2500
    """openai: longest reply, as in the published code."""
    max_tokens_name: str = "max_tokens"
    """openai: the request's name for it; some models want `max_completion_tokens`."""
    cache: str = ""
    """openai: SQLite file of all answers ever bought; `teacher.sqlite` in jz3's cache folder if empty."""
    recorded: str = ""
    """recorded: a JSON-lines file with `reply` and `prompt_id` or `prompt_hash`, such as the
    replies.jsonl of another run."""

    def __post_init__(self) -> None:
        if self.kind not in TEACHERS:
            raise ValueError(f"teacher: kind must be one of {', '.join(TEACHERS)}, got {self.kind!r}")
        check_key_name(self.api_key_env)
        if self.kind == "recorded" and not self.recorded:
            raise ValueError("teacher: kind 'recorded' needs recorded, the file of replies")
        if self.max_tokens_name not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(
                f"teacher: max_tokens_name must be max_tokens or max_completion_tokens, got {self.max_tokens_name!r}"
            )
        for name in ("max_calls", "concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"teacher: {name} must be positive, got {getattr(self, name)}")
        if self.timeout_seconds <= 0:
            raise ValueError(f"teacher: timeout_seconds must be positive, got {self.timeout_seconds}")
        for name in (
            "max_usd",
            "usd_per_million_prompt",
            "usd_per_million_completion",
            "requests_per_minute",
            "retries",
            "backoff_seconds",
            "temperature",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"teacher: {name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"teacher: max_failed_share must lie in 0..1, got {self.max_failed_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig:
    """How the teacher's problems are asked for."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Who writes them."""
    initial: int = 5300
    """Texts of the initial set, drawn at random from the corpus (the paper's number)."""
    boost: int = 4000
    """Texts of the boost, the best by influence (the paper's number)."""
    tool_share: float = 0.3
    """Share of prompts that ask for a Python solution; the paper's is unknown, 27% of its released rows are."""
    levels: tuple[str, ...] = LEVELS
    """Levels to draw from for the natural-language prompts."""

    def __post_init__(self) -> None:
        if self.initial < 0 or self.boost < 0 or not self.initial + self.boost:
            raise ValueError(
                "distillation: initial and boost must be 0 or more and not both 0, "
                f"got {self.initial} and {self.boost}"
            )
        if not 0 <= self.tool_share <= 1:
            raise ValueError(f"distillation: tool_share must lie in 0..1, got {self.tool_share}")
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            raise ValueError(f"distillation: levels must be some of {', '.join(LEVELS)}, got {self.levels!r}")
