"""Counts and lower bounds of the CUDA kernels, without a GPU: `python bench/roofline.py [--json FILE]`.

Each kernel's machine code gives the cycles that every pipe needs per step of its main loop; a small problem,
executed by the PTX interpreter of the tests, gives bytes, bank conflicts and instructions per step, and checks the
formula of the bytes that go through DRAM. Both are scaled to realistic shapes. The bounds
assume that the blocks fill all SMs evenly. Nothing here is a measured time: a kernel may be slower than its bound
by any factor.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from gpu_without_gpu import roofline, toolchain  # noqa: E402
from gpu_without_gpu.ptxsim import Device, Module, Run, TensorMap, to_bf16  # noqa: E402
from gpu_without_gpu.sass_report import KernelReport, report  # noqa: E402
from simulated_ptx import struct  # noqa: E402

from jz3.files import write_json  # noqa: E402
from jz3.ops.segment_plan import Plan, piece_limit, plan_segments  # noqa: E402

GPUS = {"A100": "sm_80", "H100": "sm_90a"}
LAYERS = {
    "Llama-3-8B q": 4096,
    "Llama-3-8B k": 1024,
    "Llama-3-8B gate": 14336,
    "SmolLM2-135M q": 576,
    "SmolLM2-135M gate": 1536,
}
"""Output features of linear layers: the width of g."""
DOCUMENTS = (64, 128, 256, 512, 1024, 2048)
PROJECTED = 128
"""Rows of L and columns of the projected a."""
EXACT = 256
"""Columns of g that a block takes where there is no L."""
COUNTS = ("l2_bytes", "smem_wavefronts", "smem_wavefronts_ideal", "warp_instructions")
"""What is counted per step."""
PIECE = 128 * 128
"""Columns that a block of sign_project sums up (CUDA_PIECE in jz3/ops/sign_project.py)."""


@dataclass
class Case:
    """A kernel on one shape and one GPU."""

    kernel: str
    shape: str
    gpu: str
    minimal_bytes: float
    dram_bytes: float
    flop: float
    kind: str
    """The tensor cores' type of input."""
    steps: float
    """Steps of the main loop, over all blocks."""
    cycles: dict[str, float]
    """Cycles of an SM per step, by pipe."""
    per_step: dict[str, float]
    """Counts of a step."""
    occupancy: int
    counted_to_formula: float
    """Bytes of DRAM counted on the small problem, relative to their formula."""

    def row(self) -> dict[str, Any]:
        """The bounds, with what they follow from."""
        peak = roofline.PEAKS[self.gpu]
        pipes = {p: self.steps * c / (peak["sms"] * peak["clock"]) for p, c in self.cycles.items()}
        smem = self.steps * self.per_step["smem_wavefronts"] / (peak["sms"] * peak["clock"])
        l2 = self.steps * self.per_step["l2_bytes"] / peak["l2"]
        bounds = {**pipes, "smem": smem, "l2": l2, "dram": self.dram_bytes / peak["dram"]}
        bounds["tensor"] = max(bounds["tensor"], self.flop / peak["tensor"][self.kind])
        binding = max(bounds, key=lambda name: bounds[name])
        ideal = self.per_step["smem_wavefronts_ideal"]
        return {
            "kernel": self.kernel,
            "shape": self.shape,
            "gpu": self.gpu,
            "minimal_bytes": self.minimal_bytes,
            "dram_to_minimal": self.dram_bytes / self.minimal_bytes,
            "counted_to_formula": self.counted_to_formula,
            "flop": self.flop,
            "bank_conflicts": self.per_step["smem_wavefronts"] / ideal if ideal else 1.0,
            "warps_per_sm": self.occupancy,
            "binding": binding,
            "bound_us": bounds[binding] * 1e6,
            "tensor_share": bounds["tensor"] / bounds[binding],
            "dram_share": bounds["dram"] / bounds[binding],
            "bounds_us": {name: seconds * 1e6 for name, seconds in bounds.items()},
        }


