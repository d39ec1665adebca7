"""What runs on a GPU, run on one of host memory that refuses what a GPU refuses (tests/virtual_gpu)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import virtual_gpu

TESTS = Path(__file__).parent

DEVICE = """
import torch

x = torch.arange(6.0, device="cuda", requires_grad=True)
layer = torch.nn.Linear(3, 2).to("cuda")
(layer(x.view(2, 3)[1:]) ** 2).sum().backward()
assert x.grad.is_cuda and layer.weight.grad.is_cuda and x.grad[:3].tolist() == [0.0] * 3
y = torch.empty(0, device="cuda")
torch.cumsum(x.detach(), 0, out=y)
y[1:3] += 1
assert y.tolist() == [0, 2, 4, 6, 10, 15] and y.view(2, 3).T.data_ptr() == y.data_ptr()
with torch.inference_mode():
    assert layer.weight.T.device == y.device
assert torch.zeros(3).copy_(y[3:]).tolist() == [6, 10, 15]
assert y[torch.tensor([1, 2])].tolist() == [2, 4] and (y + torch.tensor(1)).is_cuda
for mix in (torch.add, torch.matmul, lambda a, b: torch.cat([a, b]), lambda a, b: a.index_select(0, b.long())):
    try:
        mix(torch.ones(3, device="cuda"), torch.ones(3))
    except RuntimeError as error:
        assert "same device" in str(error), error
    else:
        raise SystemExit(f"{mix} took tensors of two devices")
"""
TASKS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from jz3.ops.score_topk import score_topk

class InAnyOrder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert "index_add" not in function.name() or not arguments[0].is_cuda, "a GPU adds in any order"
        return function(*arguments, **(options or {}))

generator = torch.Generator().manual_seed(0)
queries, mean, scale = (torch.rand(*size, generator=generator) for size in ((9, 64), (64,), (64,)))
codes, groups = torch.randint(1, 256, (50, 64), generator=generator, dtype=torch.uint8), torch.arange(9) % 2

def run(place):
    c, m, s, q, g = (x.to(place) for x in (codes, mean, scale, queries, groups))
    with InAnyOrder():
        return [x.cpu() for x in score_topk(c, m, s, "int8", q, 7, groups=g)]

assert all(map(torch.equal, run("cuda"), run("cpu")))
"""
POINTER = "import ctypes, torch; ctypes.string_at(torch.ones(3, device='cuda').data_ptr(), 4)"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if obstacle := virtual_gpu.obstacle():
        pytest.skip(obstacle)
    return virtual_gpu.build(tmp_path_factory.mktemp("virtual_gpu"))


def run(library: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtual_gpu", str(library), *map(str, arguments)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    settings = {**os.environ, "PYTHONPATH": path, "JZ3_BACKEND": "reference", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings)


def run_code(library: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "code.py").write_text(code)
    return run(library, folder / "code.py")


def test_a_torch_for_gpus_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(virtual_gpu, "_torch_folder", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert "torch is a build for GPUs" in virtual_gpu.obstacle()


def test_the_device(library: Path, tmp_path: Path) -> None:
    """Views, writes, growth, autograd and copies; what a GPU refuses is refused."""
    done = run_code(library, tmp_path, DEVICE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run_code(library, tmp_path, POINTER).returncode == -signal.SIGSEGV


def test_tasks_of_several_queries_are_summed_in_order(library: Path, tmp_path: Path) -> None:
    done = run_code(library, tmp_path, TASKS)
    assert done.returncode == 0, done.stderr[-2000:]


def test_features_and_engine(library: Path, tiny_model: Path) -> None:
    """Features equal those of the CPU, and the host waits for batches, not for layers."""
    done = run(library, TESTS / "virtual_gpu" / "passes.py", tiny_model)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row.pop("case"): row for row in map(json.loads, done.stdout.splitlines())}
    features = {case: row["errors"] for case, row in rows.items() if "errors" in row}
    assert len(features) == 5
    for case, errors in features.items():
        assert max(errors) < 1e-4, (case, errors)
    for what, waits in rows["waits"].items():
        assert waits["1"] == waits["2"] > 0, what
    assert rows["engine"]["device"] == "cuda:0" and len(rows["engine"]["texts"]) == 3


@pytest.mark.slow
def test_the_whole_loop(library: Path, tmp_path: Path) -> None:
    """With Triton's interpreter for the kernels of others that are launched on GPUs."""
    done = run(library, "-m", "jz3", "run", "tiny", "--out", tmp_path / "run", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())
