"""What a launch consists of while it runs: registers, memories, parameters, and access to operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import TYPES, UINT, Array, PtxError
from .ptx import Kernel

if TYPE_CHECKING:
    from .ptxsim import Device

# windows of the generic address space
GBASE, SWIN, PWIN, LWIN = 0x700000000, 0x100000000, 0x200000000, 0x300000000

RUNNING, AT_BARRIER, EXITED, AT_WGMMA, AT_WARP_BARRIER = 0, 1, 2, 3, 4

Lanes = Array | None
"""The threads that execute an instruction, as indices in the launch; None for all."""

Action = Callable[[Lanes], Any]
"""An instruction, compiled: to be called with the threads that execute it."""


class TensorMap:
    """A two-dimensional CUtensorMap.

    Args:
        addr: of the tensor in device memory.
        elem: bytes of an element.
        dims: (fastest, slowest) extents in elements.
        pitch: bytes between rows.
        box: (fastest, slowest) extents of a copied tile, in elements.
        swizzle: 0, 32, 64 or 128 bytes.
    """

    def __init__(
        self, addr: int, elem: int, dims: Sequence[int], pitch: int, box: Sequence[int], swizzle: int = 128
    ) -> None:
        self.addr, self.elem, self.dims, self.pitch = addr, elem, dims, pitch
        self.box, self.swizzle = box, swizzle


class State:
    """One launch. All threads of all blocks are one axis: thread i is thread i % nt of block i // nt.

    Attributes:
        nt, nc, L: threads of a block, blocks, threads in all.
        R: registers, an array [L] each.
        sm, S: shared memory of all blocks, and the bytes of one.
        lm, LS: local memory of all threads, and the bytes of one.
        pm: parameter memory.
        pc, st: each thread's next instruction and what it waits for.
        cur: the instruction under way, for errors.
    """

    def __init__(
        self, dev: Device, kernel: Kernel, grid: Sequence[int], block: Sequence[int], args: Sequence[Any],
        dyn_smem: int, async_mode: str, race: bool, order: int, metrics: bool,
    ) -> None:  # fmt: skip
        self.dev, self.k, self.mode = dev, kernel, async_mode
        self.race, self.order, self.metrics = race, order, metrics
        self.touched: dict[str, Array] = {}
        self.stats: dict[str, int] = {}
        self.races: list[str] = []
        self.steps = self.insts = 0
        self.cur = ""
        grid = tuple(grid) + (1,) * (3 - len(grid))
        block = tuple(block) + (1,) * (3 - len(block))
        self.nt, self.nc = int(np.prod(block)), int(np.prod(grid))
        self.L = self.nt * self.nc
        if self.nt % 32:
            raise PtxError("the block size must be a multiple of 32 here")
        self._special_registers(grid, block)
        self.R: dict[str, Any] = {name: np.zeros(self.L, UINT[width]) for name, width in kernel.regs.items()}
        self._memories(kernel, dyn_smem)
        self._parameters(kernel, args)
        self.symbols = {**self.lsym, **self.psym, **self.sym}
        self.pc = np.zeros(self.L, np.int64)
        self.st = np.zeros(self.L, np.int8)
        # cp.async: copies under way, groups that each thread has committed
        self.cp_pending: list[Any] = []
        self.cp_committed = np.zeros(self.L, np.int64)
        # mbarriers and the tiles on their way to them, by offset in `sm`
        self.mbarriers: dict[int, Any] = {}
        self.tma_pending: dict[int, list[Callable[[], None]]] = {}
        # wgmma: products of the open group and of the committed ones, by first thread
        self.wg_open: dict[int, list[Callable[[], None]]] = {}
        self.wg_groups: dict[int, list[list[Callable[[], None]]]] = {}
        self.wg_offsets: dict[tuple[int, ...], Array] = {}
        if race:  # vector clocks: warp w has seen what warp v of its block did before its epoch known[w, v]
            words, warps = self.nc * self.S // 4, self.nt // 32
            self.known = np.tile(np.eye(warps, dtype=np.int32), (self.nc, 1))
            self.writer, self.written = np.full(words, -1), np.full(words, -1)
            self.was_read = np.full((words, warps), -1, np.int32)

    def _special_registers(self, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
        lin = np.arange(self.L) % self.nt
        self.cta = np.arange(self.L) // self.nt
        lane = lin & 31
        bit = np.uint64(1) << lane.astype(np.uint64)
        below = bit - np.uint64(1)
        values = {
            "%tid.x": lin % block[0],
            "%tid.y": lin // block[0] % block[1],
            "%tid.z": lin // (block[0] * block[1]),
            "%laneid": lane,
            "%warpid": lin >> 5,
            "%ctaid.x": self.cta % grid[0],
            "%ctaid.y": self.cta // grid[0] % grid[1],
            "%ctaid.z": self.cta // (grid[0] * grid[1]),
            "%cluster_ctaid.x": self.cta * 0,
            "%cluster_ctarank": self.cta * 0,
            "%lanemask_eq": bit,
            "%lanemask_lt": below,
            "%lanemask_le": below | bit,
            "%lanemask_gt": ~(below | bit),
            "%lanemask_ge": ~below,
        }
        for i, d in enumerate("xyz"):
            values[f"%ntid.{d}"] = np.full(self.L, block[i])
            values[f"%nctaid.{d}"] = np.full(self.L, grid[i])
        self.sreg = {name: v.astype(np.uint32) for name, v in values.items()}

    def _memories(self, kernel: Kernel, dyn_smem: int) -> None:
        off = 0
        self.sym: dict[str, int] = {}
        for name, align, size in kernel.shared:
            if size:
                off = (off + align - 1) // align * align
                self.sym[name] = off
                off += size
        off = (off + 1023) // 1024 * 1024 if dyn_smem else off
        for name, _, size in kernel.shared:
            if not size:  # extern __shared__
                self.sym[name] = off
        self.S = (max(off + dyn_smem, 16) + 15) // 16 * 16
        self.sm = np.full(self.nc * self.S, 0xCD, np.uint8)
        off = 0
        self.lsym: dict[str, int] = {}
        for name, align, size in kernel.local:
            off = (off + align - 1) // align * align
            self.lsym[name] = off
            off += size
        self.LS = (off + 15) // 16 * 16
        self.lm = np.zeros(max(1, self.L * self.LS), np.uint8)

    def _parameters(self, kernel: Kernel, args: Sequence[Any]) -> None:
        self.pm = np.zeros(4096, np.uint8)
        self.psym: dict[str, int] = {}
        self.pmap: dict[int, TensorMap] = {}
        if len(args) != len(kernel.params):
            raise PtxError(f"{len(args)} args for {len(kernel.params)} params")
        for (name, off, size), a in zip(kernel.params, args, strict=True):
            self.psym[name] = off
            if isinstance(a, TensorMap):
                self.pmap[PWIN + off] = a
                continue
            if isinstance(a, (np.generic, np.ndarray)):
                raw = np.array(a).tobytes()
            elif isinstance(a, float):
                raw = np.float32(a).tobytes()
            else:
                raw = int(a).to_bytes(8, "little", signed=int(a) < 0)
            self.pm[off : off + size] = np.frombuffer((raw + b"\0" * size)[:size], np.uint8)

    def read(self, a: Any, t: str, idx: Lanes) -> Any:
        """Value of operand `a` as type `t`. It may be a view of the register: not to be written."""
        dt = TYPES[t]
        if isinstance(a, str):
            register = self.R.get(a)
            if register is None:
                return self._read_other(a, dt, idx)
            v = register if idx is None else register[idx]
            if v.dtype == dt or v.dtype == np.bool_:
                return v
            width = np.dtype(dt).itemsize
            if v.dtype.itemsize != width:
                v = v.astype(UINT[width * 8])
            return v.view(dt)
        n = self.L if idx is None else len(idx)
        if isinstance(a, tuple):  # ("!", predicate)
            return ~self.read(a[1], t, idx)
        if isinstance(a, np.generic):
            if a.dtype.itemsize == np.dtype(dt).itemsize:
                return np.full(n, a, a.dtype).view(dt)
            return np.full(n, a.view(np.float32 if a.dtype.itemsize == 4 else np.float64), dt)
        if dt == np.bool_:
            return np.full(n, bool(a))
        if np.dtype(dt).kind == "f":
            return np.full(n, a, dt)
        width = np.dtype(dt).itemsize * 8
        return np.full(n, int(a) & ((1 << width) - 1), UINT[width]).view(dt)

    def _read_other(self, a: str, dt: Any, idx: Lanes) -> Array:
        """Special registers, addresses of symbols, constants."""
        n = self.L if idx is None else len(idx)
        if a in self.sreg:
            v = self.sreg[a]
            return (v if idx is None else v[idx]).astype(dt)
        if a in self.symbols:
            return np.full(n, self.symbols[a], dt)
        if a == "WARP_SZ":
            return np.full(n, 32, dt)
        if a in ("%clock", "%clock64", "%globaltimer"):
            return np.full(n, self.steps, dt)
        raise PtxError(f"unknown operand {a}: {self.cur}")

    def write(self, name: str, v: Array, idx: Lanes) -> None:
        """Write register `name`, zero- or sign-extending narrower values."""
        if name == "_":
            return
        register = self.R[name]
        if register.dtype != v.dtype and register.dtype != np.bool_:
            if v.dtype == np.bool_:
                v = v.astype(register.dtype)
            elif v.dtype.itemsize == register.dtype.itemsize:
                v = np.ascontiguousarray(v).view(register.dtype)
            elif v.dtype.kind in "iu":
                v = v.astype(np.int64 if v.dtype.kind == "i" else v.dtype).astype(register.dtype)
            else:
                v = v.view(UINT[v.dtype.itemsize * 8]).astype(register.dtype)
        register[... if idx is None else idx] = v

    def lanes(self, idx: Lanes) -> Array:
        """The threads of `idx` as indices."""
        return np.arange(self.L) if idx is None else idx

    def full_warps(self, idx: Lanes, what: str) -> Array:
        """The threads as [warps, 32]; an error if a warp takes part with some of its threads only."""
        lanes = self.lanes(idx)
        warps = lanes.reshape(-1, 32) if len(lanes) % 32 == 0 else None
        if warps is None or (warps[:, :1] % 32 + np.arange(32) != warps - warps[:, :1]).any():
            raise PtxError(f"{what}: partial warp (divergent): {self.cur}")
        return warps
