"""`python -m jz3.scoring OUT`: one worker of a prepared run, or a step of a run in a job of its own."""

import argparse
import os
import sys
import time
from pathlib import Path

from jz3.errors import Jz3Error
from jz3.processes import end_with
from jz3.scoring.workers import (
    THREAD_VARIABLES,
    USER_ERROR,
    default_threads,
    missing_shards,
    print_error,
    work,
)


def _pair(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    return int(number), int(count)


def _limit_threads(count: int) -> None:
    """Keep the libraries that are loaded later from starting more threads than the run has."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))


def _prepare(out: Path) -> None:
    from jz3.scoring.request import Request

    request = Request.read(out / "slurm" / "request.json")
    threads = request.settings.threads or default_threads(1)
    _limit_threads(threads)
    request.prepare(out, threads, print_error(sys.stderr))


def _merge(out: Path) -> None:
    from jz3.scoring.job import load_job
    from jz3.scoring.merge import merge, summary
    from jz3.scoring.plan import load_plan
    from jz3.scoring.request import Request

    plan = load_plan(out)
    if missing := missing_shards(out, plan):
        print(f"{len(missing)} of {len(plan.shards)} shards are not scored yet: nothing is chosen")
        return
    choose = Request.read(out / "slurm" / "request.json").choose
    summary(merge(out, plan, load_job(out), choose), print)


def _work(arguments: argparse.Namespace) -> None:
    from jz3.scoring.plan import load_plan

    hours, deadline = arguments.hours, arguments.deadline
    _limit_threads(load_plan(arguments.out).settings.threads)
    deadline = deadline or (time.time() + hours * 3600 if hours else 0.0)
    work(arguments.out, arguments.part, deadline, arguments.rotate)


def main() -> int:
    """Run the worker or step; 0: nothing is left that it could do, 2: an error that would come again."""
    parser = argparse.ArgumentParser(prog="python -m jz3.scoring", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--step", choices=("work", "prepare", "merge"), default="work", help="of OUT/slurm/request.json"
    )
    parser.add_argument("--part", type=_pair, default=(0, 1), help="I/N: only part I of N of the shards")
    parser.add_argument("--rotate", type=_pair, default=(0, 1), help="I/N: begin at the I-th of N parts")
    parser.add_argument("--deadline", type=float, default=0.0, help="seconds since the epoch")
    parser.add_argument("--hours", type=float, default=0.0, help="the deadline, from now")
    parser.add_argument("--parent", type=int, default=0, help="end with this process")
    parser.add_argument("--cores", default="", help="CPU cores to stay on, e.g. 0,1")
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, {int(c) for c in arguments.cores.split(",")})
    if arguments.parent and not end_with(arguments.parent):
        return 0
    try:
        if arguments.step == "prepare":
            _prepare(arguments.out)
        elif arguments.step == "merge":
            _merge(arguments.out)
        else:
            _work(arguments)
    except (Jz3Error, ValueError) as error:
        print(f"jz3: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
