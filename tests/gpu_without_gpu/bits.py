"""Bits of registers, and predicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import Arithmetic
from .formats import TYPES, UINT, Array, bf16_to_f32
from .ptx import Instruction
from .state import Action, Lanes

# functions of two words by their truth table, whose bit 2 y + z is f(y, z)
TWO: tuple[Callable[[Array, Array], Any], ...] = (
    lambda y, z: np.uint32(0),
    lambda y, z: ~(y | z),
    lambda y, z: ~y & z,
    lambda y, z: ~y,
    lambda y, z: y & ~z,
    lambda y, z: ~z,
    lambda y, z: y ^ z,
    lambda y, z: ~(y & z),
    lambda y, z: y & z,
    lambda y, z: ~(y ^ z),
    lambda y, z: z,
    lambda y, z: ~y | z,
    lambda y, z: y,
    lambda y, z: y | ~z,
    lambda y, z: y | z,
    lambda y, z: np.uint32(0xFFFFFFFF),
)


def lop3(table: int, x: Array, y: Array, z: Array) -> Array:
    """The function of three words with the truth table `table`, whose bit 4 x + 2 y + z is f(x, y, z)."""
    low, high = table & 15, table >> 4
    if low == high:
        return TWO[low](y, z) | (x & np.uint32(0))
    if low == 15 - high:
        return x ^ TWO[low](y, z)
    if not low:
        return x & TWO[high](y, z)
    return (x & TWO[high](y, z)) | (~x & TWO[low](y, z))


class Bits(Arithmetic):
    """and or xor not shl shr shf bfe bfi popc clz bfind brev prmt lop3 dp4a dp2a, selp setp."""

    def op_and(self, ins: Instruction) -> Action:
        f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.base]
        return self._binary(ins, f)

    def op_not(self, ins: Instruction) -> Action:
        return lambda i: self.write(ins.args[0], np.invert(self.read(ins.args[1], ins.ty, i)), i)

    def op_shl(self, ins: Instruction) -> Action:
        """shl, shr"""
        a, ty = ins.args, ins.ty
        w, left = int(ty[1:]), ins.base == "shl"

        def run(i):
            x, k = self.read(a[1], ty, i), self.read(a[2], "u32", i)
            kc = np.minimum(k, w - 1).astype(x.dtype)
            r = np.left_shift(x, kc) if left else np.right_shift(x, kc)
            if left or ty[0] != "s":
                r = np.where(k >= w, x.dtype.type(0), r)
            self.write(a[0], r.astype(x.dtype), i)

        return run

    def op_shf(self, ins: Instruction) -> Action:
        a = ins.args

        def run(i):
            lo, hi, k = (self.read(x, "u32", i).astype(np.uint64) for x in a[1:4])
            k = k & np.uint64(31) if "wrap" in ins.mods else np.minimum(k, np.uint64(32))
            v = (hi << np.uint64(32)) | lo
            r = (v << k) >> np.uint64(32) if "l" in ins.mods else v >> k
            self.write(a[0], r.astype(np.uint32), i)

        return run

    @staticmethod
    def _ones(n: Array) -> Array:
        """uint64 with the n lowest bits set, n in 0..64"""
        n = n.astype(np.uint64)
        full = n >= 64
        return np.where(
            full, ~np.uint64(0), (np.uint64(1) << np.where(full, 0, n).astype(np.uint64)) - np.uint64(1)
        )

    def _field(self, pos: Any, length: Any, i: Lanes, bits: int) -> tuple[Array, Array, Array]:
        """position and usable length of a bit field, as uint64"""
        pos = (self.read(pos, "u32", i) & np.uint32(255)).astype(np.int64)
        length = (self.read(length, "u32", i) & np.uint32(255)).astype(np.int64)
        n = np.minimum(length, np.maximum(0, bits - pos))
        return pos, length, n

    def op_bfe(self, ins: Instruction) -> Action:
        a, ty = ins.args, ins.ty
        bits = int(ty[1:])

        def run(i):
            x = self.read(a[1], f"u{bits}", i).astype(np.uint64)
            pos, length, n = self._field(a[2], a[3], i, bits)
            r = np.where(pos < 64, x >> np.minimum(pos, 63).astype(np.uint64), np.uint64(0)) & self._ones(n)
            if ty[0] == "s":
                sign = (x >> np.minimum(pos + length - 1, bits - 1).clip(0).astype(np.uint64)) & np.uint64(1)
                r = np.where((sign == 1) & (length > 0), r | ~self._ones(n), r)
            self.write(a[0], r.astype(UINT[bits]), i)

        return run

    def op_bfi(self, ins: Instruction) -> Action:
        a, bits = ins.args, int(ins.ty[1:])

        def run(i):
            x, y = (self.read(v, f"u{bits}", i).astype(np.uint64) for v in a[1:3])
            pos, _, n = self._field(a[3], a[4], i, bits)
            shift = np.minimum(pos, 63).astype(np.uint64)
            mask = self._ones(n) << shift
            self.write(a[0], ((y & ~mask) | ((x << shift) & mask)).astype(UINT[bits]), i)

        return run

    def op_popc(self, ins: Instruction) -> Action:
        def run(i):
            x = np.ascontiguousarray(self.read(ins.args[1], ins.ty, i))
            bits = np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1)
            self.write(ins.args[0], bits.sum(1).astype(np.uint32), i)

        return run

    @staticmethod
    def _msb_first(x: Array) -> Array:
        """bit matrix (lanes, bits) with the most significant bit first"""
        b = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)[:, ::-1]
        return np.unpackbits(b, axis=1)

    def op_clz(self, ins: Instruction) -> Action:
        def run(i):
            b = self._msb_first(self.read(ins.args[1], ins.ty, i))
            self.write(ins.args[0], np.where(b.any(1), b.argmax(1), b.shape[1]).astype(np.uint32), i)

        return run

    def op_bfind(self, ins: Instruction) -> Action:
        def run(i):
            x = self.read(ins.args[1], ins.ty, i)
            x = np.where(x < 0, ~x, x).astype(x.dtype) if ins.ty[0] == "s" else x
            b = self._msb_first(x)
            first = b.argmax(1)
            r = first if "shiftamt" in ins.mods else b.shape[1] - 1 - first
            self.write(ins.args[0], np.where(b.any(1), r, -1).astype(np.int64).astype(np.uint32), i)

        return run

    def op_brev(self, ins: Instruction) -> Action:
        def run(i):
            x = self.read(ins.args[1], ins.ty, i)
            r = np.packbits(self._msb_first(x), axis=1, bitorder="little")
            self.write(ins.args[0], np.ascontiguousarray(r).view(x.dtype).ravel(), i)

        return run

    def op_prmt(self, ins: Instruction) -> Action:
        a, write, read = ins.args, self.write, self.read
        if ins.mods[1:] != ["b32"]:
            raise ins.error()  # the f4e, b4e, rc8, ecl, ecr, rc16 modes
        nibbles = np.arange(0, 16, 4, dtype=np.uint32)
        fixed = [a[3] >> k & 15 for k in range(0, 16, 4)] if isinstance(a[3], int) else None

        def run(i: Lanes) -> None:
            source = np.stack([read(a[1], "u32", i), read(a[2], "u32", i)], 1).view(np.uint8)
            if fixed and max(fixed) < 8:
                write(a[0], np.take(source, fixed, 1).view(np.uint32)[:, 0], i)
                return
            pick = (read(a[3], "u32", i)[:, None] >> nibbles) & np.uint32(15)
            byte = np.take_along_axis(source, (pick & np.uint32(7)).astype(np.intp), 1)
            byte = np.where(pick & np.uint32(8), (byte >> np.uint8(7)) * np.uint8(255), byte)
            write(a[0], byte.view(np.uint32)[:, 0], i)

        return run

    def op_lop3(self, ins: Instruction) -> Action:
        a, write, read = ins.args, self.write, self.read
        table = a[4]

        def run(i: Lanes) -> None:
            x, y, z = (read(q, "u32", i) for q in a[1:4])
            r = lop3(table, x, y, z)
            if not isinstance(a[0], tuple):
                return write(a[0], r, i)
            q = read(a[5], "pred", i)
            write(a[0][1], r, i)
            return write(a[0][2], (r != 0) | q if "or" in ins.mods else (r != 0) & q, i)

        return run

    def op_dp4a(self, ins: Instruction) -> Action:
        """dp4a, dp2a: d = c + sum of the products of 8-bit (16 x 8 bit) parts"""
        a = ins.args
        ta, tb = ins.types
        signed = "s32" in (ta, tb)

        def parts(v: Array, ty: str, width: int) -> Array:
            n = 32 // width
            return np.ascontiguousarray(v).view(TYPES[f"{ty[0]}{width}"]).reshape(-1, n).astype(np.int64)

        def run(i):
            x, y = self.read(a[1], "u32", i), self.read(a[2], "u32", i)
            if ins.base == "dp4a":
                s = (parts(x, ta, 8) * parts(y, tb, 8)).sum(1)
            else:
                half = slice(2, 4) if "hi" in ins.mods else slice(0, 2)
                s = (parts(x, ta, 16) * parts(y, tb, 8)[:, half]).sum(1)
            c = self.read(a[3], "s32" if signed else "u32", i).astype(np.int64)
            self.write(a[0], (s + c).astype(np.uint64).astype(np.uint32), i)

        return run

    def op_selp(self, ins: Instruction) -> Action:
        a, ty = ins.args, ins.ty
        read = self.read
        return lambda i: self.write(
            a[0], np.where(read(a[3], "pred", i), read(a[1], ty, i), read(a[2], ty, i)), i
        )

    def op_setp(self, ins: Instruction) -> Action:
        a, ty, op = ins.args, ins.ty, ins.mods[1]
        if ty in ("f16x2", "bf16x2"):
            raise ins.error()
        table = dict(
            eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal
        )
        table.update(lo=np.less, ls=np.less_equal, hi=np.greater, hs=np.greater_equal)
        comb = next((x for x in ins.mods[2:] if x in ("and", "or", "xor")), None)
        comb = getattr(np, f"logical_{comb}") if comb else None
        unordered = op.endswith("u") and len(op) == 3
        cmp = None if op in ("num", "nan") else table[op[:2]]

        def run(i):
            x, y = self.read(a[1], ty, i), self.read(a[2], ty, i)
            if ty == "bf16":
                x, y = bf16_to_f32(x), bf16_to_f32(y)
            nan: Any = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else None
            if cmp is None:
                r = nan if op == "nan" else ~nan
            else:
                r = cmp(x, y)
                if nan is not None:
                    r = r | nan if unordered else r & ~nan
            c = self.read(a[3], "pred", i).copy() if comb else None
            both = a[0][1:] if isinstance(a[0], tuple) else (a[0],)
            for name, v in zip(both, (r, ~r), strict=False):  # the second is optional
                self.write(name, comb(v, c) if comb else v, i)

        return run
