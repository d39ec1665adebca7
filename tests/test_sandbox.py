"""The sandbox runs programs within limits, leaves nothing behind, and says what it cannot guard."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import LIMITS, PATIENT, copies, left_over, open_level, sandbox_of

from jz3.errors import Jz3Error
from jz3.grading import cell as cell_module
from jz3.grading import sandbox as sandbox_module
from jz3.grading.sandbox import LEVELS, Execution, Sandbox, SandboxConfig


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_of(request.param) as sandbox:
        yield sandbox


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
    assert sleep.seconds < 30 and mute.seconds < 30
    assert ignoring.reason in ("timeout", "killed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
@pytest.mark.parametrize(
    "code", ["x = bytearray(10 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 26))"]
)
@pytest.mark.parametrize("level", LEVELS)
def test_memory(level: str, code: str) -> None:
    sandbox = open_level(level, limits=PATIENT)
    done = sandbox.run(code)
    sandbox.close()
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
    assert copies() - before
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert not left_over(before)


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


def test_a_sandbox_that_cannot_open_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Sandbox) -> None:
        raise Jz3Error("no level holds")

    monkeypatch.setattr(Sandbox, "_choose", refuse)
    sandbox = Sandbox(LIMITS)
    with pytest.raises(Jz3Error, match="no level"):
        sandbox.__enter__()
    assert sandbox._pool is None


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


def test_a_machine_of_many_cores_does_not_run_out_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may mostly open 1,024 files; filtering has two sandboxes and the grader's open together."""
    monkeypatch.setattr(sandbox_module, "cores", lambda: 384)
    monkeypatch.setattr(Sandbox, "_choose", lambda self: None)
    with Sandbox() as sandbox:
        assert sandbox._pool is not None and sandbox._pool._max_workers * 3 * 3 < 1000


def test_execution_is_a_plain_record() -> None:
    done = Execution(stdout="", stderr="", ok=True, reason="ok", exit_code=0, level="rlimits", seconds=0.0)
    assert done.reason in sandbox_module.REASONS
