"""All kinds of sources behind one iterator of texts and rejects."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jz3.corpus import docstrings, parquet, readers
from jz3.corpus.config import SourceConfig
from jz3.corpus.readers import SourceText, check_text, reject
from jz3.errors import Jz3Error
from jz3.records import Reject
from jz3.seeding import seed_for

Records = Iterator[SourceText | Reject]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a source that is read by itself: a file, a package, a data set, a problem family."""

    name: str
    fingerprint: str
    """Changes when the content does, so that finished work on the old content isn't reused."""
    read: Callable[[int], Records]
    """Read the records but for the first so many."""


def open_source(source: SourceConfig, seed: int) -> list[Unit]:
    """Open a source without reading it.

    Args:
        source: what to read.
        seed: the run's seed; it fixes the order of docstrings and the worked problems.

    Returns:
        Its units in their fixed order.

    Raises:
        Jz3Error: the source can't be used at all; the message says why.
    """
    if source.kind == "docstrings":
        package = source.package or source.name
        docstrings.source_files(package)
        return [
            _skipping(package, docstrings.version_of(package), lambda: _docstrings(source, package, seed))
        ]
    if source.kind == "worked":
        return _worked_units(source, seed)
    if source.kind == "huggingface":
        data, fingerprint = readers.open_huggingface(source)
        return [
            Unit(
                name=source.dataset,
                fingerprint=fingerprint,
                read=lambda n: readers.read_huggingface(data, source, n),
            )
        ]
    read = parquet.read_parquet_file if source.kind == "parquet" else readers.read_jsonl_file
    units = []
    for path in readers.find_files(source):
        try:
            stat = path.stat()
            fingerprint = f"{stat.st_size} bytes, {stat.st_mtime_ns}"
        except OSError as error:
            fingerprint = str(error)
        units.append(_skipping(str(path), fingerprint, lambda path=path: read(path, source)))
    return units


def _skipping(name: str, fingerprint: str, read: Callable[[], Records]) -> Unit:
    return Unit(name=name, fingerprint=fingerprint, read=lambda start: itertools.islice(read(), start, None))


def read_texts(source: SourceConfig, seed: int = 0) -> Records:
    """Stream the texts of any source, uncut; usable without a run.

    Args:
        source: what to read; `limit` and `whole` belong to the stage and have no effect here.
        seed: fixes the order of docstrings, the worked problems and the sample.

    Yields:
        A SourceText for every usable record, a Reject for every other one; nothing is dropped but
        what `match` and `sample` leave out.

    Raises:
        Jz3Error: the source can't be used, or not one of its records can.
    """
    texts = 0
    first: Reject | None = None
    for unit in open_source(source, seed):
        for record in unit.read(0):
            if isinstance(record, Reject):
                first = first or record
            else:
                texts += 1
            if isinstance(record, Reject) or sampled(source, seed, record):
                yield record
    check_usable(source, texts, first)


def sampled(source: SourceConfig, seed: int, record: SourceText) -> bool:
    """Whether `match` and `sample` take this text; the draw depends on its text alone."""
    if source.match and source.match.casefold() not in record.meta.get(source.match_field, "").casefold():
        return False
    return source.sample == 1 or seed_for(seed, "corpus", source.name, record.text) < source.sample * 2**64


def check_usable(source: SourceConfig, texts: int, first: Reject | None) -> None:
    """Raise a Jz3Error if a source that was read to its end gave no text."""
    if not texts:
        why = f"; first: {first.where}: {first.reason} {first.detail}".rstrip() if first else ""
        raise Jz3Error(f"source {source.name!r} holds no usable text{why}")


def _docstrings(source: SourceConfig, package: str, seed: int) -> Records:
    topic = source.topic or docstrings.topic_of(package)
    for found in docstrings.docstrings(package, seed, source.name):
        if isinstance(found, docstrings.Unparsed):
            yield reject("unparsed_file", found.where, found.detail)
            continue
        meta = {"object": found.name, "topic": topic} if topic else {"object": found.name}
        text = SourceText(
            text=found.text, source=source.name, where=found.where, generated=source.generated, meta=meta
        )
        yield check_text(text, source.max_line_bytes)


def _worked_units(source: SourceConfig, seed: int) -> list[Unit]:
    from jz3.worked import families, worked_problems

    unknown = sorted(set(source.families) - set(families()))
    if unknown:
        raise Jz3Error(f"source {source.name!r}: no family {unknown[0]!r}; families: {', '.join(families())}")
    key = seed_for(seed, "corpus", source.name) >> 1

    def records(family: str) -> Records:
        for problem in worked_problems(family, key, source.count):
            yield SourceText(
                text=f"{problem.question.strip()}\n\n{problem.cot.strip()}",
                source=source.name,
                where=problem.id,
                generated=True,
                meta={"family": family, "topic": source.topic or problem.topic},
            )

    return [_skipping(f, f"{key} {source.count}", lambda f=f: records(f)) for f in source.families]
