"""Tensor cores: mma.sync and wgmma."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import TYPES, UINT, Array, PtxError, bf16_to_f32, tf32
from .memory import Memory
from .ptx import Instruction
from .state import Action, Lanes

BITS = {"bf16": 16, "f16": 16, "tf32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1}
FLOATS = ("bf16", "f16", "tf32")
TYPE_NAME = re.compile(r"[subf]\d+|bf16|tf32|e\dm\d|e\dm\dx\d")


def elements(registers: Array, ty: str) -> Array:
    """32-bit registers -> [..., elements of a register], float64 for floats, int64 for integers."""
    if ty == "tf32":
        return tf32(registers.view(np.float32))[..., None].astype(np.float64)
    if ty in ("bf16", "f16"):
        h = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
        return (bf16_to_f32(h) if ty == "bf16" else h.view(np.float16)).astype(np.float64)
    if ty in ("s8", "u8"):
        b = np.ascontiguousarray(registers).view(TYPES[ty])
        return b.reshape(*registers.shape, 4).astype(np.int64)
    bits = int(ty[1:])
    x = (registers[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)).astype(np.int64) & ((1 << bits) - 1)
    return x - ((x >> (bits - 1)) << bits) if ty[0] == "s" else x


def swizzled(o: Array, swizzle: int) -> Array:
    """Offsets under the 128, 64 or 32-byte swizzle: bits 4.. of an offset are changed by bits 7.. of it."""
    return o ^ (((o >> 7) & {128: 7, 64: 3, 32: 1, 0: 0}[swizzle]) << 4)


def fragment_order(rows: int, columns: int, place: Callable[[Array, int], tuple[Array, Array]]) -> Array:
    """Where the elements of a [rows, columns] matrix lie in its fragments of 32 lanes.

    Args:
        place: (lane [32, 1], register) -> row and column of its elements, broadcast to [32, elements].

    Returns:
        [rows * columns] indices in an array [registers, 32, elements].
    """
    order = np.full(rows * columns, -1)
    lane, register, filled = np.arange(32)[:, None], 0, 0
    while filled < rows * columns:
        row, column = np.broadcast_arrays(*place(lane, register))
        order[(row * columns + column).ravel()] = filled + np.arange(row.size)
        filled += row.size
        register += 1
    return order


class TensorCores(Memory):
    """mma.sync.m16n8, wgmma.m64."""

    def _fragments(self, registers: list[str], ty: str, i: Lanes, warps: int) -> Array:
        """The registers' elements as [warps, registers * 32 * elements]."""
        words = np.stack([self.read(r, "u32", i).reshape(warps, 32) for r in registers], 1)
        return elements(words, ty).reshape(warps, -1)

    def op_mma(self, ins: Instruction) -> Action:
        """mma.sync.m16n8kK. With e elements per register, lane = 4 g + t:
        register k of A holds row g + 8 (k % 2), columns e t + 4 e (k // 2) + j; register k of B holds rows
        e t + 4 e k + j of column g; register k of C and D holds row g + 8 (k // 2), column 2 t + k % 2."""
        mods, a = ins.mods, ins.args
        shape = next(m for m in mods if re.fullmatch(r"m\d+n\d+k\d+", m))
        K = int(shape.split("k")[1])
        tys = [m for m in mods[mods.index(shape) :] if TYPE_NAME.fullmatch(m)]
        if not shape.startswith("m16n8k") or len(tys) != 4 or tys[1] not in BITS or tys[2] not in BITS:
            raise ins.error("mma shape or type not covered")
        td, ta, tb, tc = tys
        isfloat = ta in FLOATS
        e = 32 // BITS[ta]
        if (td, tc) != (("f32", "f32") if isfloat else ("s32", "s32")) or BITS[ta] != BITS[tb]:
            raise ins.error("mma types not covered")
        sparse = {"sp", "sp::ordered_metadata"} & set(mods)
        if sparse or "row" not in mods or mods[mods.index("row") + 1] != "col":
            raise ins.error("mma form not covered")
        aregs, bregs = (x if isinstance(x, list) else [x] for x in a[1:3])
        if len(aregs) * 4 * e != 2 * K:
            raise ins.error("mma shape not covered")
        j = np.arange(e)
        of_a = fragment_order(
            16, K, lambda n, k: ((n >> 2) + 8 * (k & 1), e * (n & 3) + 4 * e * (k >> 1) + j)
        )
        of_b = fragment_order(K, 8, lambda n, k: (e * (n & 3) + 4 * e * k + j, n >> 2))
        of_c = fragment_order(16, 8, lambda n, k: ((n >> 2) + 8 * (k >> 1), 2 * (n & 3) + (k & 1)))
        to_d = np.argsort(of_c)

        def run(i: Lanes) -> None:
            W = len(self.full_warps(i, "mma"))
            A = self._fragments(aregs, ta, i, W)[:, of_a].reshape(W, 16, K)
            B = self._fragments(bregs, tb, i, W)[:, of_b].reshape(W, K, 8)
            C = np.stack([self.read(r, td, i).reshape(W, 32) for r in a[3]], 1).reshape(W, 128)
            C = C[:, of_c].reshape(W, 16, 8)
            P = np.matmul(A.astype(np.float64, copy=False), B.astype(np.float64, copy=False))
            if isfloat:
                D = (P + C).astype(np.float32)
            else:
                P = P.astype(np.int64)
                if "xor" in mods:
                    P = A.sum(2)[:, :, None] + B.sum(1)[:, None, :] - 2 * P
                D = P + C
                D = np.clip(D, -(2**31), 2**31 - 1) if "satfinite" in mods else D
                D = D.astype(np.uint64).astype(np.uint32).view(np.int32)
            D = D.reshape(W, 128)[:, to_d].reshape(W, 4, 32)
            for k, r in enumerate(a[0]):
                self.write(r, D[:, k].reshape(-1), i)

        return run

    def op_wgmma(self, ins: Instruction) -> Action:
        """wgmma.fence, commit_group, wait_group and mma_async"""
        mods, a = ins.mods, ins.args
        if mods[1] == "fence":
            return lambda i: None

        def groups(i: Lanes) -> Array:
            groups = self.full_warps(i, "wgmma").reshape(-1, 128)
            if (groups[:, 0] % self.nt % 128).any():
                raise ins.error("wgmma by part of a warpgroup")
            return groups

        if mods[1] == "commit_group":

            def commit(i: Lanes) -> None:
                for key in groups(i)[:, 0].tolist():
                    self.wg_groups.setdefault(key, []).append(self.wg_open.pop(key, []))

            return commit
        if mods[1] == "wait_group":

            def wait(i: Lanes) -> None:
                for key in groups(i)[:, 0].tolist():
                    pending = self.wg_groups.setdefault(key, [])
                    while len(pending) > a[0]:
                        for product in pending.pop(0):
                            product()

            return wait
        return self._wgmma_mma(ins, groups)

    def _descriptor(self, desc: int, lanes: Array, rows: int, K: int, mn_major: int, ty: str) -> Array:
        """The matrix [rows, K] that a shared-memory descriptor stands for, read by all warps of a group."""
        es = BITS[ty] // 8
        start, leading, stride = ((desc >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = {0: 0, 1: 128, 2: 64, 3: 32}[desc >> 62]
        key = (rows, K, mn_major, es, leading, stride, swizzle)
        if key not in self.wg_offsets:
            r, k = np.arange(rows)[:, None], np.arange(K)[None]
            width = swizzle or 16
            if mn_major:
                el = width // 2
                o = (r % el) * 2 + (r // el) * (leading if swizzle else stride)
                o = o + (k % 8) * width + (k // 8) * (stride if swizzle else leading)
            else:
                kb = k * es
                o = (r % 8) * width + (r // 8) * stride + (kb if swizzle else kb % 16 + (kb // 16) * leading)
            self.wg_offsets[key] = o
        o = swizzled(start + self.wg_offsets[key], swizzle)
        if o.max() + es > self.S:
            raise PtxError(f"wgmma descriptor out of shared memory: {self.cur}")
        o = o + int(self.cta[lanes[0]]) * self.S
        if self.race:
            words = np.unique(o // 4) * 4
            for first in lanes[::32]:
                self.hazard(words, 4, np.full(len(words), first), False)
        v = np.ascontiguousarray(self.sm.view(UINT[8 * es])[o // es])
        return elements(v.reshape(-1).view(np.uint32), ty).reshape(rows, K).astype(np.float64, copy=False)

    def _wgmma_mma(self, ins: Instruction, groups: Callable[[Lanes], Array]) -> Action:
        mods, a = ins.mods, ins.args
        m = re.search(r"m64n(\d+)k(\d+)", ins.op)
        if not m:
            raise ins.error("wgmma not covered")
        tys = [x for x in mods[mods.index(m[0]) :] if TYPE_NAME.fullmatch(x)]
        covered = ("bf16", "f16", "tf32", "s8", "u8")
        if len(tys) != 3 or tys[1] not in covered or tys[2] not in covered or "sp" in mods:
            raise ins.error("wgmma not covered")
        td, ta, tb = tys
        isfloat, es = td == "f32", BITS[ta] // 8
        if td not in ("f32", "s32") or isfloat != (ta in FLOATS) or int(m[2]) != 32 // es:
            raise ins.error("wgmma types not covered")
        N, K, e = int(m[1]), 32 // es, 4 // es
        a_in_regs = isinstance(a[1], list)
        rest = a[3:]  # scale-d, then for floats scale-a, scale-b, then for 16-bit types transpose flags
        sign = int(rest[1]) * int(rest[2]) if isfloat else 1
        ta_mn, tb_mn = 0, 0
        if es == 2:
            ta_mn, tb_mn = (0, rest[3]) if a_in_regs else (rest[3], rest[4])
        of_a = fragment_order(
            16, K, lambda n, k: ((n >> 2) + 8 * (k & 1), e * (n & 3) + 4 * e * (k >> 1) + np.arange(e))
        )
        thread = np.arange(128)
        row, column = (thread >> 5) * 16 + (thread >> 2 & 7), 2 * (thread & 3)

        def product(lanes: Array, keep: bool, left: Any, right: int) -> None:
            if a_in_regs:
                A = elements(left, ta).reshape(4, -1)[:, of_a].reshape(64, K).astype(np.float64, copy=False)
            else:
                A = self._descriptor(left, lanes, 64, K, ta_mn, ta)
            P = sign * (A @ self._descriptor(right, lanes, N, K, tb_mn, tb).T)
            for k, x in enumerate(a[0]):
                v = P[row + 8 * ((k >> 1) & 1), (k >> 2) * 8 + column + (k & 1)]
                v = v + self.read(x, td, lanes) if keep else v
                if not isfloat:
                    v = np.clip(v, -(2.0**31), 2.0**31 - 1) if "satfinite" in mods else v
                    v = v.astype(np.int64).astype(np.uint64).astype(np.uint32).view(np.int32)
                self.write(x, v.astype(TYPES[td], copy=False), lanes)

        def run(i: Lanes) -> None:
            for lanes in groups(i):
                scale = rest[0]
                keep = bool(self.read(scale, "pred", lanes[:1])[0]) if isinstance(scale, str) else bool(scale)
                right = int(self.read(a[2], "u64", lanes)[0])
                if a_in_regs:  # [warps, registers, 32]
                    left: Any = np.stack([self.read(x, "u32", lanes).reshape(4, 32) for x in a[1]], 1)
                else:
                    left = int(self.read(a[1], "u64", lanes)[0])
                if self.mode == "eager":
                    product(lanes, keep, left, right)
                else:
                    self.wg_open.setdefault(int(lanes[0]), []).append(
                        lambda arguments=(lanes, keep, left, right): product(*arguments)
                    )

        return run
