"""One sandbox process as seen from outside: how each level starts it, and the talk with it."""

import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

GRACE_SECONDS = 30.0
"""How long beyond its own deadline a sandbox process may take to answer before it is replaced."""
START_SECONDS = 120.0
BOOTSTRAP = """
import json, os, types
def read(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            raise SystemExit(1)
        data += part
    return data
settings = json.loads(read(int(read(10))))
modules = {}
for name, text in settings.pop("sources").items():
    modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), modules[name].__dict__)
modules["inner_server"].serve(settings, modules["inner_walls"])
"""
SYSTEM_LIBRARIES = (
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/etc/ld.so.cache",
)


class CellError(Exception):
    """A sandbox process could not be started, or broke down."""


def package_paths(packages: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Find installed packages without importing them.

    Returns:
        The paths that hold them, and the folders to import them from.
    """
    paths: list[str] = []
    folders: list[str] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        places = list(spec.submodule_search_locations or []) or [spec.origin or ""]
        for place in filter(os.path.exists, places):
            parent = os.path.dirname(place)
            extra = [os.path.join(parent, f"{package}.libs")]
            paths.extend(p for p in (place, *extra) if os.path.exists(p) and p not in paths)
            if parent not in folders:
                folders.append(parent)
    return paths, folders


def visible_paths(packages: list[str]) -> list[tuple[str, str]]:
    """List what a sandbox may see: the interpreter, its library, system libraries, the packages.

    Returns:
        Pairs (path, target of the symbolic link or ""), parents first, nothing twice.
    """
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), interpreter()]
    prefix = sys.base_prefix
    if prefix not in ("/", "/usr"):
        standard += [os.path.join(prefix, "lib"), os.path.join(prefix, "lib64")]
    if prefix.startswith("/nix/store/"):
        standard.append("/nix/store")
    standard += [os.path.realpath(p) for p in standard]
    view: list[tuple[str, str]] = []
    for path in [*SYSTEM_LIBRARIES, *sorted({*standard, *packages})]:
        if not os.path.exists(path) or any(
            path == p or (path.startswith(p + "/") and not t) for p, t in view
        ):
            continue
        view.append((path, os.readlink(path) if os.path.islink(path) else ""))
    return view


def readable_by_all(packages: tuple[str, ...]) -> bool:
    """Tell whether any user, such as nobody, could read what a sandbox has to read."""
    for path, target in visible_paths(package_paths(packages)[0]):
        mode = 0 if target else os.stat(path).st_mode
        folders = [p.stat().st_mode & 0o001 for p in Path(path).parents]
        if not target and not (all(folders) and mode & 0o004):
            return False
    return True


def interpreter() -> str:
    """Return the real interpreter, not the virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def environment(hash_seed: int) -> dict[str, str]:
    """Return the whole environment of a sandbox process: nothing of the user's."""
    return {
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "PYTHONSAFEPATH": "1",
        "LC_ALL": "C.UTF-8",
        "HOME": "/",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def command(level: str, view: list[tuple[str, str]], variables: dict[str, str]) -> list[str]:
    """Return the command line that starts a sandbox process of a level.

    Raises:
        CellError: a program that the level needs is not installed.
    """
    python = [interpreter(), "-s", "-S", "-c", BOOTSTRAP]
    if level != "bwrap":
        return python
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise CellError("bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)")
    line = [
        bwrap,
        "--unshare-user",
        "--unshare-all",
        "--uid",
        "1000",
        "--gid",
        "1000",
        "--hostname",
        "sandbox",
    ]
    line += ["--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"]
    for name, value in variables.items():
        line += ["--setenv", name, value]
    for path, target in view:
        line += ["--symlink", target, path] if target else ["--ro-bind", path, path]
    return [*line, "--remount-ro", "/", "--chdir", "/", "--", *python]


class Cell:
    """A running sandbox process.

    Args:
        level: `bwrap`, `namespaces` or `rlimits`.
        settings: see `inner_server.serve`; this class adds what depends on the machine.
        packages: what the snippets may import beside the standard library.
        seed: seed of string hashes.

    Raises:
        CellError: it could not be started; the message holds what it said.
    """

    def __init__(self, level: str, settings: dict[str, Any], packages: tuple[str, ...], seed: int) -> None:
        paths, site = package_paths(packages)
        view = visible_paths(paths)
        variables = environment(seed)
        self._wall_seconds: float = settings["wall_seconds"]
        self._errors = tempfile.TemporaryFile()
        self._folder = tempfile.mkdtemp(prefix="jz3-empty-") if level == "rlimits" else ""
        if self._folder:  # the others work in the root of their own view
            os.chmod(self._folder, 0o555)
        sources = {
            n: Path(__file__).with_name(f"{n}.py").read_text("utf-8") for n in ("inner_walls", "inner_server")
        }
        self._process = None
        try:
            self._process = subprocess.Popen(
                command(level, view, variables),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=variables,
                cwd="/",
                bufsize=0,
                start_new_session=True,
            )
            first = {
                **settings,
                "level": level,
                "view": view,
                "site": site,
                "sources": sources,
                "folder": self._folder,
            }
            self._send(first)
            self.hello = self._receive(START_SECONDS)
        except (OSError, CellError) as error:
            self.close()
            raise CellError(str(error)) from error

    def run(self, code: str, stdin: str) -> dict[str, Any]:
        """Run one snippet; the reply of `inner_server`.

        Raises:
            CellError: the process broke down; it must be closed and replaced.
        """
        try:
            self._send({"code": code, "stdin": stdin})
            return self._receive(self._wall_seconds + GRACE_SECONDS)
        except OSError as error:
            raise CellError(str(error)) from error

    def close(self) -> None:
        """End the process and everything inside."""
        process = self._process
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.stdin.close()
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._errors.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        pipe = self._process.stdin if self._process else None
        if pipe is None:
            raise CellError("the sandbox process is not running")
        view = memoryview(b"%010d" % len(data) + data)
        while view:
            view = view[pipe.write(view) or 0 :]

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        return json.loads(self._exactly(int(self._exactly(10, deadline)), deadline))

    def _exactly(self, size: int, deadline: float) -> bytes:
        pipe = self._process.stdout if self._process else None
        if pipe is None:
            raise CellError("the sandbox process is not running")
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        parts: list[bytes] = []
        while size:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise CellError("the sandbox process does not answer")
            part = pipe.read(min(size, 1 << 20))
            if not part:
                raise CellError(f"the sandbox process ended: {self._said()}")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-500:].decode("utf-8", "replace").strip() or "it said nothing"
