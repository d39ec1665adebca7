"""Random signs against torch's generator, which makes others."""

from collections.abc import Iterator
from typing import Any

import torch

from jz3.ops.signs import sign_bits_reference, signs, signs_key, unpack_signs


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield the shape of one module's left matrix."""
    rows, cols = 512, 4096
    yield {
        "name": f"{rows} x {cols}",
        "rows": rows,
        "dim": cols,
        "dtype": "int8",
        "run": lambda: signs(0, "m", rows, cols),
        "plain": lambda: torch.from_numpy(
            unpack_signs(sign_bits_reference(signs_key(0, "m"), rows, cols, 0, 0), cols)
        ),
        "bytes": rows * cols,
        "flops": 0,
    }
