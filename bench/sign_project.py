"""The sign projection against traker's BasicProjector: `python bench/sign_project.py [--json FILE]`.

BasicProjector is what TRAK runs without a GPU: a block of 100 columns of signs at a time, drawn by torch's
generator, then a product. It runs in an environment of its own, one of those that JZ3_PEER_PYTHON names (Pythons
separated by `:`); without one the same steps run in plain torch and are called so. Its signs are others than ours;
only times and memory are compared. Times are the least of several runs.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from jz3 import backend
from jz3.files import write_json
from jz3.ops.sign_project import TILE, sign_project
from jz3.ops.signs import signs

PEER_BLOCK = 100
"""BasicProjector's default."""
FUSED_BYTES = 1024
"""Of signs that a thread holds where they are made as they are used (csrc/cpu/sign_project.cpp)."""
WIDER = 4
"""How many times the columns a last run has, for its memory."""


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield few and many rows; the stored matrix is not counted against torch."""
    columns, k = (1 << 20, 8192) if device == "cuda" else (1 << 15, 1024)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    omega = torch.empty(k, columns, dtype=dtype, device=device)
    for begin in range(0, columns, 1 << 15):
        some = omega[:, begin : begin + (1 << 15)]
        some.copy_(signs(0, "m", k, some.shape[1], first_col=begin, dtype=torch.float32) / k**0.5)
    for rows in (16, 128):
        x = torch.randn(rows, columns, device=device).to(dtype)
        yield {
            "name": f"{rows} x {columns} -> {k}",
            "rows": rows,
            "dim": columns,
            "dtype": str(dtype),
            "run": lambda x=x: sign_project(x, k, seed=0, name="m"),
            "plain": lambda x=x: (x @ omega.T).float(),
            "bytes": x.numel() * x.element_size(),
            "flops": 2 * rows * columns * k,
            "peers": {"fast_jl": lambda x=x: fast_jl(x, k)} if device == "cuda" else {},
        }


def fast_jl(x: torch.Tensor, k: int) -> Callable[[], Any]:
    """Return the projection of traker's CUDA kernel, in the type and with the batch that traker chooses."""
    module = importlib.import_module("fast_jl")
    half, units = x.half(), torch.cuda.get_device_properties(x.device).multi_processor_count
    project = getattr(module, f"project_rademacher_{min(32, max(8, 1 << (len(x) - 1).bit_length()))}")
    return lambda: project(half, k, 0, units)


def same_in_torch(x: torch.Tensor, k: int) -> torch.Tensor:
    """Project as BasicProjector does: blocks of signs by `bernoulli_`, then a product."""
    matrix, generator = torch.empty(x.shape[1], min(k, PEER_BLOCK)), torch.Generator()
    out = torch.zeros(len(x), k)
    for block, begin in enumerate(range(0, k, PEER_BLOCK)):
        generator.manual_seed(1000 * block)
        matrix.bernoulli_(p=0.5, generator=generator).mul_(2.0).sub_(1.0)
        end = min(begin + PEER_BLOCK, k)
        out[:, begin:end] = x @ matrix[:, : end - begin]
    return out


def traker(columns: int, k: int, counts: list[int], repeats: int) -> list[float] | None:
    """Time BasicProjector in the first environment of JZ3_PEER_PYTHON that has it; None if none has.

    Raises:
        RuntimeError: it is there and fails.
    """
    for python in filter(None, os.environ.get("JZ3_PEER_PYTHON", "").split(os.pathsep)):
        if subprocess.run([python, "-c", "import trak"], capture_output=True).returncode:
            continue
        numbers = map(str, (columns, k, repeats, backend.threads(), *counts))
        command = [python, str(Path(__file__).with_name("peer_traker.py")), *numbers]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])
    return None


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def least(function: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of the fastest of some calls, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Parse the arguments, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--columns", type=int, default=1 << 15)
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    columns, k, counts = arguments.columns, arguments.k, arguments.rows
    inputs = [torch.randn(count, columns) for count in counts]
    sign_project(
        inputs[0][:, :1024], k, seed=0, name="m"
    )  # the op's own check and the threads are not counted
    wide = torch.randn(counts[0], WIDER * columns)
    before = peak()
    ours = [least(lambda x=x: sign_project(x, k, seed=0, name="m"), arguments.repeats) for x in inputs]
    grown = peak() - before
    sign_project(wide, k, seed=0, name="m")
    grown_wide = peak() - before
    real = traker(columns, k, counts, arguments.repeats)
    if real:
        name, theirs = "traker BasicProjector", real
    else:
        name = "BasicProjector's steps in plain torch (JZ3_PEER_PYTHON names no Python that has traker)"
        theirs = [least(lambda x=x: same_in_torch(x, k), arguments.repeats) for x in inputs]
    print(f"{columns} columns -> {k}, {backend.threads()} threads, against {name}")
    rows = []
    for count, mine, other in zip(counts, ours, theirs, strict=True):
        rows.append({"rows": count, "seconds": mine, "seconds_peer": other, "ratio": other / mine})
        print(f"{count:5} rows: {mine:.3f} s, the peer {other:.3f} s, {other / mine:.1f}x")
    result = {
        "peer": name,
        "columns": columns,
        "k": k,
        "threads": backend.threads(),
        "rows": rows,
        "ratio": min(row["ratio"] for row in rows),
        "signs_bytes": FUSED_BYTES * backend.threads()
        if backend.extension().has_sign_project()
        else 4 * TILE,
        "signs_bytes_peer": 4 * columns * min(k, PEER_BLOCK),
        "grown_bytes": grown,
        "grown_bytes_wide": grown_wide,
    }
    print(
        f"signs held at a time: {result['signs_bytes'] / 2**10:.0f} KiB whatever the columns and k, the peer's "
        f"{result['signs_bytes_peer'] / 2**10:.0f} KiB of {4 * columns * k / 2**20:.0f} MiB"
    )
    print(
        f"the process grew by {grown / 2**20:.1f} MiB with the results, by {grown_wide / 2**20:.1f} MiB with {WIDER} "
        "times the columns"
    )
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
