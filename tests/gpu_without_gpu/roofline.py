"""Counts of an executed kernel (ptxsim, metrics=True) and the lower bounds of time that follow from them.

    run = dev.launch(..., metrics=True)
    c = counts(run)                    # FLOP, DRAM bytes, L2 sectors, shared-memory wavefronts, instructions
    print(table(c))                    # microseconds per resource on A100 and H100

These are bounds and counts: a kernel may be slower by any factor. Peak numbers are those of NVIDIA's data sheets
(SXM, dense; A100 with 40 GB); L2 bandwidth is a rough figure.
"""

from __future__ import annotations

import re
from typing import Any

from .ptxsim import Run

PEAKS: dict[str, dict[str, Any]] = {
    "A100": dict(
        sms=108, clock=1.41e9, dram=1.555e12, l2=4e12,
        tensor={"bf16": 312e12, "f16": 312e12, "tf32": 156e12, "s8": 624e12, "u8": 624e12, "b1": 4992e12},
    ),
    "H100": dict(
        sms=132, clock=1.98e9, dram=3.35e12, l2=5.5e12,
        tensor={"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "s8": 1979e12, "u8": 1979e12},
    ),
}  # fmt: skip


def counts(run: Run) -> dict[str, Any]:
    """Return the counts of a launch with metrics=True.

    dram_bytes: 32 for each distinct sector loaded and each stored, which is the traffic with a perfect L2.
    l2_bytes: 32 for each sector of each warp request and each TMA tile. flop: of the tensor cores, by type.
    """
    s = run.stats
    c: dict[str, Any] = dict(flop={}, dram_bytes=0, l2_bytes=0, smem_wavefronts=0, smem_wavefronts_ideal=0)
    for op, n in s.items():
        m = re.match(r"(mma|wgmma)\..*?m(\d+)n(\d+)k(\d+)", op)
        if m:
            dims = [int(x) for x in m.groups()[1:]]
            threads = 128 if m[1] == "wgmma" else 32
            tys = re.findall(r"\b(bf16|f16|tf32|[su][48]|b1)\b", op)
            flop = 2 * dims[0] * dims[1] * dims[2] * n // threads
            c["flop"][tys[0]] = c["flop"].get(tys[0], 0) + flop
    c["dram_bytes"] = int(sum(t.sum() for t in run.touched.values())) * 32
    for k, v in s.items():
        if k.startswith("M.global") and k.endswith(".sectors"):
            c["l2_bytes"] += 32 * v
        elif k.endswith(".wavefronts"):
            c["smem_wavefronts"] += v
        elif k.endswith(".ideal"):
            c["smem_wavefronts_ideal"] += v
    c["warp_instructions"] = run.insts // 32
    return c


def bounds(c: dict[str, Any], gpu: str = "H100") -> dict[str, float]:
    """Return seconds by resource, each a lower bound of the kernel's time."""
    p = PEAKS[gpu]
    return dict(
        tensor=sum(n / p["tensor"][ty] for ty, n in c["flop"].items()),
        dram=c["dram_bytes"] / p["dram"],
        l2=c["l2_bytes"] / p["l2"],
        smem=c["smem_wavefronts"] / (p["sms"] * p["clock"]),
        issue=c["warp_instructions"] / (4 * p["sms"] * p["clock"]),
    )


def table(c: dict[str, Any]) -> str:
    """Return counts and bounds as text."""
    ratio = c["smem_wavefronts"] / c["smem_wavefronts_ideal"] if c["smem_wavefronts_ideal"] else 1.0
    flop = " ".join(f"{ty}={n:.3g}" for ty, n in c["flop"].items()) or "none"
    lines = [
        f"tensor FLOP {flop}; distinct bytes {c['dram_bytes']}; L2 bytes {c['l2_bytes']}; "
        f"shared wavefronts {c['smem_wavefronts']} ({ratio:.2f}x ideal); "
        f"warp instructions {c['warp_instructions']}"
    ]
    for gpu in PEAKS:
        b = bounds(c, gpu)
        cells = "  ".join(f"{k} {1e6 * v:.3f}" for k, v in b.items())
        lines.append(f"{gpu}: lower bounds in us  {cells}  -> {max(b, key=lambda resource: b[resource])}")
    return "\n".join(lines)
