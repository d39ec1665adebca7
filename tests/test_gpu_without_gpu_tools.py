"""The tools around the PTX interpreter: nvcc, reports on machine code, Triton ahead of time and interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_without_gpu import sass_report, toolchain
from gpu_without_gpu.ptxsim import Device, Module, from_bf16, to_bf16

HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(not toolchain.have_nvcc(), reason="nvcc is not on PATH")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SOURCE = r"""
#include <cstdint>
extern "C" __global__ void products(const uint32_t* a, const uint32_t* b, float* out, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    const uint32_t* x = a + (i * 32 + threadIdx.x) * 4;
    const uint32_t* y = b + (i * 32 + threadIdx.x) * 2;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
extern "C" __global__ void many_values(const float* x, float* out, int n) {
  float v[96];
  for (int i = 0; i < 96; ++i) v[i] = x[i * 32 + threadIdx.x];
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i + 1) % 96] + k;
  for (int i = 0; i < 96; ++i) out[i * 32 + threadIdx.x] = v[i];
}
"""


@needs_nvcc
def test_what_nvcc_emits_is_executed() -> None:
    module = Module(toolchain.nvcc_ptx(SOURCE))
    rng = np.random.default_rng(0)
    ones = to_bf16(np.ones((5, 32, 4)))
    a = to_bf16(rng.integers(-8, 9, (5, 32, 8)))
    device = Device(1 << 20)
    out = device.put(np.full((32, 4), np.nan, np.float32))
    arguments = [device.put(a), device.put(ones), out, 5]
    device.launch(module.kernels["products"], (1,), (32,), arguments)
    lanes = from_bf16(a).sum(0).reshape(8, 4, 8).sum(1)  # of a quad: two rows, in pairs
    rows = lanes.reshape(8, 2, 2, 2).sum((1, 3))
    got = device.get(out, np.float32, (8, 4, 2, 2))
    assert np.array_equal(got, np.broadcast_to(rows[:, None, :, None], got.shape))


@needs_nvcc
def test_report_on_machine_code(tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    toolchain.nvcc(SOURCE, cubin, "sm_80", "cubin", toolchain.SPILLS_ARE_ERRORS)
    reports = {report.name: report for report in sass_report.report(cubin, threads=32)}
    products = reports["products"]
    assert products.mma.keys() == {"HMMA"} and not products.spills and products.blocks_per_sm == 32
    assert any(loop.tensor_utilisation > 0 and loop.cycles["tensor"] for loop in products.loops)
    assert not reports["many_values"].mma and reports["many_values"].registers > 96
    squeezed = ("-maxrregcount=32",)
    toolchain.nvcc(SOURCE, cubin, "sm_80", "cubin", squeezed)
    assert sum(report.spills for report in sass_report.report(cubin)) > 0
    with pytest.raises(RuntimeError, match="[Ss]pill"):
        toolchain.nvcc(SOURCE, cubin, "sm_80", "cubin", squeezed + toolchain.SPILLS_ARE_ERRORS)


@needs_triton
@pytest.mark.parametrize(("arch", "mma"), [(80, "HMMA"), (90, "HGMMA")])
def test_triton_ahead_of_time(arch: int, mma: str) -> None:
    from gpu_without_gpu.triton_aot import compile_aot
    from small_triton_kernels import gemm

    signature = {"A": "*bf16", "B": "*bf16", "C": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    signature |= dict.fromkeys(("BM", "BN", "BK"), "constexpr")
    tile = {"BM": 64, "BN": 32, "BK": 32}
    compiled = compile_aot(
        gemm, signature, tile, arch=arch, options={"num_warps": 4}, div16=("A", "B", "C", "K")
    )
    assert compiled.resources["mma"].keys() == {mma} and not compiled.resources["spills"]
    rng = np.random.default_rng(0)
    a, b = to_bf16(rng.standard_normal((70, 64))), to_bf16(rng.standard_normal((64, 24)))
    for mode in ("lazy", "eager"):
        device = Device(1 << 20)
        c = device.put(np.full((70, 24), np.nan, np.float32))
        compiled.run(device, (2, 1), [device.put(a), device.put(b), c, 70, 24, 64], async_mode=mode)
        assert np.abs(device.get(c, np.float32, (70, 24)) - from_bf16(a) @ from_bf16(b)).max() < 1e-3


@needs_triton
def test_triton_interpreted() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted_bf16.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
