"""Run by test_gpu_without_gpu_tools.py in a process with TRITON_INTERPRET=1, read when kernels are decorated."""

from typing import Any

import pytest
import small_triton_kernels
import torch
from gpu_without_gpu import triton_interpreter

kernels: Any = small_triton_kernels


def gemm_error(dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    a, b = torch.randn(40, 70).to(dtype), torch.randn(70, 30).to(dtype)
    c = torch.full((40, 30), float("nan"))
    kernels.gemm[(2, 1)](a, b, c, 40, 30, 70, BM=32, BN=32, BK=32)
    return float((c.double() - a.double() @ b.double()).abs().max())


def test_bf16_is_wrong_without_the_patch() -> None:  # runs first; tells when the patch is no longer needed
    assert not gemm_error(torch.bfloat16) < 1


def test_bf16_with_it() -> None:
    triton_interpreter.install()
    assert gemm_error(torch.bfloat16) < 1e-3 and gemm_error(torch.float32) < 1e-3
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    expected = x * y + x
    kernels.axpy[(1,)](x, y, size=64)
    assert torch.equal(y, expected)
    with pytest.raises(Exception, match="cast to fp32"):
        kernels.total[(1,)](x, torch.zeros(1), size=64)


def test_the_guard_catches_what_is_out_of_bounds() -> None:
    triton_interpreter.install()
    x, y = torch.ones(64), torch.zeros(64)
    with triton_interpreter.guard(x, y):
        kernels.axpy[(1,)](x, y, size=64)
        with pytest.raises(Exception, match="out-of-bounds load"):
            kernels.axpy[(1,)](x, y, size=128)
    with triton_interpreter.guard(x), pytest.raises(Exception, match="out-of-bounds"):
        kernels.axpy[(1,)](x, y, size=64)
