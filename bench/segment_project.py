"""Projected gradients of packed documents against one pair of matrix products per document.

On the CPU two small modules; on a GPU layers of Llama-3-8B and SmolLM2-135M with 16k tokens in documents of 64 to
2,048, L dense or as packed signs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from jz3.ops.segment_project import segment_project
from jz3.ops.signs import sign_bits

CPU = [(2048, 576, 32, "dense"), (4096, 1536, 128, "dense")]
CUDA = [
    (16384, outputs, 128, kind)
    for outputs in (192, 576, 1536, 1024, 4096, 14336)
    for kind in ("dense", "signs")
]


def bounds_of(tokens: int) -> list[int]:
    """Return documents of 64 to 2,048 tokens that fill a batch, the last one cut off."""
    lengths = np.random.default_rng(0).integers(64, 2049, tokens // 64)
    return [0, *(int(x) for x in lengths.cumsum() if x < tokens), tokens]


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield modules' shapes."""
    for tokens, outputs, p, kind in CUDA if device == "cuda" else CPU:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        a, g = (torch.randn(tokens, n, device=device).to(dtype) for n in (p, outputs))
        edges = bounds_of(tokens)
        bounds = torch.tensor(edges)
        if kind == "signs":
            bits = sign_bits(0, "m", outputs, p)
            dense = 1 - 2 * ((bits[:, :, None] >> torch.arange(32)) & 1).flatten(1)[:, :p]
            left, dense = bits.to(device), (dense / p**0.5).to(device, dtype)
        else:
            left = dense = torch.randn(p, outputs, device=device).to(dtype).T

        def run(a=a, g=g, left=left, bounds=bounds, q=p if kind == "signs" else None) -> torch.Tensor:
            return segment_project(a, g, left, bounds, outputs=q)

        def plain(a=a, g=g, left=dense, edges=edges) -> torch.Tensor:
            pairs = zip(edges, edges[1:], strict=False)
            return torch.stack([(left.T @ (g[b:e].T @ a[b:e])).float() for b, e in pairs])

        size = a.element_size()
        yield {
            "name": f"T={tokens} O={outputs} p={p} {kind}",
            "rows": tokens,
            "dim": outputs,
            "dtype": str(dtype),
            "run": run,
            "plain": plain,
            "bytes": tokens * (outputs + p) * size + left.nbytes + 4 * (len(edges) - 1) * p * p,
            "flops": 2 * tokens * outputs * p + 2 * tokens * p * p,
        }
