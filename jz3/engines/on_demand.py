"""Engines are opened here, and what costs seconds and memory to open only if there is work for it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from jz3.engines.base import Engine, EngineConfig
from jz3.files import read_json, write_json
from jz3.stage import release_memory

T = TypeVar("T")


class OnDemand(Generic[T]):
    """A context manager that is entered at the first `get()`, so that a resumed stage with nothing left
    to do loads nothing.

    Args:
        opener: makes the context manager to enter.
    """

    def __init__(self, opener: Callable[[], contextlib.AbstractContextManager[T]]) -> None:
        self._opener = opener
        self._stack = contextlib.ExitStack()
        self._values: list[T] = []

    def get(self) -> T:
        """Return the opened thing."""
        if not self._values:
            self._values.append(self._stack.enter_context(self._opener()))
        return self._values[0]

    def __enter__(self) -> "OnDemand[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        self._stack.__exit__(kind, error, trace)


def open_engine(config: EngineConfig, model: Path, dtype: str = "bfloat16") -> Engine:
    """Open the configured engine on the model in folder `model`.

    Raises:
        ValueError: a setting that the engine needs is missing.
        Jz3Error: the engine's package is not installed; the message names the extra.
    """
    if config.name == "transformers":
        from jz3.engines.transformers_engine import TransformersEngine

        return TransformersEngine(config, model, dtype)
    if config.name == "vllm":
        from jz3.engines.vllm_engine import VllmEngine

        if config.data_parallel > 1:
            from jz3.engines.copies import Copies

            return Copies(config, model, dtype, VllmEngine)
        return VllmEngine(config, model, dtype)
    from jz3.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(config)


def engine_on_demand(config: EngineConfig, model: Path, dtype: str, note: Path) -> OnDemand[Engine]:
    """Return an engine that is opened when it is needed and leaves its `info()` in the file `note`."""

    def opener() -> contextlib.AbstractContextManager[Engine]:
        release_memory()
        engine = open_engine(config, model, dtype)
        write_json(note, engine.info())
        return contextlib.closing(engine)

    return OnDemand(opener)


def noted_info(config: EngineConfig, note: Path) -> dict[str, Any]:
    """Return the `info()` of the engine that did the work, also if another process had opened it."""
    return read_json(note) if note.exists() else {"name": config.name}
