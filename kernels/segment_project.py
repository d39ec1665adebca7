"""segment_project in Triton: out[i] = sum over the tokens t of document i of (L^T g_t) a_t^T.

A program takes up to 256 tokens of one document: g L is formed 32 or 64 tokens at a time and stays on chip, then
multiplied with a. Documents are cut at multiples of 256 tokens from their own beginning and the pieces are
added in order, so that a document's result does not depend on what it is packed with.

bytes: g once per BI columns of a (once for p_i <= 128), a once per BQ columns of L, 4 p_o p_i per 256 tokens
flops: 2 T O p_o + 4 T p_o p_i: g L, accumulated in float32, enters the second product as the sum of two
half-precision numbers (relative error 2^-17 for bfloat16 instead of 2^-9)
Limits: float32 (every product as three TF32 ones, error about float32's), float16, bfloat16; a, g and L of one
dtype.
"""

import torch
import triton
import triton.language as tl

from jz3.kernels import cdiv, launch

CHUNK = 256


@triton.jit
def segment_project_kernel(
    p_a,
    p_g,
    p_left,
    p_chunks,
    p_partial,
    P,
    O,
    Q,
    stride_a,
    stride_g,
    stride_left,
    HAS_LEFT: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BQ: tl.constexpr,
    BI: tl.constexpr,
):
    chunk = tl.program_id(0)
    begin, end = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)  # [BQ]
    i = tl.program_id(2) * BI + tl.arange(0, BI)  # [BI]
    acc = tl.zeros((BQ, BI), tl.float32)
    for first in range(begin, end, BT):
        t = first + tl.arange(0, BT).to(tl.int64)  # [BT]
        live = t < end
        a = tl.load(
            p_a + t[:, None] * stride_a + i[None, :], mask=live[:, None] & (i < P)[None, :], other=0.0
        )
        if HAS_LEFT:
            rows = tl.zeros((BT, BQ), tl.float32)
            for o0 in range(0, O, BO):
                o = o0 + tl.arange(0, BO)
                g = tl.load(
                    p_g + t[:, None] * stride_g + o[None, :], mask=live[:, None] & (o < O)[None, :], other=0.0
                )
                left = tl.load(
                    p_left + o[:, None].to(tl.int64) * stride_left + q[None, :],
                    mask=(o < O)[:, None] & (q < Q)[None, :],
                    other=0.0,
                )
                rows = tl.dot(g, left, rows, input_precision="tf32x3")
            high = rows.to(a.dtype)
            acc = tl.dot(tl.trans(high), a, acc, input_precision="tf32x3")
            if a.dtype != tl.float32:
                low = (rows - high.to(tl.float32)).to(a.dtype)
                acc = tl.dot(tl.trans(low), a, acc, input_precision="tf32x3")
        else:
            g = tl.load(
                p_g + t[:, None] * stride_g + q[None, :], mask=live[:, None] & (q < Q)[None, :], other=0.0
            )
            acc = tl.dot(tl.trans(g), a, acc, input_precision="tf32x3")
    at = (chunk.to(tl.int64) * Q + q[:, None]) * P + i[None, :]
    tl.store(p_partial + at, acc, mask=(q < Q)[:, None] & (i < P)[None, :])


@triton.jit
def segment_sum_kernel(p_partial, p_first, p_out, n, B: tl.constexpr):
    parts = tl.cdiv(n, B)
    segment = tl.program_id(0) // parts
    j = tl.program_id(0) % parts * B + tl.arange(0, B)
    first, last = tl.load(p_first + segment), tl.load(p_first + segment + 1)
    acc = tl.zeros((B,), tl.float32)
    for chunk in range(first, last):
        acc += tl.load(p_partial + chunk * n + j, mask=j < n, other=0.0)
    tl.store(p_out + segment.to(tl.int64) * n + j, acc, mask=j < n)


def chunk_table(bounds: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Cut documents into chunks of at most 256 tokens.

    Returns:
        (begin, end) of every chunk, and for every document the number of its first chunk (and the total).
    """
    chunks: list[tuple[int, int]] = []
    first = [0]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        chunks += [(at, min(at + CHUNK, end)) for at in range(begin, end, CHUNK)]
        first.append(len(chunks))
    return chunks, first


def case(outputs: int, columns: int, dtype: torch.dtype) -> str:
    """Return the row of the launch table for the size of a document's block."""
    if outputs <= 32 and columns <= 32:
        tile = "small"
    elif (outputs <= 64 and columns <= 64) or dtype == torch.float32:
        tile = "medium"
    else:
        tile = "tall" if columns <= 32 else "large"
    return f"segment_project/{launch.kind(dtype)}/{tile}"


def segment_project(
    a: torch.Tensor, g: torch.Tensor, left: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """The Triton implementation of `jz3.ops.segment_project`, with the signature of its reference."""
    a, g = (x if x.stride(1) == 1 else x.contiguous() for x in (a, g))
    if left is not None and left.stride(1) != 1:
        left = left.contiguous()
    columns, outputs = a.shape[1], g.shape[1] if left is None else left.shape[1]
    chunks, first = chunk_table(cu_seqlens.tolist())
    out = torch.zeros(len(first) - 1, outputs, columns, dtype=torch.float32, device=a.device)
    if not chunks or not out.numel():
        return out
    partial = torch.empty(len(chunks), outputs, columns, dtype=torch.float32, device=a.device)
    blocks = {"HAS_LEFT": left is not None, **launch.parameters(case(outputs, columns, a.dtype), a.device)}
    grid = (len(chunks), cdiv(outputs, blocks["BQ"]), cdiv(columns, blocks["BI"]))
    segment_project_kernel[grid](
        a,
        g,
        g if left is None else left,
        torch.tensor(chunks, dtype=torch.int64, device=a.device),
        partial,
        columns,
        g.shape[1],
        outputs,
        a.stride(0),
        g.stride(0),
        0 if left is None else left.stride(0),
        **blocks,
    )
    n = outputs * columns
    first_chunk = torch.tensor(first, dtype=torch.int64, device=a.device)
    summing = launch.parameters("segment_sum/any", a.device)
    # All along x: y reaches 65,535, and a batch may have more documents, a layer's exact gradient more blocks.
    segment_sum_kernel[(cdiv(n, summing["B"]) * (len(first) - 1),)](partial, first_chunk, out, n, **summing)
    return out
