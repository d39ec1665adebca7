"""The streaming scan over codes against a product with decoded float32 rows and torch.topk."""

from collections.abc import Iterator
from typing import Any

import torch

from jz3.ops.encode import CODEBOOKS, decode, row_bytes
from jz3.ops.score_topk import score_topk


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
            }
