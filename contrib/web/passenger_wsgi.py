"""Entry for Phusion Passenger (cPanel's "Setup Python App"): copy it into the application root.

bgtasks.py and bgtasks_web.py lie beside it. If the param file lies elsewhere, name it in the
environment variable BGTASKS_PARAM_FILE (cPanel has a table for them).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # not every Passenger does it

from bgtasks_web import application

__all__ = ["application"]
