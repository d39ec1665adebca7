"""Mutants of sign_project and score_topk: the checks that pass the kernels must not pass a kernel with a fault."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import normal
from gpu_without_gpu import toolchain
from gpu_without_gpu.ptxsim import Device, Kernel, Module, PtxError, to_bf16
from simulated_ptx import struct

from jz3.ops.encode import CODEBOOKS, encode
from jz3.ops.score_queries import fold_queries
from jz3.ops.score_topk import fragments, level_words
from jz3.ops.sign_project import sign_project_reference

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
SCHEDULES = ({"async_mode": "lazy", "race": True}, {"async_mode": "eager"}, {"order": 1})
pytestmark = pytest.mark.skipif(not toolchain.have_nvcc(), reason="nvcc is not on PATH")

SIGN_PROJECT = {
    "no barrier": ("cp_async_wait<0>();\n    __syncthreads();", "cp_async_wait<0>();"),
    "no wait for the rows": ("cp_async_wait<0>();\n    __syncthreads();", "__syncthreads();"),
    "wrong stride": ("x_block + row * p.stride", "x_block + row * width"),
    "wrong stride of the partial sums": ("blockIdx.z) * p.rows", "blockIdx.z) * height"),
    "rows not swizzled": ("((at ^ (row & 7)) << 4)", "(at << 4)"),
    "next rows into these": ("(block & 1) * STAGE + row", "(~block & 1) * STAGE + row"),
    "one row too many": ("row < height", "row <= height"),
    "bits of a unit not apart": ("0x0000AAAAu", "0x00005555u"),
    "signs of another block": ("/ BLOCK + block;", "/ BLOCK;"),
}
SCORE_TOPK = {
    "no barrier": (
        "cp_async_wait<S::STAGES - 2>();\n    __syncthreads();",
        "cp_async_wait<S::STAGES - 2>();",
    ),
    "no wait": ("cp_async_wait<S::STAGES - 2>();\n    __syncthreads();", "__syncthreads();"),
    "waits for a stage too few": ("cp_async_wait<S::STAGES - 2>", "cp_async_wait<S::STAGES - 1>"),
    "next step into this": ("base + step % S::STAGES", "base + (step + 1) % S::STAGES"),
    "wrong stride": ("(first_row + row) * p.row_bytes", "(first_row + row) * (p.row_bytes - 16)"),
    "wrong stride of the queries": ("fragments + step * fours", "fragments + step * FOURS"),
    "rows of the tile": ("+ h * 8 + g) * S::BYTES", "+ h * 4 + g) * S::BYTES"),
    "reads beyond the row": ("byte + in_row < p.row_bytes", "byte + in_row <= p.row_bytes"),
    "reads beyond the last row": ("row + i * AT_ONCE < height", "row + i * AT_ONCE <= height"),
    "reads beyond the queries": ("unit < units", "unit <= units"),
    "writes beyond the queries": ("query >= p.queries", "query > p.queries"),
    "the first layer's queries": ("blockIdx.x % layers * FOURS, fours", "0, fours"),
    "products of another pair": ("S::UNITS + pair * 32", "S::UNITS + (pair ^ 1) * 32"),
    "sign of int8": ("[2 * product] ^ 0x80808080u", "[2 * product]"),
}


def compiled(file: str, kernel: str, change: tuple[str, str] | None = None) -> Kernel:
    """Return a kernel of a file, with its text changed at one place; the others are left out, to compile fast."""
    text = (SOURCES / "cuda" / file).read_text(encoding="utf-8")
    if file == "score_topk.cu":
        text = re.sub(r"\nJZ3_SCORE\((?!8, 16\)).*", "", text[: text.index("#undef JZ3_SCORE")]) + "}\n"
    if change:
        assert text.count(change[0]) == 1, (change[0], text.count(change[0]))
        text = text.replace(*change)
    return Module(toolchain.nvcc_ptx(text, "sm_80", ("-I", str(SOURCES)))).kernels[kernel]


def sign_project(kernel: Kernel, options: dict[str, Any]) -> bool:
    """Whether 130 rows of 270 columns come out right: two blocks of rows, two pieces, a ragged end."""
    rows, columns, k, piece, key = 130, 270, 24, 256, 0xFEDCBA98F6543210
    x = normal(0, rows, 272, dtype=torch.bfloat16)
    device = Device(1 << 22)
    partial = device.put(np.full((2, rows, k), np.nan, np.float32))
    parameters = struct(
        ("x", np.uint64, device.put(to_bf16(x.float().numpy()))),
        ("partial", np.uint64, partial),
        ("rows", np.int64, rows),
        ("columns", np.int64, columns),
        ("projections", np.int64, k),
        ("stride", np.int64, 272),
        ("key", np.uint64, key),
        ("first_block", np.uint64, 3),
        ("piece", np.int64, piece),
    )
    shared = 2 * (128 * 256 + 4096)
    run = device.launch(kernel, (1, 2, 2), (256,), [parameters], dyn_smem=shared, max_steps=5000, **options)
    got = torch.from_numpy(device.get(partial, np.float32, (2, rows, k)).copy()).sum(0) * k**-0.5
    expected = sign_project_reference(x[:, :columns].double(), key, k, 3 * 128)
    return not run.races and torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


def score_topk(kernel: Kernel, options: dict[str, Any]) -> bool:
    """Whether the scores of 270 rows of 400 int8 codes and 21 queries come out right, in two layers of 16 queries."""
    rows, queries, width = 270, 21, 400
    codes = encode(normal(0, rows, width) * 2, torch.zeros(width), torch.ones(width), "int8")
    digits = fold_queries(
        normal(3, queries, width), torch.zeros(width), torch.ones(width), CODEBOOKS["int8"].unit
    )
    device = Device(1 << 22)
    scores = device.put(np.full((queries, rows), np.nan, np.float32))
    parameters = struct(
        ("codes", np.uint64, device.put(codes.numpy())),
        ("fragments", np.uint64, device.put(fragments(digits.planes, 8, width).numpy())),
        ("step", np.uint64, device.put(digits.step.numpy())),
        ("bias", np.uint64, device.put(digits.bias.numpy())),
        ("row_scale", np.uint64, device.put(np.ones(rows, np.float32))),
        ("scores", np.uint64, scores),
        ("rows", np.int64, rows),
        ("row_bytes", np.int64, width),
        ("queries", np.int64, queries),
        ("first_query", np.int64, 0),
        ("bits", np.int32, 8),
        ("levels", (np.uint32, 4), level_words("int8")),
    )
    shared = 4 * (256 * 64 + 4 * 512)
    run = device.launch(kernel, (4,), (256,), [parameters], dyn_smem=shared, **options)
    got = device.get(scores, np.float32, (queries, rows))
    planes = digits.planes.double()
    dots = planes[0] * 128 + planes[1]
    exact = (codes.view(torch.uint8).double() - 128) @ dots.T * digits.step + digits.bias
    return not run.races and bool(np.allclose(got, exact.T.numpy(), rtol=1e-5, atol=1e-5))


KERNELS: dict[str, tuple[Callable[[Kernel, dict[str, Any]], bool], str, dict[str, tuple[str, str]]]] = {
    "sign_project": (sign_project, "jz3_sign_project_128", SIGN_PROJECT),
    "score_topk": (score_topk, "jz3_score_8bit_16", SCORE_TOPK),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_itself_passes(name: str) -> None:
    passes, symbol, _ = KERNELS[name]
    kernel = compiled(f"{name}.cu", symbol)
    for options in SCHEDULES:
        assert passes(kernel, options), options


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in KERNELS for fault in KERNELS[name][2]])
def test_a_mutant_is_caught(name: str, fault: str) -> None:
    passes, symbol, faults = KERNELS[name]
    kernel = compiled(f"{name}.cu", symbol, faults[fault])
    for options in SCHEDULES:
        try:
            if not passes(kernel, options):
                return
        except PtxError:
            return
    pytest.fail(f"{name} with {fault} passes under every schedule")
