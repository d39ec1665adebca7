"""The streaming scan over codes against its bound and its peers: `python bench/score_topk.py [--json FILE]`.

The bound is the larger of reading the codes once at the speed of a plain read of them, and of one product of int8
per code and query (2 N K Q operations) at the speed of a loop in registers; both are measured in this process, as
are the peers: torch's bfloat16 product with topk, and faiss.IndexFlatIP, both on the decoded vectors (decoding is
not counted). All are timed in turn, round by round, because what a shared machine gives changes from one to the next:
ratios and fractions are of the same round. What is printed are medians of the rounds.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from jz3 import backend
from jz3.files import write_json
from jz3.ops.encode import CODEBOOKS, decode, encode, row_bytes
from jz3.ops.score_topk import score_topk

FEW = (1, 2, 4, 8)
BLOCK = 8192
SPINNING = 0.1
"""Seconds after which a peer's threads no longer wait on the processors."""


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield two tasks at the default number of coordinates; decoding is not counted against torch."""
    rows, dim, k = (1 << 20 if device == "cuda" else 1 << 15), 2048, 100
    mean, scale = torch.zeros(dim, device=device), torch.ones(dim, device=device)
    for kind in CODEBOOKS:
        codes = torch.randint(1, 256, (rows, row_bytes(kind, dim)), dtype=torch.uint8, device=device)
        for count in (2, 16):
            queries = torch.randn(count, dim, device=device)
            decoded = decode(codes, mean, scale, kind)

            def plain(queries=queries, decoded=decoded) -> torch.Tensor:
                return (queries @ decoded.T).topk(k).values

            yield {
                "name": f"{kind} N={rows} tasks={count}",
                "rows": rows,
                "dim": dim,
                "dtype": kind,
                "run": lambda codes=codes, queries=queries, kind=kind: score_topk(
                    codes, mean, scale, kind, queries, k
                )[0],
                "plain": plain,
                "bytes": codes.numel(),
                "flops": 2 * rows * dim * count,
                # The vectors are the same whatever the codes.
                "peers": {"faiss Flat": lambda q=queries, x=decoded: flat_search(x, q, k)}
                if kind == "int8"
                else {},
            }


def seconds_of(function: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], Any]) -> float:
    """Return by how many bytes a call raises the process's resident memory at most (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = Path("/proc/self/status").read_text()
    function()
    after = Path("/proc/self/status").read_text()
    held, most = (
        int(text.split(field)[1].split()[0]) for text, field in ((before, "VmRSS:"), (after, "VmHWM:"))
    )
    return (most - held) * 1024


