"""The sandbox holds against programs that try to get out, at every level this machine has."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jz3.errors import Jz3Error
from jz3.grading import cell as cell_module
from jz3.grading import sandbox as sandbox_module
from jz3.grading.sandbox import LEVELS, Execution, Sandbox, SandboxConfig

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


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["JZ3_TEST_SECRET"] = SECRET
    opened = open_level(request.param, ("sympy",))
    yield opened
    opened.close()
    del os.environ["JZ3_TEST_SECRET"]


@pytest.fixture(scope="module")
def outside() -> Iterator[Path]:
    """A file of the user's, readable by everybody, in the home folder if that can be written."""
    folder = Path.home() if os.access(Path.home(), os.W_OK) else Path(tempfile.gettempdir())
    handle, name = tempfile.mkstemp(prefix=".jz3-test-", dir=folder)
    os.write(handle, SECRET.encode())
    os.close(handle)
    os.chmod(name, 0o644)
    yield Path(name)
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


def test_a_script_runs(sandbox: Sandbox) -> None:
    done = sandbox.run("import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 4))\n1 + 1")
    assert (done.stdout, done.ok, done.reason, done.exit_code) == ("[-2, 2]\n", True, "ok", 0)
    assert done.level == sandbox.level


def test_bare_expressions_print_nothing_and_main_is_main(sandbox: Sandbox) -> None:
    assert sandbox.run("6 * 7").stdout == ""
    assert sandbox.run("if __name__ == '__main__':\n    print('main')").stdout == "main\n"
    assert "jz3" not in sandbox.run("import sys\nprint(list(globals()), sys.argv, sys.path[:1])").stdout


def test_standard_input(sandbox: Sandbox) -> None:
    done = sandbox.run("a = int(input('? '))\nprint(a * int(input()))", "6\n7\n")
    assert done.stdout == "? 42\n"
    assert "EOFError" in sandbox.run("input()").stderr


def test_run_many_keeps_the_order(sandbox: Sandbox) -> None:
    done = sandbox.run_many([f"print({i})" for i in range(12)])
    assert [d.stdout for d in done] == [f"{i}\n" for i in range(12)]
    with pytest.raises(ValueError, match="1 snippets but 2 inputs"):
        sandbox.run_many(["1"], ["", ""])


@pytest.mark.parametrize(
    ("code", "reason", "exit_code", "text"),
    [
        ("import sys; sys.exit()", "ok", 0, ""),
        ("import sys; sys.exit(3)", "error", 3, ""),
        ("import sys; sys.exit('gone')", "error", 1, "gone"),
        ("raise SystemExit(True)", "error", 1, ""),
        ("print(1)\n1 +", "error", 1, "SyntaxError"),
        ("x = 1 / 0", "error", 1, "ZeroDivisionError"),
        ("\0", "error", 1, "null bytes"),
        ("raise ValueError('\\ud800')", "error", 1, "ValueError"),
        ("def f(n): return f(n + 1)\nf(0)", "error", 1, "RecursionError"),
        ("raise KeyboardInterrupt", "error", 1, "KeyboardInterrupt"),
        ("import os; os.abort()", "killed", -signal.SIGABRT, ""),
        ("import os; os._exit(7)", "error", 7, ""),
    ],
)
def test_how_scripts_end(sandbox: Sandbox, code: str, reason: str, exit_code: int, text: str) -> None:
    done = sandbox.run(code)
    assert (done.reason, done.exit_code) == (reason, exit_code), done
    assert text in done.stderr
    assert "inner_server" not in done.stderr


def test_the_traceback_shows_the_line(sandbox: Sandbox) -> None:
    stderr = sandbox.run("def f():\n    return missing_name\nf()").stderr
    assert "return missing_name" in stderr and 'File "<snippet>", line 2' in stderr


def test_lone_surrogates_in_the_code(sandbox: Sandbox) -> None:
    assert sandbox.run("print('\ud800')").reason == "error"


