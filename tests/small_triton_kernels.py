"""Triton kernels for the tests of the tools; a kernel has to lie in a file."""

import triton
import triton.language as tl


@triton.jit
def gemm(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        a = tl.load(A + m[:, None] * K + (at + k)[None, :], (m < M)[:, None] & (at + k < K)[None, :], 0.0)
        b = tl.load(B + (at + k)[:, None] * N + n[None, :], (at + k < K)[:, None] & (n < N)[None, :], 0.0)
        acc = tl.dot(a, b, acc)
    tl.store(C + m[:, None] * N + n[None, :], acc, (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def axpy(X, Y, size: tl.constexpr):
    i = tl.arange(0, size)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(Y + i, x * y + x)


@triton.jit
def total(X, Y, size: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, size))))
