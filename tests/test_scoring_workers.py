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
from pathlib import Path
from typing import Any

import pytest
import scoring_runs as runs

from jz3.errors import Jz3Error
from jz3.files import locked
from jz3.scoring import workers
from jz3.scoring.config import ChooseSettings, RunSettings, ScoreSettings
from jz3.scoring.merge import merge
from jz3.scoring.plan import Plan, load_plan
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


def test_deaths_with_a_finished_shard_in_between_do_not_end_the_run(
    reference: tuple[Path, list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, corpus, targets = reference
    out = tmp_path / "out"
    plan, _ = runs.start(out, corpus, targets)
    for folder in ("scores", "timing"):
        (out / folder).mkdir()
    script = tmp_path / "python"
    lines = [
        "#!/bin/sh",
        f"cd {out}",
        f"for n in {' '.join(f'{s.number:06d}' for s in plan.shards)}; do",
        "  [ -e scores/$n.parquet ] && continue",
        '  echo "{\\"tokens\\": 1, \\"size\\": 1, \\"seconds\\": 1, \\"process\\": $$}" > timing/$n.json',
        "  touch scores/$n.parquet",
        "  kill -9 $$",
        "done",
    ]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(workers.sys, "executable", str(script))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    said: list[str] = []
    run_local(out, plan, 1, 1, say=said.append)
    assert len(said) == len(plan.shards) > 3 and all("restarted, 1 of 1" in line for line in said)


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
