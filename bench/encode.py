"""Codes and back against the same steps in plain torch."""

from collections.abc import Iterator
from typing import Any

import torch

from jz3.ops.encode import CODEBOOKS, decode, decode_reference, encode, encode_reference


def cases(device: str) -> Iterator[dict[str, Any]]:
    """Yield every kind of code at the default number of coordinates."""
    rows, dim = 4096, 2048
    values, mean = torch.randn(rows, dim, device=device), torch.randn(dim, device=device)
    scale = torch.rand(dim, device=device) + 0.1
    for kind, book in CODEBOOKS.items():
        codes = encode(values, mean, scale, kind)
        both = {"rows": rows, "dim": dim, "dtype": kind, "bytes": rows * dim * (4 + book.bits / 8)}
        yield {
            **both,
            "name": f"encode {kind}",
            "run": lambda kind=kind: encode(values, mean, scale, kind),
            "plain": lambda kind=kind: encode_reference(values, mean, scale, kind),
            "flops": 2 * rows * dim,
        }
        yield {
            **both,
            "name": f"decode {kind}",
            "op": "decode",
            "run": lambda kind=kind, codes=codes: decode(codes, mean, scale, kind),
            "plain": lambda kind=kind, codes=codes: decode_reference(codes, mean, scale, kind),
            "flops": 2 * rows * dim,
        }
