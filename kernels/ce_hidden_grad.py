"""ce_hidden_grad in Triton: loss_t = logsumexp(W h_t) - W_y h_t and its gradient W^T (softmax - e_y), by three kernels.

A d-wide accumulator doesn't fit a block, and forming the logits again for every slice of d would multiply the work.
So a chunk of tokens keeps exp(logit - its tile's maximum), in the inputs' dtype, in a scratch of at most 256 MB:

1. ce_exp: a tile of logits [BT, BV] in float32; out go its exponentials, without the target's, and for every row the
   tile's maximum and sum, and the target's logit;
2. ce_loss: the rows' losses, and for every tile the factor exp(maximum - logsumexp);
3. ce_grad: sum over the vocabulary of (exponential * factor) W, and in float32 (exp(-loss) - 1) W_y for the target.

Only tokens with a target are computed. A row's sums run over the vocabulary in one fixed order, whatever the chunk: no
atomics, and a token alone has the same result as among others.

flops: 4 T V d, the minimum
bytes: per chunk W twice, the scratch written once and read once per BD columns of W (256 on sm_90, mostly from L2),
       8 bytes a row and tile of statistics; a chunk of 1,024 tokens (V = 128k, half precision) hides W's bytes
Limits: float32 (every product as three TF32 ones, error about float32's), float16, bfloat16; weight of h's dtype. A
width d that is no multiple of 16 is right, but its blocks spill.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from jz3.kernels import cdiv, launch

IGNORE = -100
SCRATCH_BYTES = 256 << 20
HALF_SCALE = 1 << 14
"""float16 keeps the exponentials times this: unscaled, probabilities below 6e-5 would lose digits."""


@triton.jit(do_not_specialize=["T"])
def ce_exp_kernel(
    p_h,
    p_weight,
    p_y,
    p_index,
    p_scratch,
    p_max,
    p_sum,
    p_target,
    T,
    V,
    D,
    stride_h,
    stride_weight,
    stride_scratch,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
    tile = tl.program_id(1)
    v = tile * BV + tl.arange(0, BV)  # [BV]
    live = row < T
    token = tl.load(p_index + row, mask=live, other=0)
    p_h += token[:, None] * stride_h
    p_weight += v[None, :].to(tl.int64) * stride_weight
    z = tl.zeros((BT, BV), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        h = tl.load(p_h + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(p_weight + d[:, None], mask=(d < D)[:, None] & (v < V)[None, :], other=0.0)
        z = tl.dot(h, w, z, input_precision="tf32x3")
    z = tl.where((v < V)[None, :], z, float("-inf"))
    y = tl.load(p_y + token, mask=live, other=-1)
    own = v[None, :] == y[:, None]
    top = tl.max(z, 1)
    e = tl.exp(z - top[:, None])  # pyright: ignore[reportArgumentType, reportCallIssue]
    at = tile * T + row
    tl.store(p_max + at, top, mask=live)
    tl.store(p_sum + at, tl.sum(e, 1), mask=live)
    here = live & (y >= tile * BV) & (y < tile * BV + BV)
    tl.store(p_target + row, tl.sum(tl.where(own, z, 0.0), 1), mask=here)
    kept = (tl.where(own, 0.0, e) * SCALE).to(p_scratch.dtype.element_ty)
    p_scratch += row[:, None].to(tl.int64) * stride_scratch
    tl.store(p_scratch + v[None, :], kept, mask=live[:, None] & (v < stride_scratch)[None, :])


@triton.jit(do_not_specialize=["T"])
def ce_loss_kernel(p_index, p_max, p_sum, p_target, p_loss, T, tiles, BT: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]  # [BT, 1]
    live = row < T
    top = tl.full((BT, 1), -3e38, tl.float32)
    total = tl.zeros((BT, 1), tl.float32)
    for first in range(0, tiles, B):
        tile = first + tl.arange(0, B)[None, :]
        at, mask = tile * T + row, live & (tile < tiles)
        own = tl.load(p_max + at, mask=mask, other=float("-inf"))
        higher = tl.maximum(top, tl.max(own, 1, keep_dims=True))
        part = tl.load(p_sum + at, mask=mask, other=0.0) * tl.exp(own - higher)
        total = total * tl.exp(top - higher) + tl.sum(part, 1, keep_dims=True)
        top = higher
    for first in range(0, tiles, B):
        tile = first + tl.arange(0, B)[None, :]
        at, mask = tile * T + row, live & (tile < tiles)
        own = tl.load(p_max + at, mask=mask, other=float("-inf"))
        tl.store(p_max + at, tl.exp(own - top) / total, mask=mask)
    token = tl.load(p_index + row, mask=live, other=0)
    target = tl.load(p_target + row, mask=live, other=0.0)
    tl.store(p_loss + token, top - target + tl.log(total), mask=live)


@triton.jit(do_not_specialize=["T"])
def ce_grad_kernel(
    p_scratch,
    p_factor,
    p_weight,
    p_y,
    p_index,
    p_loss,
    p_weights,
    p_grad,
    T,
    V,
    D,
    stride_scratch,
    stride_weight,
    stride_grad,
    SCALE: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0) * BT + tl.arange(0, BT)  # [BT]
    d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    live = row < T
    p_scratch += row[:, None].to(tl.int64) * stride_scratch
    acc = tl.zeros((BT, BD), tl.float32)
    for v0 in range(0, V, BK):
        v = v0 + tl.arange(0, BK)
        e = tl.load(p_scratch + v[None, :], mask=live[:, None] & (v < stride_scratch)[None, :], other=0.0)
        factor = tl.load(p_factor + (v0 // BV) * T + row, mask=live, other=0.0)
        p = (e.to(tl.float32) * factor[:, None]).to(e.dtype)
        w = tl.load(
            p_weight + v[:, None].to(tl.int64) * stride_weight + d[None, :],
            mask=(v < V)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc = tl.dot(p, w, acc, input_precision="tf32x3")
    token = tl.load(p_index + row, mask=live, other=0)
    y = tl.load(p_y + token, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (d < D)[None, :]
    own = tl.load(p_weight + y[:, None] * stride_weight + d[None, :], mask=mask, other=0.0)
    rest = tl.exp(-tl.load(p_loss + token, mask=live, other=0.0)) - 1
    grad = acc * (1 / SCALE) + rest[:, None] * own.to(tl.float32)
    grad *= tl.load(p_weights + token, mask=live, other=0.0)[:, None]
    p_grad += token[:, None] * stride_grad + d[None, :]
    tl.store(p_grad, grad.to(p_grad.dtype.element_ty), mask=mask)


def ce_hidden_grad(
    h: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton implementation of `jz3.ops.ce_hidden_grad`, with the signature of its reference."""
    h, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (h, weight))
    y, weights = y.contiguous(), weights.float().contiguous()
    vocabulary, columns = weight.shape
    loss = torch.zeros(len(h), dtype=torch.float32, device=h.device)
    grad = torch.zeros(len(h), columns, dtype=h.dtype, device=h.device)
    kind = launch.kind(h.dtype)
    forward, summing, backward = (
        launch.parameters(name, h.device) for name in (f"ce_exp/{kind}", "ce_loss/any", f"ce_grad/{kind}")
    )
    backward["BV"] = forward["BV"]
    constants: dict[str, Any] = {"SCALE": HALF_SCALE if h.dtype == torch.float16 else 1}
    tiles, width = cdiv(vocabulary, forward["BV"]), cdiv(vocabulary, 16) * 16
    rows = max(1, SCRATCH_BYTES // (h.dtype.itemsize * max(width, 1) * forward["BT"])) * forward["BT"]
    index = torch.nonzero(y != IGNORE)[:, 0]
    rows = min(rows, len(index))
    scratch = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    highest, sums = (torch.empty(tiles, rows, dtype=torch.float32, device=h.device) for _ in range(2))
    target = torch.empty(rows, dtype=torch.float32, device=h.device)
    for part in index.split(rows) if rows else ():
        count = len(part)
        ce_exp_kernel[(cdiv(count, forward["BT"]), tiles)](
            h,
            weight,
            y,
            part,
            scratch,
            highest,
            sums,
            target,
            count,
            vocabulary,
            columns,
            h.stride(0),
            weight.stride(0),
            width,
            **constants,
            **forward,
        )
        ce_loss_kernel[(cdiv(count, summing["BT"]),)](
            part, highest, sums, target, loss, count, tiles, **summing
        )
        ce_grad_kernel[(cdiv(count, backward["BT"]), cdiv(columns, backward["BD"]))](
            scratch,
            highest,
            weight,
            y,
            part,
            loss,
            weights,
            grad,
            count,
            vocabulary,
            columns,
            width,
            weight.stride(0),
            grad.stride(0),
            **constants,
            **backward,
        )
    return loss, grad
