"""The command line as `python -m metaoptim`."""

import sys

from metaoptim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
