"""Workers of `jz3 score` may die, stop or be many: the scores are the same to the byte.

The long tests: `pytest -m slow tests/test_scoring_workers.py`.
"""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import scoring_runs as runs

from jz3.errors import Jz3Error
from jz3.scoring import cluster, workers
from jz3.scoring.config import ChooseSettings, RunSettings, ScoreSettings
from jz3.scoring.job import load_job
from jz3.scoring.merge import merge
from jz3.scoring.plan import Plan, load_plan, locked
from jz3.scoring.request import Request
from jz3.scoring.workers import Progress, duration, missing_shards, parts, run_local, work


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, list[str], Any]:
    """One undisturbed run in one process, and its corpus and targets."""
    folder = tmp_path_factory.mktemp("reference")
    corpus, targets = runs.make_corpus(folder, 120), runs.make_targets(folder)
    runs.run(folder / "out", corpus, targets)
    return folder / "out", corpus, targets


def test_parts_make_the_whole(reference: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    out, corpus, targets = reference
    plan, job = runs.start(tmp_path / "out", corpus, targets)
    for part in ((2, 3), (0, 3)):
        assert work(tmp_path / "out", part)
    assert parts_left(tmp_path / "out", plan, 3) == {1}
    work(tmp_path / "out", (1, 3), rotate=(1, 2))
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)
    for name in ("selected.jsonl", "manifest.json", "rejects.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def parts_left(out: Path, plan: Plan, count: int) -> set[int]:
    part = parts(plan, count)
    return {part[n] for n in missing_shards(out, plan)}


def test_parts_are_runs_of_equal_size(reference: tuple[Path, list[str], Any]) -> None:
    """Neighbours stay together, no part is more than a shard off its share, more parts than shards are empty."""
    plan = load_plan(reference[0])
    largest = max(s.size for s in plan.shards)
    for count in (1, 2, 3, 7):
        part = parts(plan, count)
        assert part == sorted(part) and set(part) <= set(range(count))
        sizes = [sum(s.size for s, i in zip(plan.shards, part, strict=True) if i == n) for n in range(count)]
        assert all(abs(size - plan.size / count) <= largest for size in sizes)
    assert len(set(parts(plan, 100))) == len(plan.shards)


def test_claimed_shards_are_left_to_their_holder(
    reference: tuple[Path, list[str], Any], tmp_path: Path
) -> None:
    _, corpus, targets = reference
    plan, _ = runs.start(tmp_path / "out", corpus, targets)
    with locked(tmp_path / "out" / "claims" / "000003") as mine:
        assert mine
        assert work(tmp_path / "out")
        assert missing_shards(tmp_path / "out", plan) == [3]
    work(tmp_path / "out")
    assert not missing_shards(tmp_path / "out", plan)


def test_limit_stops_at_a_shard_and_the_rerun_goes_on(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit leaves room for the longest shard so far: nothing is begun that would pass it."""
    out, corpus, targets = reference
    plan, job = runs.start(tmp_path / "out", corpus, targets)
    assert not work(tmp_path / "out", deadline=time.time() - 1)
    assert len(missing_shards(tmp_path / "out", plan)) == len(plan.shards)
    from jz3.scoring.shard import Scorer

    begun: list[int] = []
    real = Scorer.run
    clock = [1000.0]

    def slow(self: Scorer, shard: Any) -> int:
        begun.append(shard.number)
        clock[0] += 10.0
        return real(self, shard)

    monkeypatch.setattr(Scorer, "run", slow)
    monkeypatch.setattr(workers.time, "time", lambda: clock[0])
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    assert not work(tmp_path / "out", deadline=1035.0)
    assert begun == [0, 1, 2]
    monkeypatch.undo()
    assert work(tmp_path / "out")
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)


def children(parent: int) -> list[int]:
    """Process ids of the workers that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"jz3.scoring" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
        except (OSError, IndexError):
            continue
    return found


def is_alive(process: int) -> bool:
    """A process that is gone but that nobody waited for has no command line any more."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def holds_a_shard(process: int) -> bool:
    try:
        links = [os.readlink(p) for p in Path(f"/proc/{process}/fd").iterdir()]
    except OSError:
        return False
    return any("/claims/" in link for link in links)


class Killer(threading.Thread):
    """Kills this process's workers with SIGKILL, now at once, now in the middle of a shard."""

    def __init__(self, kills: int, seed: int, pause: float) -> None:
        super().__init__(daemon=True)
        self.wanted, self.kills, self.inside = kills, 0, 0
        self._random, self._pause = random.Random(seed), pause
        self.stop = threading.Event()

    def run(self) -> None:
        while self.kills < self.wanted and not self.stop.is_set():
            time.sleep(self._random.uniform(0.01, self._pause))
            alive = children(os.getpid())
            at_work = [p for p in alive if holds_a_shard(p)]
            chosen = at_work if self.kills % 4 else alive
            if not chosen:
                continue
            victim = self._random.choice(chosen)
            inside = holds_a_shard(victim)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.kills += 1
            self.inside += inside


def test_killed_worker_is_replaced_and_its_shard_redone(
    reference: tuple[Path, list[str], Any], tmp_path: Path
) -> None:
    out, corpus, targets = reference
    plan, job = runs.start(tmp_path / "out", corpus, targets)
    killer, said = Killer(2, 1, 0.05), []
    killer.kills = 1  # the first victim is one that holds a shard
    killer.start()
    run_local(tmp_path / "out", plan, 2, 2, say=said.append)
    killer.stop.set()
    killer.join()
    assert killer.inside == 1
    assert sum("died (SIGKILL); restarted, 1 of 2" in line for line in said) == 1
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)


def test_worker_that_keeps_dying_ends_the_run(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, corpus, targets = reference
    plan, _ = runs.start(tmp_path / "out", corpus, targets)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(workers.sys, "executable", str(script))
    with pytest.raises(Jz3Error, match=r"died \(SIGKILL\) and was restarted 1 times already"):
        run_local(tmp_path / "out", plan, 2, 1)
    script.write_text("#!/bin/sh\necho 'jz3: error: the value is wrong' >&2\nexit 2\n")
    with pytest.raises(Jz3Error, match="^the value is wrong$"):
        run_local(tmp_path / "out", plan, 2, 5)


def test_workers_are_placed(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One per GPU by CUDA_VISIBLE_DEVICES; without one, each on cores of its own."""
    _, corpus, targets = reference
    plan, _ = runs.start(tmp_path / "out", corpus, targets)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS $*" >> {tmp_path}/started\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(workers.sys, "executable", str(script))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert workers.default_workers() == 2
    run_local(tmp_path / "out", plan, 2, 0)
    started = sorted((tmp_path / "started").read_text().splitlines())
    assert [line.split()[:2] for line in started] == [["4", "1"], ["6", "1"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: {3, 5, 7})
    run_local(tmp_path / "out", plan, 2, 0)
    cores = sorted(line.split("--cores ")[1] for line in (tmp_path / "started").read_text().splitlines()[2:])
    assert cores == ["3", "5"] and workers.default_threads(2) == 1
    # With GPUs the threads, which identify a run, don't depend on the number of workers.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert workers.default_threads(1) == workers.default_threads(2) == 3


def test_time_left_is_told_by_tokens(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 0 has most of the bytes: once it is done the rest is expected to take little."""
    from jz3.files import write_json

    _, corpus, targets = reference
    plan, _ = runs.start(tmp_path / "out", corpus, targets)
    progress = Progress(tmp_path / "out", plan, 2)
    assert progress.line(every=60) == ""
    write_json(tmp_path / "out" / "timing" / "000000.json", {"tokens": 1000, "size": 5000, "seconds": 10.0})
    (tmp_path / "out" / "scores").mkdir()
    (tmp_path / "out" / "scores" / "000000.parquet").touch()
    left = sum(s.size for s in plan.shards[1:]) / 5
    assert f"200 tokens a second, about {left:,.0f} left: {duration(left / 200)}" in progress.line(every=0)


SBATCH = """#!{python}
# Runs a job at once, an array's tasks one after the other; what depends on a failed job never runs.
import os, pathlib, subprocess, sys
arguments = dict(a.partition("=")[::2] for a in sys.argv[1:-1])
folder = pathlib.Path("{folder}")
calls = folder / "calls"
calls.open("a").write(" ".join(sys.argv[1:]) + "\\n")
job = str(4710 + len(calls.read_text().splitlines()))
before = arguments.get("--dependency", "").rpartition(":")[2]
status = 0
if before and (folder / before).read_text() != "0":
    assert "--kill-on-invalid-dep" in arguments, "the job would wait for ever"
    status = 1
else:
    for task in arguments.get("--array", "none").split(","):
        log = open(arguments["--output"].replace("%a", task), "w")
        script = ["/bin/false"] if task == os.environ.get("FAIL") else ["bash", sys.argv[-1]]
        environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": task}}
        done = subprocess.run(script, stdout=log, stderr=log, env=environment)
        status = status or done.returncode
(folder / job).write_text(str(status))
print(job + ";cluster")
sys.exit(status if "--wait" in arguments else 0)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm; the file lists the calls of sbatch."""
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(SBATCH.format(python=sys.executable, folder=tmp_path))
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    return tmp_path / "calls"


def asked(corpus: list[str], targets: Any, **settings: Any) -> Request:
    chosen = ScoreSettings(**{**runs.SMALL, **settings})
    return Request(tuple(corpus), targets, chosen, ChooseSettings(k=8))


def test_requests_are_read_as_they_were_written(tmp_path: Path) -> None:
    request = Request(
        ("a*.jsonl",), {"t": tmp_path}, ScoreSettings(checkpoint=("a=1", "b=2")), ChooseSettings(k=3)
    )
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_slurm_task_that_fails_is_named_and_done_again(
    reference: tuple[Path, list[str], Any], tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fits, shards and choice are jobs, each after the one before; a failed task holds up the choice."""
    out, corpus, targets = reference
    request = asked(corpus, targets)
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(Jz3Error, match=r"Slurm job 4712: 1 of 2 tasks failed \(1; .* submits only these"):
        cluster.run_slurm(tmp_path / "out", request, 2, "--partition=gpu --time=1:00:00")
    assert parts_left(tmp_path / "out", load_plan(tmp_path / "out"), 2) == {1}
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.delenv("FAIL")
    cluster.run_slurm(tmp_path / "out", request, 2)
    calls = slurm.read_text().splitlines()
    assert len(calls) == 6
    assert all("--partition=gpu --time=1:00:00" in call for call in calls[:3])
    assert [("--array" in call, "--wait" in call) for call in calls[:3]] == [(0, 0), (1, 0), (0, 1)]
    assert "--array=0,1" in calls[1] and "--dependency=afterok:4711" in calls[1]
    assert "--dependency=afterok:4712" in calls[2]
    assert "--array=1 " in calls[4]
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)
    for name in ("selected.jsonl", "manifest.json", "rejects.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
    cluster.run_slurm(tmp_path / "out", request, 2)
    assert len(slurm.read_text().splitlines()) == 6


def test_slurm_settles_on_the_node_what_the_request_leaves_open(
    reference: tuple[Path, list[str], Any], tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that submits neither plans nor fits: its number format and cores don't count."""
    from jz3.scoring.command import score_corpus

    _, corpus, targets = reference

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this is a job's work")

    for name in ("jz3.scoring.plan.best_dtype", "jz3.scoring.plan.make_plan", "jz3.scoring.request.prepare"):
        monkeypatch.setattr(name, refuse)
    # What the jobs see: a node with one core of its own.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    try:
        settings = ScoreSettings(**{**runs.SMALL, "dtype": "auto", "threads": 0, "kind": "sketch"})
        run = RunSettings(slurm=True, workers=3)
        score_corpus(tuple(corpus), targets, tmp_path / "out", settings, ChooseSettings(k=8), run)
    finally:
        os.sched_setaffinity(0, cores)
    from jz3.machine import best_dtype

    found = load_plan(tmp_path / "out").settings
    assert (found.threads, found.dtype) == (1, best_dtype())
    assert len(runs.rows_of(tmp_path / "out" / "selected.jsonl")) == 8
    assert not missing_shards(tmp_path / "out", load_plan(tmp_path / "out"))


def test_slurm_errors_of_each_job_are_told(
    reference: tuple[Path, list[str], Any], tmp_path: Path, slurm: Path
) -> None:
    _, corpus, targets = reference
    with pytest.raises(Jz3Error, match="^the corpus holds|matches no file"):
        cluster.run_slurm(tmp_path / "none", asked([str(tmp_path / "none*.jsonl")], targets), 2)
    empty = [str(runs.write_lines(tmp_path / "empty.jsonl", [{"body": "x"}]))]
    with pytest.raises(Jz3Error, match="no text of the corpus could be scored"):
        cluster.run_slurm(tmp_path / "empty", asked(empty, targets, kind="sketch"), 1)
    out = tmp_path / "limit"
    cluster.run_slurm(out, asked(corpus, targets, kind="sketch"), 2, hours=1e-9)
    assert len(missing_shards(out, load_plan(out))) == len(load_plan(out).shards)
    assert "nothing is chosen" in (out / "slurm" / "merge.log").read_text()


def test_slurm_that_is_missing_or_refuses(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, corpus, targets = reference
    request = asked(corpus, targets)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Jz3Error, match="needs sbatch on the PATH"):
        cluster.run_slurm(tmp_path / "out", request, 2)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(Jz3Error, match="refused the job: invalid partition"):
        cluster.run_slurm(tmp_path / "out", request, 2)


def test_whole_command(reference: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    from jz3.scoring.command import score_corpus

    out, corpus, targets = reference
    settings, choose = ScoreSettings(**runs.SMALL), ChooseSettings(k=8)
    folder = tmp_path / "out"
    for part in ("0/2", "1/2"):
        score_corpus(tuple(corpus), targets, folder, settings, choose, RunSettings(worker=part))
        assert not (folder / "manifest.json").exists()
    with locked(folder / ".lock"), pytest.raises(Jz3Error, match="another process is running"):
        score_corpus(tuple(corpus), targets, folder, settings, choose, RunSettings())
    score_corpus(tuple(corpus), targets, folder, settings, choose, RunSettings())
    assert runs.score_files(folder) == runs.score_files(out)
    assert (folder / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()


def test_ray_cluster_of_small_nodes(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of 4 CPUs and a dead one of 16 have no room for a worker of 8."""
    _, corpus, targets = reference
    nodes = [{"Alive": n < 16, "Resources": {"CPU": float(n)}} for n in (4, 4, 16)]
    exceptions = types.SimpleNamespace(RayError=RuntimeError)
    ray = types.SimpleNamespace(
        init=lambda **_: None, shutdown=lambda: None, nodes=lambda: nodes, exceptions=exceptions
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    with pytest.raises(Jz3Error, match="has the 8 CPUs of a worker .*has 4.*--threads"):
        cluster.run_ray(tmp_path / "out", asked(corpus, targets, threads=8), 0, "auto")


def test_threads_of_a_ray_task_are_its_share_of_a_node() -> None:
    small, large = {"CPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}
    assert cluster._threads([small, large], 0) == 16
    assert cluster._threads([small, {"CPU": 12.0}], 0) == 8
    assert cluster._threads([small, {"CPU": 12.0}], 4) == 4
    assert cluster._threads([small], 100) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_cluster(reference: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'jz3[cluster]'")
    out, corpus, targets = reference
    cluster.run_ray(tmp_path / "out", asked(corpus, targets), 2, "local")
    plan, job = load_plan(tmp_path / "out"), load_job(tmp_path / "out")
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)
    runs.start(tmp_path / "broken", corpus, targets)
    (tmp_path / "broken" / "fit" / "0" / "fit.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Jz3Error, match=r"2 of 2 Ray tasks failed \(0, 1\); task 0: .*no readable fit"):
        cluster.run_ray(tmp_path / "broken", asked(corpus, targets), 2, "local")


class RayKiller(threading.Thread):
    """Kills Ray's worker processes of this user with SIGKILL while they hold a shard of a run."""

    def __init__(self, out: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self._claims, self.wanted = str((out / "claims").resolve()), kills
        self.killed: list[tuple[int, str]] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.wanted and not self.stop.is_set():
            time.sleep(0.005)
            for process, claim in self._holders():
                # The next victim holds another shard: one task may be started again only so often.
                if claim not in {c for _, c in self.killed}:
                    os.kill(process, signal.SIGKILL)
                    self.killed.append((process, claim))
                    break

    def _holders(self) -> list[tuple[int, str]]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if not (folder / "cmdline").read_bytes().startswith(b"ray::"):
                    continue
                links = [os.readlink(link) for link in (folder / "fd").iterdir()]
            except OSError:
                continue
            found += [(int(folder.name), link) for link in links if link.startswith(self._claims)]
        return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_ray_worker_is_done_again(tmp_path: Path, tiny_model: Path) -> None:
    """kill -9 of Ray's workers while they hold a shard: Ray starts the tasks again, the scores are the same."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'jz3[cluster]'")
    corpus, targets = runs.make_corpus(tmp_path, 600), runs.make_targets(tmp_path)
    runs.run(tmp_path / "reference", corpus, targets)
    killer = RayKiller(tmp_path / "out", 2)
    killer.start()
    cluster.run_ray(tmp_path / "out", asked(corpus, targets), 2, "local")
    killer.stop.set()
    killer.join()
    assert len(killer.killed) == 2 and len({process for process, _ in killer.killed}) == 2
    plan, job = load_plan(tmp_path / "out"), load_job(tmp_path / "out")
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(tmp_path / "reference")
    assert runs.scores(tmp_path / "out")["id"].to_pylist() == [f"doc-{i}" for i in range(600)]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_of_four_workers(tmp_path: Path, tiny_model: Path) -> None:
    """kill -9 at random moments, at least 20 times; the whole run is killed and begun again as well."""
    corpus, targets = runs.make_corpus(tmp_path, 1200), runs.make_targets(tmp_path)
    runs.run(tmp_path / "reference", corpus, targets)
    plan, job = runs.start(tmp_path / "out", corpus, targets)
    killer = Killer(20, 7, 1.0)
    killer.start()
    run_local(tmp_path / "out", plan, 4, 100)
    killer.stop.set()
    killer.join()
    assert killer.kills >= 20 and killer.inside >= 10
    merge(tmp_path / "out", plan, job, ChooseSettings(k=8))
    assert runs.score_files(tmp_path / "out") == runs.score_files(tmp_path / "reference")
    ids = runs.scores(tmp_path / "out")["id"].to_pylist()
    assert ids == [f"doc-{i}" for i in range(1200)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_run_leaves_no_worker_behind(reference: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    out, corpus, targets = reference
    settings = [f"--{k.replace('_', '-')}={v}" for k, v in runs.SMALL.items()]
    tasks = [f"--target={n}={p}" for n, p in targets.items() if n != "control"]
    command = [sys.executable, "-m", "jz3", "score", *corpus, *tasks, f"--control={targets['control']}"]
    command += [*settings, "--k=8", "--workers=2", f"--out={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started: list[int] = []
    deadline = time.monotonic() + 300
    while not any(holds_a_shard(p) for p in started) and time.monotonic() < deadline:
        time.sleep(0.05)
        started = children(process.pid)
    process.kill()
    process.wait()
    time.sleep(1)
    assert started and not [p for p in started if is_alive(p)]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)
