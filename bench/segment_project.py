"""Projected gradients of packed documents against plain torch in the inputs' type.

Torch on a CPU: g L of the whole batch, then a product per document; on a GPU a pair of products per document. On a CPU
layers of SmolLM2-135M with 4k tokens in documents of 64 to 512, on a GPU those of Llama-3-8B too with 16k tokens in
documents of 64 to 2,048; L dense or as packed signs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from jz3.ops.segment_project import segment_project
from jz3.ops.signs import sign_bits

CPU = [
    (4096, outputs, p, kind, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for outputs in (192, 576, 1536)
    for p in (32, 96)
    for kind in ("dense", "signs")
]
CUDA = [
    (16384, outputs, 128, kind, torch.bfloat16)
    for outputs in (192, 576, 1536, 1024, 4096, 14336)
    for kind in ("dense", "signs")
]


def bounds_of(tokens: int, longest: int) -> list[int]:
    """Return documents of 64 tokens to the longest that fill a batch, the last one cut off."""
    lengths = np.random.default_rng(0).integers(64, longest + 1, tokens // 64)
    return [0, *(int(x) for x in lengths.cumsum() if x < tokens), tokens]


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield modules' shapes."""
    cuda = device == "cuda"
    for tokens, outputs, p, kind, dtype in CUDA if cuda else CPU:
        a, g = (torch.randn(tokens, n, device=device).to(dtype) for n in (p, outputs))
        edges = bounds_of(tokens, 2048 if cuda else 512)
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
            if g.is_cuda:
                return torch.stack([(left.T @ (g[b:e].T @ a[b:e])).float() for b, e in pairs])
            rows = g @ left
            return torch.stack([(rows[b:e].T @ a[b:e]).float() for b, e in pairs])

        size = a.element_size()
        yield {
            "name": f"O={outputs} p={p} {kind} {str(dtype)[6:]}",
            "rows": tokens,
            "dim": outputs,
            "dtype": str(dtype),
            "run": run,
            "plain": plain,
            "bytes": tokens * (outputs + p) * size + left.nbytes + 4 * (len(edges) - 1) * p * p,
            "flops": 2 * tokens * outputs * p + 2 * tokens * p * p,
        }
