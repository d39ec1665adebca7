"""The Triton kernels: interpreted, and compiled ahead of time within their budgets."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import BUDGETS, KERNELS, Elsewhere, measured, shipped

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TENSOR_CORES = {80: ("HMMA", "IMMA"), 90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA", "UTCIMMA")}


@pytest.mark.parametrize("file", ["interpreted_kernels.py", "interpreted_ops.py"])
def test_interpreted(file: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("JZ3_BACKEND", None)
    done = subprocess.run(
        [*command, str(here / file)], cwd=here.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_row_of_the_launch_table_is_a_case() -> None:
    from jz3.kernels import launch

    for arch, table in launch.TABLE.items():
        assert {case.row for case in shipped(arch)} == set(table)
        assert set(table) == set(launch.TABLE[80])
        for constants in table.values():
            assert {"num_warps", "num_stages"} < set(constants)


def test_what_lies_along_y_is_what_the_ops_refuse_beyond() -> None:
    """A launch has at most 65,535 blocks along y."""
    from jz3.kernels import launch
    from jz3.ops import sign_project, sketch

    for table in launch.TABLE.values():
        assert sketch.TRITON_MOST == 65_535 * table["sketch/any"]["BB"]
        widths = {row["BN"] for name, row in table.items() if name.startswith("sign_project/")}
        assert sign_project.TRITON_MOST == 65_535 * min(widths)


def test_what_is_checked_on_a_gpu_at_the_start_is_what_large_inputs_take() -> None:
    from jz3 import backend
    from jz3.kernels import launch, score_topk, segment_project, sign_project

    def example(name: str) -> tuple[Any, ...]:
        importlib.import_module(f"jz3.ops.{backend.OPS[name]}")
        return backend._ops[name].example(elsewhere)

    elsewhere, half = Elsewhere("cpu"), torch.bfloat16
    a, _, left, *_ = example("segment_project")
    case = segment_project.case(left.shape[1], a.shape[1], a.dtype)
    assert case == segment_project.case(1000, 1000, half) == "segment_project/half/large"
    x, *_ = example("sign_project")
    assert sign_project.case(len(x), x.dtype) == sign_project.case(1000, half) == "sign_project/half/128"
    h, weight, *_ = example("ce_hidden_grad")
    assert launch.kind(h.dtype) == "half" and h.shape[1] > 64 and len(weight) > 128
    for name in ("score_topk", "score_codes"):
        codes, _, planes, *_ = example(name)
        assert score_topk.case(4, 2 * planes.shape[1]) == "score_codes/wide/128" and len(codes) > 256


def test_inputs_take_rows_that_exist() -> None:
    from jz3.kernels import launch, score_topk, segment_project, sign_project

    sizes = (1, 16, 17, 32, 33, 64, 65, 128, 500)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in sizes:
            assert sign_project.case(size, dtype) in launch.TABLE[80]
            for other in sizes:
                assert segment_project.case(size, other, dtype) in launch.TABLE[80]
    for bits in (1, 2, 4, 8):
        for size in sizes:
            assert score_topk.case(bits, size) in launch.TABLE[80]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", [86, 89, 120])
def test_devices_without_a_table_have_room_for_the_rows_of_sm_80(target: int) -> None:
    """Consumer cards: 99 KB of shared memory a block."""
    for case in shipped(80):
        took = measured(case, target)
        assert took["shared"] <= 99 << 10 and took["spills"] <= 4, (case.name, took)
        assert bool(took["mma"]) == KERNELS[case.kernel].mma, (case.name, took)


@pytest.mark.timeout(1200)
def test_every_configuration_compiles_within_its_budget() -> None:
    """No spills; registers and shared memory as committed; the architecture's own tensor cores where meant."""
    budgets: dict[str, dict[str, int]] = json.loads(BUDGETS.read_text())["triton"]
    cases = [case for arch in TENSOR_CORES for case in shipped(arch)]
    assert {case.name for case in cases} == set(budgets)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        results: dict[str, dict[str, Any]] = dict(
            zip((case.name for case in cases), pool.map(measured, cases), strict=True)
        )
    for case in cases:
        took, allowed = results[case.name], budgets[case.name]
        assert took["spills"] == 0, (case.name, took)
        assert took["registers"] <= allowed["registers"], (case.name, took, allowed)
        assert took["shared"] <= allowed["shared"], (case.name, took, allowed)
        assert took["shared"] <= 99 << 10 or case.arch != 80, (case.name, took)
        assert bool(took["mma"]) == KERNELS[case.kernel].mma, (case.name, took)
    for arch, (floating, integer) in TENSOR_CORES.items():
        for beginning, instruction in (
            ("ce_exp/half", floating),
            ("ce_grad/half", floating),
            ("segment_project/half/large", floating),
            ("sign_project/half/128", floating),
            ("score_codes/", integer),
        ):
            rows = [case.name for case in cases if case.arch == arch and case.row.startswith(beginning)]
            assert rows and all(results[name]["mma"].get(instruction) for name in rows), (arch, beginning)
