"""Projected gradients of packed documents against one pair of matrix products per document."""

from collections.abc import Iterator
from typing import Any

import torch

from jz3.ops.segment_project import segment_project


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield a small and a large module's shapes."""
    for tokens, outputs, p in [(2048, 576, 32), (4096, 1536, 128)]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        a, g = (
            torch.randn(tokens, p, device=device).to(dtype),
            torch.randn(tokens, outputs, device=device).to(dtype),
        )
        left = torch.randn(outputs, p, device=device).to(dtype)
        bounds = torch.arange(0, tokens + 1, 128, device=device)
        edges = bounds.tolist()

        def plain(a=a, g=g, left=left, edges=edges) -> torch.Tensor:
            pairs = zip(edges, edges[1:], strict=False)
            return torch.stack([(left.T @ (g[b:e].T @ a[b:e])).float() for b, e in pairs])

        yield {
            "name": f"T={tokens} O={outputs} p={p}",
            "rows": tokens,
            "dim": outputs,
            "dtype": str(dtype),
            "run": lambda a=a, g=g, left=left, bounds=bounds: segment_project(a, g, left, bounds),
            "plain": plain,
            "bytes": tokens * (outputs + p) * a.element_size(),
            "flops": 2 * tokens * outputs * p + 2 * tokens * p * p,
        }
