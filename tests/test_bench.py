"""The benches tell wrong arguments before they measure anything, and lose nothing that they have measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def bench(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_rows_are_written_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    done = bench("run", "signs", "--device", "cpu", "--seconds", 0, "--json", path)
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in json.loads(path.read_text())["rows"]} == {"signs"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run", "there is no op nonsense, roofline; expected some of ce_hidden_grad, encode, "),
        ("roofline", "there is no kernel nonsense, roofline; expected some of sign_project, score_topk, "),
    ],
)
def test_what_is_no_op_or_kernel_is_told(name: str, said: str) -> None:
    first = "signs" if name == "run" else "sign_project"
    done = bench(name, first, "roofline", "nonsense")
    assert done.returncode == 2 and said in done.stderr and not done.stdout


def test_a_gpu_that_is_not_there_is_told() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = bench("run", "signs", "--device", "cuda")
    assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr
