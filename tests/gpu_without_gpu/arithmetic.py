"""Moves, conversions and arithmetic on integers and floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import (
    HALVES,
    TYPES,
    UINT,
    Array,
    bf16_to_f32,
    f32_to_bf16,
    f64_to_bf16,
    pack_half,
    round_directed,
    tf32,
    unpack_half,
)
from .ptx import Instruction
from .state import LWIN, PWIN, SWIN, Action, State


class Arithmetic(State):
    """mov cvta cvt, add sub mul mad fma neg abs min max div rem, sqrt and the like."""

    def op_mov(self, ins: Instruction) -> Action:
        d, src, ty, write, read = ins.args[0], ins.args[1], ins.ty, self.write, self.read
        T = TYPES[ty]
        if isinstance(src, list):  # pack
            w = {"b32": 32, "b64": 64}[ty] // len(src)

            def pack(i):
                parts = (read(x, f"u{w}", i).astype(T) << T(w * k) for k, x in enumerate(src))
                write(d, sum(parts, np.zeros(1, T)).astype(T), i)

            return pack
        if isinstance(d, list):
            w = {"b32": 32, "b64": 64}[ty] // len(d)

            def unpack(i):
                v = read(src, ty, i)
                for k, x in enumerate(d):
                    write(x, (v >> T(w * k)).astype(UINT[w]), i)

            return unpack
        return lambda i: write(d, read(src, ty, i), i)

    def op_cvta(self, ins: Instruction) -> Action:
        windows = {"shared": SWIN, "param": PWIN, "local": LWIN, "global": 0}
        off = np.uint64(next((v for k, v in windows.items() if k in ins.op), 0))
        d, src = ins.args
        if "to" in ins.mods:
            return lambda i: self.write(d, self.read(src, "u64", i) - off, i)
        return lambda i: self.write(d, self.read(src, "u64", i) + off, i)

    def op_cvt(self, ins: Instruction) -> Action:
        a, write, read, mods = ins.args, self.write, self.read, ins.mods
        tys = [m for m in mods[1:] if m in TYPES or m == "tf32"]
        if len(tys) != 2 or "satfinite" in mods:
            raise ins.error()
        d, s = tys
        relu, sat = "relu" in mods, "sat" in mods
        toint = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        toint = next((toint[m] for m in mods if m in toint), None)
        directed = next((m for m in mods if m in ("rz", "rm", "rp")), None)

        def source(x: Any, i: Any) -> Array:
            v = read(x, s, i)
            return bf16_to_f32(v) if s == "bf16" else v

        def half(x: Array, ty: str) -> Array:
            x = np.maximum(x, x.dtype.type(0)) if relu else x
            if ty == "f16":
                exact = x.astype(np.longdouble if directed else np.float16)
                return (round_directed(exact, "f16", directed) if directed else exact).view(np.uint16)
            if directed in ("rm", "rp"):
                raise ins.error()
            if directed:
                bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
                return (bits >> np.uint32(16)).astype(np.uint16)
            return f64_to_bf16(x) if x.dtype == np.float64 else f32_to_bf16(x.astype(np.float32))

        if d in ("bf16x2", "f16x2"):
            if s != "f32":
                raise ins.error()

            def pair(i):
                hi, lo = half(read(a[1], s, i), d[:-2]), half(read(a[2], s, i), d[:-2])
                write(a[0], lo.astype(np.uint32) | hi.astype(np.uint32) << np.uint32(16), i)

            return pair
        if d == "tf32":
            return lambda i: write(a[0], tf32(source(a[1], i), "rna" in mods), i)

        def convert(i):
            x = source(a[1], i)
            if d in ("bf16", "f16") and x.dtype.kind == "f" and not toint:
                r = half(x, d)
                r = pack_half(np.clip(unpack_half(r, d), 0, 1), d) if sat else r
                write(a[0], r, i)
                return
            if x.dtype.kind == "f" and d[0] in "us":
                x = (toint or np.trunc)(x)
                lim = np.iinfo(TYPES[d])
                if lim.bits == 64:  # the limits are not exact in float64
                    hi = x.astype(np.float64) >= 2.0 ** (63 if d[0] == "s" else 64)
                    x = np.where(hi | np.isnan(x), 0, np.clip(x.astype(np.float64), lim.min, None))
                    r = np.where(hi, TYPES[d](lim.max), x.astype(TYPES[d]))
                else:
                    r = np.where(np.isnan(x), 0, np.clip(x.astype(np.float64), lim.min, lim.max))
                    r = r.astype(TYPES[d])
            elif d[0] in "us" and sat:  # integer to integer, saturating
                lim, src = np.iinfo(TYPES[d]), np.iinfo(TYPES[s])
                lo, hi = max(lim.min, src.min), min(lim.max, src.max)
                r = np.clip(x, x.dtype.type(lo), x.dtype.type(hi)).astype(TYPES[d])
            elif d == "bf16":
                r = f32_to_bf16((toint(x) if toint else x).astype(np.float32))
            else:
                x = toint(x) if toint and x.dtype.kind == "f" else x
                if directed and d[0] == "f":
                    r = round_directed(x.astype(np.longdouble), d, directed)
                else:
                    r = x.astype(TYPES[d])
                if sat:
                    r = np.where(np.isnan(r), 0, np.clip(r, 0, 1)).astype(r.dtype)
            write(a[0], r, i)

        return convert

    def _binary(self, ins: Instruction, f: Callable[[Array, Array], Array]) -> Action:
        """f on two operands, in their own type"""
        a, ty = ins.args, ins.ty
        if len(ins.types) != 1:
            raise ins.error()
        write, read, kind = self.write, self.read, TYPES[ty]
        return lambda i: write(a[0], f(read(a[1], ty, i), read(a[2], ty, i)).astype(kind, copy=False), i)

    def _half_op(self, ins: Instruction, f: Callable[..., Array], n: int) -> Action:
        """f on n f16/bf16/x2 operands in float64, rounded once"""
        a, ty = ins.args, ins.ty
        if len(ins.types) != 1:
            raise ins.error()

        def run(i):
            x = f(*[unpack_half(self.read(v, ty, i), ty).astype(np.float64) for v in a[1 : n + 1]])
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1)) if "sat" in ins.mods else x
            x = np.maximum(x, 0) if "relu" in ins.mods else x
            self.write(a[0], pack_half(x, ty), i)

        return run

    def _float_op(self, ins: Instruction, f: Callable[..., Array], n: int) -> Action:
        """f on n f32/f64 operands, rounded once: three operands are computed one size larger"""
        a, ty = ins.args, ins.ty
        wide = np.float64 if ty == "f32" else np.longdouble
        directed = next((m for m in ins.mods if m in ("rz", "rm", "rp")), None)

        def run(i):
            x = [self.read(v, ty, i) for v in a[1 : n + 1]]
            if directed:
                r = round_directed(f(*[v.astype(np.longdouble) for v in x]), ty, directed)
            elif n == 2:
                r = f(*x)
            else:
                r = f(*[v.astype(wide) for v in x]).astype(TYPES[ty])
            if "sat" in ins.mods:
                r = np.where(np.isnan(r), 0, np.clip(r, 0, 1)).astype(r.dtype)
            self.write(a[0], r, i)

        return run

    def op_add(self, ins: Instruction) -> Action:
        f = np.add if ins.base == "add" else np.subtract
        ty = ins.ty
        if len(ins.types) != 1 or "cc" in ins.mods or ty[0] == "b" and ty not in HALVES:
            raise ins.error()
        if ty in HALVES:
            return self._half_op(ins, f, 2)
        if ty[0] == "f":
            return self._float_op(ins, f, 2)
        if "sat" in ins.mods:
            lim = np.iinfo(np.int32)
            return self._binary(ins, lambda x, y: np.clip(f(x.astype(np.int64), y), lim.min, lim.max))
        return self._binary(ins, f)

    def op_mul(self, ins: Instruction) -> Action:
        """mul, mad, fma"""
        a, ty, write, read = ins.args, ins.ty, self.write, self.read
        if len(ins.types) != 1 or "cc" in ins.mods:
            raise ins.error()
        three = ins.base != "mul"
        if ty in HALVES or ty[0] == "f":
            op = self._half_op if ty in HALVES else self._float_op
            return op(ins, (lambda x, y, z: x * y + z) if three else (lambda x, y: x * y), 3 if three else 2)
        if "sat" in ins.mods:
            raise ins.error()
        w = int(ty[1:])
        double = f"{ty[0]}{2 * w}"  # of 64 bits only `hi` needs more

        def integer(i):
            x, y = read(a[1], ty, i), read(a[2], ty, i)
            if "hi" in ins.mods and w == 64:
                v = [(int(q) * int(r)) >> 64 & (2**64 - 1) for q, r in zip(x, y, strict=True)]
                v = np.array(v, np.uint64).view(TYPES[ty])
            elif "hi" in ins.mods:
                big = TYPES[double]
                v = ((x.astype(big) * y.astype(big)) >> big(w)).astype(TYPES[ty])
            elif "wide" in ins.mods:
                v = x.astype(TYPES[double]) * y.astype(TYPES[double])
            else:
                v = x * y
            if three:
                v = (v + read(a[3], double if "wide" in ins.mods else ty, i)).astype(v.dtype)
            write(a[0], v, i)

        return integer

    def op_neg(self, ins: Instruction) -> Action:
        if ins.ty in HALVES:
            return self._half_op(ins, np.negative, 1)
        return lambda i: self.write(
            ins.args[0], (-self.read(ins.args[1], ins.ty, i)).astype(TYPES[ins.ty]), i
        )

    def op_abs(self, ins: Instruction) -> Action:
        if ins.ty in HALVES:
            return self._half_op(ins, np.abs, 1)
        return lambda i: self.write(ins.args[0], np.abs(self.read(ins.args[1], ins.ty, i)), i)

    def op_min(self, ins: Instruction) -> Action:
        mn = ins.base == "min"
        if len(ins.types) != 1 or {"xorsign", "abs"} & set(ins.mods) or len(ins.args) != 3:
            raise ins.error()
        if ins.ty in HALVES or ins.ty[0] == "f":
            f = (np.minimum if mn else np.maximum) if "NaN" in ins.mods else (np.fmin if mn else np.fmax)
            return self._half_op(ins, f, 2) if ins.ty in HALVES else self._binary(ins, f)
        f = np.minimum if mn else np.maximum
        if "relu" in ins.mods:
            return self._binary(ins, lambda x, y: np.maximum(f(x, y), 0))
        return self._binary(ins, f)

    def op_div(self, ins: Instruction) -> Action:
        """div, rem"""
        a, ty = ins.args, ins.ty
        if ty in HALVES:
            raise ins.error()
        if ty[0] == "f":
            return self._binary(ins, np.divide)
        big = np.int64 if ty in ("s16", "u16", "s32", "u32") else object

        def run(i):
            x, y = self.read(a[1], ty, i).astype(big), self.read(a[2], ty, i).astype(big)
            zero = y == 0
            q = np.abs(x) // np.abs(np.where(zero, 1, y))
            q = np.where(zero, -1, np.where((x < 0) != (y < 0), -q, q))
            r = q if ins.base == "div" else x - q * y
            if big is object:
                r = np.array([int(v) & (2**64 - 1) for v in r], np.uint64)
            self.write(a[0], r.astype(np.uint64).astype(UINT[int(ty[1:])]).view(TYPES[ty]), i)

        return run

    def op_sqrt(self, ins: Instruction) -> Action:
        """sqrt, rsqrt, rcp, ex2, lg2, sin, cos, tanh: exact up to the rounding of the result's type"""
        table: dict[str, Any] = dict(
            sqrt=np.sqrt, ex2=np.exp2, lg2=np.log2, sin=np.sin, cos=np.cos, tanh=np.tanh
        )
        table.update(rsqrt=lambda x: 1 / np.sqrt(x), rcp=lambda x: 1 / x)
        f: Any = table[ins.base]
        if ins.ty in HALVES:
            return self._half_op(ins, f, 1)
        return lambda i: self.write(
            ins.args[0], f(self.read(ins.args[1], ins.ty, i)).astype(TYPES[ins.ty]), i
        )
