"""Workers: each claims shards, computes and publishes them; local ones are watched and replaced.

A claim is a file lock, which ends with its holder however that ends, so that a killed worker's shard
is free at once. Files appear under their names only when they are whole: what is there is done.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jz3.errors import Jz3Error
from jz3.files import locked, read_json
from jz3.scoring.plan import REPORT_SECONDS, Plan, load_plan
from jz3.scoring.shard import lacks_features, scores_path

if TYPE_CHECKING:
    from jz3.scoring.shard import Scorer

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
USER_ERROR = 2
"""Exit status of a worker whose error another attempt would meet again."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def is_done(out: Path, plan: Plan, number: int) -> bool:
    """Tell whether a shard's scores are there, and its features if they are kept."""
    return scores_path(out, number).is_file() and not lacks_features(out, plan, number)


def missing_shards(out: Path, plan: Plan, among: Collection[int] | None = None) -> list[int]:
    """Return the numbers of the shards that are not done.

    Args:
        out: the run's folder.
        plan: its plan.
        among: only these are looked at; None: all.
    """
    scores = out / "scores"
    there = {p.stem for p in scores.glob("*.parquet")} if scores.is_dir() else set()
    numbers = [s.number for s in plan.shards if among is None or s.number in among]
    return [n for n in numbers if f"{n:06d}" not in there or lacks_features(out, plan, n)]


