"""Rows to packs: tokens and labels, reading order, cutting, packing by best fit or to equal size."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jz3.seeding import rng
from jz3.training.config import TrainSettings

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

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

    documents: list[Document] = []
    dropped: Counter[str] = Counter()
    for start in range(0, len(rows), CHUNK):
        usable: list[tuple[str, str]] = []
        for prompt, completion in rows[start : start + CHUNK]:
            if not completion.strip():
                dropped["empty_completion"] += 1
            elif not (_is_unicode(prompt) and _is_unicode(completion)):
                dropped["bad_unicode"] += 1
            else:
                usable.append((prompt, completion))
        if not usable:
            continue
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
    phases: Sequence[Phase], tokenizer: "PreTrainedTokenizerBase", settings: TrainSettings, seed: int
) -> Packs:
    """Tokenise, shuffle, cut and pack all phases.

    Every phase is packed by itself, so that the order of phases is the order of packs. Within a
    phase and epoch the rows are shuffled, packed by best fit, and the packs shuffled, all by the seed.

    Args:
        phases: in reading order.
        tokenizer: the model's.
        settings: max_length, overlong, epochs and max_tokens are used.
        seed: the run's seed.

    Returns:
        The packs; their dataset is empty if no row was usable.
    """
    from datasets import concatenate_datasets

    parts: list[Dataset] = []
    result = Packs(dataset=_dataset([]), phase=[])
    budget = settings.max_tokens or None
    for phase in phases:
        documents, dropped = encode(phase.rows, tokenizer)
        documents, split_rows = _fit(documents, settings, dropped)
        counts = Counter(rows=len(phase.rows), split_rows=split_rows)
        even: list[Document] = []
        read: list[Document] = []
        before = len(parts)
        for epoch in range(settings.epochs):
            order = rng(seed, "order", phase.name, epoch).permutation(len(documents))
            chosen = [documents[i] for i in order]
            if budget is not None:
                within = _within(chosen, budget)
                left = budget - sum(len(d.ids) for d in chosen[:within])
                cut = [Document(ids=d.ids[:left], target=d.target) for d in chosen[within : within + 1]]
                dropped["over_budget"] += len(chosen) - within
                budget = 0 if within < len(chosen) else left
                chosen = chosen[:within]
                if settings.packing == "even" and left > 0 and cut:
                    chosen.append(cut[0])
                    dropped["over_budget"] -= 1
            counts["documents"] += len(chosen)
            if settings.packing == "even":
                even += chosen
            elif chosen:
                packed = _best_fit(chosen, settings.max_length)
                parts.append(packed.select(rng(seed, "packs", phase.name, epoch).permutation(len(packed))))
                read += chosen
        if even:
            filled = _fill(even, settings.max_length)
            parts.append(_filled(filled))
            read = [piece for pieces in filled for piece in pieces]
        counts["packs"] = sum(map(len, parts[before:]))
        counts["tokens"] = sum(len(d.ids) for d in read)
        counts["targets"] = sum(max(len(d.ids) - d.target, 0) for d in read)
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


def _within(documents: list[Document], budget: int) -> int:
    """Return how many of the first documents fit the budget of tokens."""
    total = 0
    for number, document in enumerate(documents):
        total += len(document.ids)
        if total > budget:
            return number
    return len(documents)


def _labels(document: Document) -> "np.ndarray":
    labels = document.ids.copy()
    labels[: document.target] = IGNORED
    return labels


def _dataset(documents: list[Document]) -> "Dataset":
    """Build a dataset in chunks, as the offsets of an Arrow list of int32 end at 2^31 values."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    def chunks() -> Iterator[Any]:
        for start in range(0, len(documents), CHUNK):
            part = documents[start : start + CHUNK]
            offsets = np.cumsum([0] + [len(d.ids) for d in part], dtype=np.int32)
            lists = [
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(columns)))
                for columns in ([d.ids for d in part], [_labels(d) for d in part])
            ]
            yield pa.record_batch(lists, schema=schema)

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    return Dataset(pa.Table.from_batches(chunks(), schema=schema))


def _best_fit(documents: list[Document], max_length: int) -> "Dataset":
    """Pack with TRL's best-fit-decreasing; no document is longer than a pack, so nothing is cut."""
    from trl import pack_dataset

    return pack_dataset(_dataset(documents), max_length, "bfd", {"batch_size": CHUNK})


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


def _filled(packs: list[list[Document]]) -> "Dataset":
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    columns = {
        "input_ids": [np.concatenate([d.ids for d in pack]) for pack in packs],
        "labels": [np.concatenate([_labels(d) for d in pack]) for pack in packs],
        "seq_lengths": [np.array([len(d.ids) for d in pack], np.int32) for pack in packs],
    }
    return Dataset(pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name, rows in columns.items()}))
