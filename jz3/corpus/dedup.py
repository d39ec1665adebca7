"""Exact and near-duplicate removal in one pass: the first text in the fixed order stays."""

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

import xxhash

from jz3.corpus.config import MinHashConfig
from jz3.errors import Jz3Error

_WORD = re.compile(r"\w+|[^\w\s]")


def normalise(text: str) -> str:
    """Return what two texts must share to be the same: words and signs, not case or white space.

    Digits and punctuation stay, because they are what tells one formula from another.
    """
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def shingles(text: str, n: int) -> list[str]:
    """Return the runs of `n` consecutive words of a normalised text; a shorter text is one shingle."""
    words = _WORD.findall(text)
    return [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]


@dataclass(slots=True)
class Deduplicator:
    """Remembers the texts it kept, and says which of them a new one repeats.

    A text is compared with kept texts only, so that the outcome depends on the order of the texts
    but never on how they are divided into files or shards.
    """

    config: MinHashConfig
    _exact: dict[int, str] = field(default_factory=dict)
    _near: Any = None

    def __post_init__(self) -> None:
        if self.config.enabled:
            try:
                from rensa import RMinHashDeduplicator  # pyright: ignore[reportAttributeAccessIssue]
            except ImportError as error:
                raise Jz3Error(
                    "near-duplicate removal needs the package rensa: pip install rensa, "
                    "or leave near duplicates in (corpus.minhash.enabled = false, --no-near-duplicates)"
                ) from error
            c = self.config
            self._near = RMinHashDeduplicator(c.threshold, c.permutations, True, c.bands, c.seed)

    def admit(self, text: str, key: str) -> tuple[str, str] | None:
        """Keep the text `key` unless a kept one is the same or nearly so.

        Args:
            text: the text.
            key: its id.

        Returns:
            None if it was kept; else the reason (`duplicate` or `near_duplicate`) and the id of
            the kept text that it repeats, of several the one kept first.
        """
        plain = normalise(text)
        digest = xxhash.xxh3_64_intdigest(plain.encode())
        if digest in self._exact:
            return "duplicate", self._exact[digest]
        if self._near is not None:
            from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

            signature = RMinHash(self.config.permutations, self.config.seed)
            signature.update(shingles(plain, self.config.ngram))
            if repeated := self._near.get_duplicates(signature):
                return "near_duplicate", min(repeated).partition(" ")[2]
            self._near.add(f"{len(self._exact):012d} {key}", signature)
        self._exact[digest] = key
        return None
