"""The best documents for every task, by a scan over codes that never holds all scores.

With phi_i = decode(codes_i) = mean + scale * unit * level_i and queries psi_q,

    score(i, q) = row_scale_i * <phi_i, psi_q>
                = row_scale_i * (step_q * <level_i, digits_q> + <mean, psi_q>)

`digits_q` is scale * psi_q on a grid of 15 bits, kept as two int8 planes (base 128: digits =
128 planes_0 + planes_1), so that <level, digits> is an exact integer on every back end; the rest is
float64 in a fixed order, rounded to float32 once. Therefore scores are the same bit for bit on every
back end, and so are the ids under the tie rule: score descending, then id ascending. The grid moves a
score by about 1e-4 of the scores' spread; one plane (8 bits) would move it by 1e-2, enough to cost a
hundredth of the best hundred.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.ops.best import best_of_groups, chunk_topk, merge_topk, rows_at_once
from jz3.ops.checks import check_int, check_tensors
from jz3.ops.encode import CODEBOOKS, LEVELS, unpack_codes
from jz3.ops.score_queries import check_and_fold, fold_queries

if TYPE_CHECKING:
    import torch

REFERENCE_ROWS = 4096
MOST_BEST = 1 << 31
"""Rows to find."""
CUDA_MAX_DIM = 1 << 17
"""Coordinates whose integer sums fit 32 bits."""


def score_codes_reference(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
) -> "torch.Tensor":
    """The scores of every row for every query, float32 [Q, N]: float64 products of integers are exact."""
    import torch

    levels = torch.tensor(CODEBOOKS[kind].levels, dtype=torch.float64, device=codes.device)
    digits = [plane.double().T for plane in planes]
    scores = torch.empty(len(step), len(codes), device=codes.device, dtype=torch.float32)
    for begin in range(0, len(codes), REFERENCE_ROWS):
        rows = slice(begin, begin + REFERENCE_ROWS)
        level = levels[unpack_codes(codes[rows], kind, planes.shape[2]).long()]
        dot = torch.zeros(len(level), planes.shape[1], dtype=torch.int64, device=codes.device)
        for plane in digits:
            dot = dot * 128 + (level @ plane).long()
        scores[:, rows] = (row_scale[rows].double()[:, None] * (dot.double() * step + bias)).float().T
    return scores


def score_topk_reference(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
    ids: "torch.Tensor",
    groups: "torch.Tensor",
    count: int,
    k: int,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The definition of the scan in plain torch."""
    import torch

    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for begin in range(0, len(codes), REFERENCE_ROWS):
        rows = slice(begin, begin + REFERENCE_ROWS)
        scores = score_codes_reference(codes[rows], kind, planes, step, bias, row_scale[rows])
        scores = best_of_groups(scores, groups, count)
        best = [merge_topk([*best, (scores, ids[rows].expand(count, -1))], k)]
    if best:
        return best[0]
    empty = torch.empty(count, 0, device=codes.device, dtype=torch.float32)
    return empty, empty.long()


