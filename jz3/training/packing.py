"""Rows to packs: tokens and labels, reading order, cutting, packing by best fit or to equal size."""

import itertools
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jz3.seeding import rng
from jz3.training.config import TrainSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is read but not predicted."""
CHUNK = 1000
"""Texts that are tokenised, and packed together, at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the training mixture; phases are read one after the other."""

    name: str
    rows: Sequence[tuple[str, str]]
    """(prompt, completion); with an empty prompt every token of the text is predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The tokens of a row, or of a piece of one."""

    ids: "np.ndarray"
    """int32."""
    target: int
    """Where the predicted tokens begin; at least 1, as nothing comes before the first token."""


@dataclass(slots=True, kw_only=True)
class Packs:
    """All packs of a run in reading order, and what became of the rows."""

    dataset: "Dataset"
    """Columns input_ids, labels and seq_lengths (the lengths of the documents in a pack)."""
    phase: list[str]
    """The phase of each pack."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per phase: rows given, documents read (epochs counted), split rows, packs, tokens, targets."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per phase: rows left out, by reason."""


def encode(
    rows: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Document], Counter[str]]:
    """Tokenise rows as prompt + completion + end token.

    The prompt's tokens are exactly those of the prompt alone, as it is given at inference; the
    completion is tokenised in its context where that leaves them so, else by itself.

    Args:
        rows: (prompt, completion).
        tokenizer: the model's; it must have an end token.

    Returns:
        One Document per usable row, in order, and the number of unusable rows by reason:
        `empty_completion`, `bad_unicode` (lone surrogates).
    """
    import numpy as np

    end = tokenizer.eos_token_id
    ends_itself = tokenizer("a")["input_ids"][-1] == end

    def tokenize(texts: list[str]) -> list[list[int]]:
        tokens = tokenizer(texts)["input_ids"]
        return [ids[:-1] for ids in tokens] if ends_itself else tokens

    usable: list[tuple[str, str]] = []
    dropped: Counter[str] = Counter()
    for prompt, completion in rows:
        if not completion.strip():
            dropped["empty_completion"] += 1
        elif not (_is_unicode(prompt) and _is_unicode(completion)):
            dropped["bad_unicode"] += 1
        else:
            usable.append((prompt, completion))
    if not usable:
        return [], dropped
    documents: list[Document] = []
    prompts = tokenize([p for p, _ in usable])
    wholes = tokenize([p + c for p, c in usable])
    for (_, completion), prompt_ids, ids in zip(usable, prompts, wholes, strict=True):
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids = np.array([*ids, end], dtype=np.int32)
        documents.append(Document(ids=ids, target=max(1, len(prompt_ids))))
    return documents, dropped


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def split(document: Document, max_length: int) -> list[Document]:
    """Cut a document into pieces of at most `max_length` tokens that predict the same tokens.

    A piece begins with the last token of the one before, as context only, so that every predicted
    token of the document is predicted in exactly one piece. Pieces that predict nothing (within a
    long prompt) are left out.
    """
    pieces = []
    for start in range(0, max(len(document.ids) - 1, 1), max_length - 1):
        ids = document.ids[start : start + max_length]
        target = max(1, document.target - start)
        if target < len(ids):
            pieces.append(Document(ids=ids, target=target))
    return pieces


def pack(
    phases: Sequence[Phase],
    tokenizer: "PreTrainedTokenizerBase",
    settings: TrainSettings,
    seed: int,
    folder: Path,
) -> Packs:
    """Tokenise, shuffle, cut and pack all phases.

    Every phase is packed by itself, so that the order of phases is the order of packs. Within a
    phase and epoch the rows are shuffled, packed by best fit, and the packs shuffled, all by the seed.

    Args:
        phases: in reading order.
        tokenizer: the model's.
        settings: max_length, overlong, epochs and max_tokens are used.
        seed: the run's seed.
        folder: where the tokens and the packs lie, so that memory holds some bytes a row and not its tokens.

    Returns:
        The packs, which are read from the folder; their dataset is empty if no row was usable.
    """
    import numpy as np
    from datasets import Dataset, concatenate_datasets

    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Dataset] = []
    result = Packs(dataset=Dataset.from_dict({}), phase=[])
    budget = settings.max_tokens or None
    for number, phase in enumerate(phases):
        dropped: Counter[str] = Counter()
        documents, split_rows = _stored(phase, tokenizer, settings, dropped, folder / f"{number}.tokens")
        counts = Counter(rows=len(phase.rows), split_rows=split_rows)
        even: list[Document] = []
        before = len(parts)
        for epoch in range(settings.epochs):
            chosen = rng(seed, "order", phase.name, epoch).permutation(len(documents))
            if budget is not None:
                read = np.cumsum(documents.lengths[chosen])
                within = int(np.searchsorted(read, budget, side="right"))
                left = budget - int(read[within - 1] if within else 0)
                cut = [documents[i] for i in chosen[within : within + 1]]
                dropped["over_budget"] += len(chosen) - within
                budget = 0 if within < len(chosen) else left
                chosen = chosen[:within]
            else:
                left, cut = 0, []
            counts["documents"] += len(chosen)
            if settings.packing == "even":
                even += [documents[i] for i in chosen]
                if left > 0 and cut:
                    even.append(Document(ids=cut[0].ids[:left], target=cut[0].target))
                    dropped["over_budget"] -= 1
                    counts["documents"] += 1
            elif len(chosen):
                order = map(documents.__getitem__, chosen)
                packed = _best_fit(order, settings.max_length, folder / f"{number}.{epoch}.arrow")
                parts.append(packed.select(rng(seed, "packs", phase.name, epoch).permutation(len(packed))))
                counts["tokens"] += int(documents.lengths[chosen].sum())
                counts["targets"] += int((documents.lengths - documents.targets)[chosen].sum())
        if filled := _fill(even, settings.max_length):
            parts.append(_written(folder / f"{number}.arrow", map(_filled, _parts(filled))))
            pieces = [piece for pieces in filled for piece in pieces]
            counts["tokens"] = sum(len(piece.ids) for piece in pieces)
            counts["targets"] = sum(max(len(piece.ids) - piece.target, 0) for piece in pieces)
        counts["packs"] = sum(map(len, parts[before:]))
        result.phase += [phase.name] * counts["packs"]
        result.counts[phase.name] = {
            key: counts[key] for key in ("rows", "documents", "split_rows", "packs", "tokens", "targets")
        }
        result.dropped[phase.name] = {k: n for k, n in sorted(dropped.items()) if n}
        for reason, count in result.dropped[phase.name].items():
            log.warning("%s: %d rows left out: %s", phase.name, count, reason)
    if parts:
        result.dataset = concatenate_datasets(parts)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Documents whose tokens lie in a file."""

    tokens: "np.ndarray"
    ends: "np.ndarray"
    lengths: "np.ndarray"
    targets: "np.ndarray"

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> Document:
        ids = self.tokens[self.ends[i] - self.lengths[i] : self.ends[i]]
        return Document(ids=ids, target=int(self.targets[i]))


def _stored(
    phase: Phase,
    tokenizer: "PreTrainedTokenizerBase",
    settings: TrainSettings,
    dropped: Counter[str],
    path: Path,
) -> tuple[_Stored, int]:
    """Tokenise the rows of a phase into a file; return the documents and how many rows were split."""
    import numpy as np

    lengths, targets, split_rows = array("i"), array("i"), 0
    with open(path, "wb") as file:
        for start in range(0, len(phase.rows), CHUNK):
            documents, unusable = encode(phase.rows[start : start + CHUNK], tokenizer)
            dropped.update(unusable)
            documents, long = _fit(documents, settings, dropped)
            split_rows += long
            for document in documents:
                file.write(document.ids.tobytes())
                lengths.append(len(document.ids))
                targets.append(document.target)
    # An empty file can't be mapped.
    tokens = np.asarray(np.memmap(path, np.int32, "r") if lengths else np.empty(0, np.int32))
    sizes = np.array(lengths, np.int64)
    return _Stored(tokens=tokens, ends=sizes.cumsum(), lengths=sizes, targets=np.array(targets)), split_rows


def _fit(
    documents: list[Document], settings: TrainSettings, dropped: "Counter[str]"
) -> tuple[list[Document], int]:
    fitting: list[Document] = []
    long = 0
    for document in documents:
        if len(document.ids) <= settings.max_length:
            pieces = split(document, settings.max_length)
        elif settings.overlong == "reject":
            dropped["overlong"] += 1
            continue
        else:
            long += 1
            pieces = split(document, settings.max_length)
        fitting += pieces
    return fitting, long


def _labels(document: Document) -> "np.ndarray":
    labels = document.ids.copy()
    labels[: document.target] = IGNORED
    return labels


def _parts(items: Iterable[T]) -> Iterator[list[T]]:
    """Give so few at a time that the offsets of an Arrow list, which end at 2^31 values, suffice."""
    rest = iter(items)
    while part := list(itertools.islice(rest, CHUNK)):
        yield part


def _record(columns: dict[str, list["np.ndarray"]]) -> "pa.RecordBatch":
    import numpy as np
    import pyarrow as pa

    lists = []
    for values in columns.values():
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        lists.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values))))
    return pa.record_batch(lists, names=list(columns))


def _written(path: Path, records: Iterable["pa.RecordBatch"]) -> "Dataset":
    """Write a dataset, of one record batch at least, to a file and map it."""
    import pyarrow as pa
    from datasets import Dataset

    rest = iter(records)
    first = next(rest)
    with pa.ipc.new_stream(str(path), first.schema) as stream:
        for record in itertools.chain([first], rest):
            stream.write_batch(record)
    return Dataset.from_file(str(path))


def _best_fit(documents: Iterable[Document], max_length: int, path: Path) -> "Dataset":
    """Pack with TRL's best-fit-decreasing; no document is longer than a pack, so nothing is cut."""
    from trl import pack_dataset

    plain = path.with_suffix(".plain")
    records = (
        _record({"input_ids": [d.ids for d in part], "labels": [_labels(d) for d in part]})
        for part in _parts(documents)
    )
    settings = {"batch_size": CHUNK, "cache_file_name": str(path), "load_from_cache_file": False}
    packed = pack_dataset(_written(plain, records), max_length, "bfd", settings)
    plain.unlink()
    return packed


def _fill(documents: list[Document], max_length: int) -> list[list[Document]]:
    """Fill packs in order, cutting documents where a pack ends: every pack but the last is full.

    A pack that predicts nothing, such as the single token that a budget leaves over, is left out: a
    step over it alone would have no loss.
    """
    packs: list[list[Document]] = []
    room = 0
    for document in documents:
        start = 0
        while start < len(document.ids):
            if not room:
                packs.append([])
                room = max_length
            ids = document.ids[start : start + room]
            packs[-1].append(Document(ids=ids, target=max(1, document.target - start)))
            start += len(ids)
            room -= len(ids)
    return [pack for pack in packs if any(d.target < len(d.ids) for d in pack)]


def _filled(packs: list[list[Document]]) -> "pa.RecordBatch":
    import numpy as np

    return _record(
        {
            "input_ids": [np.concatenate([d.ids for d in pack]) for pack in packs],
            "labels": [np.concatenate([_labels(d) for d in pack]) for pack in packs],
            "seq_lengths": [np.array([len(d.ids) for d in pack], np.int32) for pack in packs],
        }
    )
