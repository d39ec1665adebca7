"""A GPU that this machine needn't have: torch with a CUDA device of host memory (device.cpp).

    python -m virtual_gpu LIBRARY script.py [arguments]
    python -m virtual_gpu LIBRARY -m module [arguments]

It finds what a CPU hides: tensors left on the wrong device, addresses of the device that host code reads, and
waits of the host for the device. It says nothing about kernels, which the simulator of PTX runs, or about speed.
"""

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CAPABILITY = (9, 0)
MEMORY = 8 << 30

_loaded: list[ctypes.CDLL] = []
_registered: list[Any] = []  # torch forgets implementations when their library is collected


def obstacle() -> str:
    """Return why there can be no virtual GPU here, or an empty string."""
    if shutil.which("g++") is None:
        return "no g++ to build the virtual GPU"
    if any((_torch_folder() / "lib" / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        # It would end the process: torch's registry takes one set of hooks for CUDA.
        return "torch is a build for GPUs, whose CUDA device can't be replaced"
    return ""


def build(folder: Path) -> Path:
    """Compile the device against the torch of this environment."""
    root = _torch_folder()
    library = folder / "virtual_gpu.so"
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = Path(__file__).with_name("device.cpp")
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(source), *include, *link]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def install(library: Path) -> None:
    """Make the device known to the torch that is imported now: it must not have been before."""
    _loaded.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    import torch

    for name, value in _stand_ins(torch).items():
        for module in (torch.cuda, torch.cuda.random):
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    _register_operators(torch)


def device_waits() -> int:
    """Return how often the host has waited for the device so far."""
    waits = _loaded[0].virtual_gpu_waits
    waits.restype = ctypes.c_int64
    return waits()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    return Path(spec.origin).parent


class _Guard(contextlib.nullcontext[None]):
    def __init__(self, device: Any) -> None:
        super().__init__()


def _stand_ins(torch: Any) -> dict[str, Any]:
    """What torch.cuda asks of the runtime that isn't there."""
    facts = SimpleNamespace(
        name="virtual GPU",
        total_memory=MEMORY,
        multi_processor_count=132,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
    )
    stream = SimpleNamespace(cuda_stream=0)
    given = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "get_device_capability": CAPABILITY,
        "get_device_name": facts.name,
        "get_device_properties": facts,
        "mem_get_info": (MEMORY // 2, MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "empty_cache": None,
        "synchronize": None,
        "set_device": None,
        "reset_peak_memory_stats": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_rng_state": None,
        "set_rng_state_all": None,
    }
    functions: dict[str, Any] = {
        name: lambda *_args, value=value, **_options: value for name, value in given.items()
    }
    functions["device"] = _Guard
    functions["get_rng_state"] = lambda *_: torch.get_rng_state()
    functions["get_rng_state_all"] = lambda: [torch.get_rng_state()]
    return functions


def _register_operators(torch: Any) -> None:
    """Give the CPU what only CUDA has: products with float32 results, counts of whole numbers."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a: Any, b: Any, kind: Any) -> Any:
        return a.to(kind) @ b.to(kind)

    def addmm(c: Any, a: Any, b: Any, kind: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        return beta * c.to(kind) + alpha * mm(a, b, kind)

    def histc(x: Any, bins: int, low: float, high: float) -> Any:
        return torch.histogram(x.double().flatten(), bins, range=(float(low), float(high))).hist.to(x.dtype)

    library.impl("histc", histc, "CPU")
    for name, function in {"mm": mm, "addmm": addmm}.items():
        library.impl(f"{name}.dtype", function, "CPU")
        library.impl(
            f"{name}.dtype_out",
            lambda *args, function=function, out, **options: out.copy_(function(*args, **options)),
            "CPU",
        )
    _registered.append(library)
