"""Make TRITON_INTERPRET=1 trustworthy for bf16 and for out-of-bounds accesses (Triton 3.9).

    os.environ["TRITON_INTERPRET"] = "1"           # before the kernels are decorated
    from gpu_without_gpu import triton_interpreter
    triton_interpreter.install()
    with triton_interpreter.guard(x, y):           # optional: every access must lie in x or y
        kernel[grid](x, y, ...)

bf16: the interpreter keeps bf16 as uint16 and computes on the bit patterns, without a warning. install()
makes binary and unary operations and fma work in fp32 with rounding to nearest even; tl.reduce and
tl.associative_scan on bf16 (tl.sum, tl.max, ...) would still be wrong and therefore raise TypeError: cast
to fp32 first, as a kernel should anyway. Loads, stores and casts are right as they are.

tl.dot: with an fp32 accumulator the product is formed in double precision and rounded once, so that a row's result
doesn't depend on the rows beside it, as it doesn't on tensor cores.

guard: the interpreter dereferences host pointers; an overrun corrupts memory or goes unnoticed. Inside
guard(...) every unmasked load, store and atomic is compared with the storages of the given tensors.

Not seen by the interpreter at all: layouts, shared memory, races between programs (they run one after the
other), num_warps and num_stages, TF32 (fp32 tl.dot is exact here), FMA contraction.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from .formats import bf16_to_f32, f32_to_bf16

_RANGES: list[tuple[int, int]] = []
_installed = False


def install() -> None:
    """Patch the interpreter of this process, once.

    Raises:
        RuntimeError: TRITON_INTERPRET isn't 1.
    """
    global _installed
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before importing the kernels")
    if _installed:
        return
    import triton

    if not triton.__version__.startswith("3.9."):
        warnings.warn(
            f"written for Triton 3.9, this is {triton.__version__}: run its own tests", stacklevel=2
        )
    _patch_bf16()
    _patch_memory()
    _installed = True


def _patch_bf16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter as interp

    Builder, Handle = interp.InterpreterBuilder, interp.TensorHandle

    def is_bf16(h):
        return h.dtype.scalar == tl.bfloat16

    def value(h):
        return bf16_to_f32(h.data) if is_bf16(h) else h.data

    dot, binary, unary, fma = Builder.create_dot, Builder.binary_op, Builder.unary_op, Builder.create_fma
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if is_bf16(d):
            raise TypeError("tl.dot with a bf16 accumulator is not supported")
        if d.data.dtype != np.float32 or 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        # In double precision: a row of numpy's float32 product depends on where in the matrix it lies.
        product = np.matmul(value(a), value(b), dtype=np.float64)
        return Handle(product.astype(np.float32) + d.data, d.dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        if not (is_bf16(lhs) or is_bf16(rhs)) or op in bitwise:
            return binary(self, lhs, rhs, op)
        with np.errstate(all="ignore"):
            out = op(value(lhs), value(rhs))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(f32_to_bf16(out), tl.bfloat16)

    def unary_op(self, arg, op):
        return Handle(f32_to_bf16(op(value(arg))), tl.bfloat16) if is_bf16(arg) else unary(self, arg, op)

    def create_fma(self, x, y, z):
        if is_bf16(x) or is_bf16(y) or is_bf16(z):
            return Handle(f32_to_bf16(value(x).astype(np.float64) * value(y) + value(z)), tl.bfloat16)
        return fma(self, x, y, z)

    Builder.create_dot, Builder.binary_op = create_dot, binary_op
    Builder.unary_op, Builder.create_fma = unary_op, create_fma

    apply = interp.ReduceScanOpInterface.apply

    def checked_apply(self, input):
        for t in input if isinstance(input, tuple) else (input,):
            if t.dtype.scalar == tl.bfloat16:
                raise TypeError("reduction or scan of bf16 in the interpreter is wrong: cast to fp32 first")
        return apply(self, input)

    interp.ReduceScanOpInterface.apply = checked_apply


def _patch_memory() -> None:
    from triton.runtime import interpreter as interp

    native = interp._interpreter

    class Checked:
        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, ptrs, mask, other, dtype):
            _check(ptrs, mask, np.dtype(dtype).itemsize, "load")
            return native.load(ptrs, mask, other, dtype)

        def store(self, ptrs, value, mask):
            _check(ptrs, mask, value.dtype.itemsize, "store")
            return native.store(ptrs, value, mask)

        def atomic_rmw(self, op, ptrs, value, mask, sem):
            _check(ptrs, mask, value.dtype.itemsize, "atomic")
            return native.atomic_rmw(op, ptrs, value, mask, sem)

        def atomic_cas(self, ptrs, cmp, value, sem):
            _check(ptrs, np.ones(np.shape(ptrs), bool), value.dtype.itemsize, "atomic_cas")
            return native.atomic_cas(ptrs, cmp, value, sem)

    interp._interpreter = Checked()


def _check(ptrs: Any, mask: Any, nbytes: int, what: str) -> None:
    if not _RANGES:
        return
    p = np.asarray(ptrs).ravel()[np.asarray(mask).ravel().astype(bool)].astype(np.uint64)
    ok = np.zeros(len(p), bool)
    for lo, hi in _RANGES:
        ok |= (p >= lo) & (p + np.uint64(nbytes) <= hi)
    if not ok.all():
        raise IndexError(f"out-of-bounds {what}: {int((~ok).sum())} of {len(p)} lanes")


def register(*tensors: Any) -> None:
    """From now on only the storages of these tensors may be accessed; register() switches the check off."""
    storages = [t.untyped_storage() for t in tensors]
    _RANGES[:] = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes())


@contextlib.contextmanager
def guard(*tensors: Any) -> Iterator[None]:
    """The same for the length of a with block."""
    if not _installed:
        raise RuntimeError("call install() first")
    before = list(_RANGES)
    register(*tensors)
    try:
        yield
    finally:
        _RANGES[:] = before
