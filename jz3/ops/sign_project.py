"""Dense random projection out = X Omega^T with Omega in {+-1}^(k x P) / sqrt(k), never stored whole.

Sign (r, c) of Omega is that of `signs(seed, name, k, P)`. E<out_x, out_y> = <x, y>.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jz3 import backend
from jz3.ops.checks import check_int, check_tensors
from jz3.ops.signs import BLOCK, sign_bits_reference, signs_key, unpack_signs

if TYPE_CHECKING:
    import torch

REFERENCE_COLUMNS = 32 * BLOCK
"""Columns of Omega that the reference makes at a time."""

CUDA_PIECE = 128 * BLOCK
CUDA_PARTIAL = 256 << 20
"""Columns that a CUDA block sums up, and the bytes of partial sums held at a time."""

GRID = 65_535
TRITON_MOST, CUDA_MOST = 64 * GRID, 128 * GRID
"""The most blocks of a launch along y or z, and so the most projections of the Triton kernel and rows of the CUDA
kernel, which lie along y."""

TILE = 4 << 20
"""Numbers of x in float32, or signs where they can't be made as they are used, that the CPU implementation holds
at a time."""
CPU_CHUNK = 16 * BLOCK
"""Columns that csrc/cpu/sign_project.cpp sums up at a time: pieces of x end with one, so that they change no sum."""


def sign_project_reference(x: "torch.Tensor", key: int, k: int, first_col: int) -> "torch.Tensor":
    """The definition of `sign_project` in plain torch; float64 input gives float64."""
    import torch

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(len(x), k, dtype=dtype, device=x.device)
    for begin in range(0, x.shape[1], REFERENCE_COLUMNS):
        part = x[:, begin : begin + REFERENCE_COLUMNS].to(dtype)
        bits = sign_bits_reference(key, k, part.shape[1], 0, first_col + begin)
        omega = torch.from_numpy(unpack_signs(np.ascontiguousarray(bits), part.shape[1]))
        out += part @ omega.to(x.device, dtype).T
    return out * (1 / math.sqrt(k))


def sign_project(x: "torch.Tensor", k: int, *, seed: int, name: str, first_col: int = 0) -> "torch.Tensor":
    """Project rows onto k random sign vectors scaled by 1 / sqrt(k).

    Args:
        x: [S, P].
        k: the number of projections.
        seed: the run's seed.
        name: what is projected; every name has its own signs.
        first_col: the column of Omega that x begins at, a multiple of 128: a long vector may come in
            pieces, whose results add up.

    Returns:
        float32 [S, k] (float64 if `x` is).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `k` or `first_col` is out of range.

    Source: the Rademacher projection of TRAK (arXiv 2303.14186) and LESS (arXiv 2402.04333).
    """
    import torch

    check_tensors("sign_project", x=(x, "S P", "float"))
    k = check_int("sign_project", "k", k, 1, 1 << 24)
    first_col = check_int("sign_project", "first_col", first_col, 0, 1 << 62)
    if first_col % BLOCK:
        raise ValueError(f"sign_project: first_col must be a multiple of {BLOCK}, got {first_col}")
    with torch.no_grad():
        return backend.call("sign_project", x, signs_key(seed, name), k, first_col)


def _sign_project_cpu(x: "torch.Tensor", key: int, k: int, first_col: int) -> "torch.Tensor":
    """Signs made where they are used, or where AVX-512 lacks tiles of Omega with products by torch's BLAS."""
    import torch

    module, out = backend.extension(), torch.zeros(len(x), k, dtype=torch.float32, device="cpu")
    fused = module.has_sign_project()
    width = CPU_CHUNK * max(1, TILE // max(len(x) if fused else k, 1) // CPU_CHUNK)
    for begin in range(0, x.shape[1] if len(x) else 0, width):
        part = x[:, begin : begin + width].float()
        block = (first_col + begin) // BLOCK
        if fused:
            part = part if part.stride(1) == 1 else part.contiguous()
            sizes = (*part.shape, k, part.stride(0))
            module.sign_project(part.data_ptr(), out.data_ptr(), key, block, *sizes, backend.threads())
        else:
            for row in range(0, k, TILE // CPU_CHUNK):
                some = out[:, row : row + TILE // CPU_CHUNK]
                omega = torch.empty(some.shape[1], part.shape[1], dtype=torch.float32, device="cpu")
                sizes = (*omega.shape, row, block)
                module.sign_matrix(omega.data_ptr(), key, *sizes, backend.threads())
                some.addmm_(part, omega.T)
    return out.mul_(1 / math.sqrt(k))


def _sign_project_cuda(x: "torch.Tensor", key: int, k: int, first_col: int) -> "torch.Tensor":
    """The compiled tensor-core kernel; fixed pieces of columns, whose sums are added in order."""
    import torch

    out = torch.zeros(len(x), k, device=x.device, dtype=torch.float32)
    pieces = min(CUDA_PARTIAL // max(4 * len(x) * k, 1), GRID)
    width = CUDA_PIECE * max(1, pieces)
    for begin in range(0, x.shape[1] if len(x) else 0, width):
        part = x[:, begin : begin + width]
        pieces = -(-part.shape[1] // CUDA_PIECE)
        partial = torch.empty(pieces, len(x), k, device=x.device, dtype=torch.float32)
        with torch.cuda.device(x.device):
            backend.cuda_extension().sign_project(
                part.data_ptr(),
                partial.data_ptr(),
                len(x),
                part.shape[1],
                k,
                x.stride(0),
                key,
                (first_col + begin) // BLOCK,
                CUDA_PIECE,
                torch.cuda.current_stream().cuda_stream,
            )
        for piece in partial:
            out += piece
    return out.mul_(1 / math.sqrt(k))


def _sign_project_triton(x: "torch.Tensor", key: int, k: int, first_col: int) -> "torch.Tensor":
    from jz3.kernels import sign_project as kernels

    return kernels.sign_project(x, key, k, first_col)


def _unsupported(chosen: str, arguments: tuple[Any, ...]) -> str:
    x, _, k, _ = arguments
    dtype = str(x.dtype).removeprefix("torch.")
    if chosen == "triton" and k > TRITON_MOST:
        return f"{k} projections (it takes up to {TRITON_MOST})"
    if chosen == "cuda" and dtype != "bfloat16":
        return f"{dtype} (it takes bfloat16)"
    if chosen == "cuda" and len(x) > CUDA_MOST:
        return f"{len(x)} rows (it takes up to {CUDA_MOST})"
    if chosen == "cuda" and (x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16):
        return "rows that aren't contiguous and aligned to 16 bytes"
    return dtype if dtype == "float64" else ""


def _example(device: str) -> tuple[Any, ...]:
    import torch

    # On a GPU half precision, and more rows than the largest block has.
    rows, k = (3, 17) if device == "cpu" else (130, 70)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 304)).astype(np.float32)).to(device)
    return x if device == "cpu" else x.bfloat16(), 0x0123456789ABCDEF, k, BLOCK


backend.register(
    backend.Op(
        name="sign_project",
        reference=sign_project_reference,
        native={"cuda": _sign_project_cuda, "triton": _sign_project_triton, "cpu": _sign_project_cpu},
        example=_example,
        unsupported=_unsupported,
    )
)
