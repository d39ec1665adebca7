"""Shared by the tests of the sandbox."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jz3.errors import Jz3Error
from jz3.grading.sandbox import Sandbox, SandboxConfig

LIMITS = SandboxConfig(cpu_seconds=2, wall_seconds=6.0, memory_mb=512, output_bytes=20_000, workers=4)
PATIENT = dataclasses.replace(LIMITS, cpu_seconds=60, wall_seconds=120.0, workers=1)
"""For what takes over a second on a busy machine, such as filling the memory."""
SECRET = "sk-secret-of-the-test"


def open_level(
    level: str, preload: tuple[str, ...] = (), limits: SandboxConfig = LIMITS, **features: bool
) -> Sandbox:
    """Open a level of the sandbox, or skip with the machine's reason."""
    sandbox = Sandbox(dataclasses.replace(limits, level=level, preload=preload))
    sandbox._features.update(features)
    try:
        return sandbox.__enter__()
    except Jz3Error as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def sandbox_of(level: str) -> Iterator[Sandbox]:
    """A sandbox of a level, with a secret in the caller's environment."""
    os.environ["JZ3_TEST_SECRET"] = SECRET
    sandbox = open_level(level, ("sympy",))
    try:
        yield sandbox
    finally:
        sandbox.close()
        del os.environ["JZ3_TEST_SECRET"]


@contextlib.contextmanager
def users_file() -> Iterator[Path]:
    """A file of the user's, readable by everybody, in the home folder if that can be written."""
    folder = Path.home() if os.access(Path.home(), os.W_OK) else Path(tempfile.gettempdir())
    handle, name = tempfile.mkstemp(prefix=".jz3-test-", dir=folder)
    os.write(handle, SECRET.encode())
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


def need(sandbox: Sandbox, guard: str) -> None:
    if guard not in sandbox.guards:
        pytest.skip(f"this machine's {sandbox.level} level does not guard {guard}, and says so")


def copies() -> set[int]:
    """Processes whose command line holds the sandbox's start-up program, but not those of tests that run beside."""
    parents, found = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            parents[int(folder.name)] = int(parent)
            if b"inner_server" in (folder / "cmdline").read_bytes() and state != "Z":
                found.add(int(folder.name))
        except OSError:
            continue

    def beside(process: int) -> bool:
        while process in parents and process != os.getpid():
            if (process := parents[process]) == os.getppid():
                return "PYTEST_XDIST_WORKER" in os.environ
        return False

    return {p for p in found if not beside(p)}


def left_over(before: set[int]) -> set[int]:
    """Return the `copies` that weren't there before and don't end within some seconds."""
    deadline = time.monotonic() + 5
    while (left := copies() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
