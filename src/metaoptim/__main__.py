"""The command line as `python -m metaoptim`."""

import sys

from metaoptim.cli.main import main

sys.exit(main())
