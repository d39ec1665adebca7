"""The same work on clusters: jobs of Slurm, tasks of Ray. No collectives, nothing but shared files.

The plan is made and the fits are computed by a job or task of their own, since the number format and
the threads, which identify a run, are to be those of the machines that do the shards.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error
from jz3.files import write_text
from jz3.scoring.plan import REPORT_SECONDS, Plan, load_plan
from jz3.scoring.request import Request
from jz3.scoring.workers import (
    THREAD_VARIABLES,
    Progress,
    default_threads,
    last_line,
    missing_shards,
    parts,
    work,
)

SCRIPT = """#!/bin/bash
#SBATCH --job-name=jz3-score
cd {folder} || exit 1
exec {python} -m jz3.scoring {out} {step}
"""
STEPS = {
    "prepare": "--step prepare",
    "work": '--part "$SLURM_ARRAY_TASK_ID/{tasks}"{hours}',
    "merge": "--step merge",
}
"""Per job what it does; each begins when the one before has ended well."""
ERROR = "jz3: error: "
RETRIES = 3
"""How often Ray starts a task again whose process or node died."""


def run_slurm(
    out: Path,
    request: Request,
    tasks: int,
    arguments: str = "",
    hours: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Submit the fits, the missing shards as an array, and the choice as jobs; wait for the last.

    Each depends on the one before (afterok), so that they go on without this process. Task i of the array
    does the i-th part of the plan; only tasks with missing shards are submitted. Nothing is done if no
    shard is missing.

    Args:
        out: the run's folder, on a disk that all nodes share.
        request: what to score.
        tasks: size of the array.
        arguments: further arguments of sbatch, for all jobs.
        hours: each task stops at a shard boundary before so many hours; 0: no limit.
        say: told one line per step.

    Raises:
        Jz3Error: there is no sbatch, it refused a job, or jobs failed; they and their logs are named.
    """
    todo = list(range(tasks))
    if (out / "plan.json").is_file():
        plan = request.plan(out, default_threads(1))
        todo = _unfinished(out, plan, tasks)
        if not todo and (out / "job.json").is_file():
            return
    folder = out.resolve() / "slurm"
    request.write(folder / "request.json")
    for log in folder.glob("*.log"):
        log.unlink()
    limit = f" --hours {hours}" if hours else ""
    own = {"work": [f"--array={','.join(map(str, todo))}"], "merge": ["--wait"]}
    before = ""
    jobs = {}
    for name, step in STEPS.items():
        script = folder / f"{name}.sh"
        text = SCRIPT.format(
            folder=shlex.quote(str(Path.cwd())),
            python=shlex.quote(sys.executable),
            out=shlex.quote(str(out.resolve())),
            step=step.format(tasks=tasks, hours=limit),
        )
        write_text(script, text)
        command = ["sbatch", "--parsable", *own.get(name, [])]
        if before:
            # Without the second a job whose condition can't come true any more waits for ever.
            command += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
        log = folder / ("%a.log" if name == "work" else f"{name}.log")
        command += [f"--output={log}", *shlex.split(arguments), str(script)]
        say(shlex.join(command))
        jobs[name] = before = _submit(command)
    _check_jobs(out, tasks, todo, jobs, hours)