def test_output_that_is_not_utf8(sandbox: Sandbox) -> None:
    done = sandbox.run("import sys\nsys.stdout.buffer.write(b'a\\xff\\xfeb')")
    assert done.ok and done.stdout == "a\ufffd\ufffdb"


def test_threads_and_exit_functions_finish(sandbox: Sandbox) -> None:
    code = (
        "import atexit, threading, time\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('first')"
    )
    assert sandbox.run(code).stdout == "first\nthread\nlast\n"


def test_endless_loops(sandbox: Sandbox) -> None:
    deaf = "import signal\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, lambda *_: 0)\n"
    spin, sleep, mute, ignoring = sandbox.run_many(
        [
            "print('before', flush=True)\nwhile True: pass",
            "import time\ntime.sleep(600)",
            "import os, time\nos.close(1); os.close(2)\ntime.sleep(600)",
            deaf + "while True: pass",
        ]
    )
    assert spin.reason == "timeout" and spin.stdout == "before\n"
    assert sleep.reason == mute.reason == "timeout"
    assert sleep.seconds < 10 and mute.seconds < 10
    assert ignoring.reason in ("timeout", "killed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
@pytest.mark.parametrize(
    "code", ["x = bytearray(10 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 26))"]
)
def test_memory(sandbox: Sandbox, code: str) -> None:
    done = sandbox.run(code)
    assert done.reason == "memory", done


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
def test_recursion_without_a_limit(sandbox: Sandbox) -> None:
    code = "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return [f(n + 1)]\nf(0)"
    assert sandbox.run(code).reason in ("memory", "killed", "error", "timeout")
    assert sandbox.run("print(1)").ok


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.write(2, b'y' * 100_000)",
        "print('z' * 30_000)",
    ],
)
def test_output_is_bounded(sandbox: Sandbox, code: str) -> None:
    done = sandbox.run(code)
    assert done.reason == "output_limit"
    assert 0 < len(done.stdout) + len(done.stderr) <= LIMITS.output_bytes


def test_files_and_secrets_cannot_be_read(sandbox: Sandbox, outside: Path) -> None:
    need(sandbox, "files")
    code = f"""
import glob, os
paths = [{str(outside)!r}, "/etc/shadow", "/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/environ",
         "/proc/{os.getpid()}/environ", "/proc/{os.getpid()}/maps", "/proc/{os.getppid()}/environ", "/dev/mem",
         {str(Path.home() / ".ssh" / "id_rsa")!r}, "/sys/kernel/notes", {__file__!r},
         "/proc/1/root" + {str(outside)!r}]
for path in paths:
    try:
        print("GOT", path, open(path, "rb").read(20))
    except OSError as error:
        pass
for folder in ({str(Path.home())!r}, {str(outside.parent)!r}, {str(Path(__file__).parent)!r}, "/home", "/var", "/tmp"):
    try:
        print("LISTED", [n for n in os.listdir(folder) if n.startswith(".jz3") or n.endswith(".py")])
    except OSError:
        pass
print(dict(os.environ))
print("done")
"""
    done = sandbox.run(code)
    assert done.stdout.endswith("done\n"), done
    assert "GOT" not in done.stdout
    assert all(line == "LISTED []" for line in done.stdout.splitlines() if line.startswith("LISTED"))
    assert SECRET not in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="walls of Linux")
