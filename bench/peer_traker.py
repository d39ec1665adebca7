"""Times traker's BasicProjector; run by bench/sign_project.py with the Python of the peers' own environment.

`python peer_traker.py COLUMNS K REPEATS THREADS ROWS...` prints a JSON line: for each number of rows the least
seconds of several runs after one to warm up.
"""

import json
import sys
import time

import torch
from trak.projectors import BasicProjector, ProjectionType  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Project rows of random numbers."""
    columns, k, repeats, threads, *counts = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    inputs = [torch.randn(count, columns) for count in counts]
    projector = BasicProjector(columns, k, 0, ProjectionType.rademacher, torch.device("cpu"))
    seconds = []
    for x in inputs:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            projector.project(x, model_id=0)
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
