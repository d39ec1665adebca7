"""Loads, stores, atomics, and the instructions of a whole warp."""

from __future__ import annotations

import numpy as np

from .formats import HALVES, TYPES, Array, pack_half, unpack_half
from .memory import Memory
from .ptx import Instruction
from .state import Action


class Transfers(Memory):
    """ld st atom red, shfl vote redux elect activemask, ldmatrix stmatrix."""

    @staticmethod
    def _space_of(ins: Instruction) -> str:
        names = ("global", "shared", "param", "local", "const")
        return next((x for x in names if any(m.startswith(x) for m in ins.mods[1:])), "generic")

    def op_ld(self, ins: Instruction) -> Action:
        a, sp, ty = ins.args, self._space_of(ins), ins.ty
        if not ty:
            raise ins.error()
        dst = a[0] if isinstance(a[0], list) else [a[0]]

        def run(i):
            for r, v in zip(dst, self.load(sp, self.addr(a[1], i), ty, self.lanes(i), len(dst)), strict=True):
                self.write(r, v, i)

        return run

    def op_st(self, ins: Instruction) -> Action:
        a, sp, ty = ins.args, self._space_of(ins), ins.ty
        if not ty or {"async", "bulk"} & set(ins.mods):
            raise ins.error()
        src = a[1] if isinstance(a[1], list) else [a[1]]
        read = self.read
        return lambda i: self.store(sp, self.addr(a[0], i), [read(x, ty, i) for x in src], ty, self.lanes(i))

    def op_atom(self, ins: Instruction) -> Action:
        """atom, red: lanes one after the other, in lane order"""
        a, ty, sp = ins.args, ins.ty, self._space_of(ins)
        returns = ins.base == "atom"
        kinds = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
        kind = next(x for x in ins.mods if x in kinds)
        m, src = (a[1], a[2]) if returns else (a[0], a[1])
        if isinstance(src, list) or "async" in ins.mods or ty in HALVES and kind != "add":
            raise ins.error()
        T = TYPES[ty]
        nb = np.dtype(T).itemsize

        def add_half(old: Array, v: Array) -> Array:
            x = unpack_half(np.array([old], T), ty).astype(np.float64)
            return pack_half(x + unpack_half(np.array([v], T), ty), ty)[0]

        update = {
            "add": lambda old, v, _: add_half(old, v) if ty in HALVES else old + v,
            "min": lambda old, v, _: min(old, v),
            "max": lambda old, v, _: max(old, v),
            "exch": lambda old, v, _: v,
            "cas": lambda old, v, new: new if old == v else old,
            "and": lambda old, v, _: old & v,
            "or": lambda old, v, _: old | v,
            "xor": lambda old, v, _: old ^ v,
            "inc": lambda old, v, _: T(0) if old >= v else old + T(1),
            "dec": lambda old, v, _: v if old == 0 or old > v else old - T(1),
        }[kind]

        def run(i):
            lanes = self.lanes(i)
            arr, o = self.space(sp, self.addr(m, i), lanes)
            o = self.check(arr, o, nb, lanes, "atomic", nb) // nb
            V = arr.view(T)
            x = self.read(src, ty, i)
            y = self.read(a[3], ty, i) if kind == "cas" else x
            old = np.empty(len(lanes), V.dtype)
            for k, q in enumerate(o):
                old[k] = V[q]
                V[q] = update(V[q], x[k], y[k])
            if returns:
                self.write(a[0], old, i)

        return run

    def op_shfl(self, ins: Instruction) -> Action:
        a, mode = ins.args, ins.mods[2]

        def run(i):
            self.full_warps(i, "shfl")
            src = self.read(a[1], "u32", i).reshape(-1, 32)
            b = self.read(a[2], "u32", i).astype(int).reshape(-1, 32)
            c = self.read(a[3], "u32", i).astype(int).reshape(-1, 32)
            lane, seg = np.arange(32)[None], c >> 8
            top = (lane & seg) | ((c & 31) & ~seg)
            if mode == "bfly":
                j = lane ^ b
            elif mode == "up":
                j = lane - b
            elif mode == "down":
                j = lane + b
            else:
                j = (lane & seg) | (b & 31 & ~seg)
            ok = j >= top if mode == "up" else j <= top
            v = np.take_along_axis(src, np.where(ok, j, lane) & 31, 1).ravel()
            if isinstance(a[0], tuple):
                self.write(a[0][1], v, i)
                self.write(a[0][2], ok.ravel(), i)
            else:
                self.write(a[0], v, i)

        return run

    def op_vote(self, ins: Instruction) -> Action:
        mode = ins.mods[2]
        weights = 1 << np.arange(32, dtype=np.uint64)
        f = {"any": lambda x: x.any(1), "all": lambda x: x.all(1)}
        f["ballot"] = lambda x: (x * weights).sum(1).astype(np.uint32)
        f = f[mode]

        def run(i):
            self.full_warps(i, "vote")
            x = self.read(ins.args[1], "pred", i).reshape(-1, 32)
            self.write(ins.args[0], np.repeat(f(x), 32), i)

        return run

    def op_redux(self, ins: Instruction) -> Action:
        table = {"add": np.add, "min": np.minimum, "max": np.maximum}
        table.update({"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor})
        f, ty = table[ins.mods[2]], ins.ty

        def run(i):
            self.full_warps(i, "redux")
            x = self.read(ins.args[1], ty, i).reshape(-1, 32)
            self.write(ins.args[0], np.repeat(f.reduce(x, 1).astype(TYPES[ty]), 32), i)

        return run

    def op_elect(self, ins: Instruction) -> Action:
        _, reg, pred = ins.args[0]

        def run(i):
            lanes = self.lanes(i)
            w = lanes >> 5
            first = np.r_[True, w[1:] != w[:-1]]
            self.write(pred, first, i)
            counts = np.diff(np.r_[np.nonzero(first)[0], len(lanes)])
            self.write(reg, np.repeat(lanes[first] & 31, counts).astype(np.uint32), i)

        return run

    def op_activemask(self, ins: Instruction) -> Action:
        def run(i):
            lanes = self.lanes(i)
            m = np.zeros(self.L // 32, np.uint32)
            np.bitwise_or.at(m, lanes >> 5, np.uint32(1) << (lanes & 31).astype(np.uint32))
            self.write(ins.args[0], m[lanes >> 5], i)

        return run

    def op_ldmatrix(self, ins: Instruction) -> Action:
        a, trans, loads = ins.args, "trans" in ins.mods, ins.base == "ldmatrix"
        if "m8n8" not in ins.mods or "b16" not in ins.mods:
            raise ins.error()
        regs, m = (a[0], a[1]) if loads else (a[1], a[0])
        regs = regs if isinstance(regs, list) else [regs]

        def run(i):
            lanes = self.full_warps(i, ins.base)
            ad = self.addr(m, i).reshape(-1, 32)
            V = self.sm.view(np.uint16)
            for k, r in enumerate(regs):
                rows, ll = ad[:, 8 * k : 8 * k + 8], lanes[:, 8 * k : 8 * k + 8]
                o = self.check(self.sm, rows.ravel(), 16, ll.ravel(), ins.base, 16).reshape(-1, 8)
                if self.race:
                    self.hazard(o.ravel(), 16, ll.ravel(), not loads)
                if self.metrics:
                    self.metric(self.sm, o.ravel(), 16, (ll // 32 * 32 + np.arange(8)).ravel(), ins.base)
                ix = o[:, :, None] // 2 + np.arange(8)
                if loads:
                    t = V[ix].transpose(0, 2, 1) if trans else V[ix]
                    q = t.reshape(-1, 8, 4, 2).astype(np.uint32)
                    self.write(r, (q[..., 0] | q[..., 1] << np.uint32(16)).reshape(-1), i)
                else:
                    v = self.read(r, "u32", i).reshape(-1, 8, 4)
                    t = np.stack([v & np.uint32(0xFFFF), v >> np.uint32(16)], -1)
                    t = t.astype(np.uint16).reshape(-1, 8, 8)
                    V[ix] = t.transpose(0, 2, 1) if trans else t

        return run
