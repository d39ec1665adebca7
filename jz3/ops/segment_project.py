"""All documents' projected gradients of one linear module, in one pass over its output gradient.

Document i owns some tokens of a packed batch. With a_t R already projected and L = `left`,

    out[i] = sum_{t in i} (L^T g_t) (a_t R)^T        [Q, P]

which is L^T G_i R for the document's gradient G_i = sum_t g_t a_t^T, without ever forming G_i.
"""

import functools
import math
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from jz3 import backend
from jz3.ops.checks import check_int, check_tensors
from jz3.ops.segment_plan import Plan, piece_limit, plan_segments
from jz3.ops.signs import unpack_signs

if TYPE_CHECKING:
    import torch

DENSE, SIGNS, IDENTITY = range(3)
"""Kinds of L, as csrc/cuda/launch.h numbers them."""

SLOTS, SLOTS_SM90 = 128, 256
"""Slots of a tile of the CUDA kernels."""

SMALL = 64
"""Up to so many outputs and columns the sm_90 kernel would leave half of its work unused."""


def segment_project_reference(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor | None",
    bounds: "torch.Tensor",
    tokens: "torch.Tensor | None" = None,
    outputs: int | None = None,
) -> "torch.Tensor":
    """The definition of `segment_project` in plain torch, and the signature of every back end.

    Args:
        a, g, left, outputs: as for `segment_project`.
        bounds: int [S + 1]; document i has the positions bounds[i] .. bounds[i + 1].
        tokens: int64, position -> token; None where they are the same.

    Returns:
        float32 [S, Q, P]; float64 inputs give float64.
    """
    import torch

    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    if tokens is not None:
        a, g = a[tokens], g[tokens]
    rows = g.to(dtype)
    if left is not None:
        rows = rows @ (left.to(dtype) if outputs is None else unpack_left(left, outputs, dtype))
    if outputs is not None:
        rows *= 1 / math.sqrt(outputs)
    a = a.to(dtype)
    edges = bounds.tolist()
    out = torch.empty(len(edges) - 1, rows.shape[1], a.shape[1], dtype=dtype, device=a.device)
    for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        torch.matmul(rows[begin:end].T, a[begin:end], out=out[i])
    return out


@overload
def segment_project(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor | None",
    segments: "torch.Tensor",
    *,
    documents: int | None = ...,
    outputs: int | None = ...,
    norms: Literal[False] = ...,
) -> "torch.Tensor": ...


@overload
def segment_project(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor | None",
    segments: "torch.Tensor",
    *,
    documents: int | None = ...,
    outputs: int | None = ...,
    norms: Literal[True],
) -> "tuple[torch.Tensor, torch.Tensor]": ...


def segment_project(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor | None",
    segments: "torch.Tensor",
    *,
    documents: int | None = None,
    outputs: int | None = None,
    norms: bool = False,
) -> "torch.Tensor | tuple[torch.Tensor, torch.Tensor]":
    """Project every document's gradient of a linear module: out[i] = sum_{t in i} (L^T g_t) a_t^T.

    Args:
        a: the module's input, already projected (a R): [T, P].
        g: the gradient of the loss with respect to the module's output: [T, O].
        left: L: [O, Q]; or its signs packed as `jz3.ops.signs.sign_bits` packs them, int32 [O, words],
            for entries of +-1 / sqrt(Q); None is the identity, which gives exact gradients for
            unprojected `a`.
        segments: which document a token belongs to; on the device of `a` or, which spares waiting for
            the device, on the CPU. Without `documents` the bounds of packed documents: int [S + 1], not
            decreasing; tokens before the first bound or after the last belong to none. With `documents`
            the document of every token in any order: int [T], -1 for none.
        documents: S, if `segments` is a map from tokens to documents.
        outputs: Q, if `left` is packed signs.
        norms: return the blocks' squared Frobenius norms too.

    Returns:
        float32 [S, Q, P] (float64 if `a` is), zeros for documents without tokens; with `norms` also
        [S] of the same dtype.

    Raises:
        TypeError: an argument is no tensor or of the wrong kind.
        ValueError: shapes or devices don't agree, `segments` isn't what it should be, or `documents` or
            `outputs` is missing, superfluous or out of range.

    Source: the per-document gradient of LoGra (arXiv 2405.13954, eq. 5) for ragged packed batches.
    """
    import torch

    packed = left is not None and getattr(left, "dtype", None) == torch.int32
    specs: dict[str, Any] = {"a": (a, "T P", "float"), "g": (g, "T O", "float")}
    if left is not None:
        specs["left"] = (left, "O words" if packed else "O Q", "int32" if packed else "float")
    sizes = check_tensors("segment_project", **specs)
    if packed:
        if outputs is None:
            raise ValueError("segment_project: outputs must be given where left is packed signs, got None")
        outputs = check_int("segment_project", "outputs", outputs, 1, 32 * sizes["words"])
    elif outputs is not None:
        raise ValueError(f"segment_project: outputs is for packed signs (int32 left) alone, got {outputs!r}")
    width = outputs if outputs is not None else sizes["O" if left is None else "Q"]
    tokens = None
    if documents is None:
        check_tensors("segment_project", segments=(segments, "S+1", "int"))
        bounds = segments.cpu().long().contiguous()  # whose address the CPU kernel takes
        check_bounds("segment_project", bounds, sizes["T"], "segments")
    else:
        documents = check_int("segment_project", "documents", documents, 0, (1 << 31) - 1)
        bounds, tokens = _sort_tokens(segments, documents, sizes["T"])
    with torch.no_grad():
        count = len(bounds) - 1
        if int(bounds[-1]) > int(bounds[0]) and sizes["O"] * width * sizes["P"]:
            tokens = None if tokens is None else tokens.to(a.device)
            blocks = backend.call("segment_project", a, g, left, bounds, tokens, outputs)
        else:
            dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
            blocks = torch.zeros(count, width, sizes["P"], dtype=dtype, device=a.device)
        return (blocks, torch.linalg.vector_norm(blocks.flatten(1), dim=1).square()) if norms else blocks


