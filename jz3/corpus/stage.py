"""The stage: sources in, deduplicated texts of bounded length out."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from jz3.corpus.config import CorpusConfig, SourceConfig
from jz3.corpus.cutting import Piece, TokenCounter, pieces, token_counter
from jz3.corpus.dedup import Deduplicator
from jz3.corpus.readers import SourceText, reject
from jz3.corpus.sources import Unit, check_usable, open_source, sampled
from jz3.errors import Jz3Error
from jz3.files import atomic_path, canonical_json, hash_text, read_jsonl, write_jsonl
from jz3.models import load_tokenizer, resolve_model
from jz3.records import Doc, Reject
from jz3.stage import StageContext

log = logging.getLogger(__name__)

BLOCK_RECORDS = (64, 4096)
"""Records in a unit's first block, and the most in a later one, each twice as large as the last: a
source with a small limit reads little in vain, and a huge one makes few files."""
BLOCK_CHARACTERS = 4 << 20
"""A block ends here too, so that it fits in memory; a block is all that a kill can lose."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Write `corpus/docs.jsonl` (Doc) and `corpus/rejects.jsonl` (Reject).

    Sources are read in their order, record by record; finished blocks of read and cut texts stay
    under `corpus/blocks`, so that a rerun reads and cuts only what is missing.

    Returns:
        texts, tokens, generated, by_source (origin, records, texts, tokens, rejected) and
        rejected (reason to count).

    Raises:
        Jz3Error: a source can't be used, or no text is left.
    """
    config = ctx.recipe.corpus
    count = token_counter(load_tokenizer(resolve_model(ctx.recipe.model)))
    tallies = {source.name: _Tally() for source in config.sources}
    with atomic_path(ctx.out / "rejects.jsonl") as part, open(part, "w", encoding="utf-8") as rejects:
        write_jsonl(ctx.out / "docs.jsonl", _docs(ctx, config, count, tallies, rejects))
    summary = _summary(tallies)
    if not summary["texts"]:
        raise Jz3Error(
            f"the corpus is empty: {json.dumps(summary['rejected'])}; see {ctx.out / 'rejects.jsonl'}"
        )
    for name, tally in tallies.items():
        if not tally.texts:
            log.warning("source %s gave no text: %s", name, dict(tally.rejected))
    return summary


@dataclass(slots=True)
class _Tally:
    origin: list[str] = field(default_factory=list)
    records: int = 0
    texts: int = 0
    tokens: int = 0
    generated: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


def _summary(tallies: dict[str, _Tally]) -> dict[str, Any]:
    rejected: Counter[str] = sum((t.rejected for t in tallies.values()), Counter())
    return {
        "texts": sum(t.texts for t in tallies.values()),
        "tokens": sum(t.tokens for t in tallies.values()),
        "generated": sum(t.generated for t in tallies.values()),
        "rejected": dict(sorted(rejected.items())),
        "by_source": {
            name: {
                "origin": t.origin[0] if len(t.origin) == 1 else f"{len(t.origin)} parts",
                "records": t.records,
                "texts": t.texts,
                "tokens": t.tokens,
                "rejected": dict(sorted(t.rejected.items())),
            }
            for name, t in tallies.items()
        },
    }


def _docs(
    ctx: StageContext, config: CorpusConfig, count: TokenCounter, tallies: dict[str, _Tally], rejects: TextIO
) -> Iterator[dict[str, Any]]:
    """Give the rows of docs.jsonl; write the rejects and fill the tallies on the way."""
    seen = Deduplicator(config.minhash)
    opened = [open_source(source, ctx.seed) for source in config.sources]
    for source, units in zip(config.sources, opened, strict=True):
        tally = tallies[source.name]
        label = f"{source.name}, {'texts' if source.limit else 'parts'}"
        with ctx.progress(source.limit or len(units), label) as advance:
            for row in _source_rows(ctx, config, source, units, count, tally, advance):
                refused = row.get("reject") or _repeated(row["doc"], seen)
                if refused:
                    tally.rejected[refused["reason"]] += 1
                    rejects.write(json.dumps(refused, ensure_ascii=False) + "\n")
                    continue
                tally.texts += 1
                tally.tokens += row["doc"]["tokens"]
                tally.generated += row["doc"]["generated"]
                yield row["doc"]
                if source.limit:
                    advance(1)
                    if tally.texts == source.limit:
                        break


def _repeated(doc: dict[str, Any], seen: Deduplicator) -> dict[str, Any] | None:
    repeated = seen.admit(doc["text"], doc["id"])
    if repeated is None:
        return None
    reason, kept = repeated
    return reject(
        reason, _place(doc["meta"]["where"], doc["meta"]["piece"]), f"kept {kept}", doc["text"]
    ).to_json()


def _place(where: str, piece: int | str) -> str:
    return f"{where} piece {piece}"


def _source_rows(
    ctx: StageContext,
    config: CorpusConfig,
    source: SourceConfig,
    units: list[Unit],
    count: TokenCounter,
    tally: _Tally,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Give the rows {"doc": ...} and {"reject": ...} of a source, from its blocks where they are finished."""
    texts, taken, first = 0, 0, None
    settings = [asdict(source), config.max_tokens, config.min_tokens, config.pieces_per_document]
    key = canonical_json([settings, asdict(ctx.recipe.model), ctx.seed])
    for number, unit in enumerate(units):
        tally.origin.append(unit.fingerprint if source.kind == "docstrings" else unit.name)
        base = ctx.out / "blocks" / source.name / f"{number:06d}"
        unit_key = hash_text(key + unit.name + unit.fingerprint)
        for block in _blocks(
            base, unit_key, unit, lambda record: _cut(record, source, config, count, ctx.seed)
        ):
            for record in block[1:]:
                tally.records += 1
                texts += record["usable"]
                taken += record["usable"] and bool(record["rows"])
                for row in record["rows"]:
                    if "reject" in row and first is None:
                        first = Reject.from_json(row["reject"])
                    yield row
        if not source.limit:
            advance(1)
    check_usable(source, texts, first)
    if source.match and not taken:
        raise Jz3Error(
            f"source {source.name!r}: no record was taken, of {texts} whose {source.match_field!r} might hold "
            f"{source.match!r}; correct match"
        )


