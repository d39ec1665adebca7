"""The sign projection against traker's BasicProjector: `python bench/sign_project.py [--json FILE]`.

BasicProjector is what TRAK runs without a GPU: a block of 100 columns of signs at a time, drawn by torch's
generator, then a product. Where the package `traker` can't be imported, the same steps run in plain torch and are
called so. Its signs are others than ours; only times and memory are compared. Times are the least of several runs.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from jz3 import backend
from jz3.ops.sign_project import TILE, sign_project
from jz3.ops.signs import signs

PEER_BLOCK = 100
"""BasicProjector's default."""


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield few and many rows; the stored matrix is not counted against torch."""
    columns, k = (1 << 20, 8192) if device == "cuda" else (1 << 15, 1024)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    omega = (signs(0, "m", k, columns, dtype=torch.float32) / k**0.5).to(device, dtype)
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
        }


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


def peer(columns: int, k: int) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return what to compare with: its name and its projection."""
    try:
        from trak.projectors import (  # pyright: ignore[reportMissingImports]
            BasicProjector,
            ProjectionType,
        )
    except ImportError:
        return "BasicProjector's steps in plain torch", lambda x: same_in_torch(x, k)
    projector = BasicProjector(columns, k, 0, ProjectionType.rademacher, torch.device("cpu"))
    return "traker BasicProjector", lambda x: projector.project(x, model_id=0)


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
    columns, k = arguments.columns, arguments.k
    name, project = peer(columns, k)
    print(f"{columns} columns -> {k}, {backend.threads()} threads, against {name}")
    rows = []
    for count in arguments.rows:
        x = torch.randn(count, columns)
        ours = least(lambda x=x: sign_project(x, k, seed=0, name="m"), arguments.repeats)
        theirs = least(lambda x=x: project(x), arguments.repeats)
        rows.append({"rows": count, "seconds": ours, "seconds_peer": theirs, "ratio": theirs / ours})
        print(f"{count:5} rows: {ours:.3f} s, the peer {theirs:.3f} s, {theirs / ours:.1f}x")
    memory = {"signs_bytes": 4 * TILE, "signs_bytes_peer": 4 * columns * min(k, PEER_BLOCK)}
    result = {"peer": name, "columns": columns, "k": k, "rows": rows, **memory}
    result["ratio"] = min(row["ratio"] for row in rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
