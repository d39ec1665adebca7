import atexit
import os
import runpy
import sys
from pathlib import Path

from virtual_gpu import install

library, *rest = sys.argv[1:]
install(Path(library))
try:
    if rest[0] == "-m":
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name="__main__")
except SystemExit as done:
    if done.code not in (None, 0):
        raise
# The interpreter isn't taken down: torch's autograd has a thread per GPU, which may still be letting go of
# Python objects of the last backward pass, and aborts if it must wait for an interpreter that is going.
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
