"""What the processor is good at: which number format its matrix products run fastest in."""

import functools
from pathlib import Path


@functools.cache
def fast_bfloat16() -> bool:
    """Whether matrix products run faster in bfloat16 than in float32 on the device that models run on.

    True of GPUs from Ampere on, of CPUs with AMX and of AMD's with AVX-512 bfloat16 (2.5 times as fast).
    Intel's without AMX have the instructions too, at half the speed of float32.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return fast_bfloat16_cpu()


@functools.cache
def fast_bfloat16_cpu() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in _cpu_info()


def best_dtype() -> str:
    """Return what the setting `auto` of a model's dtype stands for here: `bfloat16` or `float32`."""
    return "bfloat16" if fast_bfloat16() else "float32"


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace")[:4096] if path.is_file() else ""
