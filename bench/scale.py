"""The store and the index at size: `python bench/scale.py --documents 2000000 --out DIR [--json FILE]`.

Synthetic features (2,048 coordinates in 4 bits, 1 KB a document, topics plus noise) are written, verified,
scanned for 64 queries, a set of 2,000 is chosen among the best 20,000, all are indexed (IVF-SQ8 in parts on
disk) and queried, for 100,000 documents and then for all; the latter's writing and indexing are killed
half-way and run again. Every step runs in a process of its own, whose memory is sampled: RssAnon is what it
allocated, RSS also counts the pages of mapped files, which the kernel takes back when it needs them. What
reads only is repeated for SECONDS, so that the small size, too, is measured at work and not while modules are
loaded. 2,000,000 documents take about 2.2 GB for the store and 4.2 GB for the index.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

K, BITS, SHARD = 2048, 4, 2048
WINDOW = 512
"""Documents whose features are made and coded together, as in `jz3 score`."""
TOPICS = 256
STEPS = ("write", "open", "verify", "scan", "choose", "index", "query")
COMPARED = ("write", "verify", "scan", "index")
"""Steps whose time grows with the documents."""
SHOWN = (
    *("there_before", "coding_us", "disk_us", "chosen", "candidates", "recall_at_100", "parts"),
    *("open_ms", "first_ms", "p50_ms", "p99_ms"),
)
POLL, LOOK = 0.02, 0.2
"""Seconds between looks at a child's memory, and at whether it is to be killed."""
SECONDS = 2.0


@lru_cache(maxsize=1)
def topics() -> Any:
    """Return the topics' centres [TOPICS, K]."""
    import torch

    return torch.randn(TOPICS, K, generator=torch.Generator().manual_seed(0))


def features(first: int, rows: int) -> Any:
    """Return the unit-norm features [rows, K] of the documents from `first` on, the same in every process."""
    import torch

    own = torch.Generator().manual_seed(1 + first)
    topic = torch.randint(TOPICS, (rows,), generator=own)
    values = torch.randn(rows, K, generator=own).mul_(1.5).add_(topics()[topic])
    return values.div_(values.norm(dim=1, keepdim=True))


def queries(count: int) -> Any:
    """Return features of documents that aren't in the store."""
    return features(1 << 40, count)


def repeated(work: Callable[[], None]) -> tuple[int, float]:
    """Work for SECONDS and at least once; return how often and how long."""
    begin, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begin < SECONDS:
        work()
        count += 1
    return count, time.perf_counter() - begin


def coding() -> Any:
    """Return the codes' mean and scale."""
    import torch

    from jz3.store import Coding

    return Coding(torch.zeros(K), torch.full((K,), K**-0.5), BITS)


def write(folder: Path, documents: int) -> dict[str, Any]:
    """Write what is missing of the store."""
    import torch

    from jz3.store import StoreInfo, encode_rows, has_shard, open_store, write_codes

    info = StoreInfo(kind="synthetic", k=K, bits=BITS, model_hash="-", projection_hash="-", reduction="mean")
    open_store(folder / "store", info)
    shape = coding()
    made, coded, written = 0.0, 0.0, 0.0
    rows = skipped = 0
    for number, start in enumerate(range(0, documents, SHARD)):
        count = min(SHARD, documents - start)
        if has_shard(folder / "store", number):
            skipped += count
            continue
        codes = []
        for first in range(start, start + count, WINDOW):
            begin = time.perf_counter()
            values = features(first, min(WINDOW, start + count - first))
            middle = time.perf_counter()
            codes.append(encode_rows(values, shape))
            made, coded = made + middle - begin, coded + time.perf_counter() - middle
        begin = time.perf_counter()
        ids = [f"{(start + i) * 0x9E3779B97F4A7C15 % 2**64:016x}" for i in range(count)]
        write_codes(folder / "store", number, ids, torch.cat(codes), torch.ones(count))
        written += time.perf_counter() - begin
        rows += count
    # The disk is waited for after every shard (fsync), so that its own swings show in the second.
    parts = {"coding_us": coded / max(rows, 1) * 1e6, "disk_us": written / max(rows, 1) * 1e6}
    return {
        "documents": rows,
        "there_before": skipped,
        "making_seconds": made,
        "seconds": coded + written,
        **parts,
    }


