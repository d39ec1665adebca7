"""Build a FAISS index from a store: trained on a sample, added shard by shard, in parts on disk.

    trained.faiss        the trained, empty index
    part-NNNNNN.faiss    an index over some shards, part-NNNNNN.json names these
    index.json           factory, store, parts, recall: written last

Parts are whole or absent, so that a killed build goes on and a grown store gives further parts. The
ids inside are the documents' own.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3.errors import Jz3Error
from jz3.files import atomic_path, read_json, write_json
from jz3.index.config import IndexConfig
from jz3.index.search import RECALL, SearchIndex, best_of, import_faiss, signed
from jz3.index.vectors import BLOCK, Vectors
from jz3.seeding import rng
from jz3.stage import release_memory
from jz3.store import Shard

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = "jz3-index-1"
HNSW_LINKS = 1024
"""Bytes of graph a row, generously: what FAISS keeps beside the codes."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part's files and the shards in it, by number with their checksums."""

    path: Path
    shards: dict[int, str]


def build_index(
    vectors: Vectors,
    folder: Path,
    config: IndexConfig,
    *,
    queries: "torch.Tensor | None" = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Build an index over a store, or over those of several checkpoints, or add to it what they have gained.

    Args:
        vectors: of open stores; damaged shards are an error, since none may be lost.
        folder: of the index.
        config: factory, probes, sample, memory.
        queries: [Q, K] float32, on which recall is measured, as many as `config.recall_queries`;
            stored documents make up the number.
        seed: of the samples.
        advance: called with the number of documents just added.

    Returns:
        What index.json holds: `factory`, `documents`, `parts`, `bytes`, `recall_at_100`, ...

    Raises:
        ValueError: the factory string is wrong or needs more documents than there are.
        Jz3Error: a shard is damaged, the index doesn't fit on the disk, or the folder holds one of other
            settings.
    """
    faiss = import_faiss()
    if vectors.damaged:
        raise Jz3Error("; ".join(vectors.damaged))
    if not len(vectors):
        raise Jz3Error(f"{vectors.folder} holds no document; run the stage that writes it")
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "factory": config.factory,
        "store": vectors.identity,
        "k": vectors.k,
        "seed": seed,
    }
    trained = _train(faiss, vectors, folder, config, about)
    checksums = vectors.checksums()
    parts = _whole_parts(folder, checksums)
    covered = {number for part in parts for number in part.shards}
    advance(sum(s.rows for s in vectors.shards if s.number in covered))
    new = [shard for shard in vectors.shards if shard.number not in covered]
    number = 1 + max((int(part.path.stem.rpartition("-")[2]) for part in parts), default=-1)
    for shards in _pieces(new, int(config.memory * 2**30) // _row_bytes(faiss, trained, vectors.k)):
        part = folder / f"part-{number:06d}.faiss"
        made = _Part(part, {s.number: checksums[s.number] for s in shards})
        _write_part(faiss, folder, made, vectors, shards, advance)
        parts.append(made)
        number += 1
    sample = _recall_queries(vectors, config.recall_queries, queries, seed)
    k = min(RECALL, len(vectors))
    found = _search_parts(parts, config.probes, sample.numpy(), k)
    summary = {
        **about,
        "probes": config.probes,
        "documents": len(vectors),
        "parts": [part.path.name for part in parts],
        "bytes": sum(part.path.stat().st_size for part in parts),
        f"recall_at_{RECALL}": recall(found, vectors.scan(sample, k)[1]),
        "recall_queries": len(sample),
        "recall_target_queries": min(len(sample), 0 if queries is None else len(queries)),
        "faiss": faiss.__version__,
    }
    write_json(folder / "index.json", summary)
    return summary


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact scan's ids that were found, mean over queries.

    An id that stands for several equal texts counts as often as it comes.

    Args:
        found, exact: document ids [Q, k].
    """
    shared = [
        (Counter(f.tolist()) & Counter(e.tolist())).total() / len(e)
        for f, e in zip(found, exact, strict=True)
    ]
    return float(np.mean(shared))


def _search_parts(parts: Sequence[_Part], probes: int, queries: np.ndarray, k: int) -> np.ndarray:
    """Return the ids [Q, k] that the whole index finds, with one part at a time in memory."""
    return best_of([SearchIndex([part.path], probes).search(queries, k) for part in parts], k)[1]


def _train(faiss: Any, vectors: Vectors, folder: Path, config: IndexConfig, about: dict) -> Any:
    """Return the trained empty index, from its file if it is there."""
    path, note = folder / "trained.faiss", folder / "trained.json"
    if note.is_file() and path.is_file():
        found = read_json(note)
        different = [f"{k}: {found.get(k)!r} there, {v!r} now" for k, v in about.items() if found.get(k) != v]
        if different:
            raise Jz3Error(
                f"{folder} holds another index ({'; '.join(different)}); delete it or use another folder"
            )
        return faiss.read_index(str(path))
    index = _empty(faiss, config.factory, vectors.k)
    _check_space(folder, config.factory, len(vectors), _row_bytes(faiss, index, vectors.k), vectors.k)
    if not index.is_trained:
        rows = min(config.train, max(1, int(config.memory * 2**30) // (4 * vectors.k)), len(vectors))
        sample = _sample(vectors, rows, about["seed"])
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None and ivf.nlist > len(sample):
            raise ValueError(
                f"index.factory {config.factory!r} needs at least {ivf.nlist} documents to train, there are "
                f"{len(sample)}; use fewer cells or `Flat` (or raise index.train, index.memory)"
            )
        if ivf is not None and faiss.get_num_gpus():
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
        try:
            index.train(sample)
        except RuntimeError as error:
            raise ValueError(
                f"index.factory {config.factory!r} can't be trained on {len(sample)} documents "
                f"({_reason(error)}); use `Flat`"
            ) from error
        if ivf is not None:
            ivf.clustering_index = None
    _write(faiss, index, path)
    write_json(note, about)
    return index


def _write(faiss: Any, index: Any, path: Path) -> None:
    with atomic_path(path) as part:
        try:
            faiss.write_index(index, str(part))
        except RuntimeError as error:
            # What a full disk needs least is half a file.
            part.unlink(missing_ok=True)
            raise Jz3Error(
                f"{path} can't be written ({_reason(error)}); free some space and run the same command again, "
                "it goes on from here"
            ) from error


def _empty(faiss: Any, factory: str, k: int) -> Any:
    try:
        index = faiss.index_factory(k, factory, faiss.METRIC_INNER_PRODUCT)
        if faiss.try_extract_index_ivf(index) is None:
            # Only IVF indexes keep ids of one's own by themselves.
            index = faiss.index_factory(k, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"index.factory {factory!r} is no FAISS factory string ({_reason(error)})"
        ) from error
    return index


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200]


def _row_bytes(faiss: Any, index: Any, k: int) -> int:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        return ivf.code_size + 8
    try:
        return index.sa_code_size() + 8
    except RuntimeError:  # a graph, which keeps the numbers
        return 4 * k + HNSW_LINKS


def _check_space(folder: Path, factory: str, rows: int, row_bytes: int, k: int) -> None:
    """Refuse an index that would fill the disk, before the hours that it takes."""
    size, free = rows * row_bytes, shutil.disk_usage(folder).free
    if size > free:
        raise Jz3Error(
            f"index.factory {factory!r} takes {row_bytes:,} bytes for each of {rows:,} documents, {size / 1e9:,.1f} "
            f"GB, and the disk of {folder} has {free / 1e9:,.1f} GB left; take one of codes, such as IVF4096,SQ8 "
            f"({k + 8:,} bytes), or none: `jz3 query --exact` scans the store itself"
        )


def _sample(vectors: Vectors, rows: int, seed: int) -> np.ndarray:
    """Draw `rows` documents [rows, K] float32 from all shards, decoding only those."""
    picked = np.sort(rng(seed, "index", "sample").permutation(len(vectors))[:rows])
    out = np.empty((len(picked), vectors.k), np.float32)
    begin = 0
    for shard in vectors.shards:
        low, high = np.searchsorted(picked, [begin, begin + shard.rows])
        for start in range(low, high, BLOCK):
            stop = min(start + BLOCK, high)
            out[start:stop] = vectors.rows(shard, picked[start:stop] - begin)
        begin += shard.rows
    return out


def _whole_parts(folder: Path, there: dict[int, str]) -> list[_Part]:
    """Return the parts whose shards are there with the same checksums; others are deleted."""
    parts = []
    for note in sorted(folder.glob("part-*.json")):
        path = note.with_suffix(".faiss")
        table = read_json(note)
        shards = {int(n): digest for n, digest in table["shards"].items()}
        if path.is_file() and path.stat().st_size == table["bytes"] and shards.items() <= there.items():
            parts.append(_Part(path, shards))
        else:
            note.unlink()
            path.unlink(missing_ok=True)
    return parts


def _pieces(shards: Sequence[Shard], rows: int) -> list[list[Shard]]:
    """Cut the shards into runs of at most `rows` documents, or one shard."""
    pieces: list[list[Shard]] = []
    count = 0
    for shard in shards:
        if not pieces or count + shard.rows > rows:
            pieces.append([])
            count = 0
        pieces[-1].append(shard)
        count += shard.rows
    return pieces


def _write_part(
    faiss: Any,
    folder: Path,
    made: _Part,
    vectors: Vectors,
    shards: list[Shard],
    advance: Callable[[int], None],
) -> None:
    index = faiss.read_index(str(folder / "trained.faiss"))
    on_gpu = False
    if faiss.get_num_gpus() and faiss.try_extract_index_ivf(index) is not None:
        try:
            resources = faiss.StandardGpuResources()
            index, on_gpu = faiss.index_cpu_to_gpu(resources, 0, index), True
        except RuntimeError as error:  # it has no such index there, as PQ64, or no memory for it
            log.warning("FAISS adds to the index on the CPU: %s", error)
    ids: dict[int, np.ndarray] = {}
    for shard, start, values in vectors.blocks(shards):
        if shard.number not in ids:
            ids = {shard.number: signed(shard.id)}
        index.add_with_ids(values, ids[shard.number][start : start + len(values)])
        advance(len(values))
    if on_gpu:
        index = faiss.index_gpu_to_cpu(index)
    _write(faiss, index, made.path)
    write_json(
        made.path.with_suffix(".json"),
        {"shards": {str(n): digest for n, digest in made.shards.items()}, "bytes": made.path.stat().st_size},
    )
    del index
    release_memory()


def _recall_queries(
    vectors: Vectors, count: int, queries: "torch.Tensor | None", seed: int
) -> "torch.Tensor":
    import torch

    given = (
        torch.empty(0, vectors.k, dtype=torch.float32) if queries is None else queries[:count].float().cpu()
    )
    missing = count - len(given)
    if not missing:
        return given
    documents = torch.from_numpy(_sample(vectors, min(missing, len(vectors)), seed))
    return torch.cat([given, documents])


def describe(built: dict[str, Any]) -> str:
    """Return a line about a built index, from its index.json."""
    of_targets = built["recall_target_queries"]
    stored = built["recall_queries"] - of_targets
    return (
        f"{built['factory']}, {built['documents']:,} documents, recall@100 {built['recall_at_100']:.3f} against the "
        f"exact scan ({of_targets} target queries, {stored} documents)"
    )