@pytest.mark.parametrize(
    ("level", "features"),
    [
        ("bwrap", {"landlock": False, "seccomp": False}),
        ("namespaces", {"landlock": False, "seccomp": False}),
        ("rlimits", {"landlock": False}),
        ("rlimits", {"seccomp": False}),
    ],
)
def test_each_wall_holds_alone(level: str, features: dict[str, bool], outside: Path) -> None:
    opened = open_level(level, (), **features)
    try:
        if level == "rlimits" and "landlock" not in features and "files" not in opened.guards:
            pytest.skip("this kernel has no Landlock")
        code = f"""
import os, socket
def attempt(name, action):
    try:
        action()
        print(name)
    except OSError:
        pass
attempt("read", lambda: open({str(outside)!r}).close())
attempt("write", lambda: open({str(outside)!r}, "w").close())
attempt("change", lambda: open(os.__file__, "a").close())
attempt("create", lambda: os.mkdir(os.path.dirname(os.__file__) + "/jz3-made"))
attempt("root", lambda: os.mkdir("/jz3-made"))
attempt("here", lambda: open("jz3-made", "w").close())
attempt("temporary", lambda: open("/tmp/jz3-made", "w").close())
attempt("mount", lambda: os.chroot("/usr"))
attempt("connect", lambda: socket.create_connection(("192.0.2.1", 9), timeout=1))
"""
        done = opened.run(code)
        leaks = set(done.stdout.split())
        assert done.ok, done
        assert leaks <= ({"read"} if features == {"landlock": False} and level == "rlimits" else set())
        assert outside.read_text() == SECRET
    finally:
        opened.close()


def test_environment_is_scrubbed(sandbox: Sandbox) -> None:
    done = sandbox.run("import os, sys\nprint(dict(os.environ), sys.orig_argv[:1])")
    assert SECRET not in done.stdout and "JZ3_TEST_SECRET" not in done.stdout
    assert "HOME" in done.stdout


def test_descriptors_are_closed(sandbox: Sandbox) -> None:
    code = "import os\nfor n in range(3, 200):\n    try:\n        os.fstat(n); print(n)\n    except OSError: pass"
    assert sandbox.run(code).stdout == ""


def test_nothing_can_be_written(sandbox: Sandbox, outside: Path) -> None:
    need(sandbox, "files")
    name = f"jz3-written-{os.getpid()}"
    code = f"""
import os, shutil
outside = {str(outside)!r}
tries = [lambda p=p: open(p, "w") for p in
         (outside, "{name}", "/tmp/{name}", "/dev/shm/{name}", "/var/tmp/{name}", "/{name}", os.__file__)]
tries += [lambda: open(outside, "a"), lambda: os.remove(outside), lambda: os.chmod(outside, 0),
          lambda: os.mkdir("/tmp/{name}"), lambda: os.rename(outside, outside + "x"),
          lambda: os.symlink("/etc", "/tmp/{name}"), lambda: os.truncate(outside, 0),
          lambda: os.utime(outside), lambda: os.mkfifo("/tmp/{name}"), lambda: os.link(outside, "/tmp/{name}"),
          lambda: os.chown(outside, 1, 1), lambda: open("/proc/sys/kernel/hostname", "w").write("x"),
          lambda: open("/dev/null", "w")]
for i, attempt in enumerate(tries):
    try:
        attempt()
        print("WROTE", i)
    except OSError:
        pass
"""
    before = outside.stat()
    done = sandbox.run(code)
    assert done.ok and done.stdout == "", done
    assert outside.read_text() == SECRET
    assert (outside.stat().st_mtime_ns, outside.stat().st_mode) == (before.st_mtime_ns, before.st_mode)
    assert not any((Path(folder) / name).exists() for folder in ("/tmp", "/dev/shm", "/var/tmp", "/"))


