"""The protocol that every text generator of jz3 follows."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a prompt."""

    max_new_tokens: int = 256
    """At most this many; fewer where the model's context ends first."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this share."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if "" in self.stop:
            raise ValueError("a stop text must not be empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt with the seed of its own continuation."""

    id: str
    prompt: str
    seed: int = 0
    """Derived from the record's id, so that a continuation doesn't depend on its batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A continuation."""

    id: str
    text: str
    finish: str
    """`stop` (the model's end token or a stop text), `length` (the token limit or the end of the
    model's context), `too_long` (the prompt alone fills the context: the text is empty), or `refused` (an
    endpoint doesn't answer this prompt: the text is empty)."""
    prompt_tokens: int
    """0 where an endpoint doesn't say."""
    new_tokens: int


ENGINES = ("transformers", "vllm", "openai")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Which generator continues prompts."""

    name: str = "transformers"
    """`transformers`, `vllm` or `openai` (any OpenAI-compatible endpoint)."""
    batch_size: int = 32
    """Prompts at a time (transformers), or requests in flight (openai); vllm batches by itself."""
    max_model_len: int = 0
    """For `vllm`: context to reserve memory for, in tokens; 0 is the model's own."""
    tensor_parallel: int = 1
    """For `vllm`: GPUs that share one model."""
    data_parallel: int = 1
    """For `vllm` on GPUs: copies of the model, each on tensor_parallel GPUs. Where one GPU holds the model, copies
    write several times as much as one model on all GPUs."""
    gpu_memory: float = 0.9
    """For `vllm` on a GPU: share of its memory for weights and cache."""
    cpu_cache_gb: int = 2
    """For `vllm` on a CPU: memory for the key-value cache in GiB."""
    base_url: str = ""
    """For `openai`: the endpoint, e.g. http://127.0.0.1:8000/v1."""
    model: str = ""
    """For `openai`: the served model's name."""
    api_key_env: str = "OPENAI_API_KEY"
    """For `openai`: the environment variable that holds the key; a local endpoint needs none."""
    retries: int = 6
    """For `openai`: how often a failed request is sent again, with growing pauses."""
    timeout: float = 600.0
    """For `openai`: seconds until a request counts as failed."""

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.name!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        for name in ("tensor_parallel", "data_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_model_len", "cpu_cache_gb", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be positive, got {self.timeout}")
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"gpu_memory must lie in (0, 1], got {self.gpu_memory}")
        check_key_name(self.api_key_env)


def check_key_name(name: str) -> None:
    """Refuse a key where the name of its environment variable belongs.

    Args:
        name: the setting `api_key_env`.

    Raises:
        ValueError: it can't be such a name; the message doesn't repeat it.
    """
    if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", name):
        raise ValueError(
            "api_key_env must be the name of an environment variable that holds the key, such as OPENAI_API_KEY, "
            f"not the key itself; got {len(name)} characters that are no such name"
        )


class Engine(Protocol):
    """Continues prompts."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Continue every request's prompt; one Generation per request, in order.

        A prompt that fills the model's context is no error but a Generation with finish `too_long`.
        """
        ...

    def info(self) -> dict[str, Any]:
        """Name, versions, model and device, for the manifest."""
        ...

    def close(self) -> None:
        """Free the model and stop what was started."""
        ...
