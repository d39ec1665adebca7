"""Signed hash of a long block of numbers into a short vector (count sketch), deterministic.

Coordinate j of the block called `name` goes to one bucket with one sign, both from word j mod 4 of
Philox4x32-10 with the key of (seed, "sketch", name) and the counter j div 4:

    bucket(j) = (word * K) >> 32        sign(j) = -1 if word is odd else +1
    out[s, b] = sum over j with bucket(j) = b of sign(j) * block[s, j],  in ascending j

so that E<sketch(x), sketch(y)> = <x, y>. Blocks of several modules add up in one vector.
"""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.ops.checks import check_int, check_tensors
from jz3.ops.signs import philox
from jz3.seeding import seed_for

if TYPE_CHECKING:
    import torch

MAX_DIM = 1 << 24
TRITON_MOST = 256 * 65_535
"""Buckets of the Triton kernel: a launch has at most 65,535 blocks along y, of 256 buckets."""


@functools.lru_cache(maxsize=512)
def sketch_plan(key: int, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every coordinate's bucket (int64 [n]) and sign (int8 [n])."""
    block = np.arange(-(-n // 4), dtype=np.uint64)
    counter = np.zeros((len(block), 4), np.uint32)
    counter[:, 0], counter[:, 1] = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
    words = philox(key, counter).reshape(-1)[:n].astype(np.uint64)
    buckets = ((words * np.uint64(dim)) >> np.uint64(32)).astype(np.int64)
    return buckets, (1 - 2 * (words & np.uint64(1)).astype(np.int8)).astype(np.int8)


def sketch_reference(block: "torch.Tensor", key: int, dim: int) -> "torch.Tensor":
    """The definition of `sketch` in plain torch; float64 input gives float64."""
    import torch

    dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
    buckets, signs = (torch.from_numpy(x).to(block.device) for x in sketch_plan(key, block.shape[1], dim))
    out = torch.zeros(block.shape[0], dim, dtype=dtype, device=block.device)
    return out.index_add_(1, buckets, block.to(dtype) * signs.to(dtype))


def sketch(
    block: "torch.Tensor", name: str, dim: int, *, seed: int, out: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Hash the rows of a block into `dim` buckets with random signs.

    Args:
        block: [S, n], e.g. the flattened projections of one module.
        name: the block's name; every name has its own buckets and signs.
        dim: K, the number of buckets.
        seed: the run's seed.
        out: float32 [S, K] to add to (in place) instead of starting from zero.

    Returns:
        float32 [S, K] (float64 if `block` is), or `out`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices don't agree, or `dim` is out of range.

    Source: Charikar et al., Finding frequent items in data streams (count sketch).
    """
    import torch

    dim = check_int("sketch", "dim", dim, 1, MAX_DIM)
    if out is None:
        check_tensors("sketch", block=(block, "S n", "float"))
    else:
        kind = "float64" if isinstance(block, torch.Tensor) and block.dtype == torch.float64 else "float32"
        check_tensors("sketch", block=(block, "S n", "float"), out=(out, "S K", kind))
        if out.shape[1] != dim:
            raise ValueError(f"sketch: out must have dim = {dim} columns, got {tuple(out.shape)}")
    with torch.no_grad():
        hashed = backend.call("sketch", block, seed_for(seed, "sketch", name), dim)
        return hashed if out is None else out.add_(hashed)


def _sketch_cpu(block: "torch.Tensor", key: int, dim: int) -> "torch.Tensor":
    import torch

    if block.dtype == torch.float16:
        block = block.float()
    if block.stride(1) != 1:
        block = block.contiguous()
    rows, n = block.shape
    out = torch.empty(rows, dim, dtype=torch.float32, device="cpu")
    backend.extension().sketch(
        block.data_ptr(),
        out.data_ptr(),
        block.dtype == torch.bfloat16,
        rows,
        n,
        block.stride(0),
        key,
        dim,
        backend.threads(),
    )
    return out


def _sketch_triton(block: "torch.Tensor", key: int, dim: int) -> "torch.Tensor":
    from jz3.kernels import sketch as kernels

    return kernels.sketch(block, key, dim)


def _unsupported(chosen: str, arguments: tuple[Any, ...]) -> str:
    if chosen == "triton" and arguments[0].shape[1] >= 1 << 31:
        return "2^31 coordinates or more"
    if chosen == "triton" and arguments[2] > TRITON_MOST:
        return f"{arguments[2]} buckets (it takes up to {TRITON_MOST})"
    return "float64" if str(arguments[0].dtype) == "torch.float64" else ""


def _example(device: str) -> tuple[Any, ...]:
    import torch

    block = np.random.default_rng(0).standard_normal((3, 101)).astype(np.float32)
    return torch.from_numpy(block).to(device), 0x0123456789ABCDEF, 37


backend.register(
    backend.Op(
        name="sketch",
        reference=sketch_reference,
        native={"triton": _sketch_triton, "cpu": _sketch_cpu},
        example=_example,
        unsupported=_unsupported,
    )
)
