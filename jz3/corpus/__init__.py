"""The corpus: read many sources, cut at sound places, remove duplicates."""

from jz3.corpus.config import CorpusConfig, MinHashConfig, SourceConfig
from jz3.corpus.cutting import cut
from jz3.corpus.sources import read_texts
from jz3.corpus.stage import run

__all__ = ["CorpusConfig", "MinHashConfig", "SourceConfig", "cut", "read_texts", "run"]
