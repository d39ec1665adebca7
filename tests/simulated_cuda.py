"""Stands in for `jz3._cuda` in tests: runs the PTX of its kernels on the memory of CPU tensors."""

import ctypes
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from simulated_ptx import struct

from jz3 import backend

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def memory(address: int, kind: Any, count: int) -> np.ndarray:
    """View host memory as an array."""
    if count <= 0:
        return np.zeros(0, kind)
    raw = (ctypes.c_uint8 * (count * np.dtype(kind).itemsize)).from_address(address)
    return np.ctypeslib.as_array(raw).view(kind)


def build_launchers(folder: Path) -> Any:
    """Build the launchers on a CUDA runtime that takes notes instead of launching (recorded_launches.cpp)."""
    sources = [Path(__file__).with_name("recorded_launches.cpp")]
    names = ("segment_project", "segment_exact", "segment_project_sm90", "score_topk")
    sources += [SOURCES / "cuda" / f"{name}.cu" for name in names]
    library = folder / "launchers.so"
    options = ["-O1", "-Xcicc", "-O0"]  # no kernel of it is run
    options += ["-std=c++17", "-gencode", "arch=compute_90a,code=compute_90a", "-I", str(SOURCES)]
    options += ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC", "-o", str(library)]
    subprocess.run(["nvcc", *options, *map(str, sources)], check=True)
    launchers = ctypes.CDLL(str(library))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    launchers.launch.argtypes = [pointer, number, number, size, size, number]
    launchers.launch_sum.argtypes = [pointer, size]
    launchers.launch_score.argtypes = [pointer, pointer]
    for launcher in (launchers.launch, launchers.launch_sum, launchers.launch_score):
        launcher.restype = ctypes.c_char_p
    return launchers


