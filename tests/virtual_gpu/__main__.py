import runpy
import sys
from pathlib import Path

from virtual_gpu import install

library, *rest = sys.argv[1:]
install(Path(library))
if rest[0] == "-m":
    sys.argv = rest[1:]
    runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = rest
    runpy.run_path(rest[0], run_name="__main__")
