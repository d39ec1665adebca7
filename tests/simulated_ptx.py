"""What tests need to call kernels: PTX of their own, parameters that are structures."""

from typing import Any

import numpy as np
from gpu_without_gpu.ptxsim import Kernel, Module


def kernel(body: str, arguments: int, registers: dict[str, str], target: str = "sm_90a") -> Kernel:
    """Return a kernel whose 64-bit arguments are in %arg0, %arg1 ...

    Args:
        body: PTX statements; `%name` is a register.
        arguments: how many.
        registers: the type of each further register, by its name.
        target: an architecture.
    """
    parameters = ", ".join(f".param .u64 k_{i}" for i in range(arguments))
    declared = "".join(f".reg .{kind} %{name};\n" for name, kind in registers.items())
    declared += "".join(f".reg .b64 %arg{i};\n" for i in range(arguments))
    loads = "".join(f"ld.param.u64 %arg{i}, [k_{i}];\n" for i in range(arguments))
    head = f".version 8.0\n.target {target}\n.address_size 64\n"
    return Module(f"{head}.visible .entry k({parameters})\n{{\n{declared}{loads}{body}\n}}\n").kernels["k"]


def struct(*fields: tuple[str, Any, Any]) -> np.ndarray:
    """Return a C structure as a kernel's parameter, from (name, type, value) of its fields."""
    out = np.zeros((), np.dtype([(name, kind) for name, kind, _ in fields], align=True))
    for name, _, value in fields:
        out[name] = value
    return out
