"""Static report of a cubin: registers, spills, tensor-core instructions, occupancy, the mix of the hot loops.

Needs cuobjdump and nvdisasm (on PATH or inside the triton wheel). The bounds assume that every loop iteration
executes every instruction between the loop's label and its branch, once; they are lower bounds of time, never
predictions. Rates: the throughput table of the CUDA C++ Programming Guide; which pipe executes what: the metrics
chapter of the Nsight Compute documentation (integer multiply-adds run on the FMA pipe).
"""

from __future__ import annotations

import collections
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .toolchain import run_tool

# flop: dense bf16 tensor FLOP per clock and SM
LIMITS = {
    "sm_80": dict(warps=64, regs=65536, smem=167936, blocks=32, flop=2048),
    "sm_90": dict(warps=64, regs=65536, smem=233472, blocks=32, flop=4096),
}
# results per clock and SM of the other pipes (lanes)
RATES = {
    "sm_80": dict(fma=64, imad=64, alu=64, mufu=16, ldst=32, shfl=32, conv=16),
    "sm_90": dict(fma=128, imad=64, alu=64, mufu=16, ldst=32, shfl=32, conv=64),
}
MMA = "HMMA HGMMA IMMA IGMMA QGMMA BMMA BGMMA DMMA UTCHMMA UTCQMMA UTCIMMA".split()
PIPES = {
    "tensor": MMA,
    "fma": "FFMA FADD FMUL HFMA2 HADD2 HMUL2".split(),
    "alu": (
        "IADD3 LOP3 SHF ISETP LEA PRMT IMNMX SEL VIADD IADD BFI SGXT LOP PLOP3 VIMNMX BMSK FLO "
        "FSEL FMNMX FSETP HMNMX2 HSETP2"
    ).split(),
    "mufu": "MUFU POPC BREV".split(),
    "conv": "F2F I2F F2I F2FP I2FP I2IP".split(),
    "ldst": (
        "LDG STG LDS STS LDL STL LDSM STSM LDGSTS "
        "ATOM ATOMG ATOMS RED REDG LD ST LDGDEPBAR UTMALDG UTMASTG LDC"
    ).split(),
    "shfl": "SHFL VOTE REDUX MATCH".split(),
}
PIPE_OF = {op: pipe for pipe, ops in PIPES.items() for op in ops}
RELATIVE_TENSOR_RATE = {"S8": 2, "U8": 2, "S4": 4, "TF32": 0.5, "E4M3": 2, "E5M2": 2, "XOR": 16, "AND": 16}


@dataclass
class Loop:
    """An inner loop, or a part that a branch skips: instructions `first` .. `last`."""

    first: int
    last: int
    ops: collections.Counter[str]
    cycles: dict[str, float] = field(default_factory=dict)
    """Lower bounds per iteration of all resident warps of an SM, by pipe."""
    bound: str = ""
    tensor_utilisation: float = 0.0
    """An upper bound, 0..1."""


@dataclass
class KernelReport:
    """What the compiler made of a kernel."""

    name: str
    arch: str
    instructions: int
    registers: int
    stack: int
    static_smem: int
    spill_loads: int
    spill_stores: int
    ops: collections.Counter[str]
    """By SASS mnemonic."""
    blocks_per_sm: int
    limiter: str
    warps_per_sm: int
    loops: list[Loop]
    """The innermost ones."""
    nest: list[Loop]
    """All of them; an outer loop has the instructions of the inner ones once."""
    branches: list[Loop]
    """What forward branches skip: code that may run in some iterations only."""

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.spill_loads + self.spill_stores

    @property
    def mma(self) -> dict[str, int]:
        """Tensor-core instructions, as {"HMMA": 128}."""
        return {op: self.ops[op] for op in MMA if self.ops[op]}


def mma_flop(full: str) -> float:
    """FLOP of a warp in bf16-equivalents: an int8 FLOP takes half the time, a tf32 FLOP double."""
    m = re.match(r"[HIQB]GMMA\.64x(\d+)x(\d+)", full)
    if m:
        flop = 2 * 64 * int(m[1]) * int(m[2]) / 4
    else:
        m = re.match(r"[HIB]MMA\.16(8)(\d+)", full)
        flop = 2 * 16 * 8 * int(m[2]) if m else 0
    parts = full.split(".")
    return flop / next((r for k, r in RELATIVE_TENSOR_RATE.items() if k in parts), 1)


def _instructions(section: str) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    """Return (mnemonic, full opcode, operands) of each instruction, and the labels' indices."""
    ins: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        m = re.match(r"\s*(\.L_\w+):", line)
        if m:
            labels[m[1]] = len(ins)
            continue
        m = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if m:
            ins.append((m[3].split(".")[0], m[3], m[4]))
    return ins, labels


