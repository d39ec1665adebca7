"""What the processor is good at: which number format its matrix products run fastest in."""

import functools
from pathlib import Path

PRODUCTS = ("auto", "exact", "int8_backward", "int8", "int16")
"""In what a gradient pass multiplies: `exact`, the model's number format; `int8` or `int16`, 8 or 16 bits in the
products of Llama-like models (jz3/gradients/llama.py); `int8_backward`, 8 bits in those of the backward pass and of
the output layer alone; `auto`, what is fastest on this machine and nearly exact: any of these but `int8`."""


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


def avx2_alone() -> bool:
    """Whether the best vectors of this CPU that torch uses are those of AVX2."""
    import torch

    return torch.backends.cpu.get_cpu_capability() == "AVX2"


@functools.cache
def products_obstacle(products: str) -> str:
    """Return why this machine has not these products, or an empty string."""
    from jz3 import backend

    products = products.removesuffix("_backward")
    if products == "exact":
        return ""
    if missing := backend.extension_missing():
        return missing
    if not getattr(backend.extension(), f"has_{products}_products", bool)():
        needed = {"int8": "AVX-512 with VNNI and bfloat16", "int16": "AVX2 with FMA"}[products]
        return f"this CPU has no {needed} (or jz3._C was built without it)"
    return ""


def best_products() -> str:
    """Return what the setting `auto` of a gradient pass's products stands for here.

    Products in 8 bits add hardly anything to the gradients' errors on the way back, and more than bfloat16 on the way
    forward: 0.02 to 0.04 of Spearman on the quickstart's texts, most of it by `gate` and `up`.
    """
    import torch

    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported():
        return "exact"
    if not products_obstacle("int8_backward"):
        return "int8_backward"
    # With AVX-512 torch's products of float32 are as fast.
    return "int16" if avx2_alone() and not products_obstacle("int16") else "exact"


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace")[:4096] if path.is_file() else ""
