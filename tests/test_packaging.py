"""What the source archive and the wheel hold, and that jz3 installs and runs where nothing compiles."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from jz3 import backend
from jz3.doctor import NEEDED, PACKAGES

ROOT = Path(__file__).resolve().parents[1]
BUILT = ("*.so", "__pycache__", "*.egg-info", "build_note.txt", "*.part")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without anything built."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    copy.mkdir()
    for name in ("csrc", "jz3", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(source: Path, kind: str, **variables: str) -> tuple[Path, str]:
    """Build one archive with the installed setuptools, as `pip` does without build isolation."""
    code = f"import setuptools.build_meta as b, sys; sys.stdout.write('\\n' + b.build_{kind}(sys.argv[1]))"
    out = source.parent / kind
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "JZ3_BUILD_CUDA": "0", **variables}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source: Path) -> tuple[Path, str]:
    """A wheel built on a machine whose compiler is broken, and what the build said."""
    return build(source, "wheel", CC="/bin/false", CXX="/bin/false")


@pytest.fixture(scope="module")
def installed(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel[0]) as archive:
        archive.extractall(folder)
    return folder


NO_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
"""An editable installation beside the archive would lend it its own modules."""


def run(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = NO_EDITABLE + code
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parent, env=environment, capture_output=True, text=True
    )


def test_wheel_holds_the_package_and_nothing_else(wheel: tuple[Path, str]) -> None:
    names = zipfile.ZipFile(wheel[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"jz3"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for folder, suffix in (("jz3/prompts", ".md"), ("jz3/recipes", ".toml"), ("jz3/kernels", ".py")):
        shipped = {Path(name).name for name in names if Path(name).parent == Path(folder)}
        source_folder = ROOT / ("kernels" if folder == "jz3/kernels" else folder)
        expected = {path.name for path in source_folder.glob(f"*{suffix}")}
        assert expected <= shipped, folder
    assert "jz3/py.typed" in names  # or type checkers of those who embed jz3 take everything in it for Any
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jz3").rglob("*.py")}
    assert modules <= set(names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "jz3 = jz3.cli:main" in zipfile.ZipFile(wheel[0]).read(entry_points).decode()


def test_a_broken_compiler_is_said_loudly_and_everything_still_runs(
    wheel: tuple[Path, str], installed: Path
) -> None:
    assert "jz3: WARNING: jz3._C was not built" in wheel[1]
    code = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from jz3 import backend
from jz3.ops.sketch import sketch
print(sketch(torch.ones(1, 3), "m", 2, seed=0).shape, backend.report("cpu")["cpu"])
"""
    done = run(installed, code)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2])" in done.stdout and "jz3._C is not built" in done.stdout
    assert "/bin/false" in done.stdout  # the build's own reason
    assert "WARNING:jz3.backend:sketch on cpu runs on reference" in done.stderr


@pytest.mark.parametrize("name", NEEDED)
def test_doctor_names_the_versions_that_the_package_needs(name: str) -> None:
    [needed] = re.findall(rf'"({name}[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"'{needed}'" in PACKAGES[name]


def test_no_extra_wants_what_pip_cannot_build() -> None:
    """flash-attn imports torch in its setup.py, where pip builds without it: the whole extra failed to install."""
    assert "flash-attn" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert PACKAGES["flash-attn"].startswith("pip install --no-build-isolation ")


def test_import_is_light(installed: Path) -> None:
    code = "import sys, jz3; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert run(installed, code).returncode == 0


def test_kernels_are_importable_only_inside_the_package(installed: Path) -> None:
    code = "import importlib.util as u, sys; sys.exit(not u.find_spec('jz3.kernels') or bool(u.find_spec('kernels')))"
    assert run(installed, code).returncode == 0


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"JZ3_BUILD_CUDA": "1"}, "JZ3_BUILD_CUDA=1, but jz3._cuda can't be built: nvcc is not on PATH"),
        ({"JZ3_BUILD_CUDA": "0", "MAX_JOBS": "0"}, "MAX_JOBS must be a number of at least 1, got '0'"),
        ({"JZ3_BUILD_CUDA": "0", "MAX_JOBS": "many"}, "MAX_JOBS must be a number of at least 1, got 'many'"),
    ],
)
def test_build_that_cannot_be_as_asked_fails(
    source: Path, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "/bin/false", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert said in done.stderr


def test_source_archive_holds_what_a_build_needs(source: Path) -> None:
    archive, _ = build(source, "sdist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder, suffix in (
        ("csrc", ".cpp"),
        ("csrc", ".h"),
        ("csrc", ".cu"),
        ("kernels", ".py"),
        ("jz3", ".py"),
        ("tests", ".py"),
    ):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(f"*{suffix}")} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_the_extension_is_built_where_a_compiler_is() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert backend.extension_missing() == ""


@pytest.mark.slow
def test_wheel_with_a_compiler_holds_the_extension(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    archive, log = build(copy, "wheel")
    assert any(name.startswith("jz3/_C.") for name in zipfile.ZipFile(archive).namelist()), log
