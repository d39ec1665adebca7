import sys

from jz3.cli import main

sys.exit(main())