def _blocks(
    base: Path, key: str, unit: Unit, work: Callable[[SourceText | Reject], list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    """Give the blocks of a unit: a head, then one row a record.

    The head holds the key of the settings and the unit's content, and whether the block is the
    unit's last. A block with another key, and all after it, are made anew.
    """
    index, start, reader = 0, 0, None
    while True:
        path = base / f"{index:06d}.jsonl"
        block = list(read_jsonl(path)) if reader is None and path.exists() else None
        if not block or block[0]["key"] != key:
            if reader is None:
                reader = unit.read(start)
            block = _make_block(key, index, reader, work)
            write_jsonl(path, block)
        yield block
        if block[0]["last"]:
            break
        start += len(block) - 1
        index += 1


def _make_block(
    key: str,
    index: int,
    reader: Iterator[SourceText | Reject],
    work: Callable[[SourceText | Reject], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    characters, most = 0, min(BLOCK_RECORDS[0] << min(index, 32), BLOCK_RECORDS[1])
    while len(rows) < most and characters < BLOCK_CHARACTERS:
        record = next(reader, None)
        if record is None:
            return [{"key": key, "last": True}, *rows]
        characters += len(record.text)
        rows.append({"usable": isinstance(record, SourceText), "rows": work(record)})
    return [{"key": key, "last": False}, *rows]


def _cut(
    record: SourceText | Reject, source: SourceConfig, config: CorpusConfig, count: TokenCounter, seed: int
) -> list[dict[str, Any]]:
    """Turn a record into rows {"doc": ...} and {"reject": ...}."""
    if isinstance(record, Reject):
        return [{"reject": record.to_json()}]
    if not sampled(source, seed, record):
        return []
    if source.whole:
        text = record.text.strip()
        tokens = count([text])[0]
        return [_row(record, 0, Piece(text, tokens, tokens <= config.max_tokens), config, "too_long")]
    rows: list[dict[str, Any]] = []
    taken = 0
    for number, piece in enumerate(pieces(record.text, count, config.max_tokens)):
        rows.append(_row(record, number, piece, config, "unbreakable"))
        taken += "doc" in rows[-1]
        if taken and taken == config.pieces_per_document:
            break
    return rows


def _row(
    record: SourceText, number: int, piece: Piece, config: CorpusConfig, oversize: str
) -> dict[str, Any]:
    where = _place(record.where, number)
    if not piece.fits:
        detail = f"{piece.tokens} tokens, max_tokens is {config.max_tokens}"
        return {"reject": reject(oversize, where, detail, piece.text).to_json()}
    if piece.tokens < config.min_tokens:
        detail = f"{piece.tokens} tokens, min_tokens is {config.min_tokens}"
        return {"reject": reject("too_short", where, detail, piece.text).to_json()}
    doc = Doc(
        id=hash_text(piece.text),
        text=piece.text,
        source=record.source,
        tokens=piece.tokens,
        generated=record.generated,
        meta={**record.meta, "where": record.where, "piece": str(number)},
    )
    return {"doc": doc.to_json()}
