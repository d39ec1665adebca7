"""What this machine and installation offer, what is missing and how to get it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jz3 import backend
from jz3.errors import Jz3Error

PACKAGES = {
    "torch": "pip install 'torch>=2.13,<2.14'",
    "transformers": "pip install 'transformers>=5.12,<6'",
    "trl": "pip install 'jz3[train]' (training)",
    "peft": "pip install 'jz3[train]' (training with LoRA)",
    "datasets": "pip install 'jz3[corpus]' (Hugging Face datasets as corpus)",
    "faiss": "pip install 'jz3[index]', or 'jz3[gpu]' on a GPU (`jz3 query`)",
    "math-verify": "pip install 'jz3[grading]' (grading)",
    "reasoning-gym": "pip install 'jz3[corpus]' (the quickstart's problems)",
    "gradio": "pip install 'jz3[explore]' (`jz3 explore`)",
    "ray": "pip install 'jz3[cluster]' (`jz3 score --ray`)",
    "openai": "pip install 'jz3[teacher]' (teacher or engine behind an endpoint)",
    "triton": "pip install 'jz3[gpu]' (GPU kernels)",
    "vllm": "pip install 'jz3[synth]', in an environment of its own on a CPU (fast generation)",
    "flash-attn": "pip install --no-build-isolation 'flash-attn>=2.7' (faster attention on a GPU)",
}
"""Distribution -> how to get it."""

DISTRIBUTIONS = {"faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")}
NEEDED = ("torch", "transformers")

VARIABLES = ("JZ3_BACKEND", "JZ3_BUILD_CUDA", "JZ3_CUDA_ARCHS", "JZ3_CACHE")
"""The environment variables that jz3 reads, besides API keys named by a recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    """`ok`, `info` (optional and absent, or a plain fact) or `missing` (something needed)."""
    found: str
    remedy: str = ""
    """How to get it; empty if nothing is missing."""


def report() -> list[Check]:
    """Look at the machine, the compilers, the packages, the back ends, the sandbox and the models."""
    return [
        *_machine(),
        *_compilers(),
        *_packages(),
        *_gpu(),
        *_backends(),
        *_sandbox(),
        *_models(),
        *_variables(),
    ]


def _machine() -> Iterator[Check]:
    yield Check(name="python", status="ok", found=f"{platform.python_version()} in {sys.prefix}")
    yield Check(
        name="system", status="ok", found=f"{platform.system()} {platform.release()} {platform.machine()}"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check(name="cores", status="ok", found=str(cores))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    enough = total >= 6
    remedy = "" if enough else "the quickstart needs 6 GB"
    yield Check(name="memory", status="ok" if enough else "missing", found=f"{total:.1f} GiB", remedy=remedy)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "" if free >= 5 else "the quickstart needs 5 GB of disk"
    yield Check(
        name="disk", status="ok" if free >= 5 else "missing", found=f"{free:.1f} GiB free here", remedy=remedy
    )


def _compilers() -> Iterator[Check]:
    compiler = os.environ.get("CXX", "").split(" ")[0] or next(
        filter(shutil.which, ("g++", "clang++", "c++")), ""
    )
    version = _version_line(compiler)
    remedy = "" if version else "install g++ (Debian: apt install g++), then reinstall jz3: compiled CPU ops"
    yield Check(
        name="C++ compiler", status="ok" if version else "info", found=version or "none", remedy=remedy
    )
    version = _version_line("nvcc", -1)
    remedy = "" if version else "install the CUDA toolkit, then reinstall jz3 (only for a GPU)"
    yield Check(name="nvcc", status="ok" if version else "info", found=version or "none", remedy=remedy)


def _version_line(program: str, line: int = 0) -> str:
    if not program or shutil.which(program) is None:
        return ""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[line] if done.returncode == 0 and lines else ""


def _packages() -> Iterator[Check]:
    for name, remedy in PACKAGES.items():
        found = next(filter(None, map(_version, DISTRIBUTIONS.get(name, (name,)))), "")
        status = "ok" if found else "missing" if name in NEEDED else "info"
        yield Check(name=name, status=status, found=found or "not installed", remedy="" if found else remedy)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no device"
        yield Check(name="GPU", status="info", found=f"none ({why})", remedy="everything runs on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        yield Check(name=f"GPU {i}", status="ok", found=found)


def _backends() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    missing = backend.extension_missing()
    remedy = "install a C++ compiler, then reinstall jz3" if missing else ""
    yield Check(name="jz3._C", status="info" if missing else "ok", found=missing or "built", remedy=remedy)
    missing = backend.cuda_missing()
    yield Check(name="jz3._cuda", status="info" if missing else "ok", found=missing or "usable")
    try:
        chosen = backend.report()
    except Jz3Error as error:
        yield Check(
            name="back ends", status="missing", found=str(error), remedy="change or unset JZ3_BACKEND"
        )
        return
    yield Check(name="instructions", status="ok", found=chosen["cpu"])
    for name, choice in chosen["ops"].items():
        yield Check(name=f"op {name}", status="ok", found=f"{choice['backend']} ({choice['reason']})")


def _sandbox() -> Iterator[Check]:
    try:
        from jz3.grading.sandbox import Sandbox, SandboxConfig

        with Sandbox(SandboxConfig()) as sandbox:
            yield Check(name="sandbox", status="ok", found=f"level {sandbox.level}")
    except (ImportError, OSError, Jz3Error) as error:
        found = f"unusable: {error}"
        yield Check(name="sandbox", status="missing", found=found, remedy="tool solutions can't be executed")


def _models() -> Iterator[Check]:
    from jz3.models import EMBEDDED, cache_folder

    folder = cache_folder() / EMBEDDED
    ready = (folder / "config.json").is_file()
    remedy = "" if ready else "the first run prepares it (100 MB by pip)"
    yield Check(name="embedded model", status="ok" if ready else "info", found=str(folder), remedy=remedy)


def _variables() -> Iterator[Check]:
    for name in VARIABLES:
        yield Check(name=name, status="info", found=os.environ.get(name, "not set"))
