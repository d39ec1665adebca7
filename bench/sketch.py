"""The signed hash against torch's index_add_ with a ready plan."""

from collections.abc import Iterator
from typing import Any

import torch

from jz3.ops.sketch import sketch, sketch_plan
from jz3.seeding import seed_for


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield the tall sketch of a module, 512 x 32, into 8,192 numbers."""
    for rows in (4, 64):
        n, dim = 512 * 32, 8192
        block = torch.randn(rows, n, device=device)
        buckets, signs = sketch_plan(seed_for(0, "sketch", "m"), n, dim)
        index, sign = torch.from_numpy(buckets).to(device), torch.from_numpy(signs).to(device).float()

        def plain(block=block, index=index, sign=sign, dim=dim) -> torch.Tensor:
            return torch.zeros(len(block), dim, device=block.device).index_add_(1, index, block * sign)

        yield {
            "name": f"{rows} x {n} -> {dim}",
            "rows": rows,
            "dim": n,
            "dtype": "float32",
            "run": lambda block=block, dim=dim: sketch(block, "m", dim, seed=0),
            "plain": plain,
            "bytes": 4 * rows * (n + dim),
            "flops": rows * n,
        }
