"""The CUDA kernels, compiled: within their budgets of registers and shared memory, on the tensor cores, no spills.

python tests/test_kernel_budgets.py        # measure; rewrites "cuda" in kernel_budgets.json
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from gpu_without_gpu import toolchain
from gpu_without_gpu.sass_report import KernelReport, report

BUDGETS = Path(__file__).with_name("kernel_budgets.json")
SOURCES = Path(__file__).resolve().parents[1] / "csrc"
FILES = sorted((SOURCES / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a")
pytestmark = pytest.mark.skipif(not toolchain.have_nvcc(), reason="nvcc is not on PATH")


def compiled(source: Path, arch: str) -> list[KernelReport]:
    """Report on the kernels of a file; one for Hopper alone has none for other architectures."""
    if source.stem.endswith("_sm90") and arch != "sm_90a":
        return []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        toolchain.nvcc(source, cubin, arch, "cubin", ("-I", str(SOURCES)))
        return report(cubin)


def tensor_core_instruction(name: str) -> str:
    """Return what a kernel has to multiply with; empty where nothing is multiplied."""
    if name == "jz3_segment_sum":
        return ""
    return "IMMA" if "score" in name else "HGMMA" if "sm90" in name else "HMMA"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_budget(source: Path, arch: str) -> None:
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))["cuda"][arch]
    for kernel in compiled(source, arch):
        assert kernel.name in budgets, f"{kernel.name} has no budget: python tests/{Path(__file__).name}"
        budget = budgets[kernel.name]
        assert kernel.registers <= budget["registers"], (kernel.name, kernel.registers)
        assert kernel.static_smem <= budget["shared"], (kernel.name, kernel.static_smem)
        assert kernel.spills == 0, (kernel.name, kernel.spill_loads, kernel.spill_stores)
        needed = tensor_core_instruction(kernel.name)
        assert not needed or kernel.mma.get(needed), (kernel.name, kernel.mma)


def main() -> None:
    """Measure all kernels. Registers are rounded up to the 8 that they are given out by."""
    measured = {arch: [kernel for source in FILES for kernel in compiled(source, arch)] for arch in ARCHS}
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}
    budgets["cuda"] = {
        arch: {k.name: {"registers": -(-k.registers // 8) * 8, "shared": k.static_smem} for k in kernels}
        for arch, kernels in measured.items()
    }
    BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{sum(map(len, measured.values()))} kernels in {BUDGETS}\n")


if __name__ == "__main__":
    main()