def build_module(folder: Path) -> Any:
    """Build the extension itself on the runtime that takes notes; `recorded` is the library."""
    import pybind11

    sources = [Path(__file__).with_name("recorded_launches.cpp"), SOURCES / "cuda_bindings.cpp"]
    sources += (SOURCES / "cuda").glob("*.cu")
    path = folder / "_cuda.so"
    includes = (SOURCES, pybind11.get_include(), sysconfig.get_path("include"))
    options = ["-O1", "-Xcicc", "-O0", "-std=c++17", "-gencode", "arch=compute_90a,code=compute_90a"]
    options += [f"-I{include}" for include in includes] + ['-DJZ3_CUDA_ARCHS="90a"']
    options += ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC", "-o", str(path)]
    subprocess.run(["nvcc", *options, *map(str, sources)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(module=module, recorded=ctypes.CDLL(str(path)))


class SimulatedCuda:
    """The extension's functions, with its names of arguments; `runs` keeps what the simulator found and
    `launched` the names of the kernels.

    The launchers are the extension's own (`build_launchers`): they say what is launched, how, and on which
    tensor maps.

    Every array has its exact size on the simulated device, so that an access outside of it is refused.
    """

    def __init__(
        self, modules: dict[str, Any], launchers: Any, archs: tuple[str, ...], **options: Any
    ) -> None:
        self.modules, self.launchers, self._archs, self.options = modules, launchers, list(archs), options
        self.runs: list[Any] = []
        self.launched: list[str] = []

    def archs(self) -> list[str]:
        return self._archs

    def segment_project(self, **x: Any) -> None:
        from gpu_without_gpu.ptxsim import Device

        kind, slots = x["kind"], 256 if x["sm90"] else 128
        size = x["outputs"] * x["columns"]
        groups = memory(x["groups"], np.int32, x["blocks"] + 1)
        tiles = memory(x["tiles"], np.int32, groups[-1] + 1)
        pieces = memory(x["pieces"], np.int32, 4 * tiles[-1])
        targets = pieces[2::4]
        word = np.int32 if kind == 1 else np.uint16
        left_rows, left_width = (
            (x["outputs"], x["width"]) if kind == 0 else (x["width"], -(-x["outputs"] // 32))
        )
        arrays = {
            "a": memory(x["a"], np.uint16, (x["tokens"] - 1) * x["stride_a"] + x["columns"]),
            "g": memory(x["g"], np.uint16, (x["tokens"] - 1) * x["stride_g"] + x["width"]),
            "left": memory(
                x["left"], word, 0 if kind == 2 else (left_rows - 1) * x["stride_left"] + left_width
            ),
            "out": memory(x["out"], np.float32, size * (1 + max(targets.max(initial=-1), -1))),
            "partial": memory(x["partial"], np.float32, size * max(-targets.min(initial=0), 0)),
            "slots": memory(x["slots"], np.int32, slots * groups[-1]),
            "pieces": pieces,
            "tiles": tiles,
            "groups": groups,
        }
        device = Device()
        at = {name: device.put(array) for name, array in arrays.items()}
        numbers = ("width", "outputs", "columns", "stride_a", "stride_g", "stride_left")
        parameters = struct(
            *((name, np.uint64, address) for name, address in at.items()),
            *((name, np.int64, x[name]) for name in numbers),
            ("scale", np.float32, x["scale"]),
        )
        asked = self.launchers.launch(
            parameters.ctypes, x["kind"], x["bf16"], x["blocks"], x["tokens"], x["sm90"]
        )
        self._launch(device, asked, parameters)
        for result in ("out", "partial"):
            arrays[result][:] = device.get(at[result], np.float32, arrays[result].shape)

    def segment_sum(self, **x: Any) -> None:
        from gpu_without_gpu.ptxsim import Device

        first = memory(x["first"], np.int64, x["count"] + 1)
        documents = memory(x["documents"], np.int64, x["count"])
        out = memory(x["out"], np.float32, x["size"] * (documents.max() + 1))
        device = Device()
        arrays = (memory(x["partial"], np.float32, x["size"] * first[-1]), out, first, documents)
        at = [device.put(array) for array in arrays]
        names = ("partial", "out", "first", "documents")
        parameters = struct(
            *((n, np.uint64, address) for n, address in zip(names, at, strict=True)),
            ("size", np.int64, x["size"]),
        )
        self._launch(device, self.launchers.launch_sum(parameters.ctypes, x["count"]), parameters)
        out[:] = device.get(at[1], np.float32, out.shape)

    def score_codes(self, *x: Any) -> None:
        from gpu_without_gpu.ptxsim import Device

        codes, fragments, step, bias, row_scale, scores, rows, width, queries, bits, levels, _ = x
        steps, products = (-(-width // 32), 8) if bits == 1 else (-(-width // 64), 16 // bits)
        out = memory(scores, np.float32, queries * rows)
        device = Device()
        arrays = {
            "codes": memory(codes, np.uint8, rows * width),
            "fragments": memory(fragments, np.uint32, steps * -(-queries // 4) * products * 64),
            "step": memory(step, np.float64, queries),
            "bias": memory(bias, np.float64, queries),
            "row_scale": memory(row_scale, np.float32, rows),
            "scores": out,
        }
        at = {name: device.put(array) for name, array in arrays.items()}

        def parameters(first: int) -> np.ndarray:
            sizes = {"rows": rows, "row_bytes": width, "queries": queries, "first_query": first}
            return struct(
                *((name, np.uint64, address) for name, address in at.items()),
                *((name, np.int64, size) for name, size in sizes.items()),
                ("bits", np.int32, bits),
                ("levels", (np.uint32, 4), levels),
            )

        first = np.zeros(2, np.int64)
        asked = self.launchers.launch_score(parameters(0).ctypes, first.ctypes).splitlines()
        for line, begin in zip(asked, first.tolist(), strict=False):
            self._launch(device, line, parameters(begin))
        out[:] = device.get(at["scores"], np.float32, out.shape)

    def _launch(self, device: Any, asked: bytes, parameters: np.ndarray) -> None:
        """Run what a launcher asked for."""
        from gpu_without_gpu.ptxsim import TensorMap

        *maps, launch = asked.decode().splitlines()
        self.launched.append(launch.split(" ")[0])
        name, fields = self.launched[-1], dict(field.split("=") for field in launch.split(" ")[1:])
        shared = int(fields["shared"])
        assert shared <= int(fields["allowed"]) or shared == 0, launch
        assert fields["stream"] == "0x5", launch
        kernel = next(m.kernels[name] for m in self.modules.values() if name in m.kernels)
        run = device.launch(
            kernel,
            tuple(map(int, fields["grid"].split(","))),
            tuple(map(int, fields["block"].split(","))),
            [*(tensor_map(line, name, TensorMap) for line in maps), parameters],
            dyn_smem=shared,
            **self.options,
        )
        assert not run.races, run.races[:3]
        self.runs.append(run)


def tensor_map(line: str, kernel: str, make: Any) -> Any:
    """Turn a launcher's request for a tensor map into the simulator's."""
    fields = dict(field.split("=") for field in line.split(" ")[1:])
    kind = {"6": "fp16", "9": "bf16"}[fields["type"]]
    assert kernel.endswith(kind) and fields["rank"] == "2" and fields["steps"] == "1,1", line
    assert (fields["interleave"], fields["swizzle"], fields["fill"]) == ("0", "3", "0"), line
    sizes, box = (tuple(map(int, fields[name].split(","))) for name in ("sizes", "box"))
    pitch, address = int(fields["pitch"]), int(fields["at"], 16)
    assert pitch % 16 == 0 and address % 16 == 0 and all(1 <= side <= 256 for side in box), line
    return make(address, 2, sizes, pitch, box, 128)


def install(patch: pytest.MonkeyPatch, extension: Any, capability: tuple[int, int]) -> None:
    """Make CPU tensors pass for a device's; new ones hold NaN, so that an unwritten result shows."""
    empty = torch.empty

    class Stream:
        cuda_stream = 0

    class Guard:
        def __init__(self, device: torch.device) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        out = empty(*shape, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    patch.setattr(backend, "cuda_extension", lambda: extension)
    patch.setattr(torch, "empty", poisoned)
    patch.setattr(torch.cuda, "device", Guard)
    patch.setattr(torch.cuda, "current_stream", Stream)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
