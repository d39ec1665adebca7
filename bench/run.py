"""Time the ops against plain torch: `python bench/run.py [op ...] [--device cpu|cuda] [--json FILE]`.

A file beside this one with an op's name is its benchmark: `cases(device)` yields dictionaries with `name`,
`rows`, `dim`, `dtype`, `run` and `plain` (functions without arguments), `bytes` and `flops` (the least that
has to be moved and done), and it may have `peers`: names and functions that return what is to be timed, or raise.
A speed-up over torch is printed only if the two results agree; peers compute something else (other signs, other
vectors), so that only their times are compared, and one that isn't installed or fails is named with the reason.

`bound` is the share of the device's limit that is reached: the larger of moving the bytes at the speed of a copy
and, for floating-point numbers, of the operations at the speed of a square product of the same type, both measured
in this process, over the time taken. Above 100% the data came from a cache.
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from jz3 import backend
from jz3.files import write_json

HERE = Path(__file__).resolve().parent
OPS = sorted(path.stem for path in HERE.glob("*.py") if "\ndef cases(" in path.read_text(encoding="utf-8"))


def load(op: str) -> ModuleType:
    """Import an op's file by its path: `bench` is no package."""
    spec = importlib.util.spec_from_file_location(f"jz3_bench_{op}", HERE / f"{op}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{op}.py in {HERE} can't be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(function: Callable[[], Any], device: str, budget: float) -> list[float]:
    """Return the sorted times of some calls, after one to warm up."""
    function()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 100):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)


@functools.cache
def copy_speed(device: str) -> float:
    """Return the bytes per second of a copy, read and written."""
    source = torch.zeros(1 << (30 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 0.3)[0]


@functools.cache
def product_speed(device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of a square product."""
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / seconds(lambda: a @ a, device, 0.3)[0]


def bound_seconds(case: dict[str, Any], device: str) -> float:
    """Return the time that moving a case's bytes, or doing its operations, takes at least."""
    least = case["bytes"] / copy_speed(device)
    dtype = getattr(torch, case["dtype"].removeprefix("torch."), None)
    if dtype in (torch.bfloat16, torch.float16, torch.float32) and case["flops"]:
        least = max(least, case["flops"] / product_speed(device, dtype))
    return least


def peer_speeds(case: dict[str, Any], device: str, budget: float, ours: float) -> dict[str, float | str]:
    """Return by peer how many times as long it takes as we do, or why it can't be told."""
    found: dict[str, float | str] = {}
    for name, prepare in case.get("peers", {}).items():
        try:
            found[name] = statistics.median(seconds(prepare(), device, budget)) / ours
        except Exception as error:  # whatever a peer dies of, the rest of the table is wanted
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def agree(one: Any, other: Any) -> bool:
    """Whether two results are the same up to rounding."""
    if isinstance(one, tuple):
        return all(agree(a, b) for a, b in zip(one, other, strict=True))
    one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    scale = float(other.abs().max()) if other.numel() else 1.0
    return one.shape == other.shape and float((one - other).abs().max()) <= 2e-2 * scale


def measure(op: str, case: dict[str, Any], device: str, budget: float) -> dict[str, Any]:
    """Time one case and its plain version."""
    ours, plain = seconds(case["run"], device, budget), seconds(case["plain"], device, budget)
    middle, called = statistics.median(ours), case.get("op", op)
    return {
        "op": op,
        "backend": backend.choose(called, backend.place(called, device))[0],
        **{key: case[key] for key in ("name", "rows", "dim", "dtype")},
        "ms": middle * 1e3,
        "ms_p20": ours[len(ours) // 5] * 1e3,
        "ms_p80": ours[len(ours) * 4 // 5] * 1e3,
        "gflops": case["flops"] / middle / 1e9,
        "gbytes": case["bytes"] / middle / 1e9,
        "bound": bound_seconds(case, device) / middle,
        "vs_torch": statistics.median(plain) / middle if agree(case["run"](), case["plain"]()) else None,
        "peers": peer_speeds(case, device, budget, middle),
    }


def _told(peer: tuple[str, float | str]) -> str:
    name, value = peer
    return f"{name}: {value}" if isinstance(value, str) else f"{name} {value:.2f}x"


def machine(device: str) -> str:
    """Return the line that every table begins with."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    features = backend.extension().cpu_features() if not backend.extension_missing() else "not compiled"
    return f"{name}, {torch.get_num_threads()} threads, {features}, torch {torch.__version__}"


def main() -> None:
    """Parse the arguments, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "ops", nargs="*", default=OPS, metavar="op", help=f"of {', '.join(OPS)}; all by default"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"there is no op {', '.join(sorted(unknown))}; expected some of {', '.join(OPS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    print(machine(arguments.device))
    print(
        f"{'op':16}{'case':26}{'backend':>10}{'ms p50 (p20-p80)':>26}{'GFLOP/s':>10}{'GB/s':>8}{'bound':>7}"
        f"{'vs torch':>10}  peers"
    )
    rows = []
    for op in arguments.ops:
        for case in load(op).cases(arguments.device):
            row = measure(op, case, arguments.device, arguments.seconds)
            rows.append(row)
            spread = f"{row['ms']:.2f} ({row['ms_p20']:.2f}-{row['ms_p80']:.2f})"
            gain = "wrong" if row["vs_torch"] is None else f"{row['vs_torch']:.2f}x"
            print(
                f"{op:16}{row['name']:26}{row['backend']:>10}{spread:>26}{row['gflops']:>10.1f}"
                f"{row['gbytes']:>8.1f}{row['bound']:>7.0%}{gain:>10}  {', '.join(map(_told, row['peers'].items()))}"
            )
    if arguments.json:
        write_json(arguments.json, {"machine": machine(arguments.device), "rows": rows})


if __name__ == "__main__":
    main()
