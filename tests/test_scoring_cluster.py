"""`jz3 score` on Slurm and Ray: the same scores to the byte, planned and fitted where the work is done.

The long tests: `pytest -m slow tests/test_scoring_cluster.py`; those of Ray need it installed.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import scoring_runs as runs

from jz3.errors import Jz3Error
from jz3.scoring import __main__ as scoring_main
from jz3.scoring import cluster
from jz3.scoring.config import ChooseSettings, RunSettings, ScoreSettings
from jz3.scoring.job import load_job
from jz3.scoring.merge import merge
from jz3.scoring.plan import load_plan
from jz3.scoring.request import Request
from jz3.scoring.workers import missing_shards, parts


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, list[str], Any]:
    """One undisturbed run in one process, and its corpus and targets."""
    folder = tmp_path_factory.mktemp("reference")
    corpus, targets = runs.make_corpus(folder, 120), runs.make_targets(folder)
    runs.run(folder / "out", corpus, targets)
    return folder / "out", corpus, targets


SBATCH = """#!{python}
# Runs a job's script at once, an array's tasks one after the other.
import os, pathlib, subprocess, sys
arguments = dict(a.partition("=")[::2] for a in sys.argv[1:-1])
folder = pathlib.Path("{folder}")
calls = folder / "calls"
calls.open("a").write(" ".join(sys.argv[1:]) + "\\n")
job = str(4710 + len(calls.read_text().splitlines()))
status = 0
for task in arguments.get("--array", "none").split(","):
    with open(arguments["--output"].replace("%a", task), "w") as log:
        environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": task}}
        done = subprocess.run(["bash", sys.argv[-1]], stdout=log, stderr=log, env=environment)
    status = status or done.returncode
print(job + ";cluster")
sys.exit(status if "--wait" in arguments else 0)
"""


class Slurm:
    """Slurm in this process: does a job's script at once, an array's tasks one after the other."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fails = ""
        """The task that dies before it begins."""
        self._status: dict[str, int] = {}

    def submit(self, command: list[str]) -> str:
        self.calls.append(command)
        job = str(4710 + len(self.calls))
        options = {a.partition("=")[0]: a.partition("=")[2] for a in command[1:-1]}
        before = options.get("--dependency", "").rpartition(":")[2]
        tasks = options.get("--array", "none").split(",")
        if before and self._status[before]:
            assert "--kill-on-invalid-dep" in options, "the job would wait for ever"
            self._status[job] = 1
        else:
            self._status[job] = max(self._run(command[-1], options["--output"], task) for task in tasks)
        return job

    def _run(self, script: str, log: str, task: str) -> int:
        if task == self.fails:
            return 1
        line = Path(script).read_text().splitlines()[-1].replace("$SLURM_ARRAY_TASK_ID", task)
        with open(log.replace("%a", task), "w") as handle, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", shlex.split(line)[3:])
            patch.setattr("os.environ", dict(os.environ))
            with contextlib.redirect_stdout(handle), contextlib.redirect_stderr(handle):
                return scoring_main.main()


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    stand_in = Slurm()
    monkeypatch.setattr(cluster, "_submit", stand_in.submit)
    return stand_in


def asked(corpus: list[str], targets: Any, **settings: Any) -> Request:
    chosen = ScoreSettings(**{**runs.SMALL, **settings})
    return Request(tuple(corpus), targets, chosen, ChooseSettings(k=8))


def test_requests_are_read_as_they_were_written(tmp_path: Path) -> None:
    request = Request(
        ("a*.jsonl",),
        {"t": tmp_path, "a": tmp_path},
        ScoreSettings(checkpoint=("a=1", "b=2")),
        ChooseSettings(k=3),
    )
    request.write(tmp_path / "request.json")
    found = Request.read(tmp_path / "request.json")
    assert found == request and list(found.targets) == ["t", "a"]


def test_slurm_task_that_fails_is_named_and_done_again(
    reference: tuple[Path, list[str], Any], tmp_path: Path, slurm: Slurm
) -> None:
    """Fits, shards and choice are jobs, each after the one before; a failed task holds up the choice."""
    out, corpus, targets = reference
    request = asked(corpus, targets)
    slurm.fails = "1"
    with pytest.raises(Jz3Error, match=r"Slurm job 4712: 1 of 2 tasks failed \(1; .* submits only these"):
        cluster.run_slurm(tmp_path / "out", request, 2, "--partition=gpu --time=1:00:00")
    plan = load_plan(tmp_path / "out")
    assert {parts(plan, 2)[n] for n in missing_shards(tmp_path / "out", plan)} == {1}
    assert not (tmp_path / "out" / "manifest.json").exists()
    slurm.fails = ""
    cluster.run_slurm(tmp_path / "out", request, 2)
    assert len(slurm.calls) == 6
    assert all({"--partition=gpu", "--time=1:00:00"} <= set(call) for call in slurm.calls[:3])
    assert ["--wait" in call for call in slurm.calls[:3]] == [False, False, True]
    assert {"--array=0,1", "--dependency=afterok:4711"} <= set(slurm.calls[1])
    assert "--dependency=afterok:4712" in slurm.calls[2]
    assert "--array=1" in slurm.calls[4]
    assert runs.score_files(tmp_path / "out") == runs.score_files(out)
    for name in ("selected.jsonl", "manifest.json", "rejects.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
    cluster.run_slurm(tmp_path / "out", request, 2)
    assert len(slurm.calls) == 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_slurm_settles_on_the_node_what_the_request_leaves_open(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that submits neither plans nor fits: its number format and cores don't count."""
    from jz3.machine import best_dtype
    from jz3.scoring.command import score_corpus

    _, corpus, targets = reference
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(SBATCH.format(python=sys.executable, folder=tmp_path))
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this is a job's work")

    for name in ("jz3.scoring.plan.best_dtype", "jz3.scoring.plan.make_plan", "jz3.scoring.request.prepare"):
        monkeypatch.setattr(name, refuse)
    # What the jobs see: a node with one core of its own.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        settings = ScoreSettings(**{**runs.SMALL, "dtype": "auto", "threads": 0, "kind": "sketch"})
        run = RunSettings(slurm=True, workers=3)
        score_corpus(tuple(corpus), targets, tmp_path / "out", settings, ChooseSettings(k=8), run)
    finally:
        os.sched_setaffinity(0, cores)
    found = load_plan(tmp_path / "out").settings
    assert (found.threads, found.dtype) == (1, best_dtype())
    assert len(runs.rows_of(tmp_path / "out" / "selected.jsonl")) == 8
    assert not missing_shards(tmp_path / "out", load_plan(tmp_path / "out"))


def test_slurm_errors_of_each_job_are_told(
    reference: tuple[Path, list[str], Any], tmp_path: Path, slurm: Slurm
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
    with pytest.raises(
        Jz3Error, match=r"2 of 2 Ray tasks failed \(0, 1\); task 0: .*fit.safetensors can't be read"
    ):
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