def segment_norms(a: "torch.Tensor", g: "torch.Tensor", cu_seqlens: "torch.Tensor") -> "torch.Tensor":
    """Exact squared norms of every document's gradient without forming it.

    ||G_i||^2 = sum_{t,u in i} (g_t . g_u) (a_t . a_u), or by G_i itself where that is cheaper.

    Args:
        a: the module's full input: [T, I].
        g: the gradient with respect to its output: [T, O].
        cu_seqlens: bounds of the documents: int [S + 1].

    Returns:
        float32 [S] (float64 if `a` is).

    Raises:
        TypeError: an argument is no tensor or of the wrong kind.
        ValueError: shapes or devices don't agree, or `cu_seqlens` is no list of bounds.
    """
    import torch

    check_tensors(
        "segment_norms", a=(a, "T I", "float"), g=(g, "T O", "float"), cu_seqlens=(cu_seqlens, "S+1", "int")
    )
    check_bounds("segment_norms", cu_seqlens, len(a))
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    bounds = cu_seqlens.tolist()
    out = torch.zeros(len(bounds) - 1, dtype=dtype, device=a.device)
    gram_limit = a.shape[1] * g.shape[1] / max(a.shape[1] + g.shape[1], 1)
    with torch.no_grad():
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            left, right = g[begin:end].to(dtype), a[begin:end].to(dtype)
            if end - begin <= gram_limit:
                out[i] = ((left @ left.T) * (right @ right.T)).sum()
            else:
                out[i] = (left.T @ right).square().sum()
    return out.clamp_(min=0)


def check_bounds(op: str, bounds: "torch.Tensor", tokens: int, name: str = "cu_seqlens") -> None:
    """Refuse `bounds` that isn't a non-decreasing list of bounds within [0, tokens]."""
    if bounds.numel() == 0:
        raise ValueError(f"{op}: {name} must hold at least one bound, got none")
    low, high = int(bounds[0]), int(bounds[-1])
    if low < 0 or high > tokens or bool((bounds[1:] < bounds[:-1]).any()):
        raise ValueError(
            f"{op}: {name} must not decrease and lie in [0, {tokens}], got {bounds.tolist()!r:.200}"
        )


def unpack_left(left: "torch.Tensor", outputs: int, dtype: "torch.dtype") -> "torch.Tensor":
    """Return packed signs as +1 and -1: [O, Q] of a dtype, on their device."""
    import torch

    signs = unpack_signs(left.cpu().numpy().view(np.uint32), outputs)
    return torch.from_numpy(signs).to(left.device, dtype)


