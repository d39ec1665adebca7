"""The ops as `torch.ops.jz3.*`, with shapes for tracing; importing this module registers them.

They are opaque to torch.compile, and outside of it the same as the functions of `jz3.ops`, checks included.

    import jz3.ops.library
    torch.ops.jz3.segment_project(a, g, left, segments)
"""

import torch

from jz3.ops.ce_hidden_grad import ce_hidden_grad
from jz3.ops.encode import decode, encode, row_bytes
from jz3.ops.score_topk import score_topk
from jz3.ops.segment_project import segment_project
from jz3.ops.sign_project import sign_project
from jz3.ops.signs import sign_bits
from jz3.ops.sketch import sketch


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("jz3::signs", mutates_args=())
def signs_op(seed: int, name: str, rows: int, cols: int, first_row: int, first_col: int) -> torch.Tensor:
    """`jz3.ops.signs.sign_bits`."""
    return sign_bits(seed, name, rows, cols, first_row=first_row, first_col=first_col)


@signs_op.register_fake
def _(seed: int, name: str, rows: int, cols: int, first_row: int, first_col: int) -> torch.Tensor:
    return torch.empty(rows, 4 * ((cols + 127) // 128), dtype=torch.int32)


@torch.library.custom_op("jz3::segment_project", mutates_args=())
def segment_project_op(
    a: torch.Tensor,
    g: torch.Tensor,
    left: torch.Tensor | None,
    segments: torch.Tensor,
    documents: int | None = None,
    outputs: int | None = None,
) -> torch.Tensor:
    """`jz3.ops.segment_project.segment_project` without norms."""
    return segment_project(a, g, left, segments, documents=documents, outputs=outputs)


@segment_project_op.register_fake
def _(
    a: torch.Tensor,
    g: torch.Tensor,
    left: torch.Tensor | None,
    segments: torch.Tensor,
    documents: int | None = None,
    outputs: int | None = None,
) -> torch.Tensor:
    count = segments.shape[0] - 1 if documents is None else documents
    width = outputs if outputs is not None else g.shape[1] if left is None else left.shape[1]
    return a.new_empty(count, width, a.shape[1], dtype=_result_dtype(a))


@torch.library.custom_op("jz3::sketch", mutates_args=())
def sketch_op(block: torch.Tensor, name: str, dim: int, seed: int) -> torch.Tensor:
    """`jz3.ops.sketch.sketch`."""
    return sketch(block, name, dim, seed=seed)


@sketch_op.register_fake
def _(block: torch.Tensor, name: str, dim: int, seed: int) -> torch.Tensor:
    return block.new_empty(block.shape[0], dim, dtype=_result_dtype(block))


@torch.library.custom_op("jz3::sign_project", mutates_args=())
def sign_project_op(x: torch.Tensor, k: int, seed: int, name: str, first_col: int) -> torch.Tensor:
    """`jz3.ops.sign_project.sign_project`."""
    return sign_project(x, k, seed=seed, name=name, first_col=first_col)


@sign_project_op.register_fake
def _(x: torch.Tensor, k: int, seed: int, name: str, first_col: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], k, dtype=_result_dtype(x))


@torch.library.custom_op("jz3::ce_hidden_grad", mutates_args=())
def ce_hidden_grad_op(
    h: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`jz3.ops.ce_hidden_grad.ce_hidden_grad`."""
    return ce_hidden_grad(h, weight, y, weights)


@ce_hidden_grad_op.register_fake
def _(
    h: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return h.new_empty(h.shape[0], dtype=_result_dtype(h)), h.new_empty(h.shape)


@torch.library.custom_op("jz3::encode", mutates_args=())
def encode_op(values: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """`jz3.ops.encode.encode`."""
    return encode(values, mean, scale, kind)


@encode_op.register_fake
def _(values: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    return values.new_empty(values.shape[0], row_bytes(kind, values.shape[1]), dtype=torch.uint8)


@torch.library.custom_op("jz3::decode", mutates_args=())
def decode_op(codes: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """`jz3.ops.encode.decode`."""
    return decode(codes, mean, scale, kind)


@decode_op.register_fake
def _(codes: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    return mean.new_empty(codes.shape[0], mean.shape[0])


@torch.library.custom_op("jz3::score_topk", mutates_args=())
def score_topk_op(
    codes: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    kind: str,
    queries: torch.Tensor,
    k: int,
    row_scale: torch.Tensor,
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`jz3.ops.score_topk.score_topk` with one task per query."""
    return score_topk(codes, mean, scale, kind, queries, k, row_scale=row_scale, ids=ids)


@score_topk_op.register_fake
def _(
    codes: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    kind: str,
    queries: torch.Tensor,
    k: int,
    row_scale: torch.Tensor,
    ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (queries.shape[0], min(k, codes.shape[0]))
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)
