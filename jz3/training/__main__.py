"""`python -m jz3.training job.json`: what a launcher starts on every GPU."""

import sys
from pathlib import Path

from jz3.training.run import run_job

if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
