"""The corpus: read many sources, cut at sound places, remove duplicates."""

import importlib
from typing import TYPE_CHECKING, Any

from jz3.corpus.config import CorpusConfig, MinHashConfig, SourceConfig

if TYPE_CHECKING:
    from jz3.corpus.cutting import cut
    from jz3.corpus.sources import read_texts
    from jz3.corpus.stage import run

__all__ = ["CorpusConfig", "MinHashConfig", "SourceConfig", "cut", "read_texts", "run"]

_HOMES = {"cut": "cutting", "read_texts": "sources", "run": "stage"}


def __getattr__(name: str) -> Any:
    """Import the readers and the stage when they are used: recipes need the settings alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
