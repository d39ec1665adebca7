"""Files that are whole or absent: atomic writes, locks, JSON lines, hashes."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from jz3.errors import Jz3Error

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FULL = (
    os.strerror(errno.ENOSPC),
    os.strerror(errno.EDQUOT),
    # torch doesn't say why it could not write a file.
    ". unexpected pos ",
    "basic_ios::clear: iostream error",
)
"""Signs of a full disk in the text of a library's error."""
_MACHINE = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "ESHUTDOWN", "ECONNRESET", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EMFILE", "ENFILE", "ENOMEM"),
    )
    if hasattr(errno, name)
}
"""What reading fails with when a disk, a file server or the process is in trouble and not the file itself."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that becomes `path` when the block ends without an error.

    Args:
        path: the final file or folder; its parent is created. An existing file is replaced, an
            existing folder only if it is given up by its owner (it is moved away first).

    Yields:
        `path` with `.part` appended, not yet existing.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(part)
    yield part
    if part.is_file():
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
    elif path.is_dir():
        shutil.rmtree(path)
    os.replace(part, path)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path`; it ends with the process, however that ends. Yields whether it was had.

    Raises:
        Jz3Error: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise Jz3Error(
                f"the file system of {path.parent} has no file locks ({error.strerror}), by which processes "
                "keep out of each other's way; use another folder"
            ) from error
        yield True


@contextlib.contextmanager
def where_writable() -> Iterator[None]:
    """Do without what would only be kept for the next time, in another user's folder or on a read-only disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: keys sorted, no spaces, non-ASCII kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of jz3's own; a missing or damaged one is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Jz3Error(f"{path} is missing; run the stage that writes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Jz3Error(f"{path} is damaged ({error}); delete it and run again") from error


@contextlib.contextmanager
def jsonl_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Give what writes one JSON object as a line; the file is there when the block ends without an error."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as handle:
        yield lambda row: handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line to `path` atomically and return their number."""
    count = 0
    with jsonl_writer(path) as write:
        for row in rows:
            write(row)
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSON-lines file that jz3 wrote; foreign input goes through `jz3.corpus` instead."""
    if not path.is_file():
        raise Jz3Error(f"{path} is missing; run the stage that writes it")
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise Jz3Error(
                    f"{path}:{number} is damaged ({error}); delete the file and run again"
                ) from error


def write_tensors(path: Path, tensors: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """Write tensors to a safetensors file atomically.

    Args:
        path: the file.
        tensors: by name, all contiguous.
        about: kept as JSON in the file's metadata, under `jz3`.

    Raises:
        OSError: the file can't be written, e.g. as the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # One key only: safetensors writes several in an order that changes from run to run.
    metadata = None if about is None else {"jz3": canonical_json(about)}
    with atomic_path(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(part)) from error
            raise
        usual_rights(part)


def usual_rights(path: Path) -> None:
    """Give a file, or the weights in a folder, the rights of a new file: safetensors lets the owner alone read."""
    for file in path.rglob("*.safetensors") if path.is_dir() else (path,):
        new = file.with_name(file.name + ".new")
        new.touch()
        file.chmod(new.stat().st_mode)
        new.unlink()


def read_tensors(path: Path, wanted: str, remedy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the tensors of a file of `write_tensors` and what it holds about them.

    Args:
        path: the file.
        wanted: the `format` that it must be of.
        remedy: what to do where it can't be read.

    Raises:
        Jz3Error: it can't be read or is of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = _about_tensors(file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise Jz3Error(f"{path} can't be read ({error}); {remedy}") from error
    if about.get("format") != wanted:
        raise Jz3Error(f"{path} has the format {about.get('format')!r}, expected {wanted!r}")
    return tensors, about


def _about_tensors(metadata: dict[str, str] | None) -> dict[str, Any]:
    """Return what `write_tensors` kept in a file's metadata, nothing if that isn't by `write_tensors`."""
    with contextlib.suppress(ValueError):
        about = json.loads((metadata or {}).get("jz3", ""))
        if isinstance(about, dict):
            return about
    return {}


def hash_text(text: str) -> str:
    """Return the 16 hexadecimal digits of the 64-bit xxh3 of `text`."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))


def hash_file(path: Path) -> str:
    """Return the 16 hexadecimal digits of the 64-bit xxh3 of a file's bytes."""
    digest = xxhash.xxh3_64()
    # One buffer: a new one for every piece is memory that the system clears first, at a third of the speed.
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def is_full(error: Exception) -> bool:
    """Tell whether a write failed for want of space, also one of a library that raises its own errors."""
    if isinstance(error, Jz3Error):
        return False
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        s in str(error) for s in _FULL
    )


def raise_trouble(error: BaseException, path: Path) -> None:
    """Raise an error of the machine, as a file that only can't be read now must not count as refused or damaged.

    Raises:
        OSError: it is one, with the file's name and the remedy.
    """
    code: Any = getattr(error, "errno", None)
    if found := isinstance(error, RuntimeError) and re.search(r"\((\d+)\)$", str(error)):
        code = int(found[1])  # torch has the number in the text alone
    if code in _MACHINE:
        remedy = "the same command goes on from here, once the file can be read"
        raise OSError(code, f"{os.strerror(code)}; {remedy}", str(path)) from error
