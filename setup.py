"""Builds the extensions; everything else is in pyproject.toml.

jz3._C      C++, always tried
jz3._cuda   CUDA, when nvcc is on PATH; JZ3_BUILD_CUDA = auto | 1 | 0, JZ3_CUDA_ARCHS = "80;90a"

MAX_JOBS files are compiled at a time: as many as there are processors, at most 8.

A failed build is said loudly and noted in jz3/build_note.txt (which `jz3 doctor` shows), and the
reference back end runs instead; with JZ3_BUILD_CUDA=1 a failed CUDA build fails the installation.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NOTE = Path("jz3") / "build_note.txt"
CUDA_ARCHS = [arch for arch in re.split(r"[;, ]+", os.environ.get("JZ3_CUDA_ARCHS", "80;90a")) if arch]
CUDA_MODE = os.environ.get("JZ3_BUILD_CUDA", "auto")
MAX_JOBS = os.environ.get("MAX_JOBS", str(min(8, os.cpu_count() or 1)))
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in (HERE / folder).glob(f"*{suffix}"))


class BuildExtensions(build_ext):
    """Compiles what can be compiled here and says what can't."""

    def run(self) -> None:
        if CUDA_MODE not in ("auto", "1", "0"):
            raise SystemExit(f"JZ3_BUILD_CUDA must be auto, 1 or 0, got {CUDA_MODE!r}")
        if not MAX_JOBS.isdecimal() or int(MAX_JOBS) < 1:
            raise SystemExit(f"MAX_JOBS must be a number of at least 1, got {MAX_JOBS!r}")
        self.notes: list[str] = []
        self.failed: list[Extension] = []
        in_place = self.inplace or self.editable_mode
        super().run()
        folder = HERE if in_place else Path(self.build_lib).resolve()
        for ext in self.failed:
            (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        note = folder / NOTE
        if self.notes:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text("\n".join(self.notes) + "\n", encoding="utf-8")
        else:
            note.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name == "jz3._cuda"
        try:
            import pybind11
            from pybind11.setup_helpers import ParallelCompile

            ext.include_dirs += [pybind11.get_include(), str(HERE / "csrc")]
            if is_cuda:
                self.add_device_code(ext)
            with ParallelCompile(default=int(MAX_JOBS)):
                super().build_extension(ext)
        except Exception as error:  # an extension is optional whatever its compiler dies of; the user is told
            reason = short_reason(error)
            if is_cuda and CUDA_MODE == "1":
                raise SystemExit(f"JZ3_BUILD_CUDA=1, but jz3._cuda can't be built: {reason}") from error
            self.note(ext, f"{ext.name} was not built: {reason}")

    def add_device_code(self, ext: Extension) -> None:
        """Compile the .cu files to objects and link them and the static CUDA runtime."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise RuntimeError("nvcc is not on PATH (install the CUDA toolkit, then reinstall jz3)")
        folder = Path(self.build_temp, "cuda").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
        command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-I", "csrc", *architectures, "-c"]
        targets = {source: str(folder / (Path(source).stem + ".o")) for source in sources("csrc/cuda", ".cu")}
        with ThreadPoolExecutor(int(MAX_JOBS)) as pool:
            list(
                pool.map(
                    lambda source: self.compile_device([*command, source, "-o", targets[source]]), targets
                )
            )
        ext.extra_objects += targets.values()
        ext.define_macros.append(("JZ3_CUDA_ARCHS", '"' + ";".join(CUDA_ARCHS) + '"'))
        root, runtime = cuda_root(nvcc)
        ext.include_dirs.append(str(root))
        ext.extra_objects.append(str(runtime))
        ext.libraries += ["dl", "rt"]

    def compile_device(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:2])} ... failed: {(done.stderr or done.stdout)[-1500:]}")

    def note(self, ext: Extension, text: str) -> None:
        self.failed.append(ext)
        self.notes.append(text)
        print(f"jz3: WARNING: {text}", file=sys.stderr, flush=True)


def short_reason(error: Exception) -> str:
    """Return an error in one line; a failed command's only by its program."""
    text = " ".join(str(error).split())
    failed = re.match(r"Command '\['([^']+)'.*returned non-zero exit status (\d+)", text)
    if failed:
        text = f"{failed[1]} returned {failed[2]} (what it said: pip install -v)"
    return text[:600]


def cuda_root(nvcc: str) -> tuple[Path, Path]:
    """Return the folder of the CUDA headers and the static runtime, as nvcc itself knows them."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.M)
    if not found:
        raise RuntimeError(f"{nvcc} --dryrun names no toolkit")
    top = Path(found[1].strip()).resolve()
    headers = [
        p.parent
        for pattern in ("include", "targets/*/include")
        for p in top.glob(f"{pattern}/cuda_runtime.h")
    ]
    patterns = ("lib64", "targets/*/lib", "lib")
    runtimes = [p for pattern in patterns for p in top.glob(f"{pattern}/libcudart_static.a")]
    if not headers or not runtimes:
        raise RuntimeError(f"the toolkit in {top} lacks cuda_runtime.h or libcudart_static.a")
    return headers[0], runtimes[0]


def extensions() -> list[Extension]:
    cpu = Extension(
        "jz3._C",
        ["csrc/bindings.cpp", *sources("csrc/cpu", ".cpp")],
        depends=[*sources("csrc/cpu", ".h"), *sources("csrc/common", ".h")],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )
    cuda = Extension(
        "jz3._cuda",
        ["csrc/cuda_bindings.cpp"],
        depends=[*sources("csrc/cuda", ".cu"), *sources("csrc/cuda", ".h"), *sources("csrc/common", ".h")],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )
    wants_cuda = CUDA_MODE == "1" or (CUDA_MODE == "auto" and shutil.which("nvcc") is not None)
    return [cpu, cuda] if wants_cuda and sources("csrc/cuda", ".cu") else [cpu]


setup(
    packages=[*find_namespace_packages(include=["jz3", "jz3.*"]), "jz3.kernels"],
    package_dir={"jz3.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
