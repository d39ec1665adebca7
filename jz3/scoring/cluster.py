"""The same workers on clusters: a Slurm array job, Ray tasks. No collectives, nothing but shared files."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jz3.errors import Jz3Error
from jz3.files import write_text
from jz3.scoring.plan import Plan
from jz3.scoring.workers import REPORT_SECONDS, THREAD_VARIABLES, Progress, missing_shards, work

SCRIPT = """#!/bin/bash
#SBATCH --job-name=jz3-score
{exports}
cd {folder} || exit 1
exec {python} -m jz3.scoring {out} --part "$SLURM_ARRAY_TASK_ID/{tasks}"{hours}
"""
RETRIES = 3
"""How often Ray starts a task again whose process or node died."""


def run_slurm(
    out: Path,
    plan: Plan,
    tasks: int,
    arguments: str = "",
    hours: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Submit the missing shards as an array job and wait for it.

    Task i of n does the shards whose number is i modulo n; only tasks with missing shards are submitted.

    Args:
        out: the run's folder, on a disk that all nodes share.
        plan: its plan.
        tasks: size of the array.
        arguments: further arguments of sbatch.
        hours: each task stops at a shard boundary before so many hours; 0: no limit.
        say: told one line per step.

    Raises:
        Jz3Error: there is no sbatch, it refused the job, or tasks failed; they and their logs are named.
    """
    todo = sorted({n % tasks for n in missing_shards(out, plan)})
    if not todo:
        return
    script = out / "slurm" / "job.sh"
    text = SCRIPT.format(
        exports="\n".join(f"export {name}={plan.settings.threads}" for name in THREAD_VARIABLES),
        folder=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        out=shlex.quote(str(out.resolve())),
        tasks=tasks,
        hours=f" --hours {hours}" if hours else "",
    )
    write_text(script, text)
    command = ["sbatch", "--wait", "--parsable", f"--array={','.join(map(str, todo))}"]
    command += [f"--output={out.resolve() / 'slurm' / '%a.log'}", *shlex.split(arguments), str(script)]
    say(f"{shlex.join(command)}")
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Jz3Error(
            "--slurm needs sbatch on the PATH; elsewhere start one `jz3 score ... --worker I/N` per task"
        ) from error
    job = done.stdout.strip().splitlines()[0].split(";")[0] if done.stdout.strip() else ""
    if not job:
        raise Jz3Error(f"sbatch refused the job: {done.stderr.strip() or f'status {done.returncode}'}")
    missing = missing_shards(out, plan)
    failed = sorted({n % tasks for n in missing})
    if failed and not (hours and done.returncode == 0):
        raise Jz3Error(
            f"Slurm job {job}: {len(failed)} of {len(todo)} tasks failed ({_some(failed)}; {len(missing)} shards "
            f"are missing: {_some(missing)}); see {out / 'slurm'}/TASK.log and run the same command again: it "
            "submits only these tasks"
        )


def run_ray(
    out: Path,
    plan: Plan,
    tasks: int,
    address: str,
    deadline: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Do the missing shards as Ray tasks, one per GPU, or per `threads` CPUs where there is none.

    Args:
        out: the run's folder, on a disk that all nodes share.
        plan: its plan.
        tasks: how many tasks; 0: as many as the cluster has room for.
        address: of the cluster; `local` starts one on this machine.
        deadline: seconds since the epoch, see `work`; it is the same for a task that begins late.
        say: told one line per step.

    Raises:
        Jz3Error: ray is missing, the cluster can't be reached or has no node with enough CPUs, or tasks
            failed.
    """
    if not missing_shards(out, plan):
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
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        threads = max(plan.settings.threads, 1)
        devices = sum(int(node.get("GPU", 0)) for node in nodes)
        # A task runs on one node, so that what other nodes have left is no room for it.
        room = devices or sum(int(node.get("CPU", 0)) // threads for node in nodes)
        if not room:
            most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
            raise Jz3Error(
                f"no node of the Ray cluster {address!r} has the {threads} CPUs of a worker (the largest has "
                f"{most}); use a smaller --threads in another folder"
            )
        needs: dict[str, Any] = {"num_gpus": 1} if devices else {"num_cpus": threads}
        tasks = tasks or room
        part = ray.remote(max_retries=RETRIES, **needs)(_ray_part)
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        part = part.options(runtime_env={"env_vars": variables})
        pending = {part.remote(str(out.resolve()), (i, tasks), deadline): i for i in range(tasks)}
        progress = Progress(out, plan, min(tasks, room))
        failed: dict[int, str] = {}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=REPORT_SECONDS)
            for reference in ready:
                number = pending.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    cause = getattr(error, "cause", None) or error
                    failed[number] = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
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


def _known(address: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what may be said to a cluster: a running one takes no options of its start."""
    return options if address == "local" else {"log_to_driver": options["log_to_driver"]}


def _ray_part(out: str, part: tuple[int, int], deadline: float) -> None:
    work(Path(out), part, deadline)


def _some(numbers: list[int], most: int = 12) -> str:
    text = ", ".join(map(str, numbers[:most]))
    return text if len(numbers) <= most else f"{text} and {len(numbers) - most} more"
