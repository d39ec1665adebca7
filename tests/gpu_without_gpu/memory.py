"""Access to the memories of a launch: bounds, alignment, races, and what a profiler would count."""

from __future__ import annotations

from typing import Any

import numpy as np

from .formats import TYPES, UINT, Array, PtxError
from .state import GBASE, LWIN, PWIN, SWIN, Lanes, State


class Memory(State):
    """Loads and stores of bytes by address."""

    def addr(self, m: Any, idx: Lanes) -> Array:
        """Byte addresses (int64) of the operand [base + offset]."""
        _, base, offset = m
        if base in self.R:
            v = self.R[base]
            return (v if idx is None else v[idx]).astype(np.int64) + offset
        if base in self.symbols:
            return np.full(self.L if idx is None else len(idx), self.symbols[base], np.int64) + offset
        raise PtxError(f"unknown symbol {base}: {self.cur}")

    def space(self, sp: str, a: Array, lanes: Array) -> tuple[Array, Array]:
        """Return the memory and the offsets in it of addresses `a` in the state space `sp`."""

        def within(lo: int, hi: int | None) -> bool:
            return sp == "generic" and len(a) > 0 and a.min() >= lo and (hi is None or a.max() < hi)

        if sp == "global" or within(GBASE, None):
            return self.dev.g, a - GBASE
        if sp == "shared" or within(SWIN, PWIN):
            return self.sm, a - SWIN if sp == "generic" else a
        if sp == "local" or within(LWIN, GBASE):
            return self.lm, (a - LWIN if sp == "generic" else a) + lanes * self.LS
        if sp in ("param", "const"):
            return self.pm, np.where(a >= PWIN, a - PWIN, a)
        raise PtxError(f"mixed or bad {sp} addresses {a[:4]}: {self.cur}")

    def check(self, arr: Array, o: Array, nb: int, lanes: Array, what: str, align: int) -> Array:
        """Check alignment and bounds; return the offsets, shifted to the block's part for shared memory."""
        if (o % align).any():
            raise PtxError(f"misaligned {what} ({align} B): {self.cur}")
        if arr is self.dev.g:
            ok = self.dev.ok
            inside = (o >= 0) & (o + nb <= len(arr))
            if not inside.all() or not (ok[o].all() and ok[o + nb - 1].all()):
                q = np.where(inside, o, 0)
                bad = int(np.nonzero(~(inside & ok[q] & ok[np.where(inside, o + nb - 1, 0)]))[0][0])
                at = lanes[bad]
                where = f"lane {at} (cta {self.cta[at]}, tid {at % self.nt}) offset {o[bad]}"
                raise PtxError(f"out-of-bounds global {what}: {where}: {self.cur}")
        elif arr is self.sm:
            if (o < 0).any() or (o + nb > self.S).any():
                raise PtxError(f"out-of-bounds shared {what}: {o.max()} + {nb} > {self.S}: {self.cur}")
            o = o + self.cta[lanes] * self.S
        return o

    def _prepare(self, sp: str, a: Array, nb: int, lanes: Array, what: str) -> tuple[Array, Array]:
        arr, o = self.space(sp, a, lanes)
        o = self.check(arr, o, nb, lanes, what, nb)
        if arr is self.sm and self.race:
            self.hazard(o, nb, lanes, what == "store")
        if self.metrics:
            self.metric(arr, o, nb, lanes, what)
        return arr, o

    def load(self, sp: str, a: Array, t: str, lanes: Array, n: int = 1) -> list[Array]:
        """Load `n` elements of type `t` that follow each other."""
        nb = np.dtype(TYPES[t]).itemsize
        arr, o = self._prepare(sp, a, nb * n, lanes, "load")
        v = arr.view(UINT[nb * 8])
        return [v[o // nb + i].view(TYPES[t]) for i in range(n)]

    def store(self, sp: str, a: Array, vals: list[Array], t: str, lanes: Array) -> None:
        """Store elements of type `t` that follow each other."""
        nb, n = np.dtype(TYPES[t]).itemsize, len(vals)
        arr, o = self._prepare(sp, a, nb * n, lanes, "store")
        v = arr.view(UINT[nb * 8])
        for i, x in enumerate(vals):
            v[o // nb + i] = np.ascontiguousarray(x).view(UINT[nb * 8])

    def metric(self, arr: Array, o: Array, nb: int, lanes: Array, kind: str) -> None:
        """Count what a profiler's memory table has: 32-byte sectors per warp request, bank wavefronts."""
        w = lanes.astype(np.int64) >> 5

        def add(key: str, v: Any) -> None:
            self.stats[key] = self.stats.get(key, 0) + int(v)

        step = 4 if nb >= 4 else nb
        if arr is self.dev.g:
            add(f"M.global.{kind}.requests", len(np.unique(w)))
            add(f"M.global.{kind}.bytes", nb * len(lanes))
            sectors = np.unique(np.concatenate([(w << 40) | ((o + d) // 32) for d in range(0, nb, step)]))
            add(f"M.global.{kind}.sectors", len(sectors))
            touched = self.touched.setdefault(kind, np.zeros(len(self.dev.g) // 32 + 1, bool))
            touched[sectors & ((1 << 40) - 1)] = True
        elif arr is self.sm:
            per = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8}[nb]  # lanes served per phase
            phase = (w << 3) | ((lanes & 31) // per)
            words = np.concatenate([(phase << 20) | (((o % self.S) + d) // 4) for d in range(0, nb, step)])
            words = np.unique(words)
            bank, count = np.unique(((words >> 20) << 5) | (words & 31), return_counts=True)
            group = bank >> 5
            first = np.r_[True, group[1:] != group[:-1]]
            wavefronts = np.maximum.reduceat(count, np.nonzero(first)[0])
            add(f"M.shared.{kind}.wavefronts", wavefronts.sum())
            add(f"M.shared.{kind}.ideal", len(wavefronts))

    def hazard(self, o: Array, nb: int, lanes: Array, write: bool) -> None:
        """Report a word that another warp touched without a barrier in between, if one of the two writes."""
        warps = self.nt // 32
        w, within = lanes >> 5, lanes % self.nt >> 5
        known = self.known[w]
        row = np.arange(len(lanes))
        now = known[row, within]
        for d in range(0, nb, 4):
            q = (o + d) // 4
            writer = self.writer[q]
            bad = (writer >= 0) & (writer != within) & (known[row, writer] <= self.written[q])
            if write:
                reads = (self.was_read[q] >= known) & (np.arange(warps) != within[:, None])
                self.writer[q], self.written[q] = within, now
                bad |= reads.any(1) | (self.writer[q] != within)
            else:
                self.was_read[q, within] = now
            if bad.any() and len(self.races) < 50:
                i = int(np.nonzero(bad)[0][0])
                where = f"word {q[i] % (self.S // 4)} by warp {within[i]} of cta {self.cta[lanes[i]]}"
                what = "write" if write else "read"
                self.races.append(
                    f"{what} {where}, also touched by another warp since the last barrier: {self.cur}"
                )

    def synchronize(self, warps: Array) -> None:
        """These warps of one block have met at a barrier: each knows what the others knew and did."""
        within = warps % (self.nt // 32)
        seen = self.known[warps].max(0)
        seen[within] = self.known[warps, within] + 1
        self.known[warps] = seen