def open_(folder: Path, documents: int) -> dict[str, Any]:
    """Open the store."""
    from jz3.store import Store

    begin = time.perf_counter()
    store = Store(folder / "store")
    seconds = time.perf_counter() - begin
    assert len(store) == documents and not store.damaged
    return {"shards": len(store.shards), "seconds": seconds}


def verify(folder: Path, documents: int) -> dict[str, Any]:
    """Read every byte and compare checksums."""
    from jz3.store import verify as check

    def work() -> None:
        found = check(folder / "store")
        assert found.rows == documents and not found.damaged and not found.duplicate_count

    count, seconds = repeated(work)
    return {"documents": count * documents, "seconds": seconds}


def scan(folder: Path, documents: int) -> dict[str, Any]:
    """Score 64 queries exactly and keep the best 100 of each."""
    from jz3.store import Store
    from jz3.store import scan as exact

    store = Store(folder / "store")
    wanted = queries(64)

    def work() -> None:
        scores, ids = exact(store, coding(), wanted, 100)
        assert ids.shape == (64, min(100, documents)) and bool(scores.isfinite().all())

    count, seconds = repeated(work)
    return {"documents": count * documents, "queries": 64, "seconds": seconds}


def choose(folder: Path, documents: int) -> dict[str, Any]:
    """Choose a set for one target of 64 queries: the exact scan keeps candidates, `matching` takes of these."""
    from jz3.selection.two_stage import choose_set
    from jz3.store import Store

    store = Store(folder / "store")
    candidates = min(20_000, documents)
    begin = time.perf_counter()
    ids = choose_set(store, coding(), queries(64), candidates // 10, "matching", candidates)
    assert len(set(ids.tolist())) == candidates // 10
    seconds = time.perf_counter() - begin
    return {"documents": documents, "chosen": len(ids), "candidates": candidates, "seconds": seconds}


def config(documents: int) -> Any:
    """Return the index's settings: fewer cells for little data, parts of fewer than 100,000 documents."""
    from jz3.index.config import IndexConfig

    cells = 512 if documents >= 50_000 else max(16, documents // 100)
    return IndexConfig(factory=f"IVF{cells},SQ8", probes=16, recall_queries=32, memory=0.18)


def index(folder: Path, documents: int) -> dict[str, Any]:
    """Build what is missing of the index and measure its recall."""
    from jz3.index.build import build_index
    from jz3.index.vectors import Member, Vectors
    from jz3.store import Store

    times, added = [], []

    def advance(count: int) -> None:
        times.append(time.perf_counter())
        added.append(count)

    # The first call comes after the training, with what was there before.
    built = build_index(
        Vectors([Member(Store(folder / "store"), coding())]),
        folder / "index",
        config(documents),
        queries=queries(32),
        advance=advance,
    )
    keep = ("factory", "probes", "bytes", "recall_at_100", "recall_queries")
    return {
        "documents": sum(added[1:]),
        "there_before": added[0],
        "parts": len(built["parts"]),
        "seconds": times[-1] - times[0],
        **{key: built[key] for key in keep},
    }


def query(folder: Path, documents: int) -> dict[str, Any]:
    """Search one query at a time; the first touches pages that no one has read."""
    from jz3.index.search import SearchIndex
    from jz3.store import read_info

    settings = config(documents)
    begin = time.perf_counter()
    opened = SearchIndex.open(folder / "index", read_info(folder / "store").identity(), settings.probes)
    loaded = time.perf_counter() - begin
    times = []
    for row in queries(100).numpy():
        begin = time.perf_counter()
        opened.search(row[None], 100)
        times.append(time.perf_counter() - begin)
    first, later = times[0], sorted(times[1:])
    return {
        "documents": documents,
        "open_ms": loaded * 1e3,
        "first_ms": first * 1e3,
        "p50_ms": later[len(later) // 2] * 1e3,
        "p99_ms": later[int(len(later) * 0.99)] * 1e3,
        "seconds": sum(times),
    }


def memory(pid: int) -> dict[str, int]:
    """Return a process's peak RSS so far and its present RssAnon, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    names = {"VmHWM": "rss", "RssAnon": "rss_anon"}
    return {name: int(fields[key].split()[0]) * 1024 for key, name in names.items() if key in fields}


def child(step: str, folder: Path, documents: int, kill_when: Any = None) -> dict[str, Any]:
    """Run a step in a process of its own.

    Args:
        step: of STEPS.
        folder: with store and index.
        documents: how many.
        kill_when: called now and then; when it says so the child is killed with SIGKILL.

    Returns:
        What the step reports, or that it was killed; its peak memory and whole time.
    """
    command = [sys.executable, __file__, "--step", step, "--documents", str(documents), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"rss": 0, "rss_anon": 0}
    begin, killed = time.perf_counter(), False
    looked = begin
    while process.poll() is None:
        for key, value in memory(process.pid).items():
            peak[key] = max(peak[key], value)
        if kill_when is not None and time.perf_counter() - looked > LOOK:
            looked = time.perf_counter()
            if kill_when():
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed = True
                break
        time.sleep(POLL)
    text = process.stdout.read() if process.stdout else ""
    if process.returncode and not killed:
        raise SystemExit(f"step {step} failed with status {process.returncode}")
    found = {"killed": True} if killed else json.loads(text.splitlines()[-1])
    wall = time.perf_counter() - begin
    return {**found, "wall_seconds": wall, "peak_rss": peak["rss"], "peak_rss_anon": peak["rss_anon"]}


def measure(folder: Path, documents: int, kill: bool) -> dict[str, Any]:
    """Run all steps over a new folder; if `kill`, `write` and `index` are killed once and run again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store, parts = folder / "store", folder / "index"
    when = {
        "write": lambda: len(list(store.glob("*.json"))) > documents // SHARD // 2,
        "index": lambda: any(parts.glob("part-*.json")),
    }
    results: dict[str, Any] = {}
    for step in STEPS:
        before: dict[str, Any] = {}
        if kill and step in when:
            results[f"{step}_killed"] = before = child(step, folder, documents, when[step])
            say(f"{step}: {'killed' if 'killed' in before else 'was too fast to kill'}, run again")
        results[step] = row = child(step, folder, documents)
        for key in ("peak_rss", "peak_rss_anon"):
            row[key] = max(row[key], before.get(key, 0))
        rate = f", {throughput(row):.0f} documents/s" if step in COMPARED else ""
        say(
            f"{step}: {row['seconds']:.2f} s{rate} (whole process {row['wall_seconds']:.1f} s), "
            f"RSS {row['peak_rss'] / 2**20:.0f} MiB, anonymous {row['peak_rss_anon'] / 2**20:.0f} MiB"
        )
        for key in SHOWN:
            if key in row:
                say(f"    {key} {row[key]:.4g}")
    results["bytes"] = {
        name: sum(p.stat().st_size for p in path.iterdir())
        for name, path in (("store", store), ("index", parts))
    }
    return results


def throughput(row: dict[str, Any]) -> float:
    """Return documents per second; 0 if the run before the kill left nothing to do."""
    return row["documents"] / row["seconds"] if row["seconds"] else 0.0


def compare(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """Return per step how memory and throughput changed from the small size to the large one."""
    table = {}
    for step in COMPARED:
        table[step] = {
            "throughput": throughput(large[step]) / throughput(small[step]),
            "rss": large[step]["peak_rss"] / small[step]["peak_rss"],
            "rss_anon": large[step]["peak_rss_anon"] / small[step]["peak_rss_anon"],
        }
    return table


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main() -> None:
    """Measure a tenth (at most 100,000 documents) first, then all, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--small", type=int, help="the smaller size; 100,000 by default, 0 for none")
    parser.add_argument("--out", type=Path, required=True, help="a folder for store and index; emptied first")
    parser.add_argument("--json", type=Path, help="also write every number here")
    parser.add_argument("--keep", action="store_true", help="leave store and index there")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        function = {**globals(), "open": open_}[arguments.step]
        print(json.dumps(function(arguments.out, arguments.documents)), flush=True)
        return
    small = min(100_000, arguments.documents // 10) if arguments.small is None else arguments.small
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    }
    for size in sorted({size for size in (small, arguments.documents) if size}):
        say(f"== {size} documents")
        result[str(size)] = measure(arguments.out / str(size), size, kill=size == arguments.documents)
        if not arguments.keep:
            shutil.rmtree(arguments.out / str(size))
    if small and small != arguments.documents:
        result["change"] = compare(result[str(small)], result[str(arguments.documents)])
        for step, row in result["change"].items():
            say(f"{step}: " + ", ".join(f"{key} x {value:.2f}" for key, value in row.items()))
    if arguments.json:
        from jz3.files import write_json

        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
