"""Random signs: one counter-based generator for every op, device and back end, bit for bit.

Sign (r, c) of the matrix keyed by (seed, name) is bit c mod 128 of Philox4x32-10 with

    key     = the two halves (low, high) of the 64-bit xxh3 of (seed, "signs", name)
    counter = (c div 128: low, high; r: low, high)

where bit b lies in word b div 32 of the result, at place b mod 32, and a set bit means -1. All 128
bits of a call are used, any rectangle can be made on its own, and applying a sign to a floating
point number is an XOR on its sign bit.
"""

from typing import TYPE_CHECKING

import numpy as np

from jz3 import backend
from jz3.ops.checks import check_int
from jz3.seeding import seed_for

if TYPE_CHECKING:
    import torch

BLOCK = 128
"""Signs per call of the generator; rows of packed bits are whole blocks."""


def signs_key(seed: int, name: str) -> int:
    """Return the 64-bit Philox key of (seed, name)."""
    return seed_for(seed, "signs", name)


def philox(key: int, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        key: 64 bits, the low half first.
        counter: uint32 [n, 4].

    Returns:
        uint32 [n, 4].
    """
    words = [counter[:, i].astype(np.uint64) for i in range(4)]
    low32 = np.uint64(0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        words = [
            (p1 >> shift) ^ words[1] ^ np.uint64(k0),
            p1 & low32,
            (p0 >> shift) ^ words[3] ^ np.uint64(k1),
            p0 & low32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(words, axis=1).astype(np.uint32)


def sign_bits_reference(key: int, rows: int, cols: int, first_row: int, first_col: int) -> np.ndarray:
    """The definition of `sign_bits`, in numpy: uint32 [rows, 4 * ceil(cols / 128)]."""
    blocks = -(-cols // BLOCK)
    row = first_row + np.repeat(np.arange(rows, dtype=np.uint64), blocks)
    block = first_col // BLOCK + np.tile(np.arange(blocks, dtype=np.uint64), rows)
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.stack([block & low32, block >> shift, row & low32, row >> shift], axis=1).astype(np.uint32)
    return philox(key, counter).reshape(rows, 4 * blocks)


def sign_bits(
    seed: int, name: str, rows: int, cols: int, *, first_row: int = 0, first_col: int = 0
) -> "torch.Tensor":
    """Make a rectangle of random signs as packed bits.

    Args:
        seed: the run's seed.
        name: what the signs are for, e.g. a module's name.
        rows, cols: size of the rectangle.
        first_row, first_col: where it begins; `first_col` must be a multiple of 128.

    Returns:
        int32 [rows, 4 * ceil(cols / 128)] on the CPU: bit c mod 32 of word c div 32 is set where the
        sign is -1. Bits beyond `cols` are those of the columns that would follow.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is negative or `first_col` no multiple of 128.
    """
    sizes = {"rows": rows, "cols": cols, "first_row": first_row, "first_col": first_col}
    rows, cols, first_row, first_col = (check_int("signs", n, size, 0, 1 << 62) for n, size in sizes.items())
    if first_col % BLOCK:
        raise ValueError(f"signs: first_col must be a multiple of {BLOCK}, got {first_col}")
    import torch

    words = backend.call("signs", signs_key(seed, name), rows, cols, first_row, first_col)
    return torch.from_numpy(words.view(np.int32))


def unpack_signs(bits: np.ndarray, cols: int) -> np.ndarray:
    """Turn packed bits (uint32 [rows, words]) into int8 [rows, cols] of +1 and -1."""
    flat = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=1, bitorder="little", count=cols)
    return (1 - 2 * flat.astype(np.int8)).reshape(len(bits), cols)


def signs(
    seed: int,
    name: str,
    rows: int,
    cols: int,
    *,
    first_row: int = 0,
    first_col: int = 0,
    dtype: "torch.dtype | None" = None,
) -> "torch.Tensor":
    """Make a rectangle of random signs.

    Long rows waste fewest bits: for a tall [O, p] matrix take `signs(seed, name, p, O).T`.

    Args:
        seed: the run's seed.
        name: what the signs are for, e.g. a module's name.
        rows, cols: size of the rectangle.
        first_row, first_col: where it begins; `first_col` must be a multiple of 128.
        dtype: of the result; int8 by default.

    Returns:
        [rows, cols] of +1 and -1 on the CPU.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is negative or `first_col` no multiple of 128.
    """
    import torch

    bits = sign_bits(seed, name, rows, cols, first_row=first_row, first_col=first_col)
    return torch.from_numpy(unpack_signs(bits.numpy(), cols)).to(dtype or torch.int8)


def _native_cpu(key: int, rows: int, cols: int, first_row: int, first_col: int) -> np.ndarray:
    out = np.empty((rows, 4 * -(-cols // BLOCK)), np.uint32)
    backend.extension().sign_bits(
        out.ctypes.data, key, rows, out.shape[1] // 4, first_row, first_col // BLOCK, backend.threads()
    )
    return out


backend.register(
    backend.Op(
        name="signs",
        reference=sign_bits_reference,
        native={"cpu": _native_cpu},
        example=lambda device: (0x0123456789ABCDEF, 3, 300, (1 << 32) - 1, BLOCK * ((1 << 32) - 1)),
        exact=True,
    )
)
