"""encode and decode in Triton: float features to packed codes of 8, 4, 2 or 1 bits, and back.

z = (value - mean) / scale is compared with the table's thresholds, or for 8 bits rounded on the grid; the indices of a
byte's coordinates are then added with their shifts. Only operations whose result IEEE fixes are used, and nothing is
contracted (`launch.EXACT`), so that codes are the definition's bit for bit.

bytes: 4 per value and bits / 8 per code, each once; the tables stay in the caches
Limits: what the op allows.
"""

import torch
import triton
import triton.language as tl

from jz3.kernels import cdiv, launch


@triton.jit
def encode_kernel(
    p_values,
    p_mean,
    p_inverse,
    p_thresholds,
    p_codes,
    N,
    K,
    width,
    stride_values,
    per_unit,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)  # [BN]
    k = tl.program_id(1) * BB * PER + tl.arange(0, BB * PER)  # [BB * PER]
    mask = (row < N)[:, None] & (k < K)[None, :]
    values = tl.load(p_values + row[:, None] * stride_values + k[None, :], mask=mask, other=0.0)
    mean = tl.load(p_mean + k, mask=k < K, other=0.0)
    inverse = tl.load(p_inverse + k, mask=k < K, other=0.0)
    z = tl.where(inverse[None, :] > 0, (values - mean[None, :]) * inverse[None, :], 0.0)
    if BITS == 8:
        whole = tl.minimum(tl.maximum(z * per_unit, -127.0), 127.0)
        # adding and subtracting 1.5 * 2^23 rounds half to even
        index = ((whole + 12582912.0) - 12582912.0).to(tl.int32) + 128
    else:
        above = tl.zeros((BN, BB * PER), tl.float32)
        for t in tl.static_range(2**BITS - 1):  # pyright: ignore[reportGeneralTypeIssues]
            above += tl.where(z > tl.load(p_thresholds + t), 1.0, 0.0)
        index = tl.where((k < K)[None, :], above.to(tl.int32) << (k % PER * BITS)[None, :], 0)
        index = tl.sum(tl.reshape(index, (BN, BB, PER)), 2)
    byte = tl.program_id(1) * BB + tl.arange(0, BB)  # [BB]
    mask = (row < N)[:, None] & (byte < width)[None, :]
    tl.store(p_codes + row[:, None] * width + byte[None, :], index.to(tl.uint8), mask=mask)


@triton.jit
def decode_kernel(
    p_codes,
    p_mean,
    p_scale,
    p_table,
    p_values,
    N,
    K,
    stride_codes,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)  # [BN]
    k = tl.program_id(1) * BK + tl.arange(0, BK)  # [BK]
    mask = (row < N)[:, None] & (k < K)[None, :]
    byte = tl.load(p_codes + row[:, None] * stride_codes + (k // PER)[None, :], mask=mask, other=0)
    index = (byte.to(tl.int32) >> (k % PER * BITS)[None, :]) & (2**BITS - 1)
    mean = tl.load(p_mean + k, mask=k < K, other=0.0)
    scale = tl.load(p_scale + k, mask=k < K, other=0.0)
    values = mean[None, :] + scale[None, :] * tl.load(p_table + index)
    tl.store(p_values + row[:, None] * K + k[None, :], values, mask=mask)


def encode(values: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The Triton implementation of `jz3.ops.encode`, with the signature of its reference."""
    from jz3.ops.encode import CODEBOOKS, SMALLEST_SCALE, row_bytes

    if values.stride(1) != 1:
        values = values.contiguous()
    book, (rows, dim), device = CODEBOOKS[kind], values.shape, values.device
    inverse = torch.where(scale >= SMALLEST_SCALE, 1 / scale, torch.zeros_like(scale))
    thresholds = torch.tensor(
        book.thresholds() if book.bits < 8 else [0.0], dtype=torch.float32, device=device
    )
    codes = torch.empty(rows, row_bytes(kind, dim), dtype=torch.uint8, device=device)
    if codes.numel():
        blocks = {"BITS": book.bits, **launch.parameters("encode/any", device)}
        encode_kernel[(cdiv(rows, blocks["BN"]), cdiv(codes.shape[1], blocks["BB"]))](
            values,
            mean.contiguous(),
            inverse,
            thresholds,
            codes,
            rows,
            dim,
            codes.shape[1],
            values.stride(0),
            float(1 / torch.tensor(book.unit, dtype=torch.float32)),
            **blocks,
        )
    return codes


def decode(codes: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The Triton implementation of `jz3.ops.decode`, with the signature of its reference."""
    from jz3.ops.encode import CODEBOOKS

    if codes.stride(1) != 1:
        codes = codes.contiguous()
    book, device = CODEBOOKS[kind], codes.device
    table = torch.tensor([book.unit * level for level in book.levels], dtype=torch.float32, device=device)
    values = torch.empty(len(codes), len(mean), dtype=torch.float32, device=device)
    if values.numel():
        blocks = {"BITS": book.bits, **launch.parameters("decode/any", device)}
        decode_kernel[(cdiv(len(codes), blocks["BN"]), cdiv(len(mean), blocks["BK"]))](
            codes,
            mean.contiguous(),
            scale.contiguous(),
            table,
            values,
            len(codes),
            len(mean),
            codes.stride(0),
            **blocks,
        )
    return values
