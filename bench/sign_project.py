"""The sign projection against a product with a stored matrix of signs."""

from collections.abc import Iterator
from typing import Any

import torch

from jz3.ops.sign_project import sign_project
from jz3.ops.signs import signs


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
