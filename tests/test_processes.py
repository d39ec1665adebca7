"""A child ends with its parent, also when that is killed."""

import os
import signal
import subprocess
import sys

from jz3.processes import end_with

PARENT = """
import functools, os, subprocess, sys, time
from jz3.processes import end_with
end = functools.partial(end_with, os.getpid())
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=end)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_its_killed_parent() -> None:
    # The child holds the other end of the pipe as long as it lives.
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=20)[0] == ""
    assert end_with(os.getppid(), 0) and not end_with(os.getpid(), 0)
