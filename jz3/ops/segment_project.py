"""All documents' projected gradients of one linear module, in one pass over its output gradient.

Document i owns the tokens cu_seqlens[i] .. cu_seqlens[i + 1] of a packed batch. With a_t R already
projected and L = `left`,

    out[i] = sum_{t in i} (L^T g_t) (a_t R)^T        [p_o, p_i]

which is L^T G_i R for the document's gradient G_i = sum_t g_t a_t^T, without ever forming G_i.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.ops.checks import check_tensors

if TYPE_CHECKING:
    import torch


def segment_project_reference(
    a: "torch.Tensor", g: "torch.Tensor", left: "torch.Tensor | None", cu_seqlens: "torch.Tensor"
) -> "torch.Tensor":
    """The definition of `segment_project` in plain torch; float64 inputs give float64."""
    import torch

    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    rows = g.to(dtype) if left is None else g.to(dtype) @ left.to(dtype)
    a = a.to(dtype)
    bounds = cu_seqlens.tolist()
    out = torch.empty(len(bounds) - 1, rows.shape[1], a.shape[1], dtype=dtype, device=a.device)
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        torch.matmul(rows[begin:end].T, a[begin:end], out=out[i])
    return out


def segment_project(
    a: "torch.Tensor", g: "torch.Tensor", left: "torch.Tensor | None", cu_seqlens: "torch.Tensor"
) -> "torch.Tensor":
    """Project every document's gradient of a linear module: out[i] = sum_{t in i} (L^T g_t) a_t^T.

    Args:
        a: the module's input, already projected (a R): [T, p_i].
        g: the gradient of the loss with respect to the module's output: [T, O].
        left: L: [O, p_o]; None is the identity, which gives exact gradients for unprojected `a`.
        cu_seqlens: where the documents begin, and T at the end: int [S + 1], not decreasing. Tokens
            before the first bound or after the last belong to no document.

    Returns:
        float32 [S, p_o, p_i] (float64 if `a` is); zeros for documents without tokens.

    Raises:
        TypeError: an argument is no tensor or of the wrong kind.
        ValueError: shapes or devices don't agree, or `cu_seqlens` is no list of bounds.

    Source: the per-document gradient of LoGra (arXiv 2405.13954, eq. 5) for ragged packed batches.
    """
    import torch

    if left is None:
        check_tensors(
            "segment_project",
            a=(a, "T P", "float"),
            g=(g, "T O", "float"),
            cu_seqlens=(cu_seqlens, "S+1", "int"),
        )
    else:
        check_tensors(
            "segment_project",
            a=(a, "T P", "float"),
            g=(g, "T O", "float"),
            left=(left, "O Q", "float"),
            cu_seqlens=(cu_seqlens, "S+1", "int"),
        )
    check_bounds("segment_project", cu_seqlens, len(a))
    with torch.no_grad():
        return backend.call("segment_project", a, g, left, cu_seqlens)


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


def check_bounds(op: str, cu_seqlens: "torch.Tensor", tokens: int) -> None:
    """Refuse `cu_seqlens` that isn't a non-decreasing list of bounds within [0, tokens]."""
    if cu_seqlens.numel() == 0:
        raise ValueError(f"{op}: cu_seqlens must hold at least one bound, got none")
    low, high = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if low < 0 or high > tokens or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(
            f"{op}: cu_seqlens must not decrease and lie in [0, {tokens}], got {cu_seqlens.tolist()!r:.200}"
        )


def _segment_project_triton(
    a: "torch.Tensor", g: "torch.Tensor", left: "torch.Tensor | None", cu_seqlens: "torch.Tensor"
) -> "torch.Tensor":
    from jz3.kernels import segment_project as kernels

    return kernels.segment_project(a, g, left, cu_seqlens)


def _unsupported(chosen: str, arguments: tuple[Any, ...]) -> str:
    dtypes = {str(x.dtype).removeprefix("torch.") for x in arguments[:3] if x is not None}
    if "float64" in dtypes:
        return "float64"
    return f"mixed dtypes ({', '.join(sorted(dtypes))})" if len(dtypes) > 1 else ""


def _example(device: str) -> tuple[Any, ...]:
    import torch

    rng = np.random.default_rng(0)
    a, g, left = (rng.standard_normal(shape).astype(np.float32) for shape in ((21, 5), (21, 13), (13, 7)))
    bounds = torch.tensor([0, 3, 3, 20], device=device)
    return *(torch.from_numpy(x).to(device) for x in (a, g, left)), bounds


backend.register(
    backend.Op(
        name="segment_project",
        reference=segment_project_reference,
        native={"triton": _segment_project_triton},
        example=_example,
        unsupported=_unsupported,
    )
)
