"""The settings of the corpus: where the texts come from, how they are cut and deduplicated."""

import re
from dataclasses import dataclass, field

KINDS = ("docstrings", "worked", "jsonl", "parquet", "huggingface")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One source of texts."""

    name: str
    """Its name in every row and count: letters, digits, `.`, `_` and `-`."""
    kind: str
    """`docstrings`, `worked`, `jsonl`, `parquet` or `huggingface`."""
    limit: int = 0
    """At most so many texts of it in the corpus, after cutting and deduplication; 0 is no limit."""
    sample: float = 1.0
    """Share of its records to take, drawn by each text's hash; for a slice of a huge source."""
    whole: bool = False
    """Keep a record only if it fits in one piece, as a problem with its solution should."""
    topic: str = ""
    """Kept in each text's `meta`, e.g. `mathematics`; known for docstrings of common packages."""
    generated: bool = False
    """Whether a program wrote the texts; always so for `worked`."""
    package: str = ""
    """docstrings: an installed package, a part of one (`scipy.optimize`), or `stdlib`; the
    source's name if empty."""
    families: tuple[str, ...] = ()
    """worked: the families of `jz3.worked.families()`; keep them apart from those of the targets."""
    count: int = 100
    """worked: how many problems a family."""
    paths: tuple[str, ...] = ()
    """jsonl, parquet: files or globs (`**` for any depth); `.gz` and `.zst` are unpacked."""
    text_field: str = "text"
    """jsonl, parquet, huggingface: the field with the text. Dots reach into nested fields; several
    fields joined by `+`, e.g. `question+answer`, become paragraphs."""
    keep_fields: tuple[str, ...] = ()
    """jsonl, parquet, huggingface: fields to keep in each text's `meta`."""
    match_field: str = ""
    """jsonl, parquet, huggingface: take only records whose text in this field holds `match`; it is kept in
    `meta` too. Empty: all records."""
    match: str = ""
    """What `match_field` must hold, letter case aside."""
    max_line_bytes: int = 16 << 20
    """jsonl, parquet, huggingface: a longer line or text is rejected, so that memory stays bounded."""
    dataset: str = ""
    """huggingface: a folder written by `save_to_disk`, a folder of data files, or a name on the hub."""
    config: str = ""
    """huggingface: the data set's configuration, if it has several."""
    split: str = "train"
    """huggingface: the split."""
    revision: str = ""
    """huggingface: branch, tag or commit on the hub."""

    def __post_init__(self) -> None:
        where = f"source {self.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"{where}: a name is made of letters, digits, '.', '_' and '-'")
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.limit < 0:
            raise ValueError(f"{where}: limit must be 0 (none) or more, got {self.limit}")
        if not 0 < self.sample <= 1:
            raise ValueError(f"{where}: sample must be above 0 and at most 1, got {self.sample}")
        if self.max_line_bytes < 1:
            raise ValueError(f"{where}: max_line_bytes must be positive, got {self.max_line_bytes}")
        if self.kind in ("jsonl", "parquet") and not self.paths:
            raise ValueError(f'{where}: kind {self.kind!r} needs paths, e.g. paths = ["data/*.{self.kind}"]')
        if self.kind == "huggingface" and not self.dataset:
            raise ValueError(f"{where}: kind 'huggingface' needs dataset, a folder or a name on the hub")
        if self.kind == "worked" and (not self.families or self.count < 1):
            raise ValueError(f"{where}: kind 'worked' needs families and a positive count")
        if bool(self.match_field) != bool(self.match):
            raise ValueError(
                f"{where}: match_field and match go together, got {self.match_field!r} and {self.match!r}"
            )
        if self.match and self.kind in ("docstrings", "worked"):
            raise ValueError(
                f"{where}: kind {self.kind!r} has no fields, so none to match {self.match!r} with"
            )
        if not all(part.strip() for part in self.text_field.split("+")):
            raise ValueError(f"{where}: text_field must name fields joined by '+', got {self.text_field!r}")

    def kept_fields(self) -> tuple[str, ...]:
        """Return the fields that each text's `meta` gets, the one to match among them."""
        return tuple(dict.fromkeys((*self.keep_fields, *filter(None, (self.match_field,)))))


@dataclass(frozen=True, slots=True, kw_only=True)
class MinHashConfig:
    """Near-duplicate removal. It keeps about 2 KB of memory a text; a corpus of many millions is
    better deduplicated beforehand (e.g. with datatrove) and read with `enabled = false`."""

    enabled: bool = True
    threshold: float = 0.8
    """Estimated Jaccard similarity of the shingle sets from which on a text counts as a duplicate."""
    ngram: int = 5
    """Words a shingle; a word is a run of letters and digits, or one other sign."""
    permutations: int = 128
    """Length of a signature; the similarity's standard error is about 0.5 / sqrt(permutations)."""
    bands: int = 16
    """Bands of the locality-sensitive hashing; must divide `permutations`."""
    seed: int = 1
    """Seed of the hash functions, apart from the run's, so that runs drop the same texts."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"minhash.threshold must be above 0 and at most 1, got {self.threshold}")
        if self.ngram < 1:
            raise ValueError(f"minhash.ngram must be positive, got {self.ngram}")
        if self.bands < 1 or self.permutations < 1 or self.permutations % self.bands:
            raise ValueError(
                f"minhash.bands must divide minhash.permutations, got {self.bands} and {self.permutations}"
            )


DEFAULT_SOURCES = tuple(
    SourceConfig(name=name, kind="docstrings") for name in ("sympy", "scipy", "networkx", "mpmath", "stdlib")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Which texts make the corpus, and how long they may be."""

    sources: tuple[SourceConfig, ...] = DEFAULT_SOURCES
    """In the order in which duplicates are decided: the first source keeps its copy."""
    max_tokens: int = 512
    """Longest piece in the model's tokens; texts are cut at paragraph, sentence or formula boundaries."""
    min_tokens: int = 32
    """Shorter pieces are rejected."""
    pieces_per_document: int = 0
    """At most so many pieces of a document: 0 takes all, 1 the first only."""
    minhash: MinHashConfig = field(default_factory=MinHashConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"corpus: min_tokens must lie in 1..max_tokens, got {self.min_tokens} and {self.max_tokens}"
            )
        if self.pieces_per_document < 0:
            raise ValueError(
                f"corpus: pieces_per_document must be 0 (all) or more, got {self.pieces_per_document}"
            )
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"corpus: two sources are named {name!r}; names must differ")
        if not names:
            raise ValueError("corpus: no sources; add a [[corpus.sources]] table")
