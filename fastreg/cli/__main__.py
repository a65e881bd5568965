"""Runs the command line for `python -m fastreg.cli`."""

import sys

from . import main

sys.exit(main())
