"""The CUDA kernels of segment_project: their PTX executed on the CPU against the definition, and mutants of them.

Skipped without nvcc. The marked tests run on a GPU itself.
"""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, normal, product
from simulated_cuda import SOURCES, SimulatedCuda, build_launchers, install

from jz3 import backend
from jz3.ops.segment_plan import Plan, piece_limit, plan_segments
from jz3.ops.segment_project import segment_project_reference, unpack_left
from jz3.ops.signs import sign_bits

FILES = {"sm80": "segment_project.cu", "exact": "segment_exact.cu", "sm90": "segment_project_sm90.cu"}
ARCHS = {"sm80": "sm_80", "exact": "sm_80", "sm90": "sm_90a"}
SCHEDULES = ({"async_mode": "lazy", "race": True}, {"async_mode": "eager"}, {"order": 1})
KERNELS = {
    "sm80": "jz3_segment_project_(dense|signs)",
    "exact": "jz3_segment_exact",
    "sm90": "jz3_segment_project_sm90",
}
RAGGED = [2, 7, 7, 8, 42, 69, 70, 215, 231]  # an empty and one-token documents, one of two tiles of 128 slots
SHORT = [1, 4, 4, 5, 40]
LONG = [2, 12, 312, 333]
simulated = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def compiled(source: str | Path, kernel: str) -> Any:
    from gpu_without_gpu.ptxsim import Module
    from gpu_without_gpu.toolchain import nvcc_ptx

    return Module(nvcc_ptx(source, ARCHS[kernel], ("-I", str(SOURCES))))


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    return {kernel: compiled(SOURCES / "cuda" / file, kernel) for kernel, file in FILES.items()}


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_launchers(tmp_path_factory.mktemp("launchers"))


