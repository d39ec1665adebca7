"""`python -m jz3.scoring OUT`: one worker of a planned and prepared run."""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from jz3.errors import Jz3Error
from jz3.scoring.workers import USER_ERROR, work


def _pair(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    return int(number), int(count)


def _end_with(parent: int) -> bool:
    """Have the kernel end this process when its parent dies, so that no orphan holds a shard."""
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    return os.getppid() == parent


def main() -> int:
    """Run the worker; 0: nothing is left that it could do, 2: an error that would come again."""
    parser = argparse.ArgumentParser(prog="python -m jz3.scoring", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", type=_pair, default=(0, 1), help="I/N: only shards I modulo N")
    parser.add_argument("--rotate", type=_pair, default=(0, 1), help="I/N: begin at the I-th of N parts")
    parser.add_argument("--deadline", type=float, default=0.0, help="seconds since the epoch")
    parser.add_argument("--hours", type=float, default=0.0, help="the deadline, from now")
    parser.add_argument("--parent", type=int, default=0, help="end with this process")
    parser.add_argument("--cores", default="", help="CPU cores to stay on, e.g. 0,1")
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, {int(c) for c in arguments.cores.split(",")})
    if arguments.parent and not _end_with(arguments.parent):
        return 0
    deadline = arguments.deadline or (time.time() + arguments.hours * 3600 if arguments.hours else 0.0)
    try:
        work(arguments.out, arguments.part, deadline, arguments.rotate)
    except (Jz3Error, ValueError) as error:
        print(f"jz3: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
