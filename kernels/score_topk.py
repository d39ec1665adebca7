"""score_topk in Triton: scores of codes on the integer tensor cores, up to a million rows at a time, the best by torch.

A byte of codes holds 1, 2, 4 or 8 coordinates. Its first ones, as int8 levels, are multiplied with the queries' digits
of just these coordinates, then its second ones, and so on: nothing is unpacked in memory. A query's planes are
neighbouring columns of the int32 product, put together to 64-bit integers at the end; the rest is float64 in the
definition's order and not contracted (`launch.EXACT`), so that scores are the definition's bit for bit.

bytes: codes once per BC columns (BC / planes queries), 4 Q out per row      operations: 2 planes K Q per row
Limits: at most 2^17 coordinates, whose sums fit 32 bits.
"""

import torch
import triton
import triton.language as tl

from jz3.kernels import cdiv, launch


@triton.jit(do_not_specialize=["N"])
def score_codes_kernel(
    p_codes,
    p_levels,
    p_digits,
    p_step,
    p_bias,
    p_row_scale,
    p_scores,
    N,
    Q,
    width,
    stride_codes,
    stride_digits,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)  # [BN]
    column = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    known = column < Q * PLANES
    p_codes += row[:, None] * stride_codes
    acc = tl.zeros((BN, BC), tl.int32)
    for first in range(0, width, BK):
        byte = first + tl.arange(0, BK)
        codes = tl.load(p_codes + byte[None, :], mask=(row < N)[:, None] & (byte < width)[None, :], other=0)
        for place in tl.static_range(8 // BITS):  # pyright: ignore[reportGeneralTypeIssues]
            p = p_digits + (place * Q * PLANES + column[None, :]).to(tl.int64) * stride_digits + byte[:, None]
            digits = tl.load(p, mask=(byte < width)[:, None] & known[None, :], other=0)  # [BK, BC]
            if BITS == 8:
                levels = (codes ^ 0x80).to(tl.int8, bitcast=True)
            else:
                levels = tl.load(p_levels + ((codes.to(tl.int32) >> (place * BITS)) & (2**BITS - 1)))
            acc = tl.dot(levels, digits, acc)
    power = (1 << (7 * (PLANES - 1 - tl.arange(0, PLANES)))).to(tl.int64)
    planes = tl.reshape(acc, (BN, BC // PLANES, PLANES)).to(tl.int64)
    dot = tl.sum(planes * power[None, None, :], 2)
    query = tl.program_id(1) * (BC // PLANES) + tl.arange(0, BC // PLANES)
    step = tl.load(p_step + query, mask=query < Q, other=0.0)
    bias = tl.load(p_bias + query, mask=query < Q, other=0.0)
    row_scale = tl.load(p_row_scale + row, mask=row < N, other=0.0).to(tl.float64)
    scores = row_scale[:, None] * (dot.to(tl.float64) * step[None, :] + bias[None, :])
    tl.store(
        p_scores + query[None, :].to(tl.int64) * N + row[:, None],
        scores.to(tl.float32),
        mask=(query < Q)[None, :] & (row < N)[:, None],
    )


def digit_columns(planes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Put the queries' planes in the order in which the kernel meets their coordinates.

    Args:
        planes: int8 [P, Q, K], the most significant first.
        bits: of a code.
        width: bytes of a row of codes.

    Returns:
        int8 [8 / bits, Q, P', width]: the digits of a byte's first coordinate, of its second, ...; P' is the next
        power of two, and planes of zeros come first.
    """
    count, queries, dim = planes.shape
    per_byte = 8 // bits
    padded = planes.new_zeros(triton.next_power_of_2(count), queries, width * per_byte)
    padded[len(padded) - count :, :, :dim] = planes
    return padded.unflatten(2, (width, per_byte)).permute(3, 1, 0, 2).contiguous()


def score_codes(
    codes: torch.Tensor,
    levels: torch.Tensor,
    digits: torch.Tensor,
    step: torch.Tensor,
    bias: torch.Tensor,
    row_scale: torch.Tensor,
) -> torch.Tensor:
    """Score every row of codes for every query.

    Args:
        codes: uint8 [N, width].
        levels: int8 [2^bits], the kind's table.
        digits: int8 [8 / bits, Q, P, width], of `digit_columns`.
        step, bias: float64 [Q].
        row_scale: float32 [N].

    Returns:
        float32 [Q, N].
    """
    places, queries, planes, width = digits.shape
    scores = torch.empty(queries, len(codes), dtype=torch.float32, device=codes.device)
    columns = queries * planes
    bits = 8 // places
    blocks = {"BITS": bits, "PLANES": planes, **launch.parameters(case(bits, columns), codes.device)}
    if scores.numel():
        score_codes_kernel[(cdiv(len(codes), blocks["BN"]), cdiv(columns, blocks["BC"]))](
            codes,
            levels,
            digits,
            step,
            bias,
            row_scale,
            scores,
            len(codes),
            queries,
            width,
            codes.stride(0),
            digits.stride(2),
            **blocks,
        )
    return scores


def case(bits: int, columns: int) -> str:
    """Return the row of the launch table for codes of some bits and a number of columns (queries times planes)."""
    return f"score_codes/{'wide' if bits >= 4 else 'narrow'}/{32 if columns <= 32 else 128}"


def score_rows(
    codes: torch.Tensor,
    kind: str,
    planes: torch.Tensor,
    step: torch.Tensor,
    bias: torch.Tensor,
    row_scale: torch.Tensor,
) -> torch.Tensor:
    """The Triton implementation of `jz3.ops.score_topk.score_codes_reference`, with its signature."""
    from jz3.ops.encode import CODEBOOKS

    if codes.stride(1) != 1:
        codes = codes.contiguous()
    book = CODEBOOKS[kind]
    levels = torch.tensor(book.levels, dtype=torch.int8, device=codes.device)
    digits = digit_columns(planes, book.bits, codes.shape[1])
    return score_codes(codes, levels, digits, step.contiguous(), bias.contiguous(), row_scale.contiguous())


def score_topk(
    codes: torch.Tensor,
    kind: str,
    planes: torch.Tensor,
    step: torch.Tensor,
    bias: torch.Tensor,
    row_scale: torch.Tensor,
    ids: torch.Tensor,
    groups: torch.Tensor,
    count: int,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton implementation of `jz3.ops.score_topk`, with the signature of its reference."""
    from jz3.ops.best import best_of_groups, chunk_topk, merge_topk, rows_at_once

    device = codes.device
    best = (
        torch.empty(count, 0, device=device, dtype=torch.float32),
        torch.empty(count, 0, dtype=torch.int64, device=device),
    )
    chunk = rows_at_once(len(step))
    for begin in range(0, len(codes) if count else 0, chunk):
        rows = slice(begin, begin + chunk)
        scores = score_rows(codes[rows], kind, planes, step, bias, row_scale[rows])
        best = merge_topk([best, chunk_topk(best_of_groups(scores, groups, count), ids[rows], k)], k)
    return best
