"""Settings of the index."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """How the index is built."""

    factory: str = "Flat"
    """A FAISS factory string, e.g. `Flat`, `IVF1024,SQ8`, `IVF4096,PQ64`, `HNSW32`. `Flat` and `HNSW32` take 4 bytes
    a number on disk and, when they are searched, in memory: 16 GB for a million documents of 4,096 numbers."""
    probes: int = 16
    """Cells visited per query by IVF indexes."""
    recall_queries: int = 64
    """Queries (the targets' and, if these are fewer, stored documents) on which recall@100 against the
    exact scan is measured."""
    train: int = 65_536
    """Documents of the training sample, at most."""
    memory: float = 1.0
    """GiB: the index is built in parts that, like the training sample, take about that much. Parts of IVF
    indexes stay on disk and are mapped from there; others are read whole when they are searched."""

    def __post_init__(self) -> None:
        for name in ("probes", "recall_queries", "train"):
            if getattr(self, name) < 1:
                raise ValueError(f"index.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.memory < math.inf:
            raise ValueError(f"index.memory must be a number of GiB above 0, got {self.memory}")