def test_no_network(sandbox: Sandbox) -> None:
    need(sandbox, "network")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        code = f"""
import socket, urllib.request
for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),
                     (socket.AF_INET6, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_STREAM)):
    for address in (("127.0.0.1", {listener.getsockname()[1]}), ("192.0.2.1", 80), "/run/docker.sock"):
        try:
            s = socket.socket(family, kind)
            s.settimeout(1)
            s.connect(address)
            s.send(b"x")
            print("SENT", family, address)
        except (OSError, TypeError):
            pass
try:
    urllib.request.urlopen("http://127.0.0.1:{listener.getsockname()[1]}", timeout=1)
    print("FETCHED")
except OSError:
    pass
print("done")
"""
        done = sandbox.run(code)
        assert done.stdout == "done\n", done
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_fork_bomb_and_programs(sandbox: Sandbox) -> None:
    need(sandbox, "processes")
    before = copies()
    tries = ("os.fork()", "os.system('true')", "os.execv('/bin/sh', ['sh'])", "subprocess.run(['/bin/true'])",
             "os.posix_spawn('/bin/true', ['true'], {})", "ctypes.CDLL(None).fork()")  # fmt: skip
    code = f"import ctypes, os, subprocess\nme = os.getpid()\nfor text in {tries!r}:\n"
    code += "    try:\n        r = eval(text)\n"
    code += "        if r in (0, None) or os.getpid() != me: os.write(1, b'FORKED ' + text.encode())\n"
    code += "    except OSError: pass\n"
    done = sandbox.run(code)
    assert done.ok and done.stdout == "", done
    bomb = sandbox.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert bomb.reason == "timeout"
    assert copies() == before


@pytest.mark.skipif(sys.platform != "linux", reason="raw system calls of Linux")
def test_raw_system_calls(sandbox: Sandbox) -> None:
    need(sandbox, "processes")
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
calls = {"ptrace": (101, 117), "unshare": (272, 97), "mount": (165, 40), "bpf": (321, 280),
         "io_uring_setup": (425, 425),
         "process_vm_readv": (310, 270), "socket": (41, 198), "memfd_create": (319, 279), "setns": (308, 268),
         "keyctl": (250, 219), "perf_event_open": (298, 241), "openat2": (437, 437),
         "clone3": (435, 435), "execve": (59, 221),
         "setrlimit": (160, 164), "reboot": (169, 142), "userfaultfd": (323, 282), "pidfd_open": (434, 434)}
for name, numbers in calls.items():
    result = libc.syscall(numbers[0 if x86 else 1], 0, 0, 0, 0, 0)
    if result >= 0 or ctypes.get_errno() not in (1, 38):
        print("ALLOWED", name, result, ctypes.get_errno())
import resource
try:
    resource.prlimit(0, resource.RLIMIT_CPU, (1000, 1000))
    print("ALLOWED prlimit")
except (OSError, ValueError):
    pass
import fcntl
try:
    fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())
    print("ALLOWED F_SETOWN")
except OSError:
    print("done", resource.prlimit(0, resource.RLIMIT_CPU)[0])
"""
    assert sandbox.run(code).stdout == "done 1\n"


def test_killing_others(sandbox: Sandbox) -> None:
    need(sandbox, "processes")
    code = f"""
import os, signal
for process in (os.getppid(), {os.getpid()}, {os.getppid()}, 1, -1, 0, -{os.getpgrp()}):
    for number in (9, 15, 19, 2):
        try:
            os.kill(process, number)
            print("KILLED", process)
        except OSError:
            pass
print("alive")
"""
    assert sandbox.run(code).stdout == "alive\n"
    assert sandbox.run("print('next')").stdout == "next\n"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
@pytest.mark.parametrize("level", LEVELS)
def test_the_process_tree_dies_even_without_seccomp(level: str) -> None:
    opened = open_level(level, seccomp=False)
    try:
        if os.geteuid() != 0 and level == "rlimits":
            assert "processes" in opened.guards  # by RLIMIT_NPROC
            return
        code = """
import os, time
for i in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            while os.fork() == 0: os.setsid(); time.sleep(0.01)
            time.sleep(600)
        os._exit(0)