def _submit(command: list[str]) -> str:
    """Run sbatch and return the job's number."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Jz3Error(
            "--slurm needs sbatch on the PATH; elsewhere start one `jz3 score ... --worker I/N` per task"
        ) from error
    job = done.stdout.strip().splitlines()[0].split(";")[0] if done.stdout.strip() else ""
    if not job:
        raise Jz3Error(f"sbatch refused the job: {done.stderr.strip() or f'status {done.returncode}'}")
    return job


def _unfinished(out: Path, plan: Plan, tasks: int) -> list[int]:
    """Return the tasks with missing shards."""
    part = parts(plan, tasks)
    return sorted({part[n] for n in missing_shards(out, plan)})


def _check_jobs(out: Path, tasks: int, todo: list[int], jobs: dict[str, str], hours: float) -> None:
    """Say which job failed, if one did."""
    folder = out / "slurm"
    again = "run the same command again to go on"
    failed = last_line(folder / "prepare.log")
    if failed.startswith(ERROR):
        raise Jz3Error(failed.removeprefix(ERROR))
    if not (out / "job.json").is_file():
        raise Jz3Error(f"Slurm job {jobs['prepare']} made no fits; see {folder / 'prepare.log'} and {again}")
    plan = load_plan(out)
    unfinished = _unfinished(out, plan, tasks)
    # A task that stops at its limit ends well, and then the last job runs.
    if unfinished and not (hours and (folder / "merge.log").is_file()):
        missing = missing_shards(out, plan)
        raise Jz3Error(
            f"Slurm job {jobs['work']}: {len(unfinished)} of {len(todo)} tasks failed ({_some(unfinished)}; "
            f"{len(missing)} shards are missing: {_some(missing)}); see {folder}/TASK.log and run the same command "
            "again: it submits only these tasks"
        )
    failed = last_line(folder / "merge.log")
    if failed.startswith(ERROR):
        raise Jz3Error(failed.removeprefix(ERROR))
    if not unfinished and not (out / "manifest.json").is_file():
        raise Jz3Error(
            f"Slurm job {jobs['merge']} chose nothing; see {folder / 'merge.log'} and {again}: it chooses here"
        )


def run_ray(
    out: Path,
    request: Request,
    tasks: int,
    address: str,
    deadline: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Plan, prepare and do the missing shards as Ray tasks, one per GPU, or per `threads` CPUs.

    Nothing is done if no shard is missing.

    Args:
        out: the run's folder, on a disk that all nodes share.
        request: what to score.
        tasks: how many tasks; 0: as many as the cluster has room for.
        address: of the cluster; `local` starts one on this machine.
        deadline: seconds since the epoch, see `work`; it is the same for a task that begins late.
        say: told one line per step.

    Raises:
        Jz3Error: ray is missing, the cluster can't be reached or has no node with enough CPUs, or tasks
            failed.
    """
    settings = request.settings
    if (out / "plan.json").is_file():
        plan = request.plan(out, default_threads(1))
        settings = plan.settings
        if (out / "job.json").is_file() and not missing_shards(out, plan):
            return
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise Jz3Error("--ray needs the package ray: pip install 'jz3[cluster]'") from error
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
    try:
        ray.init(address=None if address == "local" else address, **_known(address, options))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Jz3Error(f"the Ray cluster {address!r} can't be reached: {error}") from error
    failed: dict[int, str] = {}
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        threads = settings.threads or _threads(nodes, tasks)
        devices = sum(int(node.get("GPU", 0)) for node in nodes)
        # A task runs on one node, so that what other nodes have left is no room for it.
        room = devices or sum(int(node.get("CPU", 0)) // threads for node in nodes)
        if not room:
            most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
            raise Jz3Error(
                f"no node of the Ray cluster {address!r} has the {threads} CPUs of a worker (the largest has "
                f"{most}); use a smaller --threads in another folder"
            )
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        needs: dict[str, Any] = {"num_gpus": 1} if devices else {"num_cpus": threads}
        needs |= {"max_retries": RETRIES, "runtime_env": {"env_vars": variables}}
        say("planning and fitting in a task")
        try:
            ray.get(ray.remote(**needs)(_ray_prepare).remote(str(out.resolve()), request, threads))
        except RayError as error:
            raise Jz3Error(_cause(error)) from error
        plan = load_plan(out)
        tasks = tasks or room
        part = ray.remote(**needs)(_ray_part)
        pending = {part.remote(str(out.resolve()), (i, tasks), deadline): i for i in range(tasks)}
        progress = Progress(out, plan, min(tasks, room))
        while pending:
            ready, _ = ray.wait(list(pending), timeout=REPORT_SECONDS)
            for reference in ready:
                number = pending.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    failed[number] = _cause(error)
            if line := progress.line():
                say(line)
    finally:
        ray.shutdown()
    if failed:
        number = min(failed)
        raise Jz3Error(
            f"{len(failed)} of {tasks} Ray tasks failed ({_some(sorted(failed))}); task {number}: {failed[number]}; "
            "run the same command again to go on"
        )


def _threads(nodes: list[dict[str, Any]], tasks: int) -> int:
    """Return the CPU threads of a task: a GPU's share of its node, or a task's if none has a GPU."""
    shares = [node.get("CPU", 1) // node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
    if not shares:
        each = max(1, -(-tasks // max(len(nodes), 1)))
        shares = [node.get("CPU", 1) // each for node in nodes if node.get("CPU", 0) >= 1]
    return max(1, int(min(shares, default=1)))


def _known(address: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what may be said to a cluster: a running one takes no options of its start."""
    return options if address == "local" else {"log_to_driver": options["log_to_driver"]}


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _ray_prepare(out: str, request: Request, threads: int) -> None:
    request.prepare(Path(out), threads)


def _ray_part(out: str, part: tuple[int, int], deadline: float) -> None:
    work(Path(out), part, deadline)


def _some(numbers: list[int], most: int = 12) -> str:
    text = ", ".join(map(str, numbers[:most]))
    return text if len(numbers) <= most else f"{text} and {len(numbers) - most} more"