def recall(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the mean share of the expected ids that were found."""
    hits = sum(len(set(f) & set(e)) for f, e in zip(found.tolist(), expected.tolist(), strict=True))
    return hits / expected.numel()


def flat_search(vectors: torch.Tensor, queries: torch.Tensor, k: int) -> Callable[[], Any]:
    """Return a search by faiss.IndexFlatIP of the vectors, on the GPU if they are there.

    Raises:
        ImportError: faiss isn't installed.
        AttributeError: the vectors are on a GPU, and faiss is its build for CPUs.
    """
    import faiss

    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    resources: Any = None
    if vectors.is_cuda:
        resources = faiss.StandardGpuResources()
        index = faiss.index_cpu_to_gpu(resources, vectors.device.index or 0, index)
    else:
        faiss.omp_set_num_threads(backend.threads())
    for begin in range(0, len(vectors), BLOCK):
        index.add(vectors[begin : begin + BLOCK].cpu().numpy())
    asked = queries.cpu().numpy()
    return lambda resources=resources: index.search(asked, k)  # the index doesn't keep them alive


def measure(kind: str, rows: int, dim: int, count: int, k: int, repeats: int) -> dict[str, Any]:
    """Time one kind of codes against its bound and its peers."""
    mean, scale = torch.zeros(dim), torch.ones(dim)
    codes = torch.empty(rows, row_bytes(kind, dim), dtype=torch.uint8)
    for begin in range(0, rows, BLOCK):
        block = codes[begin : begin + BLOCK]
        block.copy_(encode(torch.randn(len(block), dim), mean, scale, kind))
    queries = torch.randn(count, dim)

    def scan(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return score_topk(codes, mean, scale, kind, some, k)

    memory = peak_memory(lambda: scan(queries))
    module, threads = backend.extension(), backend.threads()
    vectors = decode(codes, mean, scale, kind)
    expected = (queries @ vectors.T).topk(k).indices
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: module.read_all(codes.data_ptr(), codes.numel(), threads),
        "all": lambda: scan(queries),
        **{str(q): lambda q=q: scan(queries[:q]) for q in FEW},
    }
    with contextlib.suppress(ImportError):
        calls["faiss"] = flat_search(vectors, queries, k)
    narrow, few_bits = vectors.bfloat16(), queries.bfloat16()
    del vectors
    calls["torch"] = lambda: (few_bits @ narrow.T).topk(k)
    for call in calls.values():
        call()
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        time.sleep(SPINNING)
        operations = module.peak_int8(-1, threads, 0.2)
        seconds = {name: seconds_of(call) for name, call in calls.items()}
        product = 2 * rows * dim * count / operations
        rounds.append({**seconds, "product": product, "bound": max(seconds["read"], product)})

    def median(over: str, under: str = "") -> float:
        return statistics.median(each[over] / (each[under] if under else 1) for each in rounds)

    has_flat = "faiss" in calls
    return {
        "seconds": median("all"),
        "seconds_of_few": {q: median(str(q)) for q in FEW},
        "seconds_torch_bf16": median("torch"),
        "seconds_faiss_flat": median("faiss") if has_flat else None,
        "peak_int8_operations": 2 * rows * dim * count / median("product"),
        "read_bytes_per_second": codes.numel() / median("read"),
        "memory_bytes": memory,
        "fraction_of_bound": median("bound", "all"),
        "ratio_vs_torch_bf16": median("torch", "all"),
        "ratio_vs_faiss_flat": median("faiss", "all") if has_flat else None,
        "recall_at_100": recall(scan(queries)[1], expected),
        "fraction_of_bandwidth": {q: median("read", str(q)) for q in FEW},
    }


def summary(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the worst kind's numbers under their names, and how much faster 4-bit codes are than int8 if both are."""
    out: dict[str, Any] = {}
    for name in ("fraction_of_bound", "ratio_vs_torch_bf16", "ratio_vs_faiss_flat", "recall_at_100"):
        values = [kind[name] for kind in kinds.values()]
        out[name] = None if None in values else min(values)
    out["fraction_of_bandwidth"] = {
        q: min(kind["fraction_of_bandwidth"][q] for kind in kinds.values()) for q in FEW
    }
    if {"int8", "4bit"} <= kinds.keys():
        int8, few_bits = kinds["int8"]["seconds_of_few"], kinds["4bit"]["seconds_of_few"]
        out["ratio_4bit_vs_int8"] = {q: int8[q] / few_bits[q] for q in FEW}
    return out


def main() -> None:
    """Parse the arguments, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="int8,4bit", help=f"of {', '.join(CODEBOOKS)}")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    features = backend.extension().cpu_features()
    machine = f"{platform.processor() or platform.machine()}, {backend.threads()} threads, {features}"
    rows, dim, queries, k = arguments.rows, arguments.dim, arguments.queries, arguments.k
    sizes = {"rows": rows, "dim": dim, "queries": queries, "k": k}
    print(machine, *(f"{name}={size}" for name, size in sizes.items()))
    kinds = {}
    for kind in arguments.kinds.split(","):
        kinds[kind] = measure(kind, rows, dim, queries, k, arguments.repeats)
        print(kind, json.dumps(kinds[kind]))
    result = {"machine": machine, **sizes, **summary(kinds), "kinds": kinds}
    print(json.dumps({name: value for name, value in result.items() if name != "kinds"}, indent=2))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
