"""The Triton kernels: interpreted, compiled ahead of time, and their PTX executed on the CPU.

Compiling and executing for a GPU that isn't there needs the package `gpu_without_gpu`; without it those tests
are skipped.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import normal

from jz3.ops.segment_project import segment_project_reference
from jz3.ops.sign_project import sign_project_reference
from jz3.ops.signs import sign_bits_reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("gpu_without_gpu") is None,
    reason="the package gpu_without_gpu is not importable",
)

TILES = {"PIECE": "constexpr", "BM": "constexpr", "BN": "constexpr"}
SIGN = {"p_x": "*bf16", "p_bits": "*i32", "p_partial": "*fp32"}
SIGN |= dict.fromkeys(("S", "P", "k", "blocks", "stride_x"), "i32") | TILES
SIGN_ALIGNED = ("p_x", "p_bits", "p_partial", "stride_x")
SEGMENT = {"p_a": "*bf16", "p_g": "*bf16", "p_left": "*bf16", "p_chunks": "*i64", "p_partial": "*fp32"}
SEGMENT |= dict.fromkeys(("P", "O", "Q", "stride_a", "stride_g", "stride_left"), "i32")
SEGMENT |= dict.fromkeys(("HAS_LEFT", "BT", "BO", "BQ", "BI"), "constexpr")
SEGMENT_ALIGNED = ("p_a", "p_g", "p_left", "p_partial", "stride_a", "stride_g", "stride_left")


def test_interpreted() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("JZ3_BACKEND", None)
    done = subprocess.run(
        [*command, str(here / "interpreted_kernels.py")],
        cwd=here.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compiled_sign_project(arch: int, rows: int, dtype: torch.dtype, piece: int):
    from gpu_without_gpu.triton_aot import compile_aot

    from jz3.kernels import sign_project as kernels

    blocks = kernels.tiles(rows, dtype)
    warps = blocks.pop("num_warps")
    signature = {**SIGN, "p_x": "*bf16" if dtype == torch.bfloat16 else "*fp32"}
    return compile_aot(
        kernels.sign_project_kernel,
        signature,
        {"PIECE": piece, **blocks},
        arch=arch,
        options={"num_warps": warps},
        div16=SIGN_ALIGNED,
    )


def compiled_segment_project(arch: int, outputs: int, columns: int, dtype: torch.dtype):
    from gpu_without_gpu.triton_aot import compile_aot

    from jz3.kernels import segment_project as kernels

    blocks = kernels.tiles(outputs, columns, dtype)
    warps = blocks.pop("num_warps")
    kind = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    return compile_aot(
        kernels.segment_project_kernel,
        {**SEGMENT, "p_a": kind, "p_g": kind, "p_left": kind},
        {"HAS_LEFT": True, **blocks},
        arch=arch,
        options={"num_warps": warps},
        div16=SEGMENT_ALIGNED,
    )


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_they_compile_for_real_gpus_with_tensor_cores_and_without_spills(
    arch: int, dtype: torch.dtype
) -> None:
    compiled = [compiled_sign_project(arch, rows, dtype, 16384) for rows in (8, 64, 500)]
    compiled += [compiled_segment_project(arch, p, p, dtype) for p in (16, 32, 64, 128)]
    for kernel in compiled:
        assert kernel.resources["mma"], kernel.resources
        assert kernel.resources["spills"] <= 16, kernel.resources


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("arch", [80, 90])
def test_sign_project_ptx_executed(arch: int) -> None:
    from gpu_without_gpu.ptxsim import Device, to_bf16

    rows, p, k, piece, key = 20, 600, 70, 256, 0xFEDCBA98F6543210
    compiled = compiled_sign_project(arch, rows, torch.bfloat16, piece)
    x = normal(0, rows, 608, dtype=torch.bfloat16)
    bits = sign_bits_reference(key, k, p, 0, 0)
    for options in ({"async_mode": "lazy"}, {"async_mode": "eager"}):
        device = Device()
        partial = device.put(np.full((3, rows, k), np.nan, np.float32))
        addresses = [device.put(to_bf16(x.float().numpy())), device.put(bits), partial]
        compiled.run(device, (1, 2, 3), [*addresses, rows, p, k, bits.shape[1] // 4, 608], **options)
        got = torch.from_numpy(device.get(partial, np.float32, (3, rows, k))).sum(0) / k**0.5
        expected = sign_project_reference(x[:, :p].double(), key, k, 0)
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("arch", [80, 90])
def test_segment_project_ptx_executed(arch: int) -> None:
    from gpu_without_gpu.ptxsim import Device, to_bf16

    from jz3.kernels.segment_project import chunk_table

    p_i, o, p_o, bounds = 32, 80, 24, [1, 4, 4, 90]
    compiled = compiled_segment_project(arch, p_o, p_i, torch.bfloat16)
    a, g, left = (
        normal(i, *shape, dtype=torch.bfloat16) for i, shape in enumerate([(95, 32), (95, 80), (80, 32)])
    )
    chunks, _ = chunk_table(bounds)
    for options in ({"async_mode": "lazy"}, {"async_mode": "eager"}):
        device = Device()
        partial = device.put(np.full((len(chunks), p_o, p_i), np.nan, np.float32))
        addresses = [device.put(to_bf16(m.float().numpy())) for m in (a, g, left)]
        addresses += [device.put(np.array(chunks, np.int64)), partial]
        compiled.run(device, (len(chunks), 1, 1), [*addresses, p_i, o, p_o, 32, 80, 32], **options)
        got = torch.from_numpy(device.get(partial, np.float32, (len(chunks), p_o, p_i)))
        exact = segment_project_reference(
            a.double(), g.double(), left[:, :p_o].double(), torch.tensor(bounds)
        )
        assert torch.allclose(got.double(), exact[[0, 2]], rtol=1e-3, atol=2e-3)
