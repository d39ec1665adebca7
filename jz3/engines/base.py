"""The protocol that every text generator of jz3 follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a prompt."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not part of it."""


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
    """`stop` or `length`."""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Which generator runs the synthesiser."""

    name: str = "transformers"
    """`transformers`, `vllm` or `openai` (any OpenAI-compatible endpoint)."""
    batch_size: int = 32
    """Prompts at a time (transformers), or requests in flight (openai)."""
    base_url: str = ""
    """For `openai`: the endpoint, e.g. http://127.0.0.1:8000/v1."""
    model: str = ""
    """For `openai`: the served model's name."""
    api_key_env: str = "OPENAI_API_KEY"
    """For `openai`: the environment variable that holds the key."""


class Engine(Protocol):
    """Continues prompts."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Continue every request's prompt; one Generation per request, in order."""
        ...

    def info(self) -> dict[str, Any]:
        """Name, versions, model and device, for the manifest."""
        ...

    def close(self) -> None:
        """Free the model and stop what was started."""
        ...


def open_engine(config: EngineConfig, model: Path, dtype: str = "bfloat16") -> Engine:
    """Open the configured engine on the model in folder `model`.

    Raises:
        ValueError: the engine's name is unknown.
        Jz3Error: the engine's package is not installed; the message names the extra.
    """
    if config.name == "transformers":
        from jz3.engines.transformers import TransformersEngine

        return TransformersEngine(config, model, dtype)
    if config.name == "vllm":
        from jz3.engines.vllm import VllmEngine

        return VllmEngine(config, model, dtype)
    if config.name == "openai":
        from jz3.engines.openai import OpenAIEngine

        return OpenAIEngine(config)
    raise ValueError(f"unknown engine {config.name!r}; choose transformers, vllm or openai")
