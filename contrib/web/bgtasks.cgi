#!/usr/bin/env python3
"""CGI entry of bgtasks. Copy it beside bgtasks.py and bgtasks_web.py, with mode 0755."""

import os
from wsgiref.handlers import CGIHandler

from bgtasks_web import application

# a RewriteRule that hands the token on has its name lengthened
if "REDIRECT_HTTP_AUTHORIZATION" in os.environ:
    os.environ.setdefault("HTTP_AUTHORIZATION", os.environ["REDIRECT_HTTP_AUTHORIZATION"])
handler = CGIHandler()
for name in [name for name in os.environ if "HTTP_" in name]:
    del os.environ[name]  # the runner that we start needs neither the token nor what browsers say
handler.run(application)