def score_topk(
    codes: "torch.Tensor | Sequence[torch.Tensor]",
    mean: "torch.Tensor",
    scale: "torch.Tensor",
    kind: str,
    queries: "torch.Tensor",
    k: int,
    *,
    row_scale: "torch.Tensor | None" = None,
    ids: "torch.Tensor | None" = None,
    groups: "torch.Tensor | None" = None,
    reduce: str = "mean",
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Find the k best rows of `codes` for every query or group of queries.

    score(i, g) = mean or max over the queries q of group g of row_scale_i * <decode(codes_i), q>

    Args:
        codes: uint8 [N, bytes], of `encode`; or several such whose rows follow one another, which the compiled CPU
            code reads where they lie and others join.
        mean, scale: float32 [K], those of `encode`.
        kind: `int8`, `4bit`, `2bit` or `1bit`.
        queries: float32 [Q, K]; for cosines, divided by their norms.
        k: how many rows to find.
        row_scale: float32 [N], one factor a row; for cosines 1 / norm. One by default.
        ids: int64 [N], what to return for a row and what breaks ties; 0 .. N-1 by default.
        groups: int [Q], the task of every query, counted from 0 without gaps; by default every query
            is a task of its own.
        reduce: `mean` (folded into one query per task, so that its cost is that of one) or `max`.

    Returns:
        values float32 [G, min(k, N)] and ids int64 [G, min(k, N)], by (value descending, id ascending).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes or devices don't agree, `kind` or `reduce` is unknown, groups have gaps or a
            number is not finite.
    """
    import torch

    k = check_int("score_topk", "k", k, 1, MOST_BEST)
    with torch.no_grad():
        # What is checked is as long as all pieces together.
        whole = codes if isinstance(codes, torch.Tensor) else _pieces(codes)
        checked = whole if isinstance(whole, torch.Tensor) else whole[0][:1].expand(sum(map(len, whole)), -1)
        folded = check_and_fold(
            "score_topk", checked, mean, scale, kind, queries, row_scale, ids, groups, reduce
        )
        if row_scale is None:
            row_scale = torch.from_numpy(np.ones(len(checked), np.float32)).to(checked.device)
        if ids is None:
            ids = torch.from_numpy(np.arange(len(checked))).to(checked.device)
        digits = folded.digits
        return backend.call(
            "score_topk",
            whole,
            kind,
            digits.planes,
            digits.step,
            digits.bias,
            row_scale,
            ids,
            folded.groups,
            folded.count,
            k,
        )


def _pieces(codes: "Sequence[torch.Tensor]") -> "torch.Tensor | tuple[torch.Tensor, ...]":
    """Check pieces; join them where there is one, or no compiled CPU code, which reads them where they lie."""
    import torch

    if not isinstance(codes, list | tuple):
        raise TypeError(
            f"score_topk: codes must be a torch.Tensor or a list of them, got {type(codes).__name__}"
        )
    if not codes:
        raise ValueError("score_topk: codes must hold at least one tensor, got none")
    for piece in codes:
        check_tensors(
            "score_topk", **{"the first codes": (codes[0], "F B", "uint8"), "codes": (piece, "N B", "uint8")}
        )
    # One stride holds for all; of a single row torch calls any contiguous.
    own = (codes[0].shape[1], 1)
    pieces = tuple(
        piece if piece.stride() == own else piece.clone(memory_format=torch.contiguous_format)
        for piece in codes
        if len(piece)
    ) or (codes[0],)
    on_cpu = pieces[0].device.type == "cpu"
    if len(pieces) > 1 and on_cpu and backend.choose("score_topk")[0] == "cpu":
        return pieces
    return torch.cat(pieces)


def score_topk_cpu(
    codes: "torch.Tensor | tuple[torch.Tensor, ...]",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
    ids: "torch.Tensor",
    groups: "torch.Tensor",
    count: int,
    k: int,
    instructions: int = -1,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The compiled scan.

    `instructions` picks 0 scalar, 1 AVX2, 2 AVX512-VNNI, 3 AMX, 4 the tile kernel of AMX with its tiles in
    plain C++, -1 the best there is; ValueError where the machine lacks it.
    """
    import torch

    if isinstance(codes, torch.Tensor):
        codes = (codes if codes.stride(1) == 1 else codes.contiguous(),)
    k = min(k, len(ids))
    values = torch.empty(count, k, dtype=torch.float32, device="cpu")
    found = torch.empty(count, k, dtype=torch.int64, device="cpu")
    addresses = np.array([piece.data_ptr() for piece in codes], np.uint64)
    begins = np.cumsum([0, *map(len, codes)], dtype=np.int64)
    planes, step, bias, row_scale, ids, groups = (
        x.contiguous() for x in (planes, step, bias, row_scale, ids, groups)
    )
    if k and count:
        backend.extension().score_topk(
            addresses.ctypes.data,
            begins.ctypes.data,
            LEVELS[kind].ctypes.data,
            planes.data_ptr(),
            step.data_ptr(),
            bias.data_ptr(),
            row_scale.data_ptr(),
            ids.data_ptr(),
            groups.data_ptr(),
            values.data_ptr(),
            found.data_ptr(),
            len(codes),
            len(ids),
            planes.shape[2],
            codes[0].shape[1],
            codes[0].stride(0),
            planes.shape[1],
            count,
            k,
            len(planes),
            CODEBOOKS[kind].bits,
            instructions,
            backend.threads(),
        )
    return values, found


def fragments(planes: "torch.Tensor", bits: int, width: int) -> "torch.Tensor":
    """Put the queries' planes in the order in which the CUDA kernel's threads meet their coordinates.

    Args:
        planes: int8 [2, Q, K].
        bits: of a code.
        width: bytes of a row of codes.

    Returns:
        int32 [steps, ceil(Q / 4), products / 2, 32, 4]: two registers of each of two products for each
        thread of a warp.
    """
    import torch

    count, dim = planes.shape[1:]
    run = 8 if bits == 1 else 16  # bytes of a row that a thread has at a time
    steps, fours, products = -(-width // (4 * run)), -(-count // 4), run // bits
    padded = planes.new_zeros(2, fours * 4, steps * 4 * products * 8)
    padded[:, :count, :dim] = planes
    # a register's four codes of less than a byte are at the bottom of the nibbles of 16 bits, shifted
    shifts = max(4 // bits, 1)
    # plane, four, query of the four, step, thread of the quad, word, register, byte, shift
    axes = padded.view(2, fours, 4, steps, 4, products // shifts, 2, 4, shifts)
    ordered = axes.permute(3, 1, 5, 8, 2, 0, 4, 6, 7).reshape(steps, fours, products // 2, 2, 32, 8)
    return ordered.transpose(3, 4).contiguous().view(steps, fours, products // 2, 32, 16).view(torch.int32)


def level_words(kind: str) -> list[int]:
    """Return the levels of a sub-byte kind as four 32-bit words, one level a byte, zeros after the last."""
    levels = CODEBOOKS[kind].levels if CODEBOOKS[kind].bits < 8 else ()
    data = bytes(level & 0xFF for level in levels).ljust(16, b"\0")
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, 16, 4)]


def score_codes_cuda(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
) -> "torch.Tensor":
    """The compiled kernel: the scores of every row for every query, float32 [Q, N]."""
    import torch

    bits = CODEBOOKS[kind].bits
    ordered = fragments(planes, bits, codes.shape[1])
    row_scale, step, bias = row_scale.contiguous(), step.contiguous(), bias.contiguous()
    scores = torch.empty(len(step), len(codes), device=codes.device, dtype=torch.float32)
    with torch.cuda.device(codes.device):
        backend.cuda_extension().score_codes(
            codes.data_ptr(),
            ordered.data_ptr(),
            step.data_ptr(),
            bias.data_ptr(),
            row_scale.data_ptr(),
            scores.data_ptr(),
            len(codes),
            codes.shape[1],
            len(step),
            bits,
            level_words(kind),
            torch.cuda.current_stream().cuda_stream,
        )
    return scores


def _score_topk_cuda(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
    ids: "torch.Tensor",
    groups: "torch.Tensor",
    count: int,
    k: int,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Scores by the compiled kernel, up to a million rows at a time, and the best of them by torch."""
    import torch

    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    chunk = rows_at_once(len(step))
    for begin in range(0, len(codes) if count else 0, chunk):
        rows = slice(begin, begin + chunk)
        scores = score_codes_cuda(codes[rows], kind, planes, step, bias, row_scale[rows])
        best.append(chunk_topk(best_of_groups(scores, groups, count), ids[rows], k))
        best = [merge_topk(best, k)]
    if best:
        return best[0]
    empty = torch.empty(count, min(k, len(codes)), device=codes.device, dtype=torch.float32)
    return empty, empty.long()


def _score_topk_triton(
    codes: "torch.Tensor",
    kind: str,
    planes: "torch.Tensor",
    step: "torch.Tensor",
    bias: "torch.Tensor",
    row_scale: "torch.Tensor",
    ids: "torch.Tensor",
    groups: "torch.Tensor",
    count: int,
    k: int,
) -> "tuple[torch.Tensor, torch.Tensor]":
    from jz3.kernels import score_topk as kernels

    return kernels.score_topk(codes, kind, planes, step, bias, row_scale, ids, groups, count, k)


def unsupported(chosen: str, arguments: tuple[Any, ...]) -> str:
    codes, _, planes = arguments[:3]
    if chosen == "triton" and planes.shape[2] > CUDA_MAX_DIM:
        return f"more than {CUDA_MAX_DIM} coordinates"
    if chosen != "cuda":
        return ""
    if len(planes) != 2:
        return f"{len(planes)} planes (it takes 2)"
    if codes.shape[1] % 16 or not codes.is_contiguous() or codes.data_ptr() % 16:
        return "rows that aren't contiguous and aligned to 16 bytes"
    return f"more than {CUDA_MAX_DIM} coordinates" if planes.shape[2] > CUDA_MAX_DIM else ""


def _example(device: str) -> tuple[Any, ...]:
    import torch

    rng = np.random.default_rng(0)
    # On a GPU more rows than a block has, and enough queries for the largest.
    dim, rows, each = (38, 50, 1) if device == "cpu" else (64, 300, 8)
    codes = torch.from_numpy(rng.integers(0, 256, (rows, dim // 2), dtype=np.uint8)).to(device)
    codes[7] = codes[3]
    queries, mean, scale, row_scale = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(device)
        for shape in ((5 * each, dim), (dim,), (dim,), (rows,))
    )
    row_scale[7] = row_scale[3]
    digits = fold_queries(queries, mean, scale.abs(), CODEBOOKS["4bit"].unit)
    ids = torch.arange(rows, device=device).flip(0)
    groups = torch.tensor([1, 0, 0, 2, 1] * each, device=device)
    return codes, "4bit", digits.planes, digits.step, digits.bias, row_scale, ids, groups, 3, 20


backend.register(
    backend.Op(
        name="score_topk",
        reference=score_topk_reference,
        native={"cuda": _score_topk_cuda, "triton": _score_topk_triton, "cpu": score_topk_cpu},
        example=_example,
        exact=True,
        unsupported=unsupported,
    )
)