def _sort_tokens(
    segments: "torch.Tensor", documents: int, tokens: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Turn a map from tokens to documents into bounds (on the CPU) and the tokens in their order.

    The sort is stable, so that a document's tokens keep their order. Those of no document come first.
    """
    import torch

    check_tensors("segment_project", segments=(segments, "T", "int"))
    if len(segments) != tokens:
        raise ValueError(
            f"segment_project: segments must have the axes [T] with T = {tokens} (from a), "
            f"got {tuple(segments.shape)}"
        )
    segments = segments.cpu()
    if tokens and not -1 <= int(segments.min()) <= int(segments.max()) < documents:
        raise ValueError(
            f"segment_project: segments must lie in [-1, {documents - 1}], got values in "
            f"[{int(segments.min())}, {int(segments.max())}]"
        )
    counts = torch.bincount(segments.long() + 1, minlength=documents + 1)
    return counts.cumsum(0), torch.argsort(segments, stable=True)


def _segment_project_triton(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor | None",
    bounds: "torch.Tensor",
    tokens: "torch.Tensor | None",
    outputs: int | None,
) -> "torch.Tensor":
    """The Triton kernel takes packed documents and a dense L: tokens are gathered, signs unpacked before."""
    from jz3.kernels import segment_project as kernels

    if tokens is not None:
        a, g = a[tokens], g[tokens]
    if left is None or outputs is None:
        return kernels.segment_project(a, g, left, bounds)
    # A power of two before, which is exact, so that sums of float16 hardly overflow; what is left of 1 / sqrt(Q) after.
    exponent = round(math.log2(outputs) / 2)
    matrix = unpack_left(left, outputs, a.dtype).mul_(2.0**-exponent)
    return kernels.segment_project(a, g, matrix, bounds).mul_(2.0**exponent / math.sqrt(outputs))


def segment_project_cpu(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor",
    bounds: "torch.Tensor",
    tokens: "torch.Tensor | None",
    outputs: int | None,
    unit: int = -1,
) -> "torch.Tensor":
    """The compiled pass over g.

    `unit` picks 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 products, -1 the best there is; ValueError where the
    machine lacks it.
    """
    import torch

    a, g, left = (x if x.stride(1) == 1 else x.contiguous() for x in (a, g, left))
    rows, columns = outputs or left.shape[1], a.shape[1]
    out = torch.empty(len(bounds) - 1, rows, columns, dtype=torch.float32, device="cpu")
    backend.extension().segment_project(
        a=a.data_ptr(),
        g=g.data_ptr(),
        left=left.data_ptr(),
        out=out.data_ptr(),
        bounds=bounds.data_ptr(),
        tokens=0 if tokens is None else tokens.data_ptr(),
        documents=len(out),
        width=g.shape[1],
        outputs=rows,
        columns=columns,
        stride_a=a.stride(0),
        stride_g=g.stride(0),
        stride_left=left.stride(0),
        scale=1 / math.sqrt(rows) if outputs else 1.0,
        signs=outputs is not None,
        bf16=g.dtype == torch.bfloat16,
        unit=unit,
        threads=backend.threads(),
    )
    return out


def _segment_project_cuda(
    a: "torch.Tensor",
    g: "torch.Tensor",
    left: "torch.Tensor | None",
    bounds: "torch.Tensor",
    tokens: "torch.Tensor | None",
    outputs: int | None,
) -> "torch.Tensor":
    """The compiled kernels: TMA and wgmma on sm_90, cp.async and mma.sync elsewhere and for signs and maps."""
    import torch

    module, width, columns = backend.cuda_extension(), g.shape[1], a.shape[1]
    if left is None:
        kind, matrix, rows = IDENTITY, g, width
    elif outputs is None:
        kind, matrix, rows = DENSE, _aligned(left.T), left.shape[1]
    else:
        kind, matrix, rows = SIGNS, _aligned(left), outputs
    hopper = torch.cuda.get_device_capability(a.device) == (9, 0) and "90a" in module.archs()
    hopper = hopper and kind == DENSE and tokens is None and max(rows, columns) > SMALL
    tile = SLOTS_SM90 if hopper else SLOTS
    limit = piece_limit(width, rows, columns, tile)
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream().cuda_stream
    plan, (slots, *tables) = _plan_on(bounds.numpy().tobytes(), limit, tile, a.device, stream)
    if tokens is not None:
        slots = torch.where(slots < 0, -1, tokens[slots.clamp(min=0)]).int()
    pieces, tiles, groups, first, documents = tables
    out = torch.empty(len(bounds) - 1, rows, columns, device=a.device, dtype=torch.float32)
    partial = torch.empty(int(plan.partials[-1]), rows, columns, device=a.device, dtype=torch.float32)
    a = _aligned(a)
    with torch.cuda.device(a.device):
        module.segment_project(
            a=a.data_ptr(),
            g=g.data_ptr(),
            left=matrix.data_ptr(),
            out=out.data_ptr(),
            partial=partial.data_ptr(),
            slots=slots.data_ptr(),
            pieces=pieces.data_ptr(),
            tiles=tiles.data_ptr(),
            groups=groups.data_ptr(),
            width=width,
            outputs=rows,
            columns=columns,
            stride_a=a.stride(0),
            stride_g=g.stride(0),
            stride_left=matrix.stride(0),
            scale=1 / math.sqrt(rows) if kind == SIGNS else 1.0,
            kind=kind,
            bf16=g.dtype == torch.bfloat16,
            blocks=len(plan.groups) - 1,
            tokens=len(g),
            sm90=hopper,
            stream=stream,
        )
        if len(plan.documents):
            module.segment_sum(
                partial=partial.data_ptr(),
                out=out.data_ptr(),
                first=first.data_ptr(),
                documents=documents.data_ptr(),
                size=rows * columns,
                count=len(plan.documents),
                stream=stream,
            )
    return out


@functools.lru_cache(maxsize=16)
def _plan_on(
    bounds: bytes, limit: int, tile: int, device: "torch.device", stream: int
) -> "tuple[Plan, tuple[torch.Tensor, ...]]":
    """Plan once for all modules of a batch.

    Every stream has tables of its own: what one drops, torch may give to the next kernels of the stream that it was
    made on, while another stream still reads it.
    """
    import torch

    plan = plan_segments(np.frombuffer(bounds, np.int64), limit, tile)
    tables = (plan.slots, plan.pieces, plan.tiles, plan.groups, plan.partials, plan.documents)
    return plan, tuple(torch.from_numpy(table).to(device) for table in tables)


def _is_aligned(x: "torch.Tensor") -> bool:
    unit = 16 // x.element_size()
    stride = x.stride(0)
    return x.stride(1) == 1 and stride >= x.shape[1] and stride % unit == 0 and x.data_ptr() % 16 == 0


def _aligned(x: "torch.Tensor") -> "torch.Tensor":
    """Return a matrix whose rows begin at multiples of 16 bytes, a copy where it isn't one.

    For a and L alone, which are small beside g.
    """
    if _is_aligned(x):
        return x
    unit = 16 // x.element_size()
    out = x.new_zeros(x.shape[0], -(-x.shape[1] // unit) * unit)[:, : x.shape[1]]
    return out.copy_(x)


def _unsupported(chosen: str, arguments: tuple[Any, ...]) -> str:
    a, g, left, _, _, outputs = arguments
    dtypes = {str(x.dtype).removeprefix("torch.") for x in (a, g, None if outputs else left) if x is not None}
    if "float64" in dtypes:
        return "float64"
    if len(dtypes) > 1:
        return f"mixed dtypes ({', '.join(sorted(dtypes))})"
    if chosen == "cpu":
        return _unsupported_on_cpu(left, dtypes)
    if chosen != "cuda":
        return ""
    if "float32" in dtypes:
        return "float32 (it takes bfloat16 and float16)"
    if not _is_aligned(g):
        return "rows of g that aren't contiguous and aligned to 16 bytes"
    return "2^31 tokens or more" if len(g) >= 1 << 31 else ""


def _unsupported_on_cpu(left: "torch.Tensor | None", dtypes: set[str]) -> str:
    if left is None:
        return "no L: one product per document, which torch's are made for"
    if "float16" in dtypes:
        return "float16 (it takes bfloat16 and float32)"
    unit = getattr(backend.extension(), "segment_unit", int)
    return "" if unit() else "this machine's vector unit (it takes AVX2, AVX-512)"


def _example(device: str) -> tuple[Any, ...]:
    import torch

    rng = np.random.default_rng(0)
    # Small integers: every sum is exact in every dtype, so that the check bites at any error. On a GPU more outputs
    # and columns than the largest block has, and several tiles: its best kernel is the one that is checked.
    outputs, columns, dtype = (72, 8, torch.float32) if device == "cpu" else (136, 136, torch.bfloat16)
    shapes = ((300, columns), (300, 16), (16, outputs))
    a, g, left = (rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes)
    bounds = torch.tensor([0, 3, 3, 290])
    return *(torch.from_numpy(x).to(device, dtype) for x in (a, g, left)), bounds, None, None


backend.register(
    backend.Op(
        name="segment_project",
        reference=segment_project_reference,
        native={"cuda": _segment_project_cuda, "triton": _segment_project_triton, "cpu": segment_project_cpu},
        example=_example,
        unsupported=_unsupported,
    )
)
