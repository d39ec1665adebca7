"""What the processor is good at: which number format its matrix products run fastest in."""

import functools
from pathlib import Path

PRODUCTS = ("auto", "exact", "int8")
"""In what a gradient pass multiplies: `exact`, the model's number format; `int8`, 8 bits in the products of Llama-like
models (jz3/gradients/llama.py); `auto`, `int8` where it is faster on this machine, else `exact`."""


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


@functools.cache
def int8_obstacle() -> str:
    """Return why this machine has no products in 8 bits, or an empty string."""
    from jz3 import backend

    if missing := backend.extension_missing():
        return missing
    if not getattr(backend.extension(), "has_int8_products", bool)():
        return "this CPU has no AVX-512 with VNNI and bfloat16 (or jz3._C was built without it)"
    return ""


def best_products() -> str:
    """Return what the setting `auto` of a gradient pass's products stands for here: `int8` or `exact`."""
    import torch

    faster = not torch.cuda.is_available() and not torch.cpu._is_amx_tile_supported()
    return "int8" if faster and not int8_obstacle() else "exact"


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace")[:4096] if path.is_file() else ""
