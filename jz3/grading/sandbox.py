"""Running Python that a model wrote.

Three levels, the strongest that works on the machine is used and written into every row:

| covered | by bwrap and namespaces | by rlimits |
|---|---|---|
| the user's files can't be read | view of interpreter, libraries, packages only | Landlock (Linux 5.13), else not |
| nothing is written or changed | read-only view, seccomp | seccomp or Landlock, else file rights |
| no network | empty network namespace, seccomp | seccomp, else not |
| no new processes or programs | seccomp; the process namespace is emptied | seccomp, else killed afterwards |
| others can't be signalled | own process namespace, seccomp | seccomp, else not |
| environment, descriptors of the caller | cleared, closed | cleared, closed |
| processor and wall time, memory, output | the kernel's limits, two outer deadlines | the same |

`bwrap` is bubblewrap, `namespaces` the same walls built by jz3 itself, `rlimits` a plain process; as
root it also becomes the user nobody where the interpreter can be read by nobody. Each level is tried
when the sandbox opens: a small program inside tries to read a file of this process, to connect to it
and to start a process, and `Sandbox.guards` names what was really refused. seccomp filters exist for
x86-64 and 64-bit ARM.

Not covered: errors of the kernel itself, timing channels, and hardware; the limits bound one snippet,
not the sum of those that run at once (`workers` of them). macOS has only `rlimits`, without memory limit.

A snippet is a plain script: the value of a bare last expression is not printed. The libraries are
loaded once for each of the worker processes, and each snippet runs in a fresh copy (fork) of them, so
that it costs milliseconds and nothing goes from one snippet to the next.
"""

import contextlib
import importlib.util
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error
from jz3.grading.cell import Cell, CellError, readable_by_all

LEVELS = ("bwrap", "namespaces", "rlimits")
"""From the strongest to the weakest."""
REASONS = ("ok", "error", "timeout", "memory", "output_limit", "killed")
PROBE = """
import json, os, socket
kept = []
try:
    open({file!r}).close()
except OSError:
    kept.append("files")
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=2).close()
except OSError:
    kept.append("network")
try:
    if not os.fork():
        os._exit(0)
except OSError:
    kept.append("processes")
print(json.dumps(kept))
"""

MOST_WORKERS = 64
"""Each takes three open files and a hundred megabytes; a process may mostly open 1,024 files, and filtering has
three sandboxes open."""

log = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """How model-written Python is run."""

    level: str = "auto"
    """`auto` (the strongest that works), `bwrap`, `namespaces` or `rlimits`."""
    minimum_level: str = "rlimits"
    """Refuse to run anything below this level."""
    cpu_seconds: int = 10
    """Processor time of one snippet."""
    wall_seconds: float = 20.0
    """Time of one snippet by the clock."""
    memory_mb: int = 1024
    """Address space of one snippet, the interpreter and its libraries included."""
    output_bytes: int = 65536
    """What one snippet may print; one that prints more is stopped."""
    workers: int = 0
    """How many snippets run at once; 0: one for each core, up to 64."""
    packages: tuple[str, ...] = ("sympy", "mpmath", "gmpy2", "numpy", "scipy")
    """What snippets may import beside the standard library, if installed."""
    preload: tuple[str, ...] = (
        "numpy",
        "sympy",
        "sympy.combinatorics",
        "sympy.physics.units",
        "sympy.tensor.tensor",
        "sympy.sets.setexpr",
        "sympy.assumptions.wrapper",
    )
    """Modules that are loaded before the first snippet; `solve` and `simplify` need those of SymPy."""
    seed: int = 0
    """Seed of string hashes, `random` and `numpy.random` in every snippet, so that a program prints
    the same thing every time; what another seed changes depends on chance."""

    def __post_init__(self) -> None:
        if self.level != "auto" and self.level not in LEVELS:
            raise ValueError(f"sandbox level {self.level!r} is unknown; choose auto, {', '.join(LEVELS)}")
        if self.minimum_level not in LEVELS:
            raise ValueError(
                f"sandbox minimum_level {self.minimum_level!r} is unknown; choose {', '.join(LEVELS)}"
            )
        for name in ("cpu_seconds", "wall_seconds", "memory_mb", "output_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"sandbox {name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"sandbox seed must lie in [0, 2^32), got {self.seed}")
        if self.workers < 0:
            raise ValueError(f"sandbox workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What became of a snippet."""

    stdout: str
    stderr: str
    ok: bool
    """It ended with exit status 0."""
    reason: str
    """`ok`, `error` (exception or exit status), `timeout`, `memory`, `output_limit` or `killed` (a signal)."""
    exit_code: int
    """Exit status, or the negative number of the signal that ended it."""
    level: str
    """The isolation it ran under."""
    seconds: float


class Sandbox:
    """Runs snippets, several at a time; use it as a context manager.

    Args:
        config: limits and the level wanted.
        warm_up: Python of the caller's own, run once in each worker process before the first snippet,
            so that what it loads or computes need not be repeated by every snippet.

    Raises:
        Jz3Error: (on entering) the level wanted, or any at or above `minimum_level`, does not work
            here; the message says why and what to do.
    """

    level: str
    """The level in use."""
    guards: tuple[str, ...]
    """What a program inside was really refused: `files`, `network`, `processes`."""

    def __init__(self, config: SandboxConfig | None = None, warm_up: str = "") -> None:
        self.config = config or SandboxConfig()
        self._warm_up = warm_up
        self.level = ""
        self.guards = ()
        self._features = {"landlock": True, "seccomp": True, "nobody": False}
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._cells: list[Cell] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Sandbox":
        workers = self.config.workers or min(cores(), MOST_WORKERS)
        # a sandbox process dies with the thread that started it, so these threads live as long as it
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        with contextlib.ExitStack() as unless_chosen:
            unless_chosen.callback(self.close)
            self._pool.submit(self._choose).result()
            unless_chosen.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all sandbox processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        with self._lock:
            cells, self._cells = self._cells, []
        for cell in cells:
            cell.close()

    def run(self, code: str, stdin: str = "") -> Execution:
        """Run one snippet.

        Args:
            code: Python source, run as a script.
            stdin: what it may read from standard input.

        Returns:
            Its output and how it ended; never raises for what the snippet does.
        """
        return self._submit(code, stdin).result()

    def run_many(self, codes: Sequence[str], stdins: Sequence[str] | None = None) -> list[Execution]:
        """Run snippets on all workers at once; one Execution each, in order."""
        inputs = stdins if stdins is not None else [""] * len(codes)
        if len(inputs) != len(codes):
            raise ValueError(f"{len(codes)} snippets but {len(inputs)} inputs")
        futures = [self._submit(code, stdin) for code, stdin in zip(codes, inputs, strict=True)]
        return [future.result() for future in futures]

    def _submit(self, code: str, stdin: str) -> Any:
        if self._pool is None:
            raise Jz3Error("the sandbox is not open; use `with Sandbox(config) as sandbox:`")
        return self._pool.submit(self._run, code, stdin)

    def _run(self, code: str, stdin: str) -> Execution:
        for attempt in range(2):
            cell = getattr(self._local, "cell", None)
            if cell is None:
                cell = self._local.cell = self._open(self.level)
            try:
                reply = cell.run(code, stdin)
                return Execution(ok=reply["reason"] == "ok", level=self.level, **reply)
            except CellError as error:
                self._local.cell = None
                self._drop(cell)
                log.warning("a sandbox process broke down (%s) and is replaced", error)
                if attempt:
                    break
        return Execution(
            stdout="", stderr="", ok=False, reason="killed", exit_code=-9, level=self.level, seconds=0.0
        )

    def _open(self, level: str) -> Cell:
        config = self.config
        settings = {
            "wall_seconds": config.wall_seconds,
            "cpu_seconds": config.cpu_seconds,
            "memory": config.memory_mb << 20,
            "output_bytes": config.output_bytes,
            "preload": [
                p for p in config.preload if importlib.util.find_spec(p.partition(".")[0]) is not None
            ],
            "warm_up": self._warm_up,
            "seed": config.seed,
            **self._features,
        }
        try:
            cell = Cell(level, settings, config.packages, config.seed)
        except CellError as error:
            raise Jz3Error(f"sandbox level {level} does not work here: {error}") from error
        with self._lock:
            self._cells.append(cell)
        return cell

    def _drop(self, cell: Cell) -> None:
        with self._lock:
            self._cells = [c for c in self._cells if c is not cell]
        cell.close()

    def _choose(self) -> None:
        """Take the strongest level that proves itself (runs in a pool thread, which keeps its cell)."""
        allowed = LEVELS[: LEVELS.index(self.config.minimum_level) + 1]
        wanted = allowed if self.config.level == "auto" else (self.config.level,)
        if not set(wanted) <= set(allowed):
            raise Jz3Error(
                f"sandbox level {self.config.level!r} is below minimum_level {self.config.minimum_level!r}; change one"
            )
        faults: list[str] = []
        for level in wanted:
            as_nobody = level == "rlimits" and os.geteuid() == 0 and readable_by_all(self.config.packages)
            for nobody in (True, False) if as_nobody else (False,):
                self._features["nobody"] = nobody
                try:
                    cell = self._open(level)
                except Jz3Error as error:
                    faults.append(str(error))
                    continue
                fault = self._probe(cell, level)
                if not fault:
                    self.level, self._local.cell = level, cell
                    self._tell(cell)
                    return
                self._drop(cell)
                faults.append(f"sandbox level {level} does not hold here: {fault}")
        raise Jz3Error(
            "; ".join(faults) + "; install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap), allow "
            "unprivileged user namespaces, or lower the sandbox's level and minimum_level"
        )

    def _probe(self, cell: Cell, level: str) -> str:
        """Set `guards` by trying; return why the level is no good, or nothing."""
        if self._features["nobody"] and cell.hello["missing"]:
            return f"the user nobody can't read the libraries ({cell.hello['missing'][0]})"
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(_listen()) as listener:
            os.chmod(folder, 0o755)
            canary = Path(folder) / "canary"
            canary.write_text("readable")
            reply = cell.run(PROBE.format(file=str(canary), port=listener.getsockname()[1]), "")
        if reply["reason"] != "ok":
            return f"the trial program failed ({reply['reason']}): {reply['stderr'][-500:]}"
        self.guards = tuple(json.loads(reply["stdout"]))
        if level != "rlimits" and not {"files", "network"} <= set(self.guards):
            return f"it refused only {', '.join(self.guards) or 'nothing'}"
        return ""

    def _tell(self, cell: Cell) -> None:
        if cell.hello["missing"] and "missing" not in _warned:
            _warned.add("missing")
            log.warning(
                "inside the sandbox these packages can't be imported: %s", "; ".join(cell.hello["missing"])
            )
        if self.level != "rlimits" or "rlimits" in _warned:
            return
        _warned.add("rlimits")
        lacking = sorted({"files", "network", "processes"} - set(self.guards))
        log.warning(
            "model-written Python runs under the weakest isolation, a limited plain process; it is "
            "refused %s%s. Install bubblewrap for real walls, or set the sandbox's minimum_level to refuse this.",
            ", ".join(self.guards) or "nothing",
            f", but NOT {', '.join(lacking)}" if lacking else "",
        )


def _listen() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    return listener


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
