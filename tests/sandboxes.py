"""Shared by the tests of the sandbox."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jz3.errors import Jz3Error
from jz3.grading.sandbox import Sandbox, SandboxConfig

LIMITS = SandboxConfig(cpu_seconds=1, wall_seconds=2.5, memory_mb=512, output_bytes=20_000, workers=4)
SECRET = "sk-secret-of-the-test"


def open_level(level: str, preload: tuple[str, ...] = (), **features: bool) -> Sandbox:
    """Open a level of the sandbox, or skip with the machine's reason."""
    sandbox = Sandbox(dataclasses.replace(LIMITS, level=level, preload=preload))
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
    """Processes whose command line holds the sandbox's start-up program."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"inner_server" in (folder / "cmdline").read_bytes()
                and " Z " not in (folder / "stat").read_text()
            ):
                found.add(int(folder.name))
        except OSError:
            continue
    return found
