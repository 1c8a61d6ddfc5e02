"""What `python3 bgtasks.pyz` runs first; it lies beside bgtasks.py in the archive."""

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - an older Python must be able to read this file
    sys.stderr.write("bgtasks: needs Python 3.9 or newer, this is " + sys.version.split()[0] + "\n")
    sys.exit(69)

import os

# in full: tasks work in a folder of their own, and import from the archive there
sys.path[0] = os.path.realpath(sys.path[0])

import bgtasks  # noqa: E402 - found by that path

# cron.params, tasks.d, state and lib lie beside the archive, not in it
bgtasks.__file__ = sys.path[0]

sys.exit(bgtasks.main())
