"""The sandbox holds against programs that try to get out, at every level this machine has."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import LIMITS, SECRET, copies, left_over, need, open_level, sandbox_of, users_file

from jz3.grading.sandbox import LEVELS, Sandbox


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_of(request.param) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def outside() -> Iterator[Path]:
    with users_file() as path:
        yield path


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
    opened = open_level(level, (), LIMITS, **features)
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
    assert not left_over(before)


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
    assert sandbox.run(code).stdout == f"done {LIMITS.cpu_seconds:.0f}\n"


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
        assert not left_over(before)
    finally:
        opened.close()