def compiled(file: str, arch: str, threads: int, shared: int) -> tuple[Module, dict[str, KernelReport]]:
    """Return the PTX of a file and the report on its machine code."""
    flags, source = ("-I", str(ROOT / "csrc")), ROOT / "csrc" / "cuda" / file
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        toolchain.nvcc(source, cubin, arch, "cubin", flags)
        reports = {kernel.name: kernel for kernel in report(cubin, threads, shared)}
    return Module(toolchain.nvcc_ptx(source, arch, flags)), reports


def loop_cycles(
    kernel: KernelReport, mma: int, trips: Mapping[int, float], stores: float = 1
) -> dict[str, float]:
    """Cycles of one block for an iteration of a loop, by pipe.

    Args:
        kernel: the report.
        mma: the loop is the first, outermost one with so many tensor-core instructions.
        trips: how often the loops within it run, by their tensor-core instructions (0: loops that load with
            cp.async); those that aren't named count once.
        stores: how often the code that stores results runs in an iteration; it is what a branch skips with every
            store of the loop and no product.
    """

    def products(loop: Any) -> int:
        return sum(loop.ops[op] for op in ("HMMA", "IMMA", "HGMMA"))

    outer = max((x for x in kernel.nest if products(x) == mma), key=lambda x: x.last - x.first)
    cycles = dict(outer.cycles)

    def counted(x: Any) -> bool:
        within = outer.first <= x.first and x.last <= outer.last and x is not outer
        return within and products(x) in trips and bool(products(x) or x.ops["LDGSTS"])

    inner = [x for x in kernel.nest if counted(x)]
    for x in inner:
        around = [y for y in inner if y is not x and y.first <= x.first and x.last <= y.last]
        more = (trips[products(x)] - 1) * math.prod(trips[products(y)] for y in around)
        for pipe, c in x.cycles.items():
            cycles[pipe] += more * c
    if stores != 1:
        skipped = [
            x
            for x in kernel.branches
            if outer.first <= x.first <= x.last <= outer.last
            and x.ops["STG"] == outer.ops["STG"]
            and not products(x)
        ]
        for pipe, c in min(skipped, key=lambda x: x.last - x.first).cycles.items():
            cycles[pipe] += (stores - 1) * c
    return {pipe: c / max(kernel.blocks_per_sm, 1) for pipe, c in cycles.items()}


def difference(short: Run, long: Run, steps: int) -> dict[str, float]:
    """Counts per step, from two runs of which one has `steps` steps more."""
    one, other = roofline.counts(short), roofline.counts(long)
    return {name: (other[name] - one[name]) / steps for name in COUNTS}


def sign_project(gpu: str) -> list[Case]:
    """128 rows of 16 M columns, a layer's weights, onto 8,192 projections."""
    height, shared = 128, 2 * (128 * 256 + 4096)
    module, reports = compiled("sign_project.cu", GPUS[gpu], 256, shared)
    kernel = module.kernels["jz3_sign_project_128"]

    def run(columns: int) -> Run:
        device = Device()
        x = device.put(to_bf16(np.ones((height, columns), np.float32)))
        sizes = (height, columns, 256, columns)
        parameters = struct(
            ("x", np.uint64, x),
            ("partial", np.uint64, device.put(np.zeros((height, 256), np.float32))),
            *((name, np.int64, v) for name, v in zip(("rows", "columns", "k", "stride"), sizes, strict=True)),
            ("key", np.uint64, 1),
            ("first_block", np.uint64, 0),
            ("piece", np.int64, columns),
        )
        return device.launch(kernel, (1,), (256,), [parameters], dyn_smem=shared, metrics=True)

    def traffic(columns: int, k: int, pieces: int) -> float:
        return 2 * height * columns + 4 * height * k * pieces

    short, long = run(256), run(512)
    columns, k = 4096 * 4096, 8192
    pieces = columns // PIECE
    machine = reports["jz3_sign_project_128"]
    return [
        Case(
            "sign_project",
            f"S={height} P={columns} k={k}",
            gpu,
            traffic(columns, k, 1),
            traffic(columns, k, 2 * pieces),
            2.0 * height * columns * k,
            "bf16",
            k / 256 * columns / 128,
            loop_cycles(machine, max(loop_products(machine)), {128: 2, 0: 4}),
            difference(short, long, 2),
            machine.warps_per_sm,
            roofline.counts(long)["dram_bytes"] / traffic(512, 256, 1),
        )
    ]