def _loops(ins: list[tuple[str, str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of every loop."""
    loops: set[tuple[int, int]] = set()
    for k, (op, _, rest) in enumerate(ins):
        target = labels.get(next(iter(re.findall(r"\.L_\w+", rest)), "")) if op == "BRA" else None
        if target is not None and target <= k and k - target > 2:
            loops.add((target, k))
    return sorted(loops)


def _branches(ins: list[tuple[str, str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of what every forward branch skips."""
    found = set()
    for k, (op, _, rest) in enumerate(ins):
        target = labels.get(next(iter(re.findall(r"\.L_\w+", rest)), "")) if op == "BRA" else None
        if target is not None and target > k + 1:
            found.add((k + 1, target - 1))
    return sorted(found)


def _inner(loops: list[tuple[int, int]], ins: list[tuple[str, str, str]]) -> list[tuple[int, int]]:
    """The innermost loops of those with tensor-core instructions, or of all if there are none."""

    def tensor(x: tuple[int, int]) -> bool:
        return any(op in MMA for op, _, _ in ins[x[0] : x[1] + 1])

    def innermost(group: Any) -> list[tuple[int, int]]:
        return [x for x in group if not any(o != x and o[0] >= x[0] and o[1] <= x[1] for o in group)]

    return innermost([x for x in loops if tensor(x)]) or innermost(loops)


def _loop(ins: list[tuple[str, str, str]], first: int, last: int, warps: int, arch: str) -> Loop:
    body = ins[first : last + 1]
    loop = Loop(first, last, collections.Counter(op for op, _, _ in body))
    pipes = collections.Counter(PIPE_OF.get(op, "other") for op, _, _ in body)
    pipes["fma"] += loop.ops["IMAD"]
    pipes["imad"] = sum(op == "IMAD" and not full.startswith("IMAD.MOV") for op, full, _ in body)
    flop = sum(mma_flop(full) for _, full, _ in body)
    loop.cycles = {"issue": len(body) * warps / 4, "tensor": flop * warps / LIMITS[arch]["flop"]}
    loop.cycles.update({p: pipes[p] * 32 * warps / r for p, r in RATES[arch].items()})
    loop.bound = max(loop.cycles, key=lambda pipe: loop.cycles[pipe])
    loop.tensor_utilisation = loop.cycles["tensor"] / max(loop.cycles[loop.bound], 1e-9)
    return loop


def report(cubin: Path | str, threads: int = 128, dyn_smem: int = 0) -> list[KernelReport]:
    """Report on every kernel of a cubin.

    Args:
        cubin: a file.
        threads: of a block.
        dyn_smem: bytes of dynamic shared memory of the launch (for Triton, metadata.shared). Occupancy adds
            1 KiB of reserved shared memory per block, so it errs on the low side.
    """
    sass = run_tool("nvdisasm", "-c", cubin)
    usage = run_tool("cuobjdump", "-res-usage", cubin)
    found = re.search(r"\.target\s+(sm_\d+)", sass) or re.search(r"\b(sm_\d+)", run_tool("cuobjdump", cubin))
    arch = found[1] if found else "sm_90"
    limits_of = arch if arch in LIMITS else "sm_90"
    lim = LIMITS[limits_of]
    out: list[KernelReport] = []
    for section in re.split(r"(?=^\.section\s+\.text\.)|(?=^//-+ \.text\.)", sass, flags=re.M):
        m = re.match(r"(?:\.section\s+|//-+ )\.text\.([\w$]+)", section)
        ins, labels = _instructions(section)
        if not m or not ins:
            continue
        name = m[1]
        u = re.search(rf"Function {re.escape(name)}:\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        regs, stack, smem = map(int, u.groups()) if u else (0, 0, 0)
        warps = math.ceil(threads / 32)
        per_warp = math.ceil(regs / 8) * 8 * 32
        occ = {"warps": lim["warps"] // warps, "smem": lim["smem"] // (smem + dyn_smem + 1024)}
        occ["blocks"] = lim["blocks"]
        if regs:
            occ["registers"] = lim["regs"] // (per_warp * warps)
        blocks = min(occ.values())
        ops = collections.Counter(op for op, _, _ in ins)
        found_loops = _loops(ins, labels)
        nest = {x: _loop(ins, *x, warps * max(blocks, 1), limits_of) for x in found_loops}
        inner = [nest[x] for x in _inner(found_loops, ins)]
        skipped = [_loop(ins, *x, warps * max(blocks, 1), limits_of) for x in _branches(ins, labels)]
        out.append(
            KernelReport(
                name, arch, len(ins), regs, stack, smem, ops["LDL"], ops["STL"], ops, blocks,
                min(occ, key=lambda limit: occ[limit]), blocks * warps, inner, [*nest.values()], skipped,
            )
        )  # fmt: skip
    return out
