"""Find the CUDA tools and run nvcc, which has to be on PATH."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

SPILLS_ARE_ERRORS = ("-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror")


def have_nvcc() -> bool:
    """Whether nvcc is on PATH."""
    return shutil.which("nvcc") is not None


@lru_cache
def binary_tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm: on PATH, inside triton, or of the package nvidia-cuda-<name>."""
    hit = shutil.which(name)
    if hit:
        return hit
    for package, pattern in (("triton", f"backends/nvidia/bin/{name}"), ("nvidia", f"*/bin/{name}")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for p in sorted(Path(root).glob(pattern)):
                return str(p)
    raise FileNotFoundError(f"{name} not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def run_tool(name: str, *args: object) -> str:
    """Return what cuobjdump or nvdisasm prints; cuobjdump looks for nvdisasm on PATH."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(binary_tool("nvdisasm")).parent), env.get("PATH", "")])
    r = subprocess.run([binary_tool(name), *map(str, args)], capture_output=True, text=True, env=env)
    if r.returncode:
        raise RuntimeError(f"{name} failed:\n{r.stderr}")
    return r.stdout


def nvcc(
    source: Path | str, output: Path, arch: str = "sm_80", kind: str = "ptx", flags: Sequence[str] = ()
) -> str:
    """Compile a .cu file (Path) or CUDA source text (str) to PTX or a cubin; return the compiler's log."""
    with tempfile.TemporaryDirectory() as d:
        if not isinstance(source, Path):
            text, source = source, Path(d, "kernel.cu")
            source.write_text(text)
        target = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
        cmd = ["nvcc", "-O3", "-std=c++17", target, *flags, f"-{kind}", "-o", str(output), str(source)]
        r = subprocess.run(cmd, capture_output=True, text=True)
    if r.returncode:
        raise RuntimeError(f"{' '.join(cmd)}\n{r.stdout}{r.stderr}")
    return r.stdout + r.stderr


def nvcc_ptx(source: Path | str, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """Return the PTX text of a .cu file (Path) or CUDA source text (str)."""
    with tempfile.TemporaryDirectory() as d:
        out = Path(d, "kernel.ptx")
        nvcc(source, out, arch, "ptx", flags)
        return out.read_text()