def loop_products(kernel: KernelReport) -> list[int]:
    """Tensor-core instructions of each loop."""
    return [sum(x.ops[op] for op in ("HMMA", "IMMA", "HGMMA")) for x in kernel.nest]


SCORES = (("int8", 64), ("int8", 4), ("4bit", 64))
"""Kinds of codes and numbers of queries."""


def score_topk(gpu: str) -> list[Case]:
    """A million documents of 8,192 codes."""
    return [scores_of_kind(gpu, kind, queries) for kind, queries in SCORES]


def scores_of_kind(gpu: str, kind: str, queries: int) -> Case:
    """The scores of one kind of codes, of 4, 16 or 64 queries."""
    import torch

    from jz3.ops.encode import CODEBOOKS
    from jz3.ops.score_topk import fragments, level_words

    rows, bits = 256, CODEBOOKS[kind].bits
    step = 32 if bits == 1 else 64  # bytes of a row
    stages, coordinates = {8: 4, 4: 3}.get(bits, 2), step * 8 // bits
    shared = stages * (rows * step + 2 * queries * coordinates)
    symbol = f"jz3_score_{bits}bit_{queries}"
    module, reports = compiled("score_topk.cu", GPUS[gpu], 256, shared)
    machine = reports[symbol]

    def run(steps: int) -> Run:
        device, width = Device(), steps * step
        planes = torch.zeros(2, queries, steps * coordinates, dtype=torch.int8)
        parameters = struct(
            ("codes", np.uint64, device.put(np.zeros((rows, width), np.uint8))),
            ("fragments", np.uint64, device.put(fragments(planes, bits, width).numpy())),
            ("step", np.uint64, device.put(np.ones(queries))),
            ("bias", np.uint64, device.put(np.ones(queries))),
            ("row_scale", np.uint64, device.put(np.ones(rows, np.float32))),
            ("scores", np.uint64, device.put(np.zeros((queries, rows), np.float32))),
            ("rows", np.int64, rows),
            ("row_bytes", np.int64, width),
            ("queries", np.int64, queries),
            ("first_query", np.int64, 0),
            ("bits", np.int32, bits),
            ("levels", (np.uint32, 4), level_words(kind)),
        )
        return device.launch(
            module.kernels[symbol], (1,), (256,), [parameters], dyn_smem=shared, metrics=True
        )

    def traffic(count: int, dim: int) -> float:
        return count * (dim * bits // 8 + 4 + 4 * queries) + 2 * queries * dim + 16 * queries

    short, long = run(4), run(8)
    count, dim = 1_000_000, 8192
    return Case(
        "score_topk",
        f"N={count} K={dim} {kind} Q={queries}",
        gpu,
        count * (dim * bits // 8 + 4) + queries * 2 * dim,
        traffic(count, dim),
        2.0 * 2 * count * dim * queries,
        "s8",
        count / rows * dim / coordinates,
        loop_cycles(machine, max(loop_products(machine)), {}),
        difference(short, long, 4),
        machine.warps_per_sm,
        roofline.counts(long)["dram_bytes"] / traffic(rows, 8 * coordinates),
    )


def left_bytes(kind: str, width: int) -> int:
    """Bytes of L: numbers of 16 bits, or one bit each."""
    return {"dense": 2 * PROJECTED * width, "signs": PROJECTED // 8 * width, "identity": 0}[kind]


def segment_traffic(kind: str, documents: int, tokens: int, width: int, plan: Plan | None = None) -> float:
    """Bytes of a, g, L and the results; with a plan also of its tables, and of partial blocks written and read."""
    block = 4 * PROJECTED * (width if kind == "identity" else PROJECTED)
    least = 2 * tokens * (width + PROJECTED) + left_bytes(kind, width) + block * documents
    if plan is None:
        return least
    tables = sum(x.nbytes for x in (plan.slots, plan.pieces, plan.tiles, plan.groups))
    return least + tables + 2 * block * int(plan.partials[-1])


def segment_project(gpu: str) -> list[Case]:
    """16k tokens in documents of 64 to 2,048, a with 128 columns; L dense with 128 rows, of signs, or the identity."""
    return [case for kind in ("dense", "signs", "identity") for case in segments_of_kind(gpu, kind)]


def segments_of_kind(gpu: str, kind: str) -> list[Case]:
    """One kind of L on the layers' shapes."""
    exact, hopper = kind == "identity", kind == "dense" and gpu == "H100"
    if hopper:
        file, symbol = "segment_project_sm90.cu", "jz3_segment_project_sm90_bf16"
        slots, threads, shared = 256, 384, 3 * 49152 + 65536 + 1024
    elif exact:  # as signs, by a kernel for sm_80 everywhere
        file, symbol = "segment_exact.cu", f"jz3_segment_exact_bf16_{EXACT}"
        slots, threads, shared = 128, 256, 3 * 49152
    else:
        file, symbol = "segment_project.cu", f"jz3_segment_project_{kind}_bf16_128"
        slots, threads, shared = 128, 256, 3 * 128 * 256
    module, reports = compiled(file, GPUS[gpu], threads, shared)
    machine = reports[symbol]

    def plan_of(bounds: np.ndarray, width: int) -> Plan:
        outputs = width if exact else PROJECTED
        return plan_segments(bounds, piece_limit(width, outputs, PROJECTED, slots), slots)

    def run(width: int, *ends: int) -> tuple[Run, int, float]:
        outputs, tokens = width if exact else PROJECTED, ends[-1]
        plan = plan_of(np.array([0, *ends]), width)
        device = Device()
        ones = [
            to_bf16(np.ones(shape, np.float32)) for shape in ((tokens, 128), (tokens, width), (128, width))
        ]
        if kind == "signs":
            ones[2] = np.zeros((width, PROJECTED // 32), np.uint32)
        a, g, left = (device.put(x) for x in ones)
        out = device.put(np.zeros((len(ends), outputs, PROJECTED), np.float32))
        partial = device.put(np.zeros((int(plan.partials[-1]), outputs, PROJECTED), np.float32))
        tables = [device.put(x) for x in (plan.slots, plan.pieces, plan.tiles, plan.groups)]
        names = ("a", "g", "left", "out", "partial", "slots", "pieces", "tiles", "groups")
        sizes = ("width", "outputs", "columns", "stride_a", "stride_g", "stride_left")
        values = (width, outputs, PROJECTED, PROJECTED, width, PROJECTED // 32 if kind == "signs" else width)
        parameters = struct(
            *((n, np.uint64, v) for n, v in zip(names, (a, g, left, out, partial, *tables), strict=True)),
            *((n, np.int64, v) for n, v in zip(sizes, values, strict=True)),
            ("scale", np.float32, 1.0),
        )
        maps = [
            TensorMap(g, 2, (width, tokens), 2 * width, (64, 16)),
            TensorMap(left, 2, (width, PROJECTED), 2 * width, (64, 128)),
        ]
        parts = -(-width // EXACT) if exact else 1
        done = device.launch(
            module.kernels[symbol],
            ((len(plan.groups) - 1) * parts,),
            (threads,),
            [*(maps if hopper else []), parameters],
            dyn_smem=shared,
            metrics=True,
        )
        formula = segment_traffic(kind, len(ends), tokens, width, plan)
        return done, (len(plan.tiles) - 1) * parts, roofline.counts(done)["dram_bytes"] / formula

    # Counts of a tile are those of its blocks of 64 columns, of which it has up to four without L, of the results
    # that it completes, and fixed ones. Full tiles of one document or of several differ in their results alone.
    width = EXACT if exact else 192
    (one, tiles, _), (several, _, _) = run(width, 512), run(width, 128, 256, 384, 512)
    result, more = difference(one, several, 3), -128 if exact else 128
    slope = difference(one, run(width + more, 512)[0], more // 64 * tiles)
    counted = roofline.counts(one)
    fixed = {x: (counted[x] - result[x]) / tiles - width // 64 * slope[x] for x in COUNTS}
    ratio = run(width, 64, 192, 448)[2]
    cases = []
    tokens = 16 * 1024
    for name, width in LAYERS.items():
        lengths: list[int] = []
        while sum(lengths) < tokens:
            lengths.append(min(DOCUMENTS[len(lengths) % len(DOCUMENTS)], tokens - sum(lengths)))
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        plan, parts = plan_of(bounds, width), -(-width // EXACT) if exact else 1
        blocks = -(-width // 64) / parts
        # The loop over columns leaves the last two blocks to the code after it; a tile's second product has 128 slots
        # in steps of 16; the copies of a tile are unrolled by four. Without L, a step is half a tile, two times two
        # products unrolled.
        trips = {4: blocks} if hopper else {64: 2} if exact else {64: blocks - 2, 32: 4, 0: 2}
        halves, filled = (2, blocks / 4) if exact else (1, 1.0)
        tiles = len(plan.tiles) - 1
        results = int(plan.pieces[:, 3].sum()) / tiles  # that a tile completes
        cycles = loop_cycles(machine, max(loop_products(machine)), trips, results / halves)
        cycles = {pipe: c * halves for pipe, c in cycles.items()}
        if hopper:  # 8 of the 12 warps multiply; that the others copy meanwhile is left out
            cycles = {pipe: c * 8 / 12 for pipe, c in cycles.items()}
        outer = 2.0 * tokens * PROJECTED
        cases.append(
            Case(
                "segment_project",
                f"{name} T={tokens} O={width} p={PROJECTED} {kind}",
                gpu,
                segment_traffic(kind, len(lengths), tokens, width),
                segment_traffic(kind, len(lengths), tokens, width, plan),
                outer * width if exact else outer * (width + PROJECTED),
                "bf16",
                tiles * parts,
                cycles,
                {x: fixed[x] + results * filled * result[x] + blocks * slope[x] for x in COUNTS},
                machine.warps_per_sm,
                ratio,
            )
        )
    return cases


KERNELS = {"sign_project": sign_project, "score_topk": score_topk, "segment_project": segment_project}


def main() -> None:
    """Parse the arguments, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", default=list(KERNELS), help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if unknown := set(arguments.kernels) - set(KERNELS):
        parser.error(
            f"there is no kernel {', '.join(sorted(unknown))}; expected some of {', '.join(KERNELS)}"
        )
    if not toolchain.have_nvcc():
        raise SystemExit("nvcc is not on PATH: the counts come from compiled kernels")
    print("counts and lower bounds; nothing here was timed")
    print(
        f"{'kernel':16}{'shape':54}{'gpu':6}{'bytes/min':>10}{'counted':>9}{'conflicts':>10}{'warps':>6}"
        f"{'bound us':>11}  {'by':8}{'tensor':>7}{'dram':>6}"
    )
    rows = []
    for name in arguments.kernels:
        for gpu in GPUS:
            for case in KERNELS[name](gpu):
                row = case.row()
                rows.append(row)
                print(
                    f"{row['kernel']:16}{row['shape']:54}{gpu:6}{row['dram_to_minimal']:>10.3f}"
                    f"{row['counted_to_formula']:>9.3f}{row['bank_conflicts']:>10.2f}{row['warps_per_sm']:>6}"
                    f"{row['bound_us']:>11.1f}  {row['binding']:8}{row['tensor_share']:>7.0%}{row['dram_share']:>6.0%}"
                )
    if arguments.json:
        write_json(arguments.json, {"what": "counts and lower bounds, not times", "rows": rows})


if __name__ == "__main__":
    main()
