"""sketch in Triton: out[s, b] = sum over j with bucket(j) = b of sign(j) * block[s, j], in ascending j.

A gather: the coordinates, sorted by bucket on the host once per (name, length, buckets) and kept on the device, say
what a bucket reads. So no float atomics, and every sum has one fixed order: the result is that of the definition on
the CPU, bit for bit.

bytes: block once from memory (a row's gathers hit L2), 4 (n + K) of plan per BS rows, 4 S K out      flops: S n
Limits: float32, float16, bfloat16; fewer than 2^31 coordinates.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from jz3.kernels import cdiv, launch


@triton.jit
def sketch_kernel(p_block, p_first, p_order, p_out, S, K, stride_block, BS: tl.constexpr, BB: tl.constexpr):
    bucket = tl.program_id(1) * BB + tl.arange(0, BB)  # [BB]
    row = (tl.program_id(0) * BS + tl.arange(0, BS)).to(tl.int64)  # [BS]
    known = bucket < K
    first = tl.load(p_first + bucket, mask=known, other=0)
    last = tl.load(p_first + bucket + 1, mask=known, other=0)
    p_block += row[:, None] * stride_block
    acc = tl.zeros((BS, BB), tl.float32)
    longest = tl.max(last - first)
    for i in range(longest):  # pyright: ignore[reportArgumentType]
        more = first + i < last
        signed = tl.load(p_order + first + i, mask=more, other=0)  # j, or -1 - j for a negative sign
        j = tl.where(signed < 0, -1 - signed, signed).to(tl.int64)
        x = tl.load(p_block + j[None, :], mask=(row < S)[:, None] & more[None, :], other=0.0).to(tl.float32)
        acc += tl.where(signed < 0, -1.0, 1.0)[None, :] * x
    tl.store(p_out + row[:, None] * K + bucket[None, :], acc, mask=(row < S)[:, None] & known[None, :])


@functools.lru_cache(maxsize=512)
def sorted_plan(
    key: int, n: int, dim: int, device: torch.device, stream: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coordinates by bucket, ascending in each.

    Every stream has its own: what one drops, torch may give to the next kernels of the stream that it was made on,
    while another stream still reads it.

    Returns:
        first: int32 [dim + 1], where every bucket's coordinates begin.
        order: int32 [n], j for a coordinate of positive sign and -1 - j for one of negative sign.
    """
    from jz3.ops.sketch import sketch_plan

    buckets, signs = sketch_plan(key, n, dim)
    order = np.argsort(buckets, kind="stable")
    first = np.searchsorted(buckets[order], np.arange(dim + 1)).astype(np.int32)
    order = np.where(signs[order] < 0, -1 - order, order).astype(np.int32)
    return torch.from_numpy(first).to(device), torch.from_numpy(order).to(device)


def sketch(block: torch.Tensor, key: int, dim: int) -> torch.Tensor:
    """The Triton implementation of `jz3.ops.sketch`, with the signature of its reference."""
    if block.stride(1) != 1:
        block = block.contiguous()
    rows, n = block.shape
    stream = torch.cuda.current_stream(block.device).cuda_stream if block.is_cuda else 0
    first, order = sorted_plan(key, n, dim, block.device, stream)
    out = torch.empty(rows, dim, dtype=torch.float32, device=block.device)
    if rows:
        blocks = launch.parameters("sketch/any", block.device)
        grid = (cdiv(rows, blocks["BS"]), cdiv(dim, blocks["BB"]))  # y reaches 65,535 only
        sketch_kernel[grid](block, first, order, out, rows, dim, block.stride(0), **blocks)
    return out