def example(
    kind: str, dtype: torch.dtype, width: int, outputs: int, columns: int, bounds: list[int]
) -> tuple[Any, ...]:
    """Return a, g, left, Q (for signs) and the matrix that `left` stands for.

    Whatever belongs to no document is NaN: tokens at the ends and what follows the rows of g.
    """
    count = bounds[-1] + 2
    wide = torch.full((count, -(-width // 8) * 8 + 8), float("nan"), dtype=dtype)
    a = torch.full((count, columns), float("nan"), dtype=dtype)
    tokens = slice(bounds[0], bounds[-1])
    wide[tokens, :width] = normal(1, count, width, dtype=dtype)[tokens]
    a[tokens] = normal(0, count, columns, dtype=dtype)[tokens]
    g = wide[:, :width]
    if kind == "identity":
        return a, g, None, None, torch.eye(width)
    if kind == "signs":
        bits = sign_bits(0, "m", width, outputs)
        return a, g, bits, outputs, unpack_left(bits, outputs, torch.float32) / outputs**0.5
    left = normal(2, width, outputs, dtype=dtype)
    return a, g, left, None, left


def expected(
    a: torch.Tensor, g: torch.Tensor, matrix: torch.Tensor, bounds: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return plain torch's result in the inputs' dtype and that of the definition in float64."""
    rows = torch.zeros(len(g), matrix.shape[1], dtype=g.dtype)
    tokens = slice(bounds[0], bounds[-1])
    rows[tokens] = product(g[tokens], matrix.to(g.dtype))
    pairs = list(zip(bounds, bounds[1:], strict=False))
    plain = torch.stack([product(rows[b:e].T, a[b:e]) for b, e in pairs])
    return plain, segment_project_reference(a.double(), g.double(), matrix.double(), torch.tensor(bounds))


def run(
    patch: pytest.MonkeyPatch,
    extension: SimulatedCuda,
    kernel: str,
    *arguments: Any,
    capability: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Run the op's CUDA implementation in the simulator and make sure which kernel it took."""
    with patch.context() as inner:
        install(inner, extension, capability or ((9, 0) if kernel == "sm90" else (8, 0)))
        got = backend.implementation("segment_project", "cuda")(*arguments)
    launched = {
        name for r in extension.runs for name in extension.modules if re.match(KERNELS[name], r.k.name)
    }
    assert kernel in launched
    return got


CASES = [
    ("sm80", "dense", torch.bfloat16, 200, 72, 40, RAGGED),  # 145 tokens go through two tiles
    ("sm80", "dense", torch.float16, 100, 24, 7, RAGGED),  # 145 tokens have two partial blocks
    ("sm80", "dense", torch.bfloat16, 70, 130, 24, SHORT),
    ("sm80", "signs", torch.bfloat16, 200, 140, 24, SHORT),
    ("sm80", "signs", torch.float16, 72, 20, 131, SHORT),
    ("exact", "identity", torch.bfloat16, 136, 136, 16, SHORT),
    ("exact", "identity", torch.bfloat16, 264, 264, 131, RAGGED),
    ("exact", "identity", torch.float16, 72, 72, 8, LONG),  # 300 tokens go through three tiles
    ("exact", "identity", torch.float16, 8, 8, 1, RAGGED),
    ("exact", "identity", torch.bfloat16, 64, 64, 64, LONG),
    ("sm90", "dense", torch.bfloat16, 264, 136, 24, RAGGED),
    ("sm90", "dense", torch.float16, 72, 20, 131, SHORT),
    ("sm90", "dense", torch.bfloat16, 64, 72, 8, LONG),  # 300 tokens go through two tiles
    ("sm90", "dense", torch.bfloat16, 264, 72, 8, LONG),  # or have two partial blocks
]


@simulated
@pytest.mark.parametrize(("kernel", "kind", "dtype", "width", "outputs", "columns", "bounds"), CASES)
def test_accuracy(
    modules: dict[str, Any],
    launchers: Any,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    kind: str,
    dtype: torch.dtype,
    width: int,
    outputs: int,
    columns: int,
    bounds: list[int],
) -> None:
    a, g, left, given, matrix = example(kind, dtype, width, outputs, columns, bounds)
    plain, exact = expected(a, g, matrix, bounds)
    results = []
    for options in SCHEDULES:
        extension = SimulatedCuda(modules, launchers, ("80", "90a"), **options)
        got = run(monkeypatch, extension, kernel, a, g, left, torch.tensor(bounds), None, given)
        assert_as_accurate(got, plain, exact)
        results.append(got)
    assert all(torch.equal(results[0], other) for other in results[1:])


@simulated
def test_exact_gradients_on_devices_of_99_kb(
    modules: dict[str, Any], launchers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, g, left, given, matrix = example("identity", torch.bfloat16, 136, 136, 16, SHORT)
    plain, exact = expected(a, g, matrix, SHORT)
    extension = SimulatedCuda(modules, launchers, ("80",))
    launchers.set_shared_memory(99 << 10)
    try:
        got = run(monkeypatch, extension, "exact", a, g, left, torch.tensor(SHORT), None, given)
    finally:
        launchers.set_shared_memory(227 << 10)
    assert_as_accurate(got, plain, exact)
    assert {name for name in extension.launched if "exact" in name} == {"jz3_segment_exact_bf16_64"}


MUTANTS = {
    "sm80": {
        "no barrier in the loop": (
            "      __syncthreads();\n      load_columns(free",
            "      load_columns(free",
        ),
        "no wait in the loop": (
            "cp_async_wait<STAGES - 2>();\n      __syncthreads();\n      load_columns",
            "__syncthreads();\n      load_columns",
        ),
        "a wait for too little": (
            "cp_async_wait<STAGES - 2>();\n      __syncthreads();\n      load_columns",
            "cp_async_wait<STAGES - 1>();\n      __syncthreads();\n      load_columns",
        ),
        "no barrier before a": ("    __syncthreads();\n    load_a(a_tile", "    load_a(a_tile"),
        "no wait for the last columns but one": (
            "cp_async_wait<STAGES - 2>();\n    __syncthreads();\n    load_a(a_tile",
            "__syncthreads();\n    load_a(a_tile",
        ),
        "no wait for the last columns": (
            "cp_async_wait<STAGES - 2>();\n      __syncthreads();\n      multiply(following",
            "__syncthreads();\n      multiply(following",
        ),
        "no barrier for the last columns": (
            "      __syncthreads();\n      multiply(following",
            "      multiply(following",
        ),
        "the stage after": ("stage = following(stage), free", "free"),
        "no wait for a": ("        }\n    cp_async_wait<0>();", "        }"),
        "no barrier before the second product": (
            "    __syncthreads();\n\n    for (int i = p.tiles",
            "    for (int i = p.tiles",
        ),
        "no barrier between tiles": ("__syncthreads();  // the next tile's loads", "//"),
        "g L in a buffer still read": ("rows_tile = buffer(blocks + 1)", "rows_tile = buffer(blocks + 2)"),
        "stride of g": ("max(token, 0)) * p.stride_g", "max(token, 0)) * p.width"),
        "swizzle": ("(((lane >> 3) & 1) ^ (y_row & 7))", "(((lane >> 4) & 1) ^ (y_row & 7))"),
        "columns beyond the end": ("const int most = bytes_left(columns);", "const int most = 16;"),
        "empty slots": ("min(bytes[i], most)", "most"),
        "rows beyond L": ("outputs > 32 * i ? most : 0", "most"),
    },
    "exact": {
        "no wait": ("cp_async_wait<STAGES - 2>();", ""),
        "a wait for too little": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
        "no barrier": ("    __syncthreads();\n", ""),
        "copies that aren't counted at the end": (
            "    }\n    cp_async_commit();\n",
            "      cp_async_commit();\n    }\n",
        ),
        "tokens of another step": ("look_up(step + 1);", "look_up(step + 2);"),
        "tokens of the other half": ("tokens[i * ROWS / 32]", "tokens[0]"),
        "the other half's slots": ("max(piece.x - begin, 0)", "max(piece.x, 0)"),
        "sums that are not complete": ("piece.w && piece.y > begin", "piece.w"),
        "stride of g": ("p.stride_g, p.width - q0", "p.width, p.width - q0"),
        "stride of a": ("p.stride_a, p.columns - p0", "p.columns, p.columns - p0"),
        "swizzle": ("((unit ^ (row & 7)) << 4), take", "(unit << 4), take"),
        "columns beyond the end": ("bytes_left(columns - unit * 8)", "16"),
        "empty slots": ("token < 0 ? 0 : bytes", "bytes"),
    },
    "sm90": {
        "no wait for a stage": ("barrier_wait(full + 8 * stage, step / STAGES & 1);", ""),
        "wrong phase": (
            "barrier_wait(full + 8 * stage, step / STAGES & 1);",
            "barrier_wait(full + 8 * stage, 0);",
        ),
        "no wait for a free stage": ("barrier_wait(empty + 8 * stage, (step / STAGES & 1) ^ 1);", ""),
        "wrong phase of a free stage": ("(step / STAGES & 1) ^ 1);", "step / STAGES & 1);"),
        "too few bytes expected": (" * BOX * COLUMNS * 2 + LEFT_BYTES", " * BOX * COLUMNS * 2"),
        "no wait for the first product": ("wgmma_wait<0>();  // the other", "// the other"),
        "no wait for a": ("    cp_async_wait<0>();\n", ""),
        "no barrier before the second product": (
            'fence.proxy.async.shared::cta;\\n" ::: "memory");\n    consumers_sync();',
            'fence.proxy.async.shared::cta;\\n" ::: "memory");',
        ),
        "no barrier between tiles": ("    consumers_sync();  // the last", "    // the last"),
        "empty slots kept": (" & ((two & 1) * 0xFFFFu + (two & 2) * 0x7FFF8000u)", ""),
        "distance of the halves of a": (
            "descriptor(a_tile + k * 128, A_HALF)",
            "descriptor(a_tile + k * 128, 1024)",
        ),
        "stride of a": ("int64_t(token) * p.stride_a", "int64_t(token) * p.columns"),
    },
}


HOST_PARTS = {
    "sm80": "cudaError_t launch_segment_project(",
    "exact": "cudaError_t launch_segment_exact(",
    "sm90": "namespace {\n\nusing Encode",
}


def mutant(kernel: str, name: str) -> str:
    """Return the source with one fault and one kernel, without its host part, to compile fast."""
    text = (SOURCES / "cuda" / FILES[kernel]).read_text()
    text = text[: text.index(HOST_PARTS[kernel])]
    if kernel == "sm80":
        text = text.replace(
            "JZ3_KERNELS(64)\nJZ3_KERNELS(128)\n", "JZ3_KERNEL(dense_bf16, Bf16, DENSE, 128)\n"
        )
    else:
        text = re.sub(r"\nJZ3_KERNEL\((fp16, .*|.*, 64)\)", "", text)
    old, new = MUTANTS[kernel][name]
    assert text.count(old) == 1, f"{name}: {text.count(old)} places"
    return text.replace(old, new) + "}\n"


def every_mutant() -> list[Any]:
    """Return all, of which those without a wait, a barrier or a stride are slow: every one is compiled."""
    return [
        pytest.param(k, name, marks=() if re.search("wait|barrier|stride", name) else pytest.mark.slow)
        for k in MUTANTS
        for name in MUTANTS[k]
    ]


@simulated
@pytest.mark.parametrize(("kernel", "name"), every_mutant())
def test_mutants_are_caught(
    modules: dict[str, Any], launchers: Any, monkeypatch: pytest.MonkeyPatch, kernel: str, name: str
) -> None:
    broken = {**modules, kernel: compiled(mutant(kernel, name), kernel)}
    assert any(not agrees(monkeypatch, broken, launchers, kernel, options) for options in SCHEDULES)


@simulated
@pytest.mark.parametrize("kernel", MUTANTS)
def test_what_the_mutants_are_made_from_is_right(
    modules: dict[str, Any], launchers: Any, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    assert all(agrees(monkeypatch, modules, launchers, kernel, options) for options in SCHEDULES)


def kind_of(kernel: str) -> str:
    return "identity" if kernel == "exact" else "dense"


def agrees(
    patch: pytest.MonkeyPatch, modules: dict[str, Any], launchers: Any, kernel: str, options: dict[str, Any]
) -> bool:
    """Whether a kernel is right on three documents, one of several tiles, with four stages' worth of columns."""
    from gpu_without_gpu.ptxsim import PtxError

    bounds = [2, 35, 75, 415]
    a, g, left, _, matrix = example(kind_of(kernel), torch.bfloat16, 204, 72, 70, bounds)
    a = torch.nn.functional.pad(a, (0, 2), value=float("nan"))[:, :70]
    if kernel == "exact":  # nothing may be read after the last token: it would not show in the results
        a, g = a[: bounds[-1]], g[: bounds[-1]]
    plain, exact = expected(a, g, matrix, bounds)
    extension = SimulatedCuda(modules, launchers, ("80", "90a"), max_steps=1_500, **options)
    try:
        got = run(patch, extension, kernel, a, g, left, torch.tensor(bounds), None, None)
        assert_as_accurate(got, plain, exact)
    except (AssertionError, PtxError):
        return False
    return True


@simulated
@pytest.mark.parametrize("kernel", MUTANTS)
def test_a_document_alone_gives_the_same_bits_as_packed(
    modules: dict[str, Any], launchers: Any, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    a, g, left, _, _ = example(kind_of(kernel), torch.bfloat16, 72, 72, 8, [0, 300])
    extension = SimulatedCuda(modules, launchers, ("80", "90a"))
    packed, alone = (
        run(monkeypatch, extension, kernel, a[cut], g[cut], left, torch.tensor(bounds), None, None)
        for cut, bounds in ((slice(0, 150), [0, 5, 140, 150]), (slice(5, 150), [0, 135]))
    )
    assert torch.equal(packed[1], alone[0])


@simulated
def test_tokens_of_documents_in_any_order(
    modules: dict[str, Any], launchers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, g, left, _, _ = example("dense", torch.bfloat16, 72, 72, 8, [0, 150])
    a, g = a[:150], g[:150]
    owner = torch.from_numpy(np.random.default_rng(0).integers(-1, 4, 150))
    owner[owner == 2] = 0  # document 2 is empty
    tokens = torch.argsort(owner, stable=True)
    bounds = torch.bincount(owner + 1, minlength=5).cumsum(0)
    got = run(
        monkeypatch,
        SimulatedCuda(modules, launchers, ("80", "90a")),
        "sm80",
        a,
        g,
        left,
        bounds,
        tokens,
        None,
    )
    exact = segment_project_reference(a.double(), g.double(), left.double(), bounds, tokens)
    plain = torch.stack([(g @ left)[owner == i].T @ a[owner == i] for i in range(4)])
    assert_as_accurate(got, plain, exact)
    on_hopper = SimulatedCuda(modules, launchers, ("80", "90a"))
    assert torch.equal(
        got, run(monkeypatch, on_hopper, "sm80", a, g, left, bounds, tokens, None, capability=(9, 0))
    )


def test_every_stream_has_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded:
        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []

        def archs(self) -> list[str]:
            return ["80"]

        def segment_project(self, **x: Any) -> None:
            self.calls.append((x["stream"], x["slots"]))

    extension, stream = Recorded(), SimpleNamespace(cuda_stream=0)
    install(monkeypatch, extension, (8, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    a, g, left, _, _ = example("dense", torch.bfloat16, 72, 16, 8, SHORT[-2:])
    for stream.cuda_stream in (3, 3, 7, 3):
        backend.implementation("segment_project", "cuda")(a, g, left, torch.tensor(SHORT[-2:]), None, None)
    (one, slots), again, (other, others), last = extension.calls
    assert (one, other) == (3, 7) and again == last == (3, slots) and slots != others


def bytes_moved(plan: Plan, width: int, outputs: int, columns: int) -> tuple[int, int]:
    """Return what the kernels move between memory and chip, and the least that any could, in bytes.

    For at most 128 outputs and columns and 16-bit numbers: g, a and L read, the blocks written; beyond that the
    tables, and partial blocks written and read.
    """
    tokens, block = int((plan.slots >= 0).sum()), 4 * outputs * columns
    documents = len(plan.documents) + int((plan.pieces[:, 2] >= 0).sum())
    least = 2 * tokens * (width + columns) + 2 * width * outputs + documents * block
    tables = (plan.slots, plan.pieces, plan.tiles, plan.groups, plan.partials, plan.documents)
    return least + sum(table.nbytes for table in tables) + 2 * int(plan.partials[-1]) * block, least


@simulated
def test_bytes_are_those_of_the_model_and_no_bank_conflicts(
    modules: dict[str, Any], launchers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_without_gpu import roofline

    bounds, shape = [0, 40, 40, 296, 300], (200, 24, 8)
    a, g, left, _, _ = example("dense", torch.bfloat16, *shape, bounds)
    extension = SimulatedCuda(modules, launchers, ("80",), metrics=True)
    run(monkeypatch, extension, "sm80", a, g, left, torch.tensor(bounds), None, None)
    counted = [roofline.counts(r) for r in extension.runs]
    plan = plan_segments(np.array(bounds), piece_limit(*shape, 128), 128)
    assert plan.partials[-1] == 2
    moved, _ = bytes_moved(plan, *shape)
    assert sum(c["dram_bytes"] for c in counted) == pytest.approx(moved, rel=0.05)
    main = counted[0]
    assert main["smem_wavefronts"] <= 1.02 * main["smem_wavefronts_ideal"]


LLAMA_3_8B, SMOLLM2_135M = (1024, 4096, 14336), (192, 576, 1536)


@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("width", [*LLAMA_3_8B, *SMOLLM2_135M])
def test_little_more_is_moved_than_must_be(width: int, tile: int) -> None:
    lengths = np.random.default_rng(0).integers(64, 2049, 16)
    bounds = np.concatenate([[0], lengths.cumsum()])
    for p in (16, 32, 64, 128):
        plan = plan_segments(bounds, piece_limit(width, p, p, tile), tile)
        moved, least = bytes_moved(plan, width, p, p)
        assert moved <= 1.15 * least, (width, p, moved / least)


@simulated
@pytest.mark.parametrize("kernel", MUTANTS)
def test_registers_and_tensor_cores(kernel: str, tmp_path: Path) -> None:
    from gpu_without_gpu import sass_report
    from gpu_without_gpu.toolchain import nvcc

    cubin = tmp_path / "k.cubin"
    nvcc(SOURCES / "cuda" / FILES[kernel], cubin, ARCHS[kernel], "cubin", ("-I", str(SOURCES)))
    reports = [r for r in sass_report.report(cubin, threads=256) if "sum" not in r.name]
    assert len(reports) == {"sm80": 8, "exact": 4, "sm90": 2}[kernel]
    for report in reports:
        assert report.spills == 0 and report.mma.get("HGMMA" if kernel == "sm90" else "HMMA"), report
        if kernel == "sm90":
            # A warpgroup waits forever for registers that the block was not launched with or nobody gave back.
            text = (SOURCES / "cuda" / FILES[kernel]).read_text()
            given, taken = (int(re.findall(rf"setmaxnreg\.{x}\.\S+ (\d+)", text)[0]) for x in ("dec", "inc"))
            assert 128 * given + 256 * taken <= 384 * report.registers <= 1 << 16, report


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "signs", "identity"])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, kind: str) -> None:
    if backend.cuda_missing():
        pytest.skip(backend.cuda_missing())
    if kernel == "sm80":  # which is what other devices run
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    cuda = backend.implementation("segment_project", "cuda")
    bounds = [2, 7, 7, 8, 42, 69, 70, 1500, 1531, 4000]
    for width, outputs, columns in ((8, 8, 1), (1000, 72, 40), (576, 128, 128), (264, 130, 131)):
        a, g, left, given, matrix = example(kind, dtype, width, outputs, columns, bounds)
        plain, exact = expected(a, g, matrix, bounds)
        wide = torch.full((len(g), g.stride(0)), float("nan"), dtype=dtype, device="cuda")
        wide[:, :width] = g.cuda()
        arguments = a.cuda(), wide[:, :width], None if left is None else left.cuda(), torch.tensor(bounds)
        got = cuda(*arguments, None, given)
        assert_as_accurate(got.cpu(), plain, exact)
        assert torch.equal(got, cuda(*arguments, None, given))
        order = torch.arange(len(g), device="cuda")
        assert_as_accurate(cuda(*arguments, order, given).cpu(), plain, exact)
