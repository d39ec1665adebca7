"""The process inside a sandbox: it loads the libraries once, then forks one child for each snippet.

Runs with the standard library only; `jz3.grading.cell` sends it its settings and the snippets as
frames of JSON on standard input and reads the results from standard output. Nothing of a snippet is
left when its result is sent: its processes are killed, it can't write files, and its memory was a copy.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import random  # noqa: F401  (loaded here so that each snippet's numbers can be seeded)
import select
import signal
import sys
import time
import types

NAME = "<snippet>"


def send(handle: int, message: dict) -> None:
    """Write one frame: the length in ten digits, then JSON."""
    data = json.dumps(message).encode()
    data = b"%010d" % len(data) + data
    while data:
        data = data[os.write(handle, data) :]


def receive(handle: int) -> dict:
    """Read one frame; an ended stream is an EOFError."""

    def exactly(size: int) -> bytes:
        parts = []
        while size:
            part = os.read(handle, min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    return json.loads(exactly(int(exactly(10))))


def serve(settings: dict, walls: types.ModuleType) -> None:
    """Build the walls, load the libraries, answer snippets until standard input ends."""
    os.umask(0o022)
    control_in, control_out = os.dup(0), os.dup(1)
    empty, writer = os.pipe()
    os.close(writer)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    if settings["level"] == "namespaces":
        walls.enter_namespaces(settings["view"])
    elif settings["level"] == "rlimits":
        _prepare_plain(settings, walls)
    if sys.platform == "linux":
        walls.drop_capabilities()
        walls.no_new_privileges()
    children = _open_children()
    guards = {"landlock": "", "seccomp": ""}
    if settings["landlock"]:
        try:
            walls.restrict_files([path for path, _ in settings["view"]])
        except OSError as error:
            guards["landlock"] = str(error)
    sys.path[:] = [p for p in sys.path if p not in ("", ".")] + settings["site"]
    missing = []
    for name in settings["preload"]:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            missing.append(f"{name}: {error}")
    exec(settings["warm_up"], {"__name__": "warm_up"})
    if settings["seccomp"]:
        guards["seccomp"] = _try_seccomp(walls)
        settings["seccomp"] = not guards["seccomp"]
    gc.collect()
    gc.freeze()
    send(control_out, {"missing": missing, "guards": guards})
    while True:
        try:
            request = receive(control_in)
        except EOFError:
            return
        send(control_out, _run(request, settings, walls, control_in, children))


def _prepare_plain(settings: dict, walls: types.ModuleType) -> None:
    """Without a process namespace: another user if possible, and orphans come to this process."""
    if settings["nobody"]:
        walls.become_nobody()
    if sys.platform == "linux":
        walls.adopt_orphans()
    os.chdir(settings["folder"])


def _open_children() -> int:
    """Open the kernel's list of this process's children while /proc can still be opened."""
    if os.getpid() == 1:
        return -1
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
    except OSError:
        return -1


def _try_seccomp(walls: types.ModuleType) -> str:
    """Install the filter in a child; return what the kernel says against it, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        text = ""
        try:
            walls.allow_computation_only()
        except OSError as error:
            text = str(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    text = os.read(reader, 4096).decode()
    os.close(reader)
    return text


def _run(request: dict, settings: dict, walls: types.ModuleType, control_in: int, children: int) -> dict:
    """Fork a child for one snippet, collect what it prints, kill what is left of it."""
    out_reader, out_writer = os.pipe()
    error_reader, error_writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        _child(request, settings, walls, out_writer, error_writer)
    os.close(out_writer)
    os.close(error_writer)
    texts = {out_reader: bytearray(), error_reader: bytearray()}
    room = settings["output_bytes"]
    deadline = start + settings["wall_seconds"]
    status, reason, waiting = None, "", set(texts)
    while not reason:
        left = deadline - time.monotonic()
        if left <= 0:
            reason = "timeout"
            break
        ready = select.select([*waiting, control_in], [], [], min(left, 0.2 if waiting else 0.001))[0]
        if control_in in ready and not os.read(control_in, 1):
            _sweep(child, children)  # the parent is gone
            os._exit(0)
        for handle in waiting.intersection(ready):
            data = os.read(handle, 1 << 16)
            if not data:
                waiting.discard(handle)
            texts[handle] += data[:room]
            room -= len(data)
        if room < 0:
            reason = "output_limit"
        elif not waiting.intersection(ready) or not waiting:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status, reason = code, "done"
    seconds = time.monotonic() - start
    if status is None:
        _kill(child)
        status = os.waitpid(child, 0)[1]
    _sweep(child, children)
    for handle in texts:
        if reason == "done" and handle in waiting:
            texts[handle] += _rest(handle, room)
        os.close(handle)
    stdout, stderr = (bytes(t).decode("utf-8", "replace") for t in texts.values())
    exit_code = os.waitstatus_to_exitcode(status)
    if reason == "done":
        reason = _reason(exit_code, stderr)
    return {"stdout": stdout, "stderr": stderr, "reason": reason, "exit_code": exit_code, "seconds": seconds}


def _rest(handle: int, room: int) -> bytes:
    """Read what a pipe still holds after its writers were killed."""
    data = bytearray()
    while room > len(data):
        part = os.read(handle, 1 << 16)
        if not part:
            break
        data += part
    return bytes(data[: max(room, 0)])


def _reason(exit_code: int, stderr: str) -> str:
    if exit_code == 0:
        return "ok"
    if exit_code == -signal.SIGXCPU:
        return "timeout"
    if exit_code < 0:
        return "killed"
    last = stderr.rstrip().rpartition("\n")[2].split(":")[0]
    return "memory" if last.endswith("MemoryError") else "error"


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _sweep(child: int, children: int) -> None:
    """Kill and reap every process that the snippet left."""
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    # an orphan becomes a child of this process, so the loop ends when the whole tree is gone
    while children >= 0:
        found = [int(p) for p in os.pread(children, 1 << 16, 0).split()]
        if not found:
            break
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)


