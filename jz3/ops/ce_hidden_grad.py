"""Cross entropy and its gradient with respect to the last hidden states, logits never held whole.

    z_t = W h_t,   loss_t = logsumexp(z_t) - z_t[y_t],   grad_t = w_t W^T (softmax(z_t) - e_{y_t})

A batch of 16 k tokens with a vocabulary of 128 k would need 8 GB of logits in float32; here a chunk of
tokens is finished before the next one begins.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.machine import fast_bfloat16_cpu
from jz3.ops.checks import check_tensors

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""The target of a token without loss, as in torch and transformers."""

CHUNK_BYTES = 32 << 20
"""Largest size of the logits held at a time."""


def ce_hidden_grad_reference(
    h: "torch.Tensor", weight: "torch.Tensor", y: "torch.Tensor", weights: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The definition of `ce_hidden_grad` in plain torch, with whole logits; float64 gives float64."""
    import torch

    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    logits = h.to(dtype) @ weight.to(dtype).T
    counted = y != IGNORE
    target = torch.where(counted, y, 0).long()
    loss = torch.logsumexp(logits, 1) - logits.gather(1, target[:, None])[:, 0]
    p = torch.softmax(logits, 1)
    p.scatter_add_(1, target[:, None], -torch.ones_like(loss)[:, None])
    grad = (p * weights.to(dtype)[:, None]) @ weight.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=h.device)
    return torch.where(counted, loss, zero), torch.where(counted[:, None], grad, zero).to(h.dtype)


def ce_hidden_grad(
    h: "torch.Tensor", weight: "torch.Tensor", y: "torch.Tensor", weights: "torch.Tensor | None" = None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Cross entropy per token and the weighted gradient with respect to the hidden states.

    Args:
        h: hidden states before the output layer: [T, d].
        weight: the output layer's matrix W: [V, d], of the same dtype.
        y: target tokens: int [T]; -100 is no target (loss and gradient are zero).
        weights: w, each token's factor in the gradient: float [T]; one by default. A document's mean
            loss has w_t = 1 / (its number of targets).

    Returns:
        loss: float32 [T], not weighted (float64 if `h` is).
        grad: [T, d] in the dtype of `h`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices don't agree, or a target is no row of `weight`.
    """
    import torch

    if weights is None and isinstance(h, torch.Tensor):
        weights = torch.ones(len(h), dtype=torch.float32, device=h.device)
    check_tensors(
        "ce_hidden_grad",
        h=(h, "T d", "float"),
        weight=(weight, "V d", "float"),
        y=(y, "T", "int"),
        weights=(weights, "T", "float"),
    )
    if h.dtype != weight.dtype:
        raise TypeError(f"ce_hidden_grad: weight must hold {h.dtype} like h, got {weight.dtype}")
    wrong = (y != IGNORE) & ((y < 0) | (y >= len(weight)))
    if bool(wrong.any()):
        raise ValueError(f"ce_hidden_grad: y must be -100 or in [0, {len(weight)}), got {int(y[wrong][0])}")
    with torch.no_grad():
        return backend.call("ce_hidden_grad", h, weight, y, weights)


def ce_hidden_grad_chunked(
    h: "torch.Tensor", weight: "torch.Tensor", y: "torch.Tensor", weights: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """`ce_hidden_grad` over chunks of the tokens that have a target; at most 32 MB of logits.

    Products of half-precision inputs are taken in that precision where the hardware accumulates them in
    float32 and rounds only the result (tensor cores; CPUs where bfloat16 is the faster, see
    jz3.machine), else in float32.
    """
    import torch

    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    loss = torch.zeros(len(h), dtype=dtype, device=h.device)
    grad = torch.zeros_like(h, memory_format=torch.contiguous_format)
    rows = max(1, CHUNK_BYTES // (dtype.itemsize * max(len(weight), 1)))
    product = h.dtype if h.device.type != "cpu" or _has_instructions(h.dtype) else dtype
    native = _native_softmax(h.device.type, product)
    # Where rows aren't of a multiple of 32 numbers, torch's products with AMX read into the next one, so that what
    # isn't finite would spread.
    wrong = ~torch.isfinite(h).all(1) & (y != IGNORE) if h.device.type == "cpu" else None
    if wrong is not None and wrong.any():
        h = h.masked_fill(wrong[:, None], 0)
    for index in torch.nonzero(y != IGNORE)[:, 0].split(rows):
        target = y[index].long()[:, None]
        logits = _product(h[index], weight, product, dtype if native is None else product)
        if native is None:
            logits.sub_(logits.amax(1, keepdim=True))
            own = logits.gather(1, target)
            total = logits.exp_().sum(1, keepdim=True)
            loss[index] = (total.log() - own)[:, 0]
            logits.scatter_add_(1, target, -total)
            if product == torch.float16:  # sums up to the vocabulary's size don't fit
                logits.div_(total)
                total = torch.ones_like(total)
        else:
            total = loss.new_empty(len(index), 1)
            part = loss.new_empty(len(index))
            pointers = (logits, target, part, total)
            native(*(x.data_ptr() for x in pointers), *logits.shape, logits.stride(0), backend.threads())
            loss[index] = part
        factor = weights[index].to(dtype)[:, None] / total
        grad[index] = (_product_t(logits, weight, product).to(dtype) * factor).to(h.dtype)
    if wrong is not None:
        loss[wrong], grad[wrong] = torch.nan, torch.nan
    return loss, grad


VOCABULARY_CHUNK = 8192


def _has_instructions(dtype: "torch.dtype") -> bool:
    """Tell whether this CPU multiplies matrices of `dtype` faster than through float32."""
    import torch

    return dtype == torch.bfloat16 and fast_bfloat16_cpu()


def _native_softmax(device: str, product: "torch.dtype") -> Any:
    """Return the softmax of csrc/cpu/block_rows.h, one pass less and no float32 copy; None where there is none."""
    if device != "cpu" or backend.extension_missing():
        return None
    units = getattr(
        backend.extension(), "vector_unit", int
    )()  # 1: AVX2, in float32 alone; 2: AVX-512 with bfloat16
    if units < (2 if str(product) == "torch.bfloat16" else 1):
        return None
    return getattr(backend.extension(), f"softmax_residual_{str(product).removeprefix('torch.')}", None)


def _product(
    h: "torch.Tensor", weight: "torch.Tensor", product: "torch.dtype", dtype: "torch.dtype"
) -> "torch.Tensor":
    """h W^T, with W brought to the dtype of the product a piece at a time."""
    import torch

    if weight.dtype == product:
        return (h @ weight.T).to(dtype)
    out = torch.empty(len(h), len(weight), dtype=dtype, device=h.device)
    for begin in range(0, len(weight), VOCABULARY_CHUNK):
        part = weight[begin : begin + VOCABULARY_CHUNK].to(product)
        torch.mm(h.to(product), part.T, out=out[:, begin : begin + VOCABULARY_CHUNK])
    return out


def _product_t(p: "torch.Tensor", weight: "torch.Tensor", product: "torch.dtype") -> "torch.Tensor":
    """p W, with W brought to the dtype of the product a piece at a time."""
    import torch

    if weight.dtype == product:
        return p.to(product) @ weight
    out = torch.zeros(len(p), weight.shape[1], dtype=product, device=p.device)
    for begin in range(0, len(weight), VOCABULARY_CHUNK):
        out.addmm_(
            p[:, begin : begin + VOCABULARY_CHUNK], weight[begin : begin + VOCABULARY_CHUNK].to(product)
        )
    return out


def _ce_hidden_grad_triton(
    h: "torch.Tensor", weight: "torch.Tensor", y: "torch.Tensor", weights: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    from jz3.kernels import ce_hidden_grad as kernels

    return kernels.ce_hidden_grad(h, weight, y, weights)


def _unsupported(chosen: str, arguments: tuple[Any, ...]) -> str:
    return "float64" if chosen == "triton" and str(arguments[0].dtype) == "torch.float64" else ""


def _example(device: str) -> tuple[Any, ...]:
    import torch

    rng = np.random.default_rng(0)
    y = torch.tensor([0, 10, IGNORE, 3, 3], device=device)
    if device == "cpu":
        h, weight, weights = (
            torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
            for shape in ((5, 6), (11, 6), (5,))
        )
        return h, weight, y, weights
    # Half precision, as models have on GPUs, and several tiles; logits of small whole numbers are exact in it.
    h, weight = (
        torch.from_numpy(rng.integers(-1, 2, shape).astype(np.float32)).to(device, torch.bfloat16)
        for shape in ((40, 80), (300, 80))
    )
    return h, weight, y.repeat(8), torch.from_numpy(rng.random(40, np.float32)).to(device)


backend.register(
    backend.Op(
        name="ce_hidden_grad",
        reference=ce_hidden_grad_reference,
        native={
            "triton": _ce_hidden_grad_triton,
            "cuda": ce_hidden_grad_chunked,
            "cpu": ce_hidden_grad_chunked,
        },
        plain=frozenset({"cuda", "cpu"}),
        example=_example,
        unsupported=_unsupported,
    )
)
