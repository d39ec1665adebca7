"""The CUDA kernels: their PTX, executed on the CPU, agrees with the references.

Needs nvcc; skipped without it. On a machine with a GPU the marked tests run the kernels themselves.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, normal
from simulated_cuda import SimulatedCuda, build_launchers, build_module, install
from simulated_ptx import struct

from jz3 import backend
from jz3.ops.best import chunk_topk, rows_at_once, top_k
from jz3.ops.encode import CODEBOOKS, encode
from jz3.ops.score_queries import fold_queries
from jz3.ops.score_topk import (
    _score_topk_cuda,
    score_codes_reference,
    score_topk,
    score_topk_reference,
)
from jz3.ops.sign_project import sign_project, sign_project_reference
from jz3.ops.signs import sign_bits_reference, unpack_signs

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"async_mode": "lazy", "race": True},
    {"async_mode": "eager"},
    {"order": 1},
)


@pytest.fixture(scope="module")
def modules() -> dict:
    from gpu_without_gpu.ptxsim import Module
    from gpu_without_gpu.toolchain import nvcc_ptx

    flags = ("-I", str(SOURCES))
    return {
        (name, arch): Module(nvcc_ptx(SOURCES / "cuda" / f"{name}.cu", arch, flags))
        for name in ("sign_project", "score_topk")
        for arch in ("sm_80", "sm_90a")
    }


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("rows", "columns", "k"), [(5, 300, 40), (16, 128, 270), (50, 600, 33), (130, 300, 33)]
)
def test_sign_project(modules: dict, arch: str, rows: int, columns: int, k: int) -> None:
    from gpu_without_gpu.ptxsim import Device, to_bf16

    key, first_block, piece = 0xFEDCBA98F6543210, (1 << 32) - 1, 256
    wide = normal(0, rows, 616, dtype=torch.bfloat16)
    x = wide[:, :columns]
    omega = torch.from_numpy(
        unpack_signs(sign_bits_reference(key, k, columns, 0, first_block * 128), columns)
    )
    plain = (x @ omega.to(x.dtype).T).float() * k**-0.5
    exact = sign_project_reference(x.double(), key, k, first_block * 128)
    pieces = -(-columns // piece)
    height = 16 if rows <= 16 else 64 if rows <= 64 else 128
    for options in SCHEDULES:
        device = Device()
        partial = device.put(np.full((pieces, rows, k), np.nan, np.float32))
        parameters = struct(
            ("x", np.uint64, device.put(to_bf16(wide.float().numpy()))),
            ("partial", np.uint64, partial),
            ("rows", np.int64, rows),
            ("columns", np.int64, columns),
            ("projections", np.int64, k),
            ("stride", np.int64, 616),
            ("key", np.uint64, key),
            ("first_block", np.uint64, first_block),
            ("piece", np.int64, piece),
        )
        kernel = modules["sign_project", arch].kernels[f"jz3_sign_project_{height}"]
        grid, threads = (-(-k // 256), -(-rows // height), pieces), 256 if height == 128 else 128
        run = device.launch(
            kernel, grid, (threads,), [parameters], dyn_smem=2 * (height * 256 + 4096), **options
        )
        assert not run.races, run.races[:3]
        got = torch.from_numpy(device.get(partial, np.float32, (pieces, rows, k)).copy()).sum(0) * k**-0.5
        assert_as_accurate(got, plain, exact)


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_launchers(tmp_path_factory.mktemp("launchers"))


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("kind", "dim", "queries", "kernels"),
    [
        ("1bit", 900, 5, [16]),
        ("1bit", 600, 67, [64, 4]),
        ("2bit", 290, 3, [4]),
        ("2bit", 900, 40, [64]),
        ("4bit", 32, 64, [64]),
        ("4bit", 700, 80, [64, 16]),
        ("4bit", 290, 16, [16]),
        ("int8", 16, 1, [4]),
        ("int8", 400, 81, [64]),
    ],
)
def test_scores_are_exact(
    modules: dict, launchers: Any, arch: str, kind: str, dim: int, queries: int, kernels: list[int]
) -> None:
    rows, bits = 270, CODEBOOKS[kind].bits
    width = -(-dim * bits // 8 // 16) * 16
    dim = width * 8 // bits
    mean, scale = normal(1, dim), normal(2, dim).abs()
    codes = encode(normal(0, rows, dim) * 2, mean, scale, kind)
    digits = fold_queries(normal(3, queries, dim) * 1e3, mean, scale, CODEBOOKS[kind].unit)
    ids, groups = torch.arange(rows), torch.arange(queries)
    arguments = (codes, kind, digits.planes, digits.step, digits.bias, normal(4, rows), ids, groups)
    expected = score_topk_reference(*arguments, queries, rows)
    for options in SCHEDULES:
        extension = SimulatedCuda({"": modules["score_topk", arch]}, launchers, ("80", "90a"), **options)
        with pytest.MonkeyPatch.context() as patch:
            install(patch, extension, (8, 0))
            values, found = _score_topk_cuda(*arguments, queries, rows)
        assert extension.launched == [f"jz3_score_{bits}bit_{size}" for size in kernels]
        assert torch.equal(values, expected[0]) and torch.equal(found, expected[1])


def test_scores_held_at_a_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for queries in (0, 1, 64, 257, 5_000, 1 << 18):
        assert rows_at_once(queries) % 256 == 0 < rows_at_once(queries) <= 1 << 20
        assert 4 * rows_at_once(queries) * queries <= max(1 << 30, 4 * 256 * queries)
    rows, seen = 1100, []

    def scores(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(codes))
        return score_codes_reference(codes, *rest)

    monkeypatch.setattr("jz3.ops.best.MOST_SCORES", 1 << 12)
    monkeypatch.setattr("jz3.ops.score_topk.score_codes_cuda", scores)
    digits = fold_queries(normal(3, 8, 16), normal(1, 16), normal(2, 16).abs(), CODEBOOKS["int8"].unit)
    codes = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (rows, 16), dtype=np.uint8))
    planes = (digits.planes, digits.step, digits.bias, normal(4, rows))
    arguments = (codes, "int8", *planes, torch.arange(rows).flip(0), torch.arange(8), 8, 30)
    for got, expected in zip(_score_topk_cuda(*arguments), score_topk_reference(*arguments), strict=True):
        assert torch.equal(got, expected)
    assert seen == [512, 512, 76]


def test_chunk_topk_of_nothing_but_nan_is_no_shorter() -> None:
    values, ids = chunk_topk(torch.full((2, 50), torch.nan), torch.arange(50), 3)
    assert bool(values.isnan().all()) and values.shape == ids.shape == (2, 3)


def test_chunk_topk_is_top_k() -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (3, 1000))).float()
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for k in (1, 17, 300, 1000):
        for got, expected in zip(
            chunk_topk(values, ids, k), top_k(values, ids.expand(3, -1), k), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.skipif(backend._load("_cuda")[0] is None, reason="jz3._cuda is not built")
def test_the_extension_loads_without_a_driver_and_knows_its_devices() -> None:
    module = backend.cuda_extension()
    assert module.archs()
    if set(module.archs()) == {"80", "90a"}:
        expected = {(8, 0): True, (8, 6): True, (9, 0): True, (7, 5): False, (10, 0): False, (9, 1): False}
        assert {device: module.runs_on(*device) for device in expected} == expected


@needs_nvcc
def test_a_launch_is_not_taken_to_fail_of_an_earlier_error(tmp_path: Path) -> None:
    built = build_module(tmp_path)
    names = (
        "a g left out partial slots pieces tiles groups width outputs columns stride_a stride_g stride_left"
    )
    arguments = dict.fromkeys(names.split(), 0) | {"width": 64, "outputs": 128, "columns": 128}
    arguments |= {"kind": 0, "bf16": True, "blocks": 1, "tokens": 16, "sm90": False, "stream": 0}

    def launch() -> None:
        built.module.segment_project(**arguments, scale=1.0)

    launch()
    built.recorded.set_shared_memory(48 << 10)
    with pytest.raises(RuntimeError, match="CUDA: invalid argument"):
        launch()
    built.recorded.set_shared_memory(227 << 10)
    launch()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if backend.cuda_missing():
        pytest.skip(backend.cuda_missing())
    x = normal(0, 70, 40_000, dtype=torch.bfloat16).cuda()
    got = sign_project(x, 300, seed=0, name="m").cpu()
    expected = sign_project(x.cpu().double(), 300, seed=0, name="m")
    assert torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-2)
    mean, scale = normal(1, 2048), normal(2, 2048).abs()
    codes = encode(normal(0, 5000, 2048), mean, scale, "4bit")
    queries = normal(3, 5, 2048)
    on_gpu = score_topk(codes.cuda(), mean.cuda(), scale.cuda(), "4bit", queries.cuda(), 100)
    for one, other in zip(on_gpu, score_topk(codes, mean, scale, "4bit", queries, 100), strict=True):
        assert torch.equal(one.cpu(), other)