def parts(plan: Plan, count: int) -> list[int]:
    """Return per shard which of `count` parts it is in: runs of shards of about as many bytes each.

    Neighbours stay together, as the shards of a compressed file are cheapest to read one after the other.
    """
    before, total = 0, max(plan.size, 1)
    found = []
    for shard in plan.shards:
        middle = 2 * before + shard.size
        found.append(min(middle * count // (2 * total), count - 1))
        before += shard.size
    return found


def work(
    out: Path,
    part: tuple[int, int] = (0, 1),
    deadline: float = 0.0,
    rotate: tuple[int, int] = (0, 1),
) -> bool:
    """Do the missing shards of a part of the plan, one after the other.

    Args:
        out: the run's folder, planned and prepared.
        part: (i, n): only the i-th of n parts, see `parts`.
        deadline: seconds since the epoch after which no shard is begun that is not expected to end
            before; 0: none.
        rotate: (i, n): begin at the i-th of n equal parts, so that workers seldom meet.

    Returns:
        Whether all were done that no other worker holds.
    """
    plan = load_plan(out)
    shards = [s for s, i in zip(plan.shards, parts(plan, part[1]), strict=True) if i == part[0]]
    first = len(shards) * rotate[0] // rotate[1]
    longest = 0.0
    scorer: Scorer | None = None
    for shard in shards[first:] + shards[:first]:
        if is_done(out, plan, shard.number):
            continue
        with locked(out / "claims" / f"{shard.number:06d}", wait=False) as mine:
            # Another worker may have finished it between the look and the claim.
            if not mine or is_done(out, plan, shard.number):
                continue
            if deadline and time.time() + longest > deadline:
                return False
            from jz3.scoring.job import cpu_threads

            with cpu_threads(plan.settings.threads):
                scorer = scorer or _scorer(out, plan)
                start = time.monotonic()
                scorer.run(shard)
            longest = max(longest, time.monotonic() - start)
    return True


def _scorer(out: Path, plan: Plan) -> "Scorer":
    """Load the models; only a worker that has a shard to do pays for it."""
    from jz3.scoring.job import load_job
    from jz3.scoring.shard import Scorer

    return Scorer(out, plan, load_job(out))


@dataclass(slots=True)
class _Child:
    number: int
    process: "subprocess.Popen[bytes]"
    log: Path
    restarts: int = 0


def run_local(
    out: Path,
    plan: Plan,
    workers: int,
    restarts: int,
    deadline: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Do all shards with local processes; one that dies is replaced and only its shard is redone.

    Args:
        out: the run's folder, planned and prepared.
        plan: its plan.
        workers: how many processes.
        restarts: how often each may be replaced before it finishes a shard.
        deadline: see `work`.
        say: told of deaths and progress, one line each.

    Raises:
        Jz3Error: a worker met a user's error, or died more often than allowed.
    """
    devices = gpus()
    children = [_spawn(out, plan, i, workers, deadline, devices) for i in range(workers)]
    progress = Progress(out, plan, workers)
    try:
        while children:
            time.sleep(POLL_SECONDS)
            for child in list(children):
                status = child.process.poll()
                if status is None:
                    continue
                children.remove(child)
                if status == 0:
                    continue
                if status == USER_ERROR:
                    raise Jz3Error(last_line(child.log).removeprefix("jz3: error: ") or f"see {child.log}")
                if progress.finished(child.process.pid):
                    child.restarts = 0
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                if child.restarts >= restarts:
                    raise Jz3Error(
                        f"worker {child.number} died ({how}) and was restarted {child.restarts} times already since it "
                        f"last finished a shard; its last words are in {child.log}; run the same command again to go "
                        "on, more --restarts help only if the cause is gone"
                    )
                say(f"worker {child.number} died ({how}); restarted, {child.restarts + 1} of {restarts}")
                again = _spawn(out, plan, child.number, workers, deadline, devices)
                again.restarts = child.restarts + 1
                children.append(again)
            if line := progress.line():
                say(line)
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.process.wait()


def gpus() -> list[str]:
    """Return the CUDA devices that this process may use, without starting CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(i) for i in range(len(done.stdout.splitlines()))] if done.returncode == 0 else []


def default_workers() -> int:
    """Return one worker per GPU, or one where there is none."""
    return max(1, len(gpus()))


def default_threads(workers: int) -> int:
    """Return the CPU threads of each of so many workers; with GPUs the number of these counts instead.

    The number is part of a run's identity, and with GPUs that shall not depend on the workers.
    """
    return max(1, len(os.sched_getaffinity(0)) // max(len(gpus()) or workers, 1))


def _spawn(out: Path, plan: Plan, number: int, workers: int, deadline: float, devices: list[str]) -> _Child:
    environment = dict(os.environ)
    threads = plan.settings.threads
    for name in THREAD_VARIABLES:
        environment[name] = str(threads)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    command = [sys.executable, "-m", "jz3.scoring", str(out), "--rotate", f"{number}/{workers}"]
    command += ["--parent", str(os.getpid())]
    if deadline:
        command += ["--deadline", repr(deadline)]
    cores = sorted(os.sched_getaffinity(0))
    if not devices and workers * threads <= len(cores):
        mine = cores[number * threads : (number + 1) * threads]
        command += ["--cores", ",".join(map(str, mine))]
    path = out / "logs" / f"worker-{number}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as handle:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, env=environment
        )
    return _Child(number, process, path)


def last_line(path: Path) -> str:
    """Return the last line of a log that isn't blank; nothing if there is none."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "")


class Progress:
    """What is done and how long the rest takes, by tokens.

    The tokens of what is left are its bytes times the tokens per byte of what is done, so that neither
    long documents nor many short ones make the estimate creep.
    """

    def __init__(self, out: Path, plan: Plan, workers: int) -> None:
        self._out, self._plan, self._workers = out, plan, workers
        self._before = self._missing = set(missing_shards(out, plan))
        self._done: dict[int, tuple[int, int, float]] = {}
        """Per finished shard its tokens, bytes and seconds."""
        self._processes: set[int] = set()
        """Those that finished them."""
        self._start = self._last = time.monotonic()

    def line(self, every: float = REPORT_SECONDS) -> str:
        """Return a line of progress if the last one is so many seconds old, else an empty one."""
        now = time.monotonic()
        if now - self._last < every:
            return ""
        self._last = now
        missing = self._look()
        done = len(self._plan.shards) - len(missing)
        head = f"shards {done} of {len(self._plan.shards)}, {now - self._start:.0f} s"
        tokens, size, seconds = (sum(row[i] for row in self._done.values()) for i in range(3))
        if not tokens or not size:
            return head
        left = sum(self._plan.shards[n].size for n in missing) * tokens / size
        # The time of shards, not of the run: loading the models counts once, not for all that is left.
        rate = tokens / seconds * self._workers
        return f"{head}, {rate:,.0f} tokens a second, about {left:,.0f} left: {duration(left / rate)}"

    def finished(self, process: int) -> bool:
        """Tell whether a process of this run has finished a shard."""
        self._look()
        return process in self._processes

    def _look(self) -> set[int]:
        """Read the timing of shards that were finished since the last look; return those that are missing."""
        # What is done stays so, and a look into the stores for every shard would take long.
        self._missing = missing = set(missing_shards(self._out, self._plan, self._missing))
        for number in self._before - missing - self._done.keys():
            path = self._out / "timing" / f"{number:06d}.json"
            if path.is_file():
                table = read_json(path)
                self._done[number] = (table["tokens"], table["size"], table["seconds"])
                self._processes.add(table.get("process", 0))
        return missing


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def print_error(stream: TextIO = sys.stderr) -> Callable[[str], None]:
    """Return a function that prints a line at once."""
    return lambda line: print(line, file=stream, flush=True)
