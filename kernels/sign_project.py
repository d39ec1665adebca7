"""sign_project in Triton: out[s, r] = sum_c x[s, c] * sign(r, c).

The signs of some columns are made once, packed (k / 8 bytes a column, at most 32 MB, so that they stay in the
L2 cache), and expanded to numbers in registers: 128 signs cost one Philox call and 16 bytes, however many rows
x has. Columns are split into fixed pieces of 16,384 whose sums are added in order: the result does not depend
on the device.

bytes: x once per BN projections, 1 bit per sign and BM rows      flops: 2 S P k
Limits: float32 (three TF32 products, error about float32's), float16, bfloat16.
"""

import math

import torch
import triton
import triton.language as tl

from jz3.kernels import cdiv, launch

BLOCK = 128
PIECE = 128 * BLOCK
BITS_BYTES = 32 << 20


@triton.jit(do_not_specialize=["key_low", "key_high", "first_block", "blocks", "k"])
def sign_bits_kernel(p_bits, key_low, key_high, first_block, blocks, k, B: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * B + tl.arange(0, B)
    block = first_block.to(tl.int64) + at
    seed = (key_high.to(tl.uint64) << 32) | (key_low.to(tl.uint64) & 0xFFFFFFFF)
    zero = at * 0
    low, high = block.to(tl.int32), (block >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + row, zero)  # pyright: ignore[reportGeneralTypeIssues]
    p = p_bits + (row.to(tl.int64) * blocks + at) * 4
    tl.store(p, w0.to(tl.int32, bitcast=True), mask=at < blocks)
    tl.store(p + 1, w1.to(tl.int32, bitcast=True), mask=at < blocks)
    tl.store(p + 2, w2.to(tl.int32, bitcast=True), mask=at < blocks)
    tl.store(p + 3, w3.to(tl.int32, bitcast=True), mask=at < blocks)


@triton.jit(do_not_specialize=["P", "k", "blocks"])
def sign_project_kernel(
    p_x,
    p_bits,
    p_partial,
    S,
    P,
    k,
    blocks,
    stride_x,
    PIECE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    projections = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    piece = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, 128)
    p_x += rows[:, None].to(tl.int64) * stride_x
    p_words = p_bits + projections[:, None].to(tl.int64) * blocks * 4 + tl.arange(0, 4)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for column in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, P), 128):
        columns = column + lane
        x = tl.load(p_x + columns[None, :], mask=(rows[:, None] < S) & (columns[None, :] < P), other=0.0)
        words = tl.load(p_words + column // 32, mask=projections[:, None] < k, other=0)  # [BN, 4]
        words = tl.reshape(tl.broadcast_to(words[:, :, None], (BN, 4, 32)), (BN, 128))
        negative = (words >> (lane % 32)[None, :]) & 1
        omega = (1 - 2 * negative).to(tl.float32).to(x.dtype)
        acc = tl.dot(x, tl.trans(omega), acc, input_precision="tf32x3")
    at = (piece * S + rows[:, None]) * k + projections[None, :]
    tl.store(p_partial + at, acc, mask=(rows[:, None] < S) & (projections[None, :] < k))


def case(rows: int, dtype: torch.dtype) -> str:
    """Return the row of the launch table for a number of rows."""
    width = 16 if rows <= 16 else 64 if rows <= 64 and dtype != torch.float32 else 128
    return f"sign_project/{launch.kind(dtype)}/{width}"


def sign_bits(key: int, rows: int, blocks: int, first_block: int, device: torch.device) -> torch.Tensor:
    """Make packed signs on a device: int32 [rows, 4 * blocks], as `jz3.ops.signs` defines them."""
    bits = torch.empty(rows, 4 * blocks, dtype=torch.int32, device=device)
    blocking = launch.parameters("sign_bits/any", device)
    sign_bits_kernel[(rows, cdiv(blocks, blocking["B"]))](
        bits, _signed(key & 0xFFFFFFFF), _signed(key >> 32), first_block, blocks, rows, **blocking
    )
    return bits


def sign_project(x: torch.Tensor, key: int, k: int, first_col: int) -> torch.Tensor:
    """The Triton implementation of `jz3.ops.sign_project`, with the signature of its reference."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    out = torch.zeros(rows, k, dtype=torch.float32, device=x.device)
    blocking = {"PIECE": PIECE, **launch.parameters(case(rows, x.dtype), x.device)}
    width = max(1, BITS_BYTES * 8 // (k * PIECE)) * PIECE
    for begin in range(0, columns if rows else 0, width):
        part = x[:, begin : begin + width]
        blocks = cdiv(part.shape[1], BLOCK)
        bits = sign_bits(key, k, blocks, (first_col + begin) // BLOCK, x.device)
        pieces = cdiv(part.shape[1], PIECE)
        partial = torch.empty(pieces, rows, k, dtype=torch.float32, device=x.device)
        grid = (cdiv(rows, blocking["BM"]), cdiv(k, blocking["BN"]), pieces)
        sign_project_kernel[grid](
            part,
            bits,
            partial,
            rows,
            part.shape[1],
            k,
            blocks,
            x.stride(0),
            **blocking,
        )
        for piece in partial:
            out += piece
    return out.mul_(1 / math.sqrt(k))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
