"""Functional PTX interpreter on numpy: executes the PTX that nvcc and Triton emit, on a machine without a GPU.

All blocks and threads of a launch are one numpy vector. Each warp runs the lowest program counter of its
threads (min-PC reconvergence); `order=seed` lets only a random subset of the warps move in each round.
Memory effects of cp.async, TMA and wgmma happen at the wait (`async_mode="lazy"`) or at issue (`"eager"`):
a correct kernel gives the right answer under both and under every `order`.

Covered
  control    bra, ret/exit, bar.sync / barrier.sync with id and count, bar.warp.sync
  scalar     add sub mul mad fma min max neg abs (integers, f32, f64, f16, bf16, f16x2, bf16x2),
             and or xor not shl shr shf bfe bfi prmt lop3 popc clz brev bfind, dp4a dp2a, div rem,
             sqrt rsqrt rcp ex2 lg2 sin cos tanh, setp selp mov cvta,
             cvt (int, float, f16, bf16, tf32, packed x2, .sat, .relu, directed rounding)
  memory     ld st (all spaces, v2/v4), atom red (scalar), cp.async, ldmatrix stmatrix,
             mbarrier (parity waits), 2D TMA tiles (cp.async.bulk.tensor.2d) with 32/64/128-byte swizzle
  warp       shfl vote redux elect activemask (full warps only)
  tensor     mma.sync m16n8: bf16/f16 (f32 accumulator), tf32, s8/u8, s4/u4, b1 (xor.popc, and.popc);
             wgmma m64nN: bf16/f16 (K- and MN-major), tf32, s8/u8 (K-major), A from shared memory or registers

Checked on the way (raises PtxError): out-of-bounds or misaligned access, deadlock, too many steps
(livelock), use of a warp-wide instruction by part of a warp, mbarrier used before init, wgmma descriptor
outside shared memory. Shared memory starts poisoned with 0xCD. `race=True` reports conflicting accesses of
different warps to one 32-bit word of shared memory without a bar.sync of both in between in `run.races` (not
raised; TMA and shared atomics are not tracked; an mbarrier orders nothing here; two warps writing
different bytes of one word are reported too).

Ignored (accepted, but not modelled): every modifier or instruction listed in `module.ignored` after parsing,
e.g. "ex2.approx" (exact here), "add.ftz", "ld.ca", "atom.acq_rel", "fence.proxy.async" (fences are no-ops).
`module.ignored_numeric` is the part of it that can change a number on hardware. Also not modelled: the memory
model (execution is sequentially consistent), tensor-core accumulation order (float64 sum, one rounding),
double rounding of f32 fma (computed in float64), membermasks of shfl/vote, clusters larger than one block,
races in global memory, bounds of local and parameter memory. The 4 warps of a warpgroup run in lock step at
wgmma instructions, so a barrier missing right after wgmma is not found.

Raises PtxError: every opcode, type or shape not named above, e.g. tcgen05, fp8, call, bar.arrive, bar.red,
1D/3D TMA, multicast, mapa, vector atomics, module-level .const/.global tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .bits import Bits
from .copies import Copies
from .formats import Array, PtxError, from_bf16, to_bf16
from .ptx import NO_OPS, Instruction, Kernel, Module
from .state import (
    AT_BARRIER,
    AT_WARP_BARRIER,
    AT_WGMMA,
    EXITED,
    GBASE,
    RUNNING,
    Action,
    Lanes,
    TensorMap,
)
from .tensor import TensorCores
from .transfers import Transfers

__all__ = ["Device", "Kernel", "Module", "PtxError", "Run", "TensorMap", "from_bf16", "to_bf16"]

# opcodes handled by another opcode's method
ALIASES = {
    **{"sub": "add", "mad": "mul", "fma": "mul", "max": "min", "rem": "div", "shr": "shl"},
    **{"red": "atom", "ldu": "ld", "dp2a": "dp4a", "or": "and", "xor": "and", "stmatrix": "ldmatrix"},
    **dict.fromkeys("rsqrt rcp ex2 lg2 sin cos tanh".split(), "sqrt"),
}
CONTROL = ("bra", "bar", "barrier", "ret", "exit", "wgmma")
NEVER = np.iinfo(np.int64).max


class Device:
    """Global memory of `mem` bytes. Arrays lie 4 KiB apart: an overrun leaves its allocation and is caught."""

    def __init__(self, mem: int = 64 << 20) -> None:
        self.g = np.zeros(mem, np.uint8)
        self.ok = np.zeros(mem, bool)
        self.top = 4096

    def put(self, arr: Any) -> int:
        """Copy an array to the device and return its address."""
        arr = np.ascontiguousarray(arr)
        a, n = self.top, arr.nbytes
        self.top = (a + n + 4096 + 255) // 256 * 256
        if self.top > len(self.g):
            raise MemoryError(f"device memory of {len(self.g)} bytes is full: Device(mem=...)")
        self.g[a : a + n] = np.frombuffer(arr.tobytes(), np.uint8)
        self.ok[a : a + n] = True
        return GBASE + a

    def get(self, addr: int, dtype: Any, shape: int | Sequence[int]) -> Array:
        """Return a copy of device memory as an array."""
        o, n = addr - GBASE, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.g[o : o + n].tobytes(), dtype).reshape(shape)

    def launch(
        self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], dyn_smem: int = 0,
        async_mode: str = "lazy", race: bool = False, max_steps: int = 10**7, order: int = 0,
        metrics: bool = False,
    ) -> Run:  # fmt: skip
        """Run a kernel.

        Args:
            kernel: `Module.kernels[name]`.
            grid: blocks, up to three numbers.
            block: threads, up to three numbers.
            args: addresses and integers as int, f32 as Python float, anything else as a numpy scalar or
                structure of the parameter's type, TensorMap for a CUtensorMap.
            dyn_smem: bytes of dynamic shared memory.
            async_mode: "lazy" or "eager": cp.async, TMA and wgmma take effect at the wait or at issue.
            race: report conflicts in shared memory between barriers in `races`.
            max_steps: when to call it a livelock.
            order: a seed; random subsets of the warps move then.
            metrics: count sectors, wavefronts and distinct bytes (for `roofline.counts`).

        Returns:
            The Run: `races`, `stats` (executed thread-instructions by opcode), `insts`, `steps`.

        Raises:
            PtxError: the kernel went wrong, or has an instruction that isn't covered.
        """
        if async_mode not in ("lazy", "eager"):
            raise ValueError(f"async_mode is 'lazy' or 'eager', got {async_mode!r}")
        run = Run(self, kernel, grid, block, args, dyn_smem, async_mode, race, order, metrics)
        with np.errstate(all="ignore"):
            run.go(max_steps)
        return run


class Run(Bits, Transfers, TensorCores, Copies):
    """One launch. op_<opcode> compiles an instruction to a function of the active threads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.barrier_id = np.zeros(self.L, np.int32)
        self.warp_mask = np.zeros(self.L, np.uint32)
        self.barriers: dict[tuple[int, int], int | None] = {}  # (block, id) -> threads, None for all
        code = self.k.code
        self.control = {i for i, ins in enumerate(code) if ins.base in CONTROL}
        leaders = sorted({0} | set(self.k.labels.values()) | {i + 1 for i in self.control})
        self.block_end = dict(zip(leaders, leaders[1:] + [len(code)], strict=True))
        self.actions = [
            None if i in self.control and ins.base != "wgmma" else self._compile(ins)
            for i, ins in enumerate(code)
        ]

    def _compile(self, ins: Instruction) -> Action:
        if ins.base in NO_OPS:
            return lambda i: None
        method = getattr(self, "op_" + ALIASES.get(ins.base, ins.base), None)
        if method is None:
            raise ins.error()
        try:
            return method(ins)
        except PtxError:
            raise
        except Exception as e:
            raise PtxError(f"not covered: {ins.text} ({type(e).__name__}: {e})") from e

    def go(self, max_steps: int) -> None:
        """Execute until every thread has returned."""
        rng = np.random.default_rng(self.order) if self.order else None
        while True:
            running = self.st == RUNNING
            if not running.any():
                if (self.st == EXITED).all():
                    return
                n = [int((self.st == s).sum()) for s in (AT_BARRIER, AT_WGMMA, AT_WARP_BARRIER)]
                raise PtxError(
                    f"deadlock: {n[0]} threads wait at a barrier, {n[1]} at a wgmma, {n[2]} at a warp barrier"
                )
            self.steps += 1
            if self.steps > max_steps:
                raise PtxError("too many steps (livelock?)")
            pcs = np.where(running, self.pc, NEVER).reshape(-1, 32)
            lowest = pcs.min(1)
            if rng is not None:  # adversarial: only a random subset of the warps moves this round
                candidates = np.nonzero(lowest < NEVER)[0]
                keep = candidates[rng.random(len(candidates)) < 0.5]
                if not len(keep):
                    keep = candidates[[rng.integers(len(candidates))]]
                moving = np.full(len(lowest), NEVER)
                moving[keep] = lowest[keep]
                lowest = moving
            for p in np.unique(lowest[lowest < NEVER]):
                selected = ((pcs == p) & (lowest == p)[:, None]).ravel()
                self._run_block(int(p), None if selected.all() else np.nonzero(selected)[0])

    def _run_block(self, p: int, idx: Lanes) -> None:
        """Run the threads `idx` from instruction `p` to the end of its basic block."""
        end, code = self.block_end[p], self.k.code
        n = self.L if idx is None else len(idx)
        for i in range(p, end):
            ins, action = code[i], self.actions[i]
            self.cur = ins.text
            self.insts += n
            if action is None or i in self.control:
                return self._control(i, ins, idx)
            if ins.guard is None:
                self._count(ins.op, n)
                action(idx)
                continue
            name, negated = ins.guard
            m = self.R[name] if idx is None else self.R[name][idx]
            m = ~m if negated else m
            if m.all():
                self._count(ins.op, n)
                action(idx)
            elif m.any():
                some = self.lanes(idx)[m]
                self._count(ins.op, len(some))
                action(some)
        self.pc[... if idx is None else idx] = end
        if end >= len(code):
            self.st[self.lanes(idx)] = EXITED
        return None

    def _count(self, op: str, n: int) -> None:
        self.stats[op] = self.stats.get(op, 0) + n

    def _control(self, i: int, ins: Instruction, idx: Lanes) -> None:
        lanes = self.lanes(idx)
        self._count(ins.op, len(lanes))
        take = np.ones(len(lanes), bool)
        if ins.guard:
            m = self.R[ins.guard[0]][lanes]
            take = ~m if ins.guard[1] else m
        self.pc[lanes[~take]] = i + 1
        t = lanes[take]
        if ins.base == "bra":
            self.pc[t] = ins.target
        elif ins.base == "wgmma":
            self._meet_at_wgmma(i, ins, t)
        elif ins.base in ("ret", "exit"):
            self.st[t] = EXITED
            self._release_barriers()
            self._release_warps()
        elif "warp" in ins.mods:
            self.warp_mask[t] = self.read(ins.args[0], "u32", t)
            self.pc[t], self.st[t] = i + 1, AT_WARP_BARRIER
            self._release_warps()
        elif {"arrive", "red", "cluster"} & set(ins.mods):
            raise ins.error()
        else:
            ids = self.read(ins.args[0], "u32", t) if ins.args else np.zeros(len(t), np.uint32)
            need = int(self.read(ins.args[1], "u32", t)[0]) if len(ins.args) > 1 and len(t) else None
            self.pc[t], self.st[t] = i + 1, AT_BARRIER
            self.barrier_id[t] = ids
            for key in np.unique(self.cta[t] << 8 | ids).tolist():
                self.barriers.setdefault((key >> 8, key & 255), need)
            self._release_barriers()

    def _meet_at_wgmma(self, i: int, ins: Instruction, t: Array) -> None:
        """Rendezvous of the 4 warps of a warpgroup."""
        action = self.actions[i]
        self.pc[t], self.st[t] = i, AT_WGMMA
        first = np.unique(t - t % self.nt % 128)
        if action is None or (first % self.nt + 128 > self.nt).any():
            raise ins.error("wgmma by part of a warpgroup")
        members = first[:, None] + np.arange(128)
        ready = ((self.st[members] == AT_WGMMA) & (self.pc[members] == i)).all(1)
        if ready.any():
            x = members[ready].ravel()
            action(x)
            self.pc[x], self.st[x] = i + 1, RUNNING

    def _release_barriers(self) -> None:
        for (cta, q), need in list(self.barriers.items()):
            threads = slice(cta * self.nt, (cta + 1) * self.nt)
            st = self.st[threads]
            at = (st == AT_BARRIER) & (self.barrier_id[threads] == q)
            n, live = int(at.sum()), int((st != EXITED).sum())
            if n and n >= (live if need is None else need):
                if self.race:
                    met = at if need is not None else at | (st == EXITED)
                    self.synchronize(threads.start // 32 + np.nonzero(met.reshape(-1, 32).any(1))[0])
                st[at] = RUNNING
                del self.barriers[(cta, q)]

    def _release_warps(self) -> None:
        here = (self.st == AT_WARP_BARRIER) | (self.st == EXITED)
        bits = here.reshape(-1, 32) @ (np.uint64(1) << np.arange(32, dtype=np.uint64))
        missing = self.warp_mask & ~np.repeat(bits.astype(np.uint32), 32)
        self.st[(self.st == AT_WARP_BARRIER) & (missing == 0)] = RUNNING
