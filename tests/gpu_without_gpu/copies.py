"""Asynchronous copies: cp.async, mbarrier and TMA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .formats import UINT, Array, PtxError
from .memory import Memory
from .ptx import Instruction
from .state import GBASE, Action, Lanes
from .tensor import swizzled


@dataclass
class Copy:
    """One cp.async of some threads: bytes `source` .. `source + size` of global memory, zeros up to `total`."""

    lanes: Array
    group: Array
    """The commit group of each thread that it belongs to, counted from the thread's start."""
    target: Array
    source: Array
    size: Array
    total: int

    def part(self, mask: Array) -> Copy:
        """The copies of some of the threads."""
        return Copy(
            self.lanes[mask],
            self.group[mask],
            self.target[mask],
            self.source[mask],
            self.size[mask],
            self.total,
        )


@dataclass
class Barrier:
    """An mbarrier."""

    count: int
    pending: int
    phase: int = 0
    bytes: int = 0
    """Of transactions that are expected and have not arrived."""

    def update(self) -> None:
        """Begin the next phase if everything has arrived."""
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Copies(Memory):
    """cp.async with groups, mbarrier, cp.async.bulk.tensor.2d."""

    def op_cp(self, ins: Instruction) -> Action:
        """cp.async and cp.async.bulk"""
        if ins.op.startswith("cp.async.bulk"):
            return self._tma(ins)
        if not ins.op.startswith("cp.async.") or "mbarrier" in ins.mods:
            raise ins.error()
        if "commit_group" in ins.mods:
            return self._cp_commit
        if "wait_all" in ins.mods:
            return lambda i: self._cp_wait(self.lanes(i), None)
        if "wait_group" in ins.mods:
            return lambda i: self._cp_wait(self.lanes(i), ins.args[0])
        return self._cp_issue(ins)

    def _cp_commit(self, i: Lanes) -> None:
        self.cp_committed[self.lanes(i)] += 1

    def _cp_wait(self, lanes: Array, pending: int | None) -> None:
        """Let all groups of these threads land but the last `pending`; with None what isn't committed, too."""
        limit = np.zeros(self.L, np.int64)
        limit[lanes] = np.iinfo(np.int64).max if pending is None else self.cp_committed[lanes] - pending
        left = []
        for copy in self.cp_pending:
            now = copy.group < limit[copy.lanes]
            if now.any():
                self._cp_land(copy.part(now))
                copy = copy.part(~now)
            if len(copy.lanes):
                left.append(copy)
        self.cp_pending = left

    def _cp_land(self, copy: Copy) -> None:
        if self.race and self.mode == "lazy":
            self.hazard(copy.target, copy.total, copy.lanes, True)
        k = np.arange(copy.total)
        valid = k < copy.size[:, None]
        data = self.dev.g[np.where(valid, copy.source[:, None] + k, 0)]
        self.sm[copy.target[:, None] + k] = np.where(valid, data, 0)

    def _cp_issue(self, ins: Instruction) -> Action:
        a = ins.args
        total = a[2]

        def issue(i: Lanes) -> None:
            lanes = self.lanes(i)
            source = self.addr(a[1], i) - GBASE
            size = self.read(a[3], "u32", i).astype(int) if len(a) > 3 else np.full(len(lanes), total)
            target = self.check(self.sm, self.addr(a[0], i), total, lanes, "cp.async", total)
            if (size > total).any():
                raise PtxError(f"cp.async of {size.max()} bytes into {total}: {self.cur}")
            for n in np.unique(size[size > 0]):
                m = size == n
                if (source[m] % total).any():
                    raise PtxError(f"misaligned cp.async load ({total} B): {self.cur}")
                self.check(self.dev.g, source[m], int(n), lanes[m], "cp.async load", 1)
            if self.race:
                self.hazard(target, total, lanes, True)
            if self.metrics and (size > 0).any():
                m = size > 0
                self.metric(self.dev.g, source[m], total, lanes[m], "load")
                self.metric(self.sm, target, total, lanes, "store")
            copy = Copy(lanes, self.cp_committed[lanes], target, source, size, total)
            if self.mode == "eager":
                self._cp_land(copy)
            else:
                self.cp_pending.append(copy)

        return issue

    def _barriers(self, addresses: Array, i: Lanes) -> list[Barrier]:
        """The mbarrier at each address; an error if there is none."""
        found = [self.mbarriers.get(key) for key in self._keys(addresses, i)]
        if None in found:
            raise PtxError(f"mbarrier used before init: {self.cur}")
        return [barrier for barrier in found if barrier]

    def _keys(self, addresses: Array, i: Lanes) -> list[int]:
        """Offsets in the shared memory of all blocks, which name the mbarriers."""
        return (self.cta[self.lanes(i)] * self.S + addresses).tolist()

    def op_mbarrier(self, ins: Instruction) -> Action:
        """mbarrier.init, inval, arrive, expect_tx, try_wait.parity, test_wait.parity"""
        a, mods = ins.args, ins.mods
        kind = mods[1]
        if kind == "init":

            def init(i: Lanes) -> None:
                for key, count in zip(
                    self._keys(self.addr(a[0], i), i), self.read(a[1], "u32", i), strict=True
                ):
                    self.mbarriers[key] = Barrier(int(count), int(count))

            return init
        if kind == "inval":
            return lambda i: [self.mbarriers.pop(key, None) for key in self._keys(self.addr(a[0], i), i)]
        if kind in ("arrive", "expect_tx"):
            m = a[1] if isinstance(a[0], str) else a[0]
            expected = a[-1] if "expect_tx" in mods else 0
            arrivals = a[2] if "expect_tx" not in mods and isinstance(a[0], str) and len(a) > 2 else 1

            def arrive(i: Lanes) -> None:
                more, counts = self.read(expected, "u32", i).tolist(), self.read(arrivals, "u32", i).tolist()
                for barrier, nbytes, count in zip(
                    self._barriers(self.addr(m, i), i), more, counts, strict=True
                ):
                    barrier.bytes += nbytes
                    barrier.pending -= count if kind == "arrive" else 0
                    barrier.update()

            return arrive
        if kind in ("try_wait", "test_wait") and "parity" in mods:

            def wait(i: Lanes) -> None:
                addresses = self.addr(a[1], i)
                barriers = self._barriers(addresses, i)
                for key in set(self._keys(addresses, i)) & self.tma_pending.keys():
                    for land in self.tma_pending.pop(key):  # lazy: data land only when somebody waits
                        land()
                phase = np.array([barrier.phase for barrier in barriers], np.uint32)
                self.write(a[0], phase != self.read(a[2], "u32", i), i)

            return wait
        raise ins.error()

    def _tma(self, ins: Instruction) -> Action:
        mods, a = ins.mods, ins.args
        if "commit_group" in mods or "wait_group" in mods:
            return lambda i: None
        if "tensor" not in mods or "2d" not in mods or "multicast::cluster" in mods or "prefetch" in mods:
            raise ins.error()
        if any(x.startswith(("im2col", "tile::")) for x in mods):
            raise ins.error()
        to_global = mods.index("global") < next(k for k, x in enumerate(mods) if x.startswith("shared"))
        tensor, smem = (a[0], a[1]) if to_global else (a[1], a[0])

        def run(i: Lanes) -> None:
            maps, bases = self.read(tensor[1], "u64", i).tolist(), self.addr(smem, i).tolist()
            xs, ys = (self.read(x, "s32", i).tolist() for x in tensor[2])
            barriers = [] if to_global else self._barriers(self.addr(a[2], i), i)
            keys = [] if to_global else self._keys(self.addr(a[2], i), i)
            for k, lane in enumerate(self.lanes(i)):
                shared, device, inside, size = self._box(maps[k], bases[k], xs[k], ys[k])
                shared = shared + int(self.cta[lane]) * self.S
                if self.metrics:
                    self._tma_metric(device[inside], size, "store" if to_global else "load")
                s, g = self.sm.view(UINT[size * 8]), self.dev.g.view(UINT[size * 8])
                if to_global:
                    g[device[inside] // size] = s[shared[inside] // size]
                    continue
                land = self._landing(barriers[k], shared, device, inside, size)
                if self.mode == "eager":
                    land()
                else:
                    self.tma_pending.setdefault(keys[k], []).append(land)

        return run

    def _landing(
        self, barrier: Barrier, shared: Array, device: Array, inside: Array, size: int
    ) -> Callable[[], None]:
        """What the arrival of a tile does."""
        s, g = self.sm.view(UINT[size * 8]), self.dev.g.view(UINT[size * 8])

        def land() -> None:
            s[shared // size] = np.where(inside, g[np.where(inside, device, 0) // size], 0)
            barrier.bytes -= shared.size * size
            barrier.update()

        return land

    def _box(self, address: int, base: int, x: int, y: int) -> tuple[Array, Array, Array, int]:
        """Offsets of a tile's elements in shared and device memory, which lie in the tensor, bytes of one."""
        m = self.pmap.get(address)
        if m is None:
            raise PtxError(f"no TensorMap at this address: {self.cur}")
        (width, height), size = m.box, m.elem
        column, row = x + np.arange(width), y + np.arange(height)[:, None]
        inside = ((column >= 0) & (column < m.dims[0])) & ((row >= 0) & (row < m.dims[1]))
        if m.swizzle and base % (8 * m.swizzle):
            raise PtxError(f"TMA address not aligned to the swizzle atom: {self.cur}")
        shared = base + (np.arange(height)[:, None] * width + np.arange(width)) * size
        shared = swizzled(shared, m.swizzle)
        if shared.min() < 0 or shared.max() + size > self.S:
            raise PtxError(f"TMA box out of shared memory: {self.cur}")
        device = m.addr - GBASE + row * m.pitch + column * size
        if inside.any() and not (
            self.dev.ok[device[inside]].all() and self.dev.ok[device[inside] + size - 1].all()
        ):
            raise PtxError(f"TensorMap reaches out of its allocation: {self.cur}")
        return shared, device, inside, size

    def _tma_metric(self, device: Array, size: int, kind: str) -> None:
        """Count a tile's sectors; its accesses to shared memory are free of bank conflicts."""
        sectors = np.unique(device // 32)
        for key, v in (("bytes", device.size * size), ("sectors", len(sectors))):
            self.stats[f"M.global.{kind}.{key}"] = self.stats.get(f"M.global.{kind}.{key}", 0) + v
        self.touched.setdefault(kind, np.zeros(len(self.dev.g) // 32 + 1, bool))[sectors] = True