def _child(request: dict, settings: dict, walls: types.ModuleType, out: int, error: int) -> None:
    """Become the snippet; never returns."""
    code = 1
    try:
        os.setsid()
        if sys.platform == "linux":
            walls.die_with_parent()
        os.dup2(out, 1)
        os.dup2(error, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        text = io.BytesIO(request["stdin"].encode("utf-8", "replace"))
        sys.stdin = io.TextIOWrapper(text, encoding="utf-8", errors="replace")
        sys.argv[:] = ["snippet"]
        for name in ("random", "numpy.random"):
            if name in sys.modules:
                sys.modules[name].seed(settings["seed"])
        walls.limit_resources(settings["memory"], settings["cpu_seconds"], settings["seccomp"])
        if settings["seccomp"]:
            walls.allow_computation_only()
        code = _execute(request["code"])
    except BaseException as problem:
        _complain(problem)
    finally:
        os._exit(code)


def _execute(code: str) -> int:
    """Run `code` as a script would; return its exit status."""
    import atexit
    import linecache
    import threading

    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    linecache.cache[NAME] = (len(code), None, code.splitlines(True), NAME)
    status = 0
    try:
        exec(compile(code, NAME, "exec"), main.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as stop:
        status = _exit_status(stop)
    except BaseException as problem:
        _complain(problem)
        status = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as problem:
        _complain(problem)
        status = status or 1
    return status


def _exit_status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _complain(problem: BaseException) -> None:
    """Print the traceback without this file's own frames; when even that fails, the error's name."""
    try:
        import traceback

        place = problem.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename != NAME:
            place = place.tb_next
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        traceback.print_exception(type(problem), problem, place, file=sys.stderr)
        sys.stderr.flush()
    except BaseException:
        os.write(2, type(problem).__name__.encode() + b"\n")