print("started")
"""
        before = copies()
        done = opened.run(code)
        assert done.stdout == "started\n" or "fork" in done.stderr
        assert copies() == before
    finally:
        opened.close()


def test_nothing_goes_from_one_snippet_to_the_next(sandbox: Sandbox) -> None:
    bad = (
        "import builtins, math, sys, os, sympy\nbuiltins.print = None\nmath.pi = 3\nsys.modules['json'] = None\n"
        "os.environ['LEFT'] = '1'\nsympy.pi = 3\nleft = 1"
    )
    assert all(d.ok for d in sandbox.run_many([bad] * 4))
    good = "import json, math, os, sympy\nprint(math.pi, 'LEFT' in os.environ, 'left' in globals(), sympy.pi)"
    assert {d.stdout for d in sandbox.run_many([good] * 4)} == {"3.141592653589793 False False pi\n"}


def test_chance_follows_the_seed(sandbox: Sandbox) -> None:
    code = "import random\nprint(random.random(), hash('jz3'), list({'a', 'b', 'c', 'd', 'e'}))"
    first, second = sandbox.run_many([code] * 2)
    assert first.stdout == second.stdout
    with Sandbox(SandboxConfig(level=sandbox.level, preload=(), seed=1)) as other:
        assert other.run(code).stdout not in ("", first.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_dead_sandbox_process_is_replaced(sandbox: Sandbox) -> None:
    for opened in list(sandbox._cells):
        assert opened._process is not None
        opened._process.kill()
    assert [d.stdout for d in sandbox.run_many(["print(1)", "print(2)"])] == ["1\n", "2\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_outlives_a_killed_caller(level: str) -> None:
    open_level(level).close()
    before = copies()
    code = (
        "from jz3.grading.sandbox import Sandbox, SandboxConfig\n"
        f"with Sandbox(SandboxConfig(level={level!r}, workers=1, preload=())) as s:\n"
        "    print('open', flush=True)\n    s.run('import time\\ntime.sleep(15)')\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    assert caller.stdout.readline() == "open\n"
    time.sleep(0.3)
    assert copies() > before
    caller.kill()
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 5
    while copies() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not copies() - before


def test_close_leaves_no_process_and_no_folder() -> None:
    opened = open_level("rlimits")
    opened.run_many(["print(1)"] * 4)
    folders = [Path(c._folder) for c in opened._cells]
    processes = [c._process for c in opened._cells]
    assert folders and all(f.is_dir() for f in folders)
    opened.close()
    assert all(p is not None and p.poll() is not None for p in processes)
    assert not any(f.exists() for f in folders)
    with pytest.raises(Jz3Error, match="not open"):
        opened.run("1")


def test_the_weakest_level_warns_and_can_be_refused(caplog: pytest.LogCaptureFixture) -> None:
    sandbox_module._warned.clear()
    with caplog.at_level("WARNING"):
        open_level("rlimits").close()
        open_level("rlimits").close()
    assert [r.message for r in caplog.records if "weakest isolation" in r.message].__len__() == 1
    with (
        pytest.raises(Jz3Error, match="minimum_level"),
        Sandbox(SandboxConfig(level="rlimits", minimum_level="namespaces")),
    ):
        pass


def test_auto_falls_through_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_module.shutil, "which", lambda _: None)
    with Sandbox(SandboxConfig(preload=(), workers=1)) as opened:
        assert opened.level in ("namespaces", "rlimits")
    with (
        pytest.raises(Jz3Error, match="apt-get install bubblewrap"),
        Sandbox(SandboxConfig(minimum_level="bwrap")),
    ):
        pass


def test_a_level_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cell_module.command("rlimits", [], {})
    monkeypatch.setattr(cell_module, "command", lambda *_: plain)
    sandbox = Sandbox(SandboxConfig(level="bwrap", preload=()))
    sandbox._features.update(landlock=False, seccomp=False)
    with pytest.raises(Jz3Error, match="bwrap does not hold here"), sandbox:
        pass


def test_guards_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_level("rlimits", landlock=False, seccomp=False)
    opened.close()
    assert "network" not in opened.guards


@pytest.mark.parametrize(
    "wrong", [{"level": "docker"}, {"minimum_level": "none"}, {"cpu_seconds": 0}, {"workers": -1}]
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match="sandbox"):
        SandboxConfig(**wrong)


def test_execution_is_a_plain_record() -> None:
    done = Execution(stdout="", stderr="", ok=True, reason="ok", exit_code=0, level="rlimits", seconds=0.0)
    assert done.reason in sandbox_module.REASONS
